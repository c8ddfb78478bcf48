"""Dynamic axes of a graph -> fixed ones: TensorRT writes a KV cache only where its length is fixed.

Every value that names the axis gets its size. What nodes compute from the axis (``Shape``) stays as it is, and becomes
a constant in whoever builds the graph.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir


def freeze_dynamic_axes(model: ir.Model, sizes: Mapping[str, int]) -> None:
    """Rewrite ``model`` in place: each axis of ``sizes`` has that many elements, wherever its name stands."""
    values = [*model.graph.inputs, *model.graph.outputs]
    values += [output for node in model.graph for output in node.outputs]
    for value in values:
        if value.shape is None:
            continue
        dims = [sizes.get(str(dim.value), dim) if isinstance(dim, ir.SymbolicDim) else dim for dim in value.shape]
        value.shape = ir.Shape(dims)
