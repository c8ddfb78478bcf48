"""The fused attention kernel's numbers, under Triton's interpreter, against PyTorch in float64."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'transom[plugin]'")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transom.export.plugins.launch import Blocks, launches, width
from transom.runtime.errors import InputError

# max|ours - exact| / max|exact|: FP32 sums of some hundred terms; halves are rounded at the weights and at the end
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
SMALL = Blocks(16, 16)


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


def ours(
    q: Any, k: Any, v: Any, scale: float, *, blocks: Blocks = SMALL, split: int = 0, **options: Any
) -> torch.Tensor:
    B, H, _, D = q.shape
    output = torch.full_like(q, torch.nan)
    if split:
        sums = torch.full((B, H, split, 2, blocks.m), torch.nan)
        options["parts"] = (split, sums, torch.full((B, H, split, blocks.m, width(D)), torch.nan))
    for launch in launches(q, k, v, output, scale=scale, blocks=blocks, **options):
        launch.run()
    return output


def visible(lengths: Any, S: int, T: int, *, causal: bool) -> torch.Tensor:
    """(B, 1, S, T): keys before the row's length; with ``causal`` up to length - S + i."""
    keys, queries = torch.arange(T), torch.arange(S)[:, None]
    length = torch.as_tensor(lengths)[:, None, None, None]
    seen = keys < length
    return seen & (keys <= length - S + queries) if causal else seen.expand(-1, -1, S, -1)


def require_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    error = (found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    assert not found.isnan().any()
    assert error <= TOLERANCES[found.dtype], f"{error:.2e}"


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("size", [9, 16, 33, 80, 256])
def test_plain_attention(dtype: torch.dtype, size: int) -> None:
    q, k, v = (normal(1, 2, n, size, seed=seed, dtype=dtype) for seed, n in enumerate((19, 37, 37)))
    require_close(ours(q, k, v, size**-0.5), exact(q, k, v, size**-0.5))


@pytest.mark.parametrize("split", [0, 3])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths_differ_by_row(causal: bool, split: int) -> None:
    """Lengths of all, some, one, fewer than queries, and none; what lies behind a length is NaN."""
    lengths, S, T = [37, 20, 1, 2, 0], 4, 37
    q, k, v = (normal(5, 2, n, 16, seed=seed) for seed, n in enumerate((S, T, T)))
    for row, length in enumerate(lengths):
        k[row, :, length:], v[row, :, length:] = torch.nan, torch.nan
    found = ours(q, k, v, 0.25, lengths=torch.tensor(lengths, dtype=torch.int32), causal=causal, split=split)
    expected = exact(q, torch.nan_to_num(k), v, 0.25, seen=visible(lengths, S, T, causal=causal))
    require_close(found, expected)
    assert not found[4].any()
    assert causal <= (not found[3, :, :2].any())  # queries before the first key


def test_masks_causality_and_biases_together() -> None:
    """What IAttention refuses: a mask and causality in one; and a bias per head besides."""
    q, k, v = (normal(2, 4, 21, 32, seed=seed) for seed in range(3))
    boolean, added = normal(2, 1, 21, 21, seed=3) > -0.5, normal(1, 4, 21, 21, seed=4)
    bias = normal(4, 21, 21, seed=5)
    seen = visible([21, 21], 21, 21, causal=True)
    require_close(ours(q, k, v, 0.2, mask=boolean, causal=True), exact(q, k, v, 0.2, seen=seen & boolean))
    require_close(
        ours(q, k, v, 0.2, mask=added, bias=bias, causal=True), exact(q, k, v, 0.2, seen=seen, added=added + bias)
    )
    half = added.half()
    half[:, :, 3] = -torch.inf  # a query that an additive mask leaves nothing
    found = ours(q, k, v, 0.2, mask=half)
    require_close(found, exact(q, k, v, 0.2, added=half))
    assert not found[:, :, 3].any()


@pytest.mark.parametrize("split", [0, 2])
def test_grouped_heads_and_views(split: int) -> None:
    """Six heads of queries read two of keys; all are views of (B, S, H, D), as projections leave them."""
    q, k, v = (normal(2, n, h, 24, seed=s).transpose(1, 2) for s, (n, h) in enumerate(((3, 6), (40, 2), (40, 2))))
    require_close(ours(q, k, v, 0.2, split=split), exact(q, k, v, 0.2))


@pytest.mark.parametrize("split", [0, 2])
def test_an_int8_cache(split: int) -> None:
    """Against the very integers times their scales: no more than the products' own rounding."""
    q = normal(2, 4, 1, 32)
    scales = tuple(normal(2, 2, 50, seed=seed).abs() / 50 + 1e-3 for seed in (1, 2))
    k, v = ((20 * normal(2, 2, 50, 32, seed=seed)).round().clamp(-127, 127).to(torch.int8) for seed in (3, 4))
    found = ours(q, k, v, 0.2, scales=scales, split=split)
    require_close(found, exact(q, k * scales[0][..., None], v * scales[1][..., None], 0.2))


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e4, 3e18])
def test_huge_and_tiny_logits(size: float) -> None:
    """From nothing but ties to one key that takes all."""
    q, k, v = (normal(1, 1, 18, 16, seed=seed) for seed in range(3))
    require_close(ours(size * q, k, v, 1.0), exact(size * q, k, v, 1.0))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 2),
    heads=st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 2)]),
    S=st.integers(1, 40),
    T=st.integers(1, 70),
    D=st.integers(1, 48),
    causal=st.booleans(),
    masked=st.booleans(),
    blocks=st.sampled_from([Blocks(16, 16), Blocks(16, 32), Blocks(32, 16)]),
    seed=st.integers(0, 99),
)
def test_any_sizes(
    B: int, heads: tuple[int, int], S: int, T: int, D: int, causal: bool, masked: bool, blocks: Blocks, seed: int
) -> None:
    H, shared = heads
    q = normal(B, H, S, D, seed=seed)
    k, v = (normal(B, shared, T, D, seed=seed + n) for n in (1, 2))
    lengths = torch.randint(0, T + 1, (B,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    options: dict[str, Any] = {"lengths": lengths, "causal": causal, "blocks": blocks}
    seen = visible(lengths, S, T, causal=causal)
    if masked:
        options["mask"] = normal(B, 1, S, T, seed=seed + 3) > 0
        seen = seen & options["mask"]
    require_close(ours(q, k, v, 0.3, **options), exact(q, k, v, 0.3, seen=seen))
    if blocks.m >= S:
        require_close(ours(q, k, v, 0.3, split=3, **options), exact(q, k, v, 0.3, seen=seen))


@pytest.mark.parametrize(
    ("shapes", "options", "said"),
    [
        (((1, 1, 4, 264), (1, 1, 4, 264)), {}, "heads of 264; expected 1 to 256"),
        (((1, 3, 4, 8), (1, 2, 4, 8)), {}, r"keys of \(1, 2, 4, 8\)"),
        (((1, 2, 4, 8), (1, 2, 6, 8)), {"mask": torch.ones(1, 1, 4, 5)}, r"a mask of \(1, 1, 4, 5\)"),
        (((1, 2, 40, 8), (1, 2, 40, 8)), {"split": 2}, "40 queries in one block of 16"),
    ],
)
def test_what_does_not_fit_is_refused(shapes: Any, options: dict[str, Any], said: str) -> None:
    q, k = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(InputError, match=said):
        ours(q, k, k, 1.0, **options)
