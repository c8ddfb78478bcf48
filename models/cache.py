"""The KV cache: keys and values of the tokens read so far, in buffers that the caller owns.

One graph serves prefill, chunked prefill and decode. Every row of the batch stands at a position of
its own, ``write_indices``: its new keys and values are written there, and a query sees what was
written up to its own position. Rows of unequal length are padded on the right; what is written for
padding lies past the row's end and is overwritten before any query sees it.

Shape letters as in attention.py, and
    C capacity of a cache, in tokens
"""

from __future__ import annotations

import torch
from torch import Tensor

from transom.runtime.graph_spec import Tensor as TensorSpec


def write_cache(cache: Tensor, new: Tensor, write_indices: Tensor) -> Tensor:
    """Write ``new`` (B, H, S, D) into ``cache`` (B, H, C, D) at ``write_indices`` (B,) of axis 2; in place in PyTorch.

    In ONNX one ``TensorScatter`` (opset 24, mode "linear"), which the exporter has no operator for. It is in
    place where the runtime binds one buffer as input and output.
    """
    if torch.onnx.is_in_onnx_export():
        updated: Tensor = torch.onnx.ops.symbolic(
            "TensorScatter",
            (cache, new, write_indices),
            {"axis": -2, "mode": "linear"},
            dtype=cache.dtype,
            shape=cache.shape,
            version=24,
        )
        return updated
    B, _, S, _ = new.shape
    rows = torch.arange(B, device=new.device)[:, None]
    cache.transpose(1, 2)[rows, positions(write_indices, S)] = new.transpose(1, 2)
    return cache


def positions(write_indices: Tensor, S: int) -> Tensor:
    """Return the position of each new token in its row: int64 (B, S)."""
    return write_indices[:, None] + torch.arange(S, device=write_indices.device)


def causal_mask(write_indices: Tensor, S: int, C: int) -> Tensor:
    """Return bool (B, 1, S, C), true at a query's own position and all before it."""
    columns = torch.arange(C, device=write_indices.device)
    return (columns <= positions(write_indices, S)[:, :, None])[:, None]


def select_positions(hidden: Tensor, logits_positions: Tensor) -> Tensor:
    """Select the positions whose logits are wanted: ``hidden`` (B, S, E), ``logits_positions`` (B, P) -> (B, P, E)."""
    B, S, _ = hidden.shape
    first = torch.arange(B, device=hidden.device)[:, None] * S
    return hidden.flatten(0, 1)[first + logits_positions]


def cache_inputs(layers: int, heads: int, head_size: int) -> tuple[TensorSpec, ...]:
    """Return ``key_cache.<i>`` and ``value_cache.<i>`` of every layer, float32 (B, H, C, D), by default zeros."""
    shape = ("B", heads, "C", head_size)
    return tuple(
        TensorSpec(f"{kind}_cache.{layer}", "float32", shape, default=0, state=True)
        for layer in range(layers)
        for kind in ("key", "value")
    )


def cache_outputs(layers: int, heads: int, head_size: int) -> tuple[TensorSpec, ...]:
    """Return the caches after a call, each written into the buffer of its input."""
    return tuple(
        TensorSpec(f"{tensor.name}.written", "float32", tensor.shape, state=True, aliases=tensor.name)
        for tensor in cache_inputs(layers, heads, head_size)
    )
