"""Replace ``Attention`` by the operators that it stands for, where TensorRT has no fused kernel and fails.

softmax(scale * Q K^T, where the mask allows) V, with four axes and no cache of its own: what the exporter writes
(ONNX operator specification, Attention, opset 23). The scale is split between Q and K as there, so that half of it
cannot overflow. In half precision the softmax is taken in FP32.

Cases:
1. No mask.
2. A boolean mask: masked scores become MASKED.
3. A mask of numbers, which is added to the scores.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import numpy as np
import onnx_ir as ir

from transom.export.passes._builder import NodeBuilder
from transom.export.passes._match import ATTENTION_INPUTS, extra_inputs, inputs_of, is_standard, rank_of
from transom.runtime.errors import ExportError

MASKED = np.array(np.finfo(np.float32).min)  # of a masked score, in FP32: softmax of a whole row stays finite


def decompose_attention(model: ir.Model, chosen: Callable[[ir.Node], bool] = lambda node: True) -> int:
    """Rewrite every ``Attention`` of ``model`` that is ``chosen`` in place; return how many there were.

    Raises ExportError for one that has what this exporter never writes: a cache, a soft cap, three axes.
    """
    nodes = [node for node in model.graph if is_standard(node, "Attention") and chosen(node)]
    for node in nodes:
        require_plain(node)
        query, key, value, mask = inputs_of(node, len(ATTENTION_INPUTS))
        assert query is not None
        builder, name = NodeBuilder(model.graph, node), str(node.outputs[0].name)
        given = node.attributes.get("scale")
        head = query.shape[-1] if query.shape is not None else None
        scale = given.as_float() if given is not None else 1 / sqrt(int(head))  # type: ignore[arg-type]
        dtype = query.dtype or ir.DataType.FLOAT
        half = dtype != ir.DataType.FLOAT
        root = builder.weight(f"{name}.scale", np.array(sqrt(scale), dtype.numpy()))
        scaled = builder.add("Mul", [query, root], f"{name}.query", dtype=dtype)
        transposed = builder.add("Transpose", [key], f"{name}.turned", {"perm": [0, 1, 3, 2]}, dtype=dtype)
        keys = builder.add("Mul", [transposed, root], f"{name}.key", dtype=dtype)
        scores = builder.add("MatMul", [scaled, keys], f"{name}.scores", dtype=dtype)
        if half:
            scores = builder.add("Cast", [scores], f"{name}.scores.wide", {"to": ir.DataType.FLOAT})
        if mask is not None and mask.dtype == ir.DataType.BOOL:
            scores = builder.add("Where", [mask, scores, builder.weight("attention.masked", MASKED)], f"{name}.masked")
        elif mask is not None:
            if half:
                mask = builder.add("Cast", [mask], f"{name}.mask.wide", {"to": ir.DataType.FLOAT})
            scores = builder.add("Add", [scores, mask], f"{name}.masked")
        weights = builder.add("Softmax", [scores], f"{name}.weights", {"axis": -1})
        if half:
            weights = builder.add("Cast", [weights], f"{name}.weights.half", {"to": dtype}, dtype=dtype)
        builder.replace_node(builder.add("MatMul", [weights, value], f"{name}.mixed", dtype=dtype))
    return len(nodes)


def require_plain(node: ir.Node) -> None:
    """Raise ExportError where the operator does more than the cases above."""

    def number(name: str) -> float:
        attribute = node.attributes.get(name)
        return float(attribute.value) if attribute is not None else 0.0

    more, axes = extra_inputs(node, len(ATTENTION_INPUTS)), rank_of(node.inputs[0])
    if more or len(node.outputs) > 1 or number("is_causal") or number("softcap") or axes != 4:
        raise ExportError(
            f"the node {node.name} is an Attention with {len(node.inputs)} inputs, {axes} axes, is_causal "
            f"{number('is_causal'):g} and softcap {number('softcap'):g}; expected four axes, at most a mask, and "
            "neither of both. Export the bundle again with this version."
        )
