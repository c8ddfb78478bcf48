"""Write and read the KV cache with ONNX Runtime's ``GroupQueryAttention``, which splits and joins the heads as well.

``Attention`` reads the whole buffer, full or not, behind a mask that was computed of its size; this operator reads what
a row has, and writes new keys and values where one buffer is bound as input and output. On the CPU (ONNX Runtime 1.32,
group_query_attention.cc) it refuses several rows of several new tokens each behind a past: an ``If`` then gives it row
after row, in a ``Scan``, so that no row computes otherwise than alone. What lies behind a row's end is not read.

Cases:
1. ``Attention`` of four axes over caches that ``TensorScatter`` wrote at ``write_indices``, with the mask
   arange(C) <= write_indices + arange(S); queries, new keys and values are (B, S, E) whose heads are split by
   ``Reshape`` and ``Transpose``, and the result's are joined by the same.
2. The three are the parts of one ``Split``: the packed value is read as it is.

Left as it is: a head size that is no multiple of 8, which the operator refuses; keys of fewer heads than queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from transom.export.passes._builder import NodeBuilder
from transom.export.passes._match import integer_attribute, made_by, only_reader, rank_of, size_along
from transom.export.passes.cached_attention import (
    HEAD_SIZE,
    CacheMask,
    match_cache_mask,
    reason_against_lengths,
    scale_of,
    written_cache,
)

DOMAIN = "com.microsoft"
HEADS, LAST = 1, 2  # axes of (B, heads, tokens, head size), and of (B, tokens, features)
HEAD_SIZES = 8  # a head size is a multiple of it
SPLIT = [0, 2, 1, 3]  # (B, tokens, heads, head size) <-> (B, heads, tokens, head size)


@dataclass(frozen=True, eq=False)
class CachedAttention:
    """An ``Attention`` of case 1; ``joined`` is the node whose result is (B, S, E).

    ``tokens`` are queries, keys and values (B, S, E), or the packed value (B, S, 3 E) alone.
    """

    node: ir.Node
    joined: ir.Node
    mask: CacheMask
    tokens: tuple[ir.Value, ...]
    writers: tuple[ir.Node, ir.Node]
    heads: int
    head_size: int
    scale: float


@dataclass(frozen=True)
class Lengths:
    """Inputs of the operators beside tokens and caches, computed once for all layers.

    every     tokens of each row, the new ones among them: int32 (B,)
    before    one less: int32 (B,)
    longest   the largest of ``every``: int32 (1,)
    accepted  whether ``GroupQueryAttention`` takes these rows: one row, or one new token, or no past
    """

    every: ir.Value
    before: ir.Value
    longest: ir.Value
    accepted: ir.Value


def group_query_attention(model: ir.Model) -> int:
    """Rewrite every such ``Attention`` of ``model`` in place; return how many there were."""
    found = [matched for matched in map(match_cached_attention, model.graph) if matched is not None]
    lengths: dict[ir.Value, Lengths] = {}
    for attention in found:
        new = attention.mask.new
        if new not in lengths:
            lengths[new] = count_lengths(NodeBuilder(model.graph, attention.node), attention)
        replace(model.graph, attention, lengths[new])
    return len(found)


def reads_cache(model: ir.Model) -> bool:
    """Return whether the model has such an ``Attention``."""
    return any(match_cached_attention(node) is not None for node in model.graph)


def match_cached_attention(node: ir.Node) -> CachedAttention | None:
    """Return the match of case 1 whose ``Attention`` is ``node``; None if there is none."""
    if node.op_type != "Attention" or node.domain or reason_against_lengths(node) is not None:
        return None
    query, keys, values, mask = node.inputs[:4]
    writers = made_by(keys, "TensorScatter"), made_by(values, "TensorScatter")
    if writers[0] is None or writers[1] is None:
        return None
    heads, head_size = size_along(query, HEADS), size_along(query, HEAD_SIZE)
    if not isinstance(heads, int) or not isinstance(head_size, int) or head_size % HEAD_SIZES:
        return None
    sides = (query, writers[0].inputs[1], writers[1].inputs[1])
    tokens = [whole_tokens(side, heads, head_size) for side in sides]
    caches = [written_cache(keys), written_cache(values)]
    if any((size_along(cache, HEADS), size_along(cache, HEAD_SIZE)) != (heads, head_size) for cache in caches):
        return None
    joined = joined_heads(node.outputs[0], heads * head_size)
    scale, matched = scale_of(node), match_cache_mask(mask)
    if joined is None or scale is None or matched is None or any(side is None for side in tokens):
        return None
    whole = tuple(side for side in tokens if side is not None)
    packed = packed_tokens(whole)
    given = whole if packed is None else (packed,)
    return CachedAttention(node, joined, matched, given, (writers[0], writers[1]), heads, head_size, scale)


def whole_tokens(value: ir.Value | None, heads: int, head_size: int) -> ir.Value | None:
    """Return (B, S, E) of a value whose heads were split: Transpose(Reshape(x)); None for another one."""
    turned = made_by(value, "Transpose")
    split = made_by(turned.inputs[0], "Reshape") if turned is not None and is_swap(turned) else None
    if split is None or split.inputs[0] is None:
        return None
    apart, whole = split.outputs[0], split.inputs[0]
    sizes = [size_along(apart, axis) for axis in range(4)]
    known = [size_along(whole, axis) for axis in range(3)] if rank_of(whole) == 3 else []
    fits = None not in sizes and sizes[2:] == [heads, head_size] and known == [*sizes[:2], heads * head_size]
    return whole if fits else None


def joined_heads(value: ir.Value, features: int) -> ir.Node | None:
    """Return the node that gives (B, S, E) of ``value`` (B, H, S, D): Reshape(Transpose(x)); None for another use."""
    turned = only_reader(value)
    if turned is None or turned.op_type != "Transpose" or turned.domain or not is_swap(turned):
        return None
    joined = only_reader(turned.outputs[0])
    if joined is None or joined.op_type != "Reshape" or joined.domain or rank_of(joined.outputs[0]) != 3:
        return None
    sizes = [size_along(joined.outputs[0], axis) for axis in range(3)]
    expected = [size_along(turned.outputs[0], axis) for axis in range(2)]
    return joined if None not in sizes and sizes == [*expected, features] else None


def is_swap(transpose: ir.Node) -> bool:
    """Return whether a ``Transpose`` of four axes swaps the middle two."""
    order = transpose.attributes.get("perm")
    return order is not None and list(order.as_ints()) == SPLIT


def packed_tokens(parts: tuple[ir.Value, ...]) -> ir.Value | None:
    """Return the value of case 2 whose ``Split`` gave the three ``parts`` in order; None if none did."""
    split = made_by(parts[0], "Split")
    if split is None or list(split.outputs) != list(parts) or integer_attribute(split, "axis") not in (LAST, -1):
        return None
    return split.inputs[0]  # three parts of one size, as whole_tokens found them


def count_lengths(builder: NodeBuilder, attention: CachedAttention) -> Lengths:
    """Insert what all layers share in front of the builder's node."""
    start, integer = attention.mask.write_indices, ir.DataType.INT64
    one, none = (builder.weight(f"cache.{name}", np.array([n], np.int64)) for name, n in (("one", 1), ("none", 0)))

    def computed(operator: str, inputs: Sequence[ir.Value], name: str, **attributes: int) -> ir.Value:
        return builder.add(operator, inputs, f"cache.{name}", attributes, dtype=integer)

    def narrow(value: ir.Value, name: str) -> ir.Value:
        return builder.add("Cast", [value], f"cache.{name}", {"to": ir.DataType.INT32}, dtype=ir.DataType.INT32)

    new = computed("Shape", attention.tokens[:1], "new", start=1, end=2)
    held = computed("Add", [start, new], "held")
    latest = computed("ReduceMax", [computed("Abs", [start], "starts")], "latest", keepdims=1)  # one below 0 is refused
    others = computed("Sub", [computed("Shape", [start], "rows"), one], "other_rows")
    steps = computed("Sub", [new, one], "other_tokens")
    refused = computed("Mul", [computed("Mul", [others, steps], "others"), latest], "refused")
    return Lengths(
        every=narrow(held, "every"),
        before=narrow(computed("Sub", [held, one], "held_before"), "before"),
        longest=narrow(computed("Add", [latest, new], "most_held"), "longest"),
        accepted=builder.add("Equal", [refused, none], "cache.accepted", dtype=ir.DataType.BOOL),
    )


