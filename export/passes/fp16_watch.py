"""Have a graph that rounds as FP16 (``fake_half``) say whether FP16 held every value of a run.

Two scalars become outputs, so that one run for parity or accuracy shows the range as well:

1. WATCHED_SUM adds up the magnitudes of everything that is rounded: infinite or NaN where a value was beyond FP16. Left
   out are weights, and what is inside the body of a ``Scan``.
2. WATCHED_SCORES bounds the scores inside each ``Attention``, which FP16 kernels may hold: the longest query times the
   longest key (Cauchy and Schwarz), before or after they are scaled. It may be several times too large.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from transom.export.passes._builder import NodeBuilder
from transom.export.passes._match import is_standard, made_by

WATCHED_SUM, WATCHED_SCORES = "fp16.sum", "fp16.scores"


def add_fp16_watch(model: ir.Model) -> None:
    """Add both outputs to ``model`` in place: float32, of no axes, 0 where there is nothing to watch."""
    sums, scores = [], []
    for number, node in enumerate(list(model.graph)):
        if is_rounded(node):
            reduced = ir.node("ReduceL1", [node.outputs[0]], {"keepdims": 0}, name=f"{WATCHED_SUM}_{number}")
            reduced.outputs[0].name = f"{WATCHED_SUM}.{number}"
            model.graph.insert_after(node, reduced)
            sums.append(reduced.outputs[0])
        elif is_standard(node, "Attention"):
            scores.append(bound_of_scores(model.graph, node, f"{WATCHED_SCORES}.{number}"))
    for name, operator, values in ((WATCHED_SCORES, "Max", scores), (WATCHED_SUM, "Sum", sums)):
        if not values:
            zero = ir.node("Constant", [], {"value": ir.tensor(np.array(0, np.float32))}, name=f"{name}_zero")
            model.graph.append(zero)
            values = [zero.outputs[0]]
        result = running_total(model.graph, operator, values, name)
        result.name, result.type, result.shape = name, ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
        model.graph.outputs.append(result)


def running_total(graph: ir.Graph, operator: str, values: Sequence[ir.Value], name: str) -> ir.Value:
    """Append nodes that combine scalars two by two, from the first on.

    ONNX Runtime computes the last output of a graph first, and of a node's inputs the one whose node comes last: the
    total so far, which stands behind all of the values. So each value is reduced as soon as it is there, and what it is
    reduced from is not kept until the end.
    """
    total = values[0]
    for number, value in enumerate(values[1:] or [None]):
        node = ir.node(operator, [total] if value is None else [total, value], name=f"{name}_total_{number}")
        graph.append(node)
        total = node.outputs[0]
        total.name = f"{name}.total.{number}"
    return total


def is_rounded(node: ir.Node) -> bool:
    """Return whether the node gives back in FP32 what ``fake_half`` rounded, other than a dequantised weight."""
    if not is_standard(node, "Cast") or node.outputs[0].dtype != ir.DataType.FLOAT:
        return False
    rounded = made_by(node.inputs[0], "Cast")
    if rounded is None or rounded.outputs[0].dtype != ir.DataType.FLOAT16:
        return False
    dequantized = made_by(rounded.inputs[0], "DequantizeLinear")
    return dequantized is None or not (dequantized.inputs[0] and dequantized.inputs[0].is_initializer())


def bound_of_scores(graph: ir.Graph, node: ir.Node, name: str) -> ir.Value:
    """Return the bound of case 2 for one ``Attention``."""
    builder = NodeBuilder(graph, node)
    last = builder.weight(f"{WATCHED_SCORES}.axes", np.array([-1], np.int64))
    lengths = []
    for which, value in zip(("query", "key"), node.inputs[:2], strict=True):
        norms = builder.add("ReduceL2", [value, last], f"{name}.{which}.norms", {"keepdims": 0})
        longest = builder.add("ReduceMax", [norms], f"{name}.{which}.longest", {"keepdims": 0})
        lengths.append(builder.add("Relu", [longest], f"{name}.{which}"))  # of no keys at all it is -infinity
    bound = builder.add("Mul", lengths, f"{name}.bound")
    scale = node.attributes.get("scale")
    factor = builder.weight(f"{name}.scale", np.array(max(1.0, scale.as_float() if scale else 1.0), np.float32))
    return builder.add("Mul", [bound, factor], name)
