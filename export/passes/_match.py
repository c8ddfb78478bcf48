"""Questions that several passes ask of nodes and values."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

Size = int | ir.SymbolicDim

ATTENTION_INPUTS = ("query", "key", "value", "mask")  # of ONNX's Attention; what else it takes is a cache of its own


def is_standard(node: ir.Node, *operators: str) -> bool:
    """Return whether the node is one of ONNX's own ``operators``: other domains have some of these names too."""
    return node.op_type in operators and not node.domain


def is_weight(value: ir.Value) -> bool:
    """Return whether the value is an initializer whose contents are known."""
    return value.is_initializer() and value.const_value is not None


def body_of(node: ir.Node) -> ir.Graph | None:
    """Return the body of a ``Scan``; None for any other node."""
    return node.attributes["body"].as_graph() if is_standard(node, "Scan") else None


def is_unused(value: ir.Value) -> bool:
    """Return whether no node reads the value and the graph does not output it."""
    return not value.is_graph_output() and not list(value.uses())


def made_by(value: ir.Value | None, operator: str) -> ir.Node | None:
    """Return the node of ONNX's ``operator`` that computes the value; None if another node or none does."""
    node = value.producer() if value is not None else None
    return node if node is not None and is_standard(node, operator) else None


def only_reader(value: ir.Value) -> ir.Node | None:
    """Return the one node that reads the value, once; None if several do or the graph outputs it as well."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def inputs_of(node: ir.Node, count: int) -> list[ir.Value | None]:
    """Return the first ``count`` inputs of the node, None for each that it leaves out."""
    return [*node.inputs, *[None] * count][:count]


def integer_attribute(node: ir.Node, name: str, default: int = 0) -> int:
    """Return an attribute of the node, ``default`` where the node does not give it."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def weight_shape(weight: ir.Value) -> tuple[int, ...]:
    """Return the shape of an initializer."""
    assert weight.const_value is not None
    return tuple(int(size) for size in weight.const_value.shape.numpy())


def rank_of(value: ir.Value | None) -> int | None:
    """Return how many axes the value has; None where its shape is not known."""
    return None if value is None or value.shape is None else len(value.shape)


def size_along(value: ir.Value | None, axis: int) -> Size | None:
    """Return the size of an axis, a number or a name; None where it has neither."""
    if value is None or value.shape is None or not 0 <= axis < len(value.shape):
        return None
    size: Size = value.shape[axis]
    return None if isinstance(size, ir.SymbolicDim) and size.value is None else size


def extra_inputs(node: ir.Node, count: int) -> Sequence[ir.Value]:
    """Return the inputs that the node has beyond its first ``count``."""
    return [value for value in node.inputs[count:] if value is not None]