def replace(graph: ir.Graph, attention: CachedAttention, lengths: Lengths) -> None:
    """Replace the nodes of an attention by an ``If``; its results take their names and shapes."""
    replaced = [attention.joined.outputs[0], *(writer.outputs[0] for writer in attention.writers)]
    names = [str(value.name) for value in replaced]
    rows_axis = NodeBuilder(graph, attention.joined).weight("cache.row_axis", np.array([0], np.int64))
    caches = [cache for writer in attention.writers for cache in writer.inputs[:1] if cache is not None]
    tokens = [*attention.tokens]
    grouped = grouped_node(attention, tokens, caches, lengths.before, lengths.longest)
    together = ir.Graph([], grouped.outputs, nodes=[grouped], name="together")
    row_by_row = scan_rows(attention, [*tokens, *caches, lengths.before, lengths.every], rows_axis)
    for body, kind in ((together, "together"), (row_by_row, "row_by_row")):
        for result, old in zip(body.outputs, replaced, strict=True):
            result.type, result.shape = old.type, old.shape
        rename(body, f"{names[0]}.{kind}")
    node = ir.node(
        "If",
        [lengths.accepted],
        {"then_branch": together, "else_branch": row_by_row},
        num_outputs=len(replaced),
        name=f"If_{names[0]}",
    )
    node.metadata_props.update(attention.node.metadata_props)
    graph.insert_before(attention.joined, node)
    for old, new, name in zip(replaced, node.outputs, names, strict=True):
        old.name = f"{name}.replaced"
        new.name, new.type, new.shape = name, old.type, old.shape
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def grouped_node(
    attention: CachedAttention,
    tokens: Sequence[ir.Value],
    caches: Sequence[ir.Value],
    before: ir.Value,
    longest: ir.Value,
) -> ir.Node:
    """Return a ``GroupQueryAttention`` of some rows: its results are (B, S, E) and the caches."""
    attributes = {"num_heads": attention.heads, "kv_num_heads": attention.heads, "scale": attention.scale}
    inputs = [*[*tokens, None, None][:3], *caches, before, longest]
    return ir.node("GroupQueryAttention", inputs, attributes, domain=DOMAIN, num_outputs=3)


