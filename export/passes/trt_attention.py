"""Attention over a KV cache by a mask -> ``TRT_Attention`` by lengths: TensorRT need not read what no row has reached.

``TRT_Attention`` is an operator of TensorRT's parser alone: neither ONNX's checker nor ONNX Runtime knows it. It reads
Q, K, V, mask, query_lengths, kv_lengths, the last int32 (B,). With ``causal_kind="lower_right"`` query i of S sees the
keys j <= kv_length - S + i; it does not scale (documentation of TensorRT's ONNX parser and of ``CausalMaskKind``). So
does the parser of TensorRT-RTX 1.7 read it; that of TensorRT 11.0 is documented with other inputs and a scale. No GPU
has executed it for us, and ``standard_attention`` tests our reading of it, not TensorRT's.

Cases:
1. Keys and values are caches that ``TensorScatter`` wrote at ``write_indices``, and the mask is
   arange(C) <= write_indices + arange(S). With kv_length = write_indices + S the keys that query i sees are the same:
   kv_length - S + i = write_indices + i. What a row's prompt is padded with on the right makes no difference: S counts
   it in both, and neither shows it to a query before it.

Everything else stays as it is, with the reason: cross-attention and encoders, whose masks are of padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from transom.export.passes._builder import NodeBuilder
from transom.runtime.errors import ExportError
from transom.runtime.feeds import WRITE_INDICES

OPERATOR = "TRT_Attention"
OPERANDS = 4  # of Attention: query, key, value, mask; what else it takes is a cache of its own
PADDED = "padded_bhnd"
KINDS = NONE, UPPER_LEFT, LOWER_RIGHT = "none", "upper_left", "lower_right"
INPUTS = 6
USUAL = {"causal_kind": NONE, "query_form": PADDED, "kv_form": PADDED}  # where the node does not say
ATTRIBUTES = {**USUAL, "causal_kind": LOWER_RIGHT}
TOKENS = 2  # the axis of queries and caches (B, heads, tokens, head size)

Size = int | ir.SymbolicDim


def trt_attention(model: ir.Model) -> Mapping[str, str]:
    """Rewrite every attention of case 1 in place; why the others were left, by their nodes."""
    left: dict[str, str] = {}
    for node in [node for node in model.graph if node.op_type == "Attention"]:
        reason = why_not(node)
        if reason is not None:
            left[str(node.name)] = reason
            continue
        query, key, value, mask = node.inputs[:OPERANDS]
        assert query is not None
        assert query.dtype is not None
        found = parts_of(mask)
        assert found is not None
        builder, name = NodeBuilder(model.graph, node), str(node.outputs[0].name)
        factor = np.array(scale_of(node), query.dtype.numpy())
        scaled = builder.add(
            "Mul", [query, builder.weight(f"{name}.scale", factor)], f"{name}.query", dtype=query.dtype
        )
        reached = builder.add("Add", [found.write_indices, found.new], f"{name}.reached", dtype=ir.DataType.INT64)
        lengths = builder.add("Cast", [reached], f"{name}.lengths", {"to": ir.DataType.INT32}, dtype=ir.DataType.INT32)
        inputs = [scaled, key, value, None, None, lengths]
        builder.replace_node(builder.add(OPERATOR, inputs, f"{name}.attended", ATTRIBUTES, dtype=query.dtype))
    RemoveUnusedNodesPass()(model)
    return left


def why_not(node: ir.Node) -> str | None:
    """None for case 1."""
    query, key, value, mask, *more = [*node.inputs, None][: max(OPERANDS, len(node.inputs))]
    if mask is None:
        return "it has no mask"
    if any(other is not None for other in more) or len(node.outputs) > 1:
        return "it has a cache of its own"
    for name, attribute in node.attributes.items():
        if name != "scale" and attribute.value != 0:
            return f"it has {name} {attribute.value}, which the other operator has not"
    caches = [written_cache(key), written_cache(value)]
    if any(cache is None for cache in caches):
        return "its keys are no cache that is written"
    if scale_of(node) is None:
        return "its scale is not known"
    found = parts_of(mask)
    if found is None or str(found.write_indices.name) != WRITE_INDICES:
        return "its mask is another than that of the cache"
    if size_of(found.new) is None or size_of(found.new) != size_along(query, TOKENS):
        return "its mask counts other queries than it has"
    if size_of(found.held) is None or any(size_of(found.held) != size_along(cache, TOKENS) for cache in caches):
        return "its mask counts other keys than it has"
    return None


def written_cache(value: ir.Value | None) -> ir.Value | None:
    """The cache into which ``value`` was written at ``write_indices``, from its start to its end; None if not so."""
    writer = made_by(value, "TensorScatter")
    if writer is None or writer.inputs[2] is None or str(writer.inputs[2].name) != WRITE_INDICES:
        return None
    axis, mode = writer.attributes.get("axis"), writer.attributes.get("mode")
    linear = mode is None or mode.as_string() == "linear"
    return writer.inputs[0] if linear and (-2 if axis is None else axis.as_int()) in (TOKENS, TOKENS - 4) else None


def scale_of(node: ir.Node) -> float | None:
    """What an ``Attention`` multiplies its scores by: 1 / sqrt(head size) where it does not say."""
    if "scale" in node.attributes:
        return node.attributes["scale"].as_float()
    size = size_along(node.inputs[0], 3)
    return 1 / sqrt(size) if isinstance(size, int) else None


class CacheMask(NamedTuple):
    """arange(held) <= write_indices + arange(new)."""

    held: ir.Value
    write_indices: ir.Value
    new: ir.Value


def parts_of(mask: ir.Value | None) -> CacheMask | None:
    """None for another formula, or the same along other axes."""
    compared = made_by(unsqueezed(mask, 1, 4), "LessOrEqual")  # (B, S, C)
    if compared is None:
        return None
    keys, reach = compared.inputs  # (C,), (B, S, 1)
    added = made_by(unsqueezed(reach, 2, 3), "Add")
    if added is None:
        return None
    starts, steps = added.inputs  # (B, 1), (S,)
    held, write_indices, new = count_of(keys), unsqueezed(starts, 1, 2), count_of(steps)
    if held is None or write_indices is None or new is None:
        return None
    return CacheMask(held, write_indices, new)


def count_of(value: ir.Value | None) -> ir.Value | None:
    """n of ``Range(0, n, 1)``."""
    made = made_by(value, "Range")
    if made is None:
        return None
    start, limit, step = made.inputs
    numbers = [None if v is None or v.const_value is None else int(v.const_value.numpy()) for v in (start, step)]
    return limit if numbers == [0, 1] else None


def size_of(value: ir.Value) -> Size | None:
    """The size that the scalar ``value`` is, where it is read from a tensor's shape."""
    squeezed = made_by(value, "Squeeze")
    shape = made_by(squeezed.inputs[0], "Shape") if squeezed is not None else None
    if shape is None or "end" not in shape.attributes:
        return None
    start = shape.attributes["start"].as_int() if "start" in shape.attributes else 0
    return size_along(shape.inputs[0], start) if shape.attributes["end"].as_int() == start + 1 else None


