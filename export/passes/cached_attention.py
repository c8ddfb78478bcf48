"""Match ``Attention`` over a KV cache whose mask can be replaced by the lengths of its rows.

Keys and values are caches that ``TensorScatter`` wrote at ``write_indices``, and the mask is
arange(C) <= write_indices + arange(S).
"""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

import onnx_ir as ir

from transom.export.passes._match import ATTENTION_INPUTS, Size, extra_inputs, inputs_of, made_by, size_along
from transom.runtime.feeds import WRITE_INDICES

TOKENS, HEAD_SIZE = 2, 3  # axes of queries and caches (B, heads, tokens, head size)


class CacheMask(NamedTuple):
    """arange(held) <= write_indices + arange(new)."""

    held: ir.Value
    write_indices: ir.Value
    new: ir.Value


def match_cache_mask(mask: ir.Value | None) -> CacheMask | None:
    """Return the operands of a mask (B, 1, S, C); None for another formula, or the same along other axes."""
    compared = made_by(unsqueezed(mask, 1, 4), "LessOrEqual")  # (B, S, C)
    if compared is None:
        return None
    keys, last_key = compared.inputs  # (C,), (B, S, 1)
    added = made_by(unsqueezed(last_key, 2, 3), "Add")
    if added is None:
        return None
    starts, steps = added.inputs  # (B, 1), (S,)
    held, write_indices, new = count_of(keys), unsqueezed(starts, 1, 2), count_of(steps)
    if held is None or write_indices is None or new is None:
        return None
    return CacheMask(held, write_indices, new)


def reason_against_lengths(node: ir.Node) -> str | None:
    """Return why the mask of an ``Attention`` cannot be replaced by lengths; None if it can."""
    query, key, value, mask = inputs_of(node, len(ATTENTION_INPUTS))
    if mask is None:
        return "it has no mask"
    if extra_inputs(node, len(ATTENTION_INPUTS)) or len(node.outputs) > 1:
        return "it has a cache of its own"
    for name, attribute in node.attributes.items():
        if name != "scale" and attribute.value != 0:
            return f"it has {name} {attribute.value}, which the other operator does not have"
    caches = [written_cache(key), written_cache(value)]
    if any(cache is None for cache in caches):
        return "its keys are no cache that is written"
    if scale_of(node) is None:
        return "its scale is not known"
    matched = match_cache_mask(mask)
    if matched is None or str(matched.write_indices.name) != WRITE_INDICES:
        return "its mask is another than that of the cache"
    if scalar_size(matched.new) is None or scalar_size(matched.new) != size_along(query, TOKENS):
        return "its mask counts other queries than it has"
    held = scalar_size(matched.held)
    if held is None or any(held != size_along(cache, TOKENS) for cache in caches):
        return "its mask counts other keys than it has"
    return None


def written_cache(value: ir.Value | None) -> ir.Value | None:
    """Return the cache into which ``value`` was written at ``write_indices``, over its whole length; else None."""
    writer = made_by(value, "TensorScatter")
    if writer is None or writer.inputs[2] is None or str(writer.inputs[2].name) != WRITE_INDICES:
        return None
    axis, mode = writer.attributes.get("axis"), writer.attributes.get("mode")
    linear = mode is None or mode.as_string() == "linear"
    return writer.inputs[0] if linear and (-2 if axis is None else axis.as_int()) in (TOKENS, TOKENS - 4) else None


def scale_of(node: ir.Node) -> float | None:
    """Return the factor of an ``Attention``'s scores: by default 1 / sqrt(head size), None where that is not known."""
    if "scale" in node.attributes:
        return node.attributes["scale"].as_float()
    size = size_along(node.inputs[0], HEAD_SIZE)
    return 1 / sqrt(size) if isinstance(size, int) else None


def count_of(value: ir.Value | None) -> ir.Value | None:
    """Return n of ``Range(0, n, 1)``; None for anything else."""
    made = made_by(value, "Range")
    if made is None:
        return None
    start, limit, step = made.inputs
    numbers = [None if v is None or v.const_value is None else int(v.const_value.numpy()) for v in (start, step)]
    return limit if numbers == [0, 1] else None


def scalar_size(value: ir.Value) -> Size | None:
    """Return the size of an axis that the scalar ``value`` was read from with ``Shape``; None for other scalars."""
    squeezed = made_by(value, "Squeeze")
    shape = made_by(squeezed.inputs[0], "Shape") if squeezed is not None else None
    if shape is None or "end" not in shape.attributes:
        return None
    start = shape.attributes["start"].as_int() if "start" in shape.attributes else 0
    return size_along(shape.inputs[0], start) if shape.attributes["end"].as_int() == start + 1 else None


def unsqueezed(value: ir.Value | None, axis: int, rank: int) -> ir.Value | None:
    """Return the input of the ``Unsqueeze`` that gave ``value``, of ``rank`` axes, a new one at ``axis``; else None."""
    made = made_by(value, "Unsqueeze")
    axes = made.inputs[1].const_value if made is not None and made.inputs[1] is not None else None
    return made.inputs[0] if made and axes is not None and axes.numpy().tolist() in ([axis], [axis - rank]) else None
