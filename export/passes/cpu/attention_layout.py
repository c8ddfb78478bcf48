"""Attention on heads that lie side by side, as projections write and read them: no Transpose around it.

Models move the heads in front of the tokens, and ``Attention`` takes them so. It takes (B, S, N H) as well, given the
number of heads; ONNX Runtime then multiplies along the strides of the heads, where a ``Transpose`` copies each of
query, key, value and result. The arithmetic is the same, whatever the mask.

Cases:
1. Query, key and value each are ``Transpose`` of (B, S, N, H) to (B, N, S, H), and the result goes through its inverse:
   ``Attention`` gets and gives (B, S, N H), of ``Reshape``, which copies nothing. Key and value may have another S,
   fewer heads, and the value another H.
2. Where (B, S, N, H) is ``Reshape`` of (B, S, N H), or becomes it, that ``Reshape`` goes too.
3. ``Expand`` to the shape that a value has already is passed over.

Left as it is: a cache of keys and values, further outputs, and heads that something else reads on their way out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from transom.export.passes._builder import NodeBuilder
from transom.export.passes._match import (
    ATTENTION_INPUTS,
    extra_inputs,
    is_standard,
    made_by,
    only_reader,
    rank_of,
    size_along,
)

HEADS_FIRST = (0, 2, 1, 3)  # of a Transpose; its own inverse


@dataclass(frozen=True)
class Heads:
    """A value (B, S, N, H) of case 1, and the (B, S, N H) that it was split of in case 2."""

    split: ir.Value
    whole: ir.Value | None
    count: int
    size: int


def flatten_heads(model: ir.Model) -> int:
    """Apply the cases to ``model`` in place; return how many ``Attention`` changed."""
    return sum(rewrite(model.graph, node) for node in list(model.graph) if is_standard(node, "Attention"))


def rewrite(graph: ir.Graph, attention: ir.Node) -> bool:
    """Apply the cases to one node; return whether it changed."""
    query, key, value = (heads_of(each) for each in attention.inputs[: ATTENTION_INPUTS.index("mask")])
    if extra_inputs(attention, len(ATTENTION_INPUTS)) or len(attention.outputs) != 1:
        return False
    if query is None or key is None or value is None or key.count != value.count or query.size != key.size:
        return False
    transpose = only_reader(attention.outputs[0])
    if heads_moved(transpose) is None or transpose is None:
        return False
    builder = NodeBuilder(graph, attention)
    inputs = [flat(builder, side) for side in (query, key, value)] + list(attention.inputs[len(ATTENTION_INPUTS) - 1 :])
    attributes = {**attention.attributes, "q_num_heads": query.count, "kv_num_heads": key.count}
    name = str(attention.outputs[0].name)
    result = builder.add("Attention", inputs, f"{name}.flat", attributes)
    replaced = Heads(transpose.outputs[0], None, query.count, value.size)
    merge = only_reader(replaced.split)
    if merge is not None and is_standard(merge, "Reshape") and same_tokens(replaced, merge.outputs[0]):
        NodeBuilder(graph, merge).replace_node(result)
        return True
    axes = builder.weight("heads_of_flat", np.array([0, 0, query.count, value.size], np.int64))
    NodeBuilder(graph, transpose).replace_node(builder.add("Reshape", [result, axes], f"{name}.split"))
    return True


def heads_of(value: ir.Value | None) -> Heads | None:
    """Return query, key or value of case 1, without the Expand of case 3; None where it is something else."""
    expand = made_by(value, "Expand")
    if expand is not None and value is not None and is_shape_of(expand.inputs[0], value):
        value = expand.inputs[0]
    split = heads_moved(made_by(value, "Transpose"))
    count, size = size_along(split, 2), size_along(split, 3)
    if split is None or not isinstance(count, int) or not isinstance(size, int):
        return None
    heads = Heads(split, None, count, size)
    reshape = made_by(split, "Reshape")
    whole = None if reshape is None else reshape.inputs[0]
    return heads if whole is None or not same_tokens(heads, whole) else Heads(split, whole, count, size)


def flat(builder: NodeBuilder, heads: Heads) -> ir.Value:
    """Return (B, S, N H) of the heads."""
    if heads.whole is not None:
        return heads.whole
    axes = builder.weight("flat_heads", np.array([0, 0, heads.count * heads.size], np.int64))
    return builder.add("Reshape", [heads.split, axes], f"{heads.split.name}.flat")


def same_tokens(heads: Heads, whole: ir.Value) -> bool:
    """Return whether ``whole`` is known to be the (B, S, N H) of ``heads``."""
    tokens = [size_along(heads.split, axis) for axis in (0, 1)]
    sizes = [*tokens, heads.count * heads.size]
    return None not in tokens and rank_of(whole) == 3 and sizes == [size_along(whole, axis) for axis in range(3)]


def heads_moved(transpose: ir.Node | None) -> ir.Value | None:
    """Return what a node swaps the axes of tokens and heads of; None where it does something else."""
    if transpose is None or not is_standard(transpose, "Transpose") or "perm" not in transpose.attributes:
        return None
    return transpose.inputs[0] if tuple(transpose.attributes["perm"].as_ints()) == HEADS_FIRST else None


def is_shape_of(value: ir.Value | None, other: ir.Value) -> bool:
    """Return whether two values are known to have one shape."""
    axes = range(rank_of(other) or 0)
    sizes = [size_along(value, axis) for axis in axes]
    return bool(sizes) and None not in sizes and sizes == [size_along(other, axis) for axis in axes]
