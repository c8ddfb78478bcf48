"""Replace dynamic axes of a graph by fixed sizes: TensorRT writes a KV cache only where its length is fixed.

Every value that names the axis gets its size. What nodes compute from the axis (``Shape``) stays; the builder of an
engine or a session folds it to a constant.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir


def freeze_dynamic_axes(model: ir.Model, sizes: Mapping[str, int]) -> None:
    """Rewrite ``model`` in place: each axis named in ``sizes`` gets that many elements, in every value that has it."""
    values = [*model.graph.inputs, *model.graph.outputs]
    values += [output for node in model.graph for output in node.outputs]
    for value in values:
        if value.shape is None:
            continue
        dims = [sizes.get(str(dim.value), dim) if isinstance(dim, ir.SymbolicDim) else dim for dim in value.shape]
        value.shape = ir.Shape(dims)