def size_along(value: ir.Value | None, axis: int) -> Size | None:
    """None where it has no name and no number."""
    if value is None or value.shape is None or not 0 <= axis < len(value.shape):
        return None
    size: Size = value.shape[axis]
    return None if isinstance(size, ir.SymbolicDim) and size.value is None else size


def unsqueezed(value: ir.Value | None, axis: int, rank: int) -> ir.Value | None:
    """What became ``value``, of ``rank`` axes, by a new one at ``axis``."""
    made = made_by(value, "Unsqueeze")
    axes = made.inputs[1].const_value if made is not None and made.inputs[1] is not None else None
    return made.inputs[0] if made and axes is not None and axes.numpy().tolist() in ([axis], [axis - rank]) else None


def made_by(value: ir.Value | None, operator: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == operator and not node.domain else None


def standard_attention(model: ir.Model) -> int:
    """``TRT_Attention`` as its documentation describes it, in standard operators; how many there were.

    The reference by which ``trt_attention`` is checked: it starts from ``kv_lengths`` and the node's attributes, and
    knows nothing of the mask that was there before. Raises ExportError for what is not described here: a mask, packed
    rows, no lengths.
    """
    nodes = [node for node in model.graph if node.op_type == OPERATOR]
    int64, true = ir.DataType.INT64, ir.DataType.BOOL
    for node in nodes:
        query, key, value, mask, query_lengths, lengths = [*node.inputs, *[None] * INPUTS][:INPUTS]
        given = {name: attribute.value for name, attribute in node.attributes.items()}
        kind, *forms = (given.get(name, usual) for name, usual in USUAL.items())
        others = mask is not None or query_lengths is not None or lengths is None or len(node.inputs) > INPUTS
        if others or forms != [PADDED, PADDED] or kind not in KINDS:
            raise ExportError(
                f"the {OPERATOR} {str(node.name)!r} has {given} and the inputs "
                f"{[v if v is None else v.name for v in node.inputs]}; expected causal_kind one of {', '.join(KINDS)}, "
                f"{PADDED}, and Q, K, V, None, None, kv_lengths. Build with --attention mask, and report this."
            )
        assert query is not None
        assert query.dtype is not None
        builder, name = NodeBuilder(model.graph, node), str(node.outputs[0].name)
        nought = builder.weight("lengths.zero", np.array(0, np.int64))
        single = builder.weight("lengths.one", np.array(1, np.int64))

        def size(tensor: ir.Value | None, what: str, builder: NodeBuilder = builder, name: str = name) -> ir.Value:
            axis = builder.add("Shape", [tensor], f"{name}.{what}.shape", {"start": 2, "end": 3}, dtype=int64)
            return builder.add("Squeeze", [axis], f"{name}.{what}", dtype=int64)

        S, C = size(query, "queries"), size(key, "keys")
        column = builder.weight("lengths.column", np.array([1, 2, 3], np.int64))
        wide = builder.add("Cast", [lengths], f"{name}.wide", {"to": int64}, dtype=int64)
        length = builder.add("Unsqueeze", [wide, column], f"{name}.length", dtype=int64)  # (B, 1, 1, 1)
        keys = builder.add("Range", [nought, C, single], f"{name}.j", dtype=int64)  # (C,)
        queries = builder.add("Range", [nought, S, single], f"{name}.i", dtype=int64)
        last = builder.weight("lengths.last", np.array([1], np.int64))
        steps = builder.add("Unsqueeze", [queries, last], f"{name}.i.2d", dtype=int64)  # (S, 1)
        before = builder.add("Sub", [length, S], f"{name}.before", dtype=int64)
        diagonal = {NONE: C, UPPER_LEFT: nought, LOWER_RIGHT: before}[kind]
        most = builder.add("Add", [diagonal, steps], f"{name}.most", dtype=int64)
        held = builder.add("Less", [keys, length], f"{name}.held", dtype=true)  # (B, 1, 1, C)
        causal = builder.add("LessOrEqual", [keys, most], f"{name}.causal", dtype=true)
        seen = builder.add("And", [held, causal], f"{name}.seen", dtype=true)  # (B, 1, S, C)
        inputs = [query, key, value, seen]
        builder.replace_node(builder.add("Attention", inputs, f"{name}.plain", {"scale": 1.0}, dtype=query.dtype))
    return len(nodes)
