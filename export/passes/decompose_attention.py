"""``Attention`` -> the operators it stands for: where TensorRT has no fused kernel, it fails when one is asked for.

softmax(scale * Q K^T, where the mask allows) V, with four axes and no cache of its own: what the exporter gives
(ONNX operator specification, Attention, opset 23). The scale is split between Q and K as there, so that half of it
cannot overflow. In half precision the softmax is taken in FP32.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import numpy as np
import onnx_ir as ir

from transom.export.passes._builder import NodeBuilder
from transom.runtime.errors import ExportError

# What a masked score becomes, in FP32: softmax of a whole row stays finite
MASKED = np.array(np.finfo(np.float32).min)
OPERANDS = 4  # query, key, value, mask: what else the operator takes is a cache


def decompose_attention(model: ir.Model, chosen: Callable[[ir.Node], bool] = lambda node: True) -> int:
    """Rewrite every ``Attention`` of ``model`` that is ``chosen`` in place; how many there were.

    Raises ExportError for one that has what this exporter never writes: a cache, a soft cap, three axes.
    """
    nodes = [node for node in model.graph if node.op_type == "Attention" and not node.domain and chosen(node)]
    for node in nodes:
        require_plain(node)
        query, key, value, mask = [*node.inputs, None, None][:OPERANDS]
        assert query is not None
        builder, name = NodeBuilder(model.graph, node), str(node.outputs[0].name)
        given = node.attributes.get("scale")
        head = query.shape[-1] if query.shape is not None else None
        scale = given.as_float() if given is not None else 1 / sqrt(int(head))  # type: ignore[arg-type]
        dtype = query.dtype or ir.DataType.FLOAT
        half = dtype != ir.DataType.FLOAT
        root = builder.weight(f"{name}.scale", np.array(sqrt(scale), dtype.numpy()))
        scaled = builder.add("Mul", [query, root], f"{name}.query", dtype=dtype)
        turned = builder.add("Transpose", [key], f"{name}.turned", {"perm": [0, 1, 3, 2]}, dtype=dtype)
        keys = builder.add("Mul", [turned, root], f"{name}.key", dtype=dtype)
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
    """Raise ExportError where the operator does more than is written here."""

    def number(name: str) -> float:
        attribute = node.attributes.get(name)
        return float(attribute.value) if attribute is not None else 0.0

    query = node.inputs[0]
    extra = [value for value in node.inputs[OPERANDS:] if value is not None]
    axes = None if query is None or query.shape is None else len(query.shape)
    if extra or len(node.outputs) > 1 or number("is_causal") or number("softcap") or axes != 4:
        raise ExportError(
            f"the node {node.name} is an Attention with {len(node.inputs)} inputs, {axes} axes, is_causal "
            f"{number('is_causal'):g} and softcap {number('softcap'):g}; expected four axes, at most a mask, and "
            "neither of both. Export the bundle again with this version."
        )
