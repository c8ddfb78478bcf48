"""Attention over a KV cache by a mask -> ``TRT_Attention`` by lengths: TensorRT need not read what no row has reached.

``TRT_Attention`` is an operator of TensorRT's parser alone: neither ONNX's checker nor ONNX Runtime knows it. With
``causal_kind="lower_right"`` and ``kv_lengths`` int32 (B,) query i of S sees the keys up to kv_length - S + i; it does
not scale (documentation of TensorRT's ONNX parser; no GPU has executed it for us, and ``standard_attention`` tests our
reading of it, not TensorRT's).

Cases:
1. Keys and values are caches that ``TensorScatter`` wrote at ``write_indices``, and the mask is
   arange(C) <= write_indices + arange(S): the same keys, with kv_length = write_indices + S.

Everything else stays as it is, with the reason: cross-attention and encoders, whose masks are of padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from transom.export.passes.splice import Splice
from transom.runtime.inputs import WRITE_INDICES

OPERATOR = "TRT_Attention"
ATTRIBUTES = {"causal_kind": "lower_right", "query_form": "padded_bhnd", "kv_form": "padded_bhnd"}


def length_attention(model: ir.Model) -> Mapping[str, str]:
    """Rewrite every attention of case 1 in place; why the others were left, by their nodes."""
    left: dict[str, str] = {}
    for node in [node for node in model.graph if node.op_type == "Attention"]:
        reason = why_not(node)
        if reason is not None:
            left[str(node.name)] = reason
            continue
        query, key, value, mask = node.inputs[:4]
        assert query is not None
        assert query.dtype is not None
        assert mask is not None
        splice, name = Splice(model.graph, node), str(node.outputs[0].name)
        scale = splice.weight(f"{name}.scale", np.array(node.attributes["scale"].as_float(), query.dtype.numpy()))
        scaled = splice.add("Mul", [query, scale], f"{name}.query", dtype=query.dtype)
        found = parts_of(mask)
        assert found is not None
        reached = splice.add("Add", [found.write_indices, found.new], f"{name}.reached", dtype=ir.DataType.INT64)
        lengths = splice.add("Cast", [reached], f"{name}.lengths", {"to": ir.DataType.INT32}, dtype=ir.DataType.INT32)
        inputs = [scaled, key, value, None, None, lengths]
        splice.replace_place(splice.add(OPERATOR, inputs, f"{name}.attended", ATTRIBUTES, dtype=query.dtype))
    RemoveUnusedNodesPass()(model)
    return left


def why_not(node: ir.Node) -> str | None:
    """None for case 1."""
    _, key, value, mask = [*node.inputs, None, None][:4]
    if mask is None:
        return "it has no mask"
    for cache in (key, value):
        writer = cache.producer() if cache is not None else None
        if writer is None or writer.op_type != "TensorScatter" or str(writer.inputs[2].name) != WRITE_INDICES:  # type: ignore[union-attr]
            return "its keys are no cache that is written"
    if "scale" not in node.attributes:
        return "its scale is not written down"
    found = parts_of(mask)
    if found is None or str(found.write_indices.name) != WRITE_INDICES or shape_input(found.held) not in caches(node):
        return "its mask is another than that of the cache"
    return None


class CacheMask(NamedTuple):
    """arange(held) <= write_indices + arange(new)."""

    held: ir.Value
    write_indices: ir.Value
    new: ir.Value


def parts_of(mask: ir.Value) -> CacheMask | None:
    """None for another formula."""
    compared = made_by(unsqueezed(mask), "LessOrEqual")
    if compared is None:
        return None
    keys, reach = (unsqueezed(value) for value in compared.inputs if value is not None)
    added = made_by(reach, "Add")
    held = count_of(keys)
    if added is None or held is None:
        return None
    first, second = (unsqueezed(value) for value in added.inputs if value is not None)
    new = count_of(second)
    return CacheMask(held, first, new) if new is not None else None


def count_of(value: ir.Value) -> ir.Value | None:
    """n of ``Range(0, n, 1)``."""
    made = made_by(value, "Range")
    if made is None:
        return None
    start, limit, step = made.inputs
    numbers = [None if v is None or v.const_value is None else int(v.const_value.numpy()) for v in (start, step)]
    return limit if numbers == [0, 1] else None


def shape_input(value: ir.Value) -> str | None:
    """The tensor whose size along an axis the value is."""
    squeezed = made_by(value, "Squeeze")
    shape = made_by(squeezed.inputs[0], "Shape") if squeezed is not None and squeezed.inputs[0] is not None else None
    return str(shape.inputs[0].name) if shape is not None and shape.inputs[0] is not None else None


def caches(node: ir.Node) -> set[str]:
    """Inputs of the graph that are caches, all of one length: those that a ``TensorScatter`` writes."""
    assert node.graph is not None
    written = [other.inputs[0] for other in node.graph if other.op_type == "TensorScatter"]
    return {str(value.name) for value in written if value is not None}


def unsqueezed(value: ir.Value) -> ir.Value:
    made = made_by(value, "Unsqueeze")
    return value if made is None or made.inputs[0] is None else unsqueezed(made.inputs[0])


def made_by(value: ir.Value, operator: str) -> ir.Node | None:
    node = value.producer()
    return node if node is not None and node.op_type == operator and not node.domain else None


def standard_attention(model: ir.Model) -> int:
    """``TRT_Attention`` as its documentation describes it, in standard operators; how many there were.

    The reference by which ``length_attention`` is checked: it starts from ``kv_lengths`` and knows nothing of the mask
    that was there before.
    """
    nodes = [node for node in model.graph if node.op_type == OPERATOR]
    int64, zero, one = ir.DataType.INT64, np.array(0, np.int64), np.array(1, np.int64)
    for node in nodes:
        query, key, value, _, _, lengths = node.inputs
        assert query is not None
        assert query.dtype is not None
        splice, name = Splice(model.graph, node), str(node.outputs[0].name)
        nought, single = splice.weight("lengths.zero", zero), splice.weight("lengths.one", one)

        def size(tensor: ir.Value | None, what: str, splice: Splice = splice, name: str = name) -> ir.Value:
            axis = splice.add("Shape", [tensor], f"{name}.{what}.shape", {"start": 2, "end": 3}, dtype=int64)
            return splice.add("Squeeze", [axis], f"{name}.{what}", dtype=int64)

        S, C = size(query, "queries"), size(key, "keys")
        wide = splice.add("Cast", [lengths], f"{name}.wide", {"to": int64}, dtype=int64)
        before = splice.add("Sub", [wide, S], f"{name}.before", dtype=int64)  # kv_length - S, (B,)
        column = splice.weight("lengths.column", np.array([1, 2, 3], np.int64))
        row = splice.add("Unsqueeze", [before, column], f"{name}.before.4d", dtype=int64)  # (B, 1, 1, 1)
        queries = splice.add("Range", [nought, S, single], f"{name}.i", dtype=int64)
        last = splice.weight("lengths.last", np.array([1], np.int64))
        steps = splice.add("Unsqueeze", [queries, last], f"{name}.i.2d", dtype=int64)  # (S, 1)
        most = splice.add("Add", [row, steps], f"{name}.most", dtype=int64)  # (B, 1, S, 1)
        keys = splice.add("Range", [nought, C, single], f"{name}.j", dtype=int64)
        seen = splice.add("LessOrEqual", [keys, most], f"{name}.seen", dtype=ir.DataType.BOOL)
        inputs = [query, key, value, seen]
        splice.replace_place(splice.add("Attention", inputs, f"{name}.plain", {"scale": 1.0}, dtype=query.dtype))
    return len(nodes)
