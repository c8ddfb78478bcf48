"""Compute attention in float64, and compare what the kernel computes with it."""

from __future__ import annotations

import os
from typing import Any

import torch

# Units of roundoff of max|exact|. Halves are rounded at the weights and at the end; the interpreter cuts BF16 off where
# a GPU rounds. FP32 has two more for each unit of the largest score: a larger one is rounded more coarsely, and exp
# makes of its absolute error a relative one.
# On a GPU ex2.approx is within 2 units of FP32, in numerator and denominator, as in gpu/test_gpu_plugin.py.
DEVICE = os.environ.get("TRANSOM_KERNEL_DEVICE", "cpu")
ON_GPU = int(DEVICE != "cpu")
ROUNDOFF = {
    torch.float32: (2**-24, 12 + 12 * ON_GPU),
    torch.float16: (2**-11, 3 + ON_GPU),
    torch.bfloat16: (2**-8, 4),
}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(q: Any, k: Any, v: Any, scale: float, *, seen: Any = None, added: Any = None) -> torch.Tensor:
    """softmax(scale q k^T + added, where seen) v in float64; a query that sees nothing gives zeros."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    scores = scale * q @ k.transpose(2, 3)
    if added is not None:
        scores = scores + added.double()
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
    weights = torch.nan_to_num(torch.softmax(scores, -1), nan=0.0)
    return weights @ torch.nan_to_num(v)


def visible(lengths: Any, S: int, T: int, *, causal: bool) -> torch.Tensor:
    """(B, 1, S, T): keys before the row's length; with ``causal`` up to length - S + i."""
    keys, queries = torch.arange(T), torch.arange(S)[:, None]
    length = torch.as_tensor(lengths)[:, None, None, None]
    seen = keys < length
    return seen & (keys <= length - S + queries) if causal else seen.expand(-1, -1, S, -1)


def require_close(found: torch.Tensor, expected: torch.Tensor, scores: float = 4.0) -> None:
    unit, units = ROUNDOFF[found.dtype]
    if found.dtype == torch.float32:
        units += 2 * scores
    error = (found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    assert not found.isnan().any()
    assert error <= unit * units, f"{error:.2e}, {error / unit:.1f} units of roundoff"
