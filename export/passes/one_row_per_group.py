"""Give every group of rows one row: an axis that divides the batch becomes the batch itself.

A Flamingo's images are read by groups of rows, B = K * G, whose queries are K * S of one attention over the group's
keys. TensorRT takes its kernel for a step of one token where it knows that there is one query; of K * S it does not,
although a profile has one new token a row, and puts copies of keys, values and queries around its kernel for many
queries. Axes of one name are of one size to its parser, so that K is 1 with G renamed to B.

Cases:
1. A shape has the axis: it gets the other's name. No node changes, and the file computes the same.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from transom.runtime.graph_spec import Axis


def one_row_per_group(model: ir.Model, axes: Mapping[str, Axis]) -> int:
    """Rename in place every axis of ``model`` that divides another to that one; return in how many shapes."""
    names = {name: axis.divides for name, axis in axes.items() if axis.divides is not None}
    renamed = 0
    computed = [output for node in model.graph for output in node.outputs]
    for value in (*model.graph.inputs, *computed):
        shape = value.shape
        found = [] if shape is None else [i for i, size in enumerate(shape) if name_of(size) in names]
        for index in found:
            shape[index] = names[name_of(shape[index])]  # type: ignore[index]
        renamed += bool(found)
    return renamed


def name_of(size: int | ir.SymbolicDim) -> str | None:
    """Return the name of an axis; None for a number, and for one that has no name."""
    return size.value if isinstance(size, ir.SymbolicDim) else None
