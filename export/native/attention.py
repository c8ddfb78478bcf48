"""Read attention: over a sequence's own rows, over caches that it writes, over what an encoder left."""

from __future__ import annotations

from math import sqrt

import numpy as np
import onnx_ir as ir

from transom.export.native.axes import Axis, Dims, columns_in, heads_in
from transom.export.native.index_values import Array
from transom.export.native.integers import unquantised
from transom.export.native.meanings import Integers, Meaning, Rows, State, Written
from transom.export.native.reader import GraphReader, Handler, attribute, name_of
from transom.export.native.row_program import TOKENS, AttentionStep, CannotLowerError
from transom.export.passes._match import inputs_of

CACHE_INPUTS = ("query", "key", "value", "mask")


def read_scatter(reader: GraphReader, node: ir.Node) -> Meaning:
    """Read ``TensorScatter`` of new rows into a cache, from where it ends on."""
    cache, rows = reader.meaning(node.inputs[0]), heads_of(reader, node.inputs[1])
    places = reader.index.of(node.inputs[2]) if len(node.inputs) > 2 else None
    linear = attribute(node, "mode", "linear") == "linear" and attribute(node, "axis", -2) in (-2, 2)
    if not isinstance(cache, State) or not linear:
        raise CannotLowerError("it writes to something else than a cache of the inputs, or in a circle")
    if places is None or "write_indices" not in reader.index.inputs or not reader.is_input(places, "write_indices"):
        raise CannotLowerError("it writes elsewhere than where the cache ends")
    _, heads, head_dim = rows
    if (heads, head_dim) != (cache.heads, cache.head_dim):
        raise CannotLowerError("it writes other heads than the cache has")
    return Written(cache, rows[0])


def heads_of(reader: GraphReader, value: ir.Value | None, count: int | None = None) -> tuple[Rows, int, int]:
    """Return token rows split into heads, (B, heads, tokens, head_dim), how many heads, and their size.

    With ``count`` they may be whole, (B, tokens, n), of so many heads.
    """
    found = reader.meaning(value)
    rows = unquantised(reader, value) if isinstance(found, Integers) else reader.rows(value)
    leading = reader.leading(TOKENS)
    if rows.step.rows == TOKENS and count and len(rows.dims) == 3 and rows.dims[:2] == leading:
        columns = columns_in(rows.dims[2])
        if columns == rows.view.columns and columns % count == 0:
            return rows, count, columns // count
    if rows.step.rows == TOKENS and len(rows.dims) == 4 and (rows.dims[0], rows.dims[2]) == leading:
        head_dim = columns_in(rows.dims[3])
        heads = None if head_dim is None else heads_in(rows.dims[1], head_dim)
        if head_dim and heads and heads * head_dim == rows.view.columns:
            return rows, heads, head_dim
    raise CannotLowerError(f"{rows.step.name!r} is not split into the heads of each token")


def read_attention(reader: GraphReader, node: ir.Node) -> list[Meaning]:
    """Read ``Attention`` of opset 23 or 24."""
    query, key, value, mask = inputs_of(node, 4)
    if any(given is not None for given in node.inputs[4:]) or len(node.outputs) > 1:
        raise CannotLowerError("it has a cache of its own, or gives more than its result")
    if attribute(node, "softcap", 0.0) or attribute(node, "qk_matmul_output_mode", 0):
        raise CannotLowerError("it limits its scores, or gives them back")
    count, key_count = (int(attribute(node, name, 0)) or None for name in ("q_num_heads", "kv_num_heads"))
    q, heads, head_dim = heads_of(reader, query, count)
    scale = float(attribute(node, "scale", 1 / sqrt(head_dim)))
    causal = bool(attribute(node, "is_causal", 0))
    name = name_of(node)
    columns = heads * head_dim
    k, v = reader.meaning(key), reader.meaning(value)
    if isinstance(k, Written) and isinstance(v, Written):
        if causal or not sees_cache(reader, mask):
            raise CannotLowerError("its mask is not that of all positions of a cache up to a token's own")
        reader.take_caches(k.cache.name, v.cache.name)
        step = AttentionStep(
            name, TOKENS, columns, q.view, k.rows.view, v.rows.view, heads, k.cache.heads, head_dim, scale,
            key_cache=k.cache.name, value_cache=v.cache.name,
        )  # fmt: skip
        fits = k.cache.head_dim == v.cache.head_dim == head_dim and k.cache.heads == v.cache.heads
    elif isinstance(k, State) and isinstance(v, State):
        if causal:
            raise CannotLowerError("it reads an encoder's keys, and only some of them for each token")
        step = AttentionStep(
            name, TOKENS, columns, q.view, None, None, heads, k.heads, head_dim, scale,
            cross_key=k.name, cross_value=v.name, cross_mask=cross_mask(reader, mask, k.name),
        )  # fmt: skip
        fits = k.head_dim == v.head_dim == head_dim and k.heads == v.heads
    else:
        keys, key_heads, key_dim = heads_of(reader, key, key_count)
        values, value_heads, value_dim = heads_of(reader, value, key_count)
        is_causal = self_mask(reader, mask, causal=causal)
        step = AttentionStep(
            name, TOKENS, columns, q.view, keys.view, values.view, heads, key_heads, head_dim, scale, is_causal
        )
        fits = key_dim == value_dim == head_dim and key_heads == value_heads
    if not fits or step.heads % step.key_heads:
        raise CannotLowerError("its keys and values have other heads than its queries")
    parts: Dims = (
        (() if heads == 1 else (Axis("features", (heads, heads), head_dim),)),
        (() if head_dim == 1 else (Axis("features", (head_dim, head_dim), 1),)),
    )
    batch, tokens = reader.leading(TOKENS)
    whole = (batch, tokens, parts[0] + parts[1])
    return [Rows(reader.add(step), whole if count and len(q.dims) == 3 else (batch, parts[0], tokens, parts[1]))]