def scan_rows(attention: CachedAttention, inputs: Sequence[ir.Value], axis: ir.Value) -> ir.Graph:
    """Return a graph of one ``Scan`` that gives each row to a ``GroupQueryAttention`` of its own.

    ``inputs`` are tokens, caches, and of each row its tokens before and after the last one, all with rows first.
    """
    rows = [
        ir.Value(
            name=f"row.{index}", type=value.type, shape=None if value.shape is None else ir.Shape([*value.shape][1:])
        )
        for index, value in enumerate(inputs)
    ]
    nodes = [ir.node("Unsqueeze", [row, axis]) for row in rows[:-1]]  # the last is a scalar as it is
    *tokens, keys, values, before = (node.outputs[0] for node in nodes)
    grouped = grouped_node(attention, tokens, [keys, values], before, rows[-1])
    results = [ir.node("Squeeze", [result, axis]) for result in grouped.outputs]
    for result in results:
        result.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    body = ir.Graph(rows, [node.outputs[0] for node in results], nodes=[*nodes, grouped, *results], name="row")
    scan = ir.node("Scan", inputs, {"body": body, "num_scan_inputs": len(inputs)}, num_outputs=len(results))
    return ir.Graph([], scan.outputs, nodes=[scan], name="row_by_row")


def rename(body: ir.Graph, prefix: str) -> None:
    """Name the values of a branch and of the graphs in it: none may have the name of one around it."""
    inner = [value for graph in (body, *body.subgraphs()) for value in graph.inputs]
    inner += [value for node in body.all_nodes() for value in node.outputs]
    for number, value in enumerate(inner):
        value.name = f"{prefix}.{number}"
