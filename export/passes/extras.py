"""Which further activations of a graph can be quantised, though by default they are not.

Cases:
1. "attention": query, key and value of each ``Attention``. The probabilities inside stay in full precision.
2. "residual": the two sides of each residual Add: an Add of two activations of one shape whose sum, or what a
   LayerNormalization makes of it, goes on to further layers. On Transformers this is what costs the accuracy:
   the residual stream carries outliers that int8 cannot.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir

from transom.export.passes.linear_layers import is_weight
from transom.export.passes.qdq_static import QdqSite

OPTIONAL_SITES = ("attention", "residual")
OPERANDS = 3  # of Attention: query, key, value


def optional_sites(model: ir.Model, extras: Collection[str]) -> list[QdqSite]:
    """The inputs of nodes that ``extras``, some of EXTRAS, mean; those in FP32 alone."""
    places: list[QdqSite] = []
    for node in model.graph:
        if "attention" in extras and node.op_type == "Attention":
            places += [(node, index) for index in range(OPERANDS)]
        if "residual" in extras and is_residual(node):
            places += [(node, 0), (node, 1)]
    return [(node, index) for node, index in places if is_float(node.inputs[index])]


def is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.FLOAT


def is_residual(node: ir.Node) -> bool:
    """Case 2: an Add of two three-dimensional activations, neither of them a weight or a position table."""
    if node.op_type != "Add":
        return False
    sides = [value for value in node.inputs if value is not None]
    return (
        len(sides) == 2
        and all(
            not is_weight(side) and side.producer() is not None and side.shape is not None and len(side.shape) == 3
            for side in sides
        )
        and sides[0].shape == sides[1].shape
    )
