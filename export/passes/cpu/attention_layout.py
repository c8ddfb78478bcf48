"""Attention on heads that lie side by side, as projections write and read them: no Transpose around it.

Models move the heads in front of the tokens, and ``Attention`` takes them so. It takes (B, S, N H) as well, given the
number of heads; ONNX Runtime then multiplies along the strides of the heads, where a ``Transpose`` copies each of
query, key, value and result. The arithmetic is the same, whatever the mask.

Cases:
1. Query, key and value each are ``Reshape`` of (B, S, N H) to (B, S, N, H), then ``Transpose`` to (B, N, S, H), and
   the result goes through ``Transpose`` and ``Reshape`` back to (B, S, N H): ``Attention`` gets and gives the three
   axes. Key and value may have another S, fewer heads, and the value another H.
2. Everything else stays: a cache of keys and values, further outputs, heads that something else reads as well on
   their way out, or sizes that are not known to be these.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from transom.export.passes._builder import NodeBuilder
from transom.export.passes._match import (
    ATTENTION_INPUTS,
    Size,
    extra_inputs,
    is_standard,
    made_by,
    only_reader,
    size_along,
)

HEADS_FIRST = (0, 2, 1, 3)  # of a Transpose; its own inverse


@dataclass(frozen=True)
class Heads:
    """A value (B, S, N H) that is split into N heads of H."""

    value: ir.Value
    count: int
    size: int


def flatten_heads(model: ir.Model) -> int:
    """Apply case 1 to ``model`` in place; return how many nodes changed."""
    return sum(rewrite(model.graph, node) for node in list(model.graph) if is_standard(node, "Attention"))


def rewrite(graph: ir.Graph, attention: ir.Node) -> bool:
    """Apply case 1 to one node; return whether it did."""
    sides = [heads_of(value) for value in attention.inputs[: ATTENTION_INPUTS.index("mask")]]
    if extra_inputs(attention, len(ATTENTION_INPUTS)) or len(attention.outputs) != 1:
        return False
    query, key, value = sides
    if query is None or key is None or value is None or key.count != value.count or query.size != key.size:
        return False
    reshape = merged_heads(attention.outputs[0], query, value)
    if reshape is None:
        return False
    counts = {"q_num_heads": query.count, "kv_num_heads": key.count}
    inputs = [query.value, key.value, value.value, *attention.inputs[len(sides) :]]
    result = NodeBuilder(graph, attention).add(
        "Attention", inputs, f"{attention.outputs[0].name}.flat", {**attention.attributes, **counts}
    )
    NodeBuilder(graph, reshape).replace_node(result)
    return True


def heads_of(value: ir.Value | None) -> Heads | None:
    """Return the value (B, S, N H) that case 1 makes (B, N, S, H) of; None where another shape is made, or may be."""
    split = heads_moved(made_by(value, "Transpose"))
    reshape = made_by(split, "Reshape")
    if reshape is None or split is None or reshape.inputs[0] is None:
        return None
    whole = reshape.inputs[0]
    count, size = size_along(split, 2), size_along(split, 3)
    if not isinstance(count, int) or not isinstance(size, int) or not has_shape(whole, tokens_of(split), count * size):
        return None
    return Heads(whole, count, size)


def merged_heads(result: ir.Value, query: Heads, value: Heads) -> ir.Node | None:
    """Return the ``Reshape`` behind the result of an ``Attention`` in case 1."""
    transpose = only_reader(result)
    if transpose is None or heads_moved(transpose) is not result:
        return None
    reshape = only_reader(transpose.outputs[0])
    if reshape is None or not is_standard(reshape, "Reshape"):
        return None
    merged = reshape.outputs[0]
    return reshape if has_shape(merged, tokens_of(query.value), query.count * value.size) else None


def heads_moved(transpose: ir.Node | None) -> ir.Value | None:
    """Return what a node swaps the axes of tokens and heads of; None where it does something else."""
    if transpose is None or not is_standard(transpose, "Transpose") or "perm" not in transpose.attributes:
        return None
    return transpose.inputs[0] if tuple(transpose.attributes["perm"].as_ints()) == HEADS_FIRST else None


def tokens_of(value: ir.Value) -> tuple[Size | None, Size | None]:
    """Return the sizes of the first two axes."""
    return size_along(value, 0), size_along(value, 1)


def has_shape(value: ir.Value, tokens: tuple[Size | None, Size | None], features: int) -> bool:
    """Return whether a value is known to have the shape (*tokens, features)."""
    if None in tokens or value.shape is None or len(value.shape) != 3:
        return False
    return tokens_of(value) == tokens and size_along(value, 2) == features