def masks(reader: GraphReader, mask: ir.Value | None) -> tuple[Array, Array] | None:
    """Return a mask as booleans (B, heads or 1, queries or 1, keys) in both samples; None for no mask at all."""
    if mask is None:
        return None
    found = reader.index.of(mask)
    if found is None or found[0].dtype != np.bool_ or found[0].ndim > 4:
        raise CannotLowerError("its mask is computed, or no booleans")
    return tuple(array.reshape((1,) * (4 - array.ndim) + array.shape) for array in found)  # type: ignore[return-value]


def equal(found: Array, expected: Array) -> bool:
    """Return whether two masks are the same once both are repeated along the axes where one has size 1."""
    try:
        one, other = np.broadcast_arrays(found, expected)
    except ValueError:
        return False
    return bool(np.array_equal(one, other))


def self_mask(reader: GraphReader, mask: ir.Value | None, *, causal: bool) -> bool:
    """Return whether attention over a sequence's own rows is causal; the reader gets the input that masks keys."""
    found = masks(reader, mask)
    if found is None:
        return causal
    triangles = [np.tri(size, dtype=np.bool_)[None, None] for size in reader.token_axis[0].sizes]
    if all(equal(*pair) for pair in zip(found, triangles, strict=True)):
        return True
    for name, given in reader.index.inputs.items():
        if given[0].ndim != 2:
            continue
        keys = [array[:, None, None, :] != 0 for array in given]
        if all(equal(*pair) for pair in zip(found, keys, strict=True)):
            reader.use_mask(name)
            return causal
        both = [k & triangle for k, triangle in zip(keys, triangles, strict=True) if k.shape[-1] == triangle.shape[-1]]
        if len(both) == 2 and all(equal(*pair) for pair in zip(found, both, strict=True)):
            reader.use_mask(name)
            return True
    raise CannotLowerError("its mask is neither that of an input, nor causal, nor both")


def sees_cache(reader: GraphReader, mask: ir.Value | None) -> bool:
    """Return whether a mask lets each token see all positions of a cache up to its own."""
    found = masks(reader, mask)
    past = reader.index.inputs.get("write_indices")
    if found is None or past is None or "C" not in reader.index.sizes:
        return False
    return all(
        equal(array, (np.arange(capacity) <= ends[:, None, None] + np.arange(size)[:, None])[:, None])
        for array, ends, capacity, size in zip(
            found, past, reader.index.sizes["C"], reader.token_axis[0].sizes, strict=True
        )
    )


def cross_mask(reader: GraphReader, mask: ir.Value | None, key: str) -> str | None:
    """Return the input that says which of an encoder's keys count, None for all."""
    found = masks(reader, mask)
    if found is None:
        return None
    keys = reader.graph.inputs_by_name[key].shape[2]
    for name, given in reader.index.inputs.items():
        if reader.graph.inputs_by_name[name].shape[1:] != (keys,):
            continue
        if all(equal(array, ids[:, None, None, :] != 0) for array, ids in zip(found, given, strict=True)):
            return name
    raise CannotLowerError("its mask is not that of an input")


HANDLERS: dict[str, Handler] = {"TensorScatter": read_scatter, "Attention": read_attention}
