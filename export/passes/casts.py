"""The one way passes make a Cast."""

from __future__ import annotations

import onnx_ir as ir


def cast_of(value: ir.Value, to: ir.DataType, name: str) -> ir.Node:
    """A node, not yet in a graph, whose result ``name`` is ``value`` as ``to``."""
    node = ir.node("Cast", [value], {"to": to}, name=f"cast_{name}")
    result = node.outputs[0]
    result.name, result.type, result.shape = name, ir.TensorType(to), value.shape
    return node
