"""Pad the heads of an ``Attention`` whose values are of another width than its queries: fused kernels have one width.

Zeros change neither scores nor what is mixed: q k^T adds products of zeros, and a padded column of values is cut off.
The scale stays that of the queries as they were.

Cases, D the width of queries and keys, W that of values:
1. D < W: queries and keys get W - D columns of zeros, as the published Perceiver of language needs, D = 32, W = 160.
2. D > W: values get D - W columns of zeros, and the result loses them.

Left as it is: an attention whose widths are equal, or not fixed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from transom.export.passes._builder import NodeBuilder
from transom.export.passes._match import ATTENTION_INPUTS, inputs_of, is_standard, size_along
from transom.export.passes.cached_attention import HEAD_SIZE, scale_of


def head_widths(node: ir.Node) -> tuple[int, int] | None:
    """Return the width of queries and of values, per head, of an ``Attention``; None where one is not fixed."""
    query, _, value, _ = inputs_of(node, len(ATTENTION_INPUTS))
    widths = size_along(query, HEAD_SIZE), size_along(value, HEAD_SIZE)
    return widths if isinstance(widths[0], int) and isinstance(widths[1], int) else None  # type: ignore[return-value]


def pad_heads(model: ir.Model, chosen: Callable[[ir.Node], bool]) -> int:
    """Rewrite every ``Attention`` that is ``chosen`` and of two widths in place; return how many there were."""
    nodes = [node for node in model.graph if is_standard(node, "Attention") and chosen(node)]
    count = 0
    for node in nodes:
        widths = head_widths(node)
        if widths is None or widths[0] == widths[1]:
            continue
        count += 1
        query, key, value, mask = inputs_of(node, len(ATTENTION_INPUTS))
        assert query is not None
        assert query.shape is not None
        builder, name, widest = NodeBuilder(model.graph, node), str(node.outputs[0].name), max(widths)
        dtype = query.dtype or ir.DataType.FLOAT
        operands = [padded(builder, operand, widest) for operand in (query, key, value)]
        attributes = {key: attribute.value for key, attribute in node.attributes.items()} | {"scale": scale_of(node)}
        result = builder.add("Attention", [*operands, mask], f"{name}.wide", attributes, dtype=dtype)
        result.shape = ir.Shape([*query.shape[:HEAD_SIZE], widest])
        attention = result.producer()
        assert attention is not None
        if widths[1] < widest:
            bounds = [builder.weight(f"heads.{at}", np.array([at], np.int64)) for at in (0, widths[1], HEAD_SIZE)]
            result = builder.add("Slice", [result, *bounds], f"{name}.cut", dtype=dtype)
        builder.replace_node(result)
        attention.name = node.name  # by which reports and engines know it
    return count


def padded(builder: NodeBuilder, operand: ir.Value | None, width: int) -> ir.Value:
    """Return ``operand`` (B, H, S, D) with columns of zeros up to ``width``; itself where it is as wide."""
    assert operand is not None
    assert operand.shape is not None
    missing = width - int(operand.shape[HEAD_SIZE])  # type: ignore[arg-type]
    if not missing:
        return operand
    pads = builder.weight(f"heads.pads.{missing}", np.array([0] * 7 + [missing], np.int64))  # starts, then ends
    result = builder.add("Pad", [operand, pads], f"{operand.name}.padded", dtype=operand.dtype or ir.DataType.FLOAT)
    result.shape = ir.Shape([*operand.shape[:HEAD_SIZE], width])
    return result
