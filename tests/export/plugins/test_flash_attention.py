"""The fused attention kernel's numbers, under Triton's interpreter, against PyTorch in float64.

With TRANSOM_KERNEL_DEVICE=cuda the same calls run on a GPU, compiled and launched by Triton.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'transom[plugin]'")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_reference import DEVICE, ROUNDOFF, exact, normal, require_close, visible
from transom.export.plugins.kernel_spec import TileSizes, Variant, launches
from transom.runtime.errors import InputError

SMALL = TileSizes(16, 16)
if DEVICE != "cpu" and not torch.cuda.is_available():
    pytest.skip("PyTorch here has no CUDA: install a torch that has, pip install torch", allow_module_level=True)


def ours(
    q: Any, k: Any, v: Any, scale: float, *, tiles: TileSizes = SMALL, split: int = 0, **options: Any
) -> torch.Tensor:
    """What the kernel writes, into NaN: an element that it leaves out shows."""
    B, H, S, D = q.shape
    q, k, v = (tensor.to(DEVICE) for tensor in (q, k, v))
    output = torch.full_like(q, torch.nan)
    if split:
        options["workspaces"] = (torch.full((split, 2, B, H, S), torch.nan), torch.full((split, B, H, S, D), torch.nan))
    for name, option in options.items():
        if isinstance(option, tuple):
            options[name] = tuple(tensor.to(DEVICE) for tensor in option)
        elif isinstance(option, torch.Tensor):
            options[name] = option.to(DEVICE)
    for launch in launches(q, k, v, output, scale=scale, tiles=tiles, **options):
        launch.run()
    return output.cpu()


@pytest.mark.parametrize("dtype", ROUNDOFF, ids=str)
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


@pytest.mark.parametrize("axes", ["", "b", "h", "m", "bm", "hm", "bhm", "n"])
def test_masks_broadcast(axes: str) -> None:
    """One mask for everybody, per row, per head, per query; boolean and added."""
    q, k, v = (normal(2, 3, n, 16, seed=seed) for seed, n in enumerate((18, 20, 20)))
    full = dict(zip("bhmn", (2, 3, 18, 20), strict=True))
    shape = [size if axis in axes or (axis == "n" and axes != "n") else 1 for axis, size in full.items()]
    mask = normal(*shape, seed=3)
    require_close(ours(q, k, v, 0.25, mask=mask > -1), exact(q, k, v, 0.25, seen=(mask > -1).expand(*full.values())))
    require_close(ours(q, k, v, 0.25, mask=mask), exact(q, k, v, 0.25, added=mask))


@pytest.mark.filterwarnings("ignore:overflow")  # numpy's: finfo.min in base 2 is -inf, and exp2 of it is zero
def test_the_least_finite_number_is_no_infinity() -> None:
    """A query whose keys are all at finfo.min sees them all alike, as softmax has it, and at -inf none."""
    q, k, v = (normal(1, 1, 16, 16, seed=seed) for seed in range(3))
    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 5, :], mask[..., 6, :], mask[..., 7, 3:] = torch.finfo().min, -torch.inf, torch.finfo().min
    found = ours(q, k, v, 0.25, mask=mask)
    torch.testing.assert_close(found[0, 0, 5], v[0, 0].mean(0), rtol=1e-6, atol=1e-6)
    assert not found[0, 0, 6].any()
    require_close(found[:, :, 7:], exact(q, k, v, 0.25, added=mask)[:, :, 7:])


@pytest.mark.parametrize("split", [0, 2])
@pytest.mark.parametrize("dtype", ROUNDOFF, ids=str)
@pytest.mark.parametrize("size", [1e-2, 1e-6])
def test_an_int8_cache(dtype: torch.dtype, split: int, size: float) -> None:
    """Against the very integers times their scales, small values too: no more than the products' own rounding."""
    q = normal(2, 4, 1, 32, dtype=dtype)
    scales = (normal(2, 2, 50, seed=1).abs() / 50 + 1e-3, size * (1 + normal(2, 2, 50, seed=2).abs()))
    k, v = ((20 * normal(2, 2, 50, 32, seed=seed)).round().clamp(-127, 127).to(torch.int8) for seed in (3, 4))
    found = ours(q, k, v, 0.2, scales=scales, split=split)
    values = v * scales[1][..., None]
    smallest = 0.5 * 2**-24 / float(values.abs().max()) if dtype == torch.float16 else 0.0  # FP16 ends at 2^-24
    expected = exact(q, k * scales[0][..., None], values, 0.2)
    error = float((found.double() - expected).abs().max() / expected.abs().max())
    unit, units = ROUNDOFF[dtype]
    assert error <= unit * (units + 2) + 4 * smallest, f"{error:.2e}"


def test_one_scale_per_head_is_a_stride_of_nothing() -> None:
    q = normal(1, 2, 1, 16)
    k, v = (torch.full((1, 2, 20, 16), number, dtype=torch.int8) for number in (3, 100))
    scale = torch.tensor([0.5, 0.25])[None, :, None].expand(1, 2, 20)
    found = ours(q, k, v, 1.0, scales=(scale, scale))
    assert found[0, 0].unique().tolist() == [50.0]
    assert found[0, 1].unique().tolist() == [25.0]


@pytest.mark.parametrize(("size", "logits"), [(1e-20, 0.0), (1.0, 20.0), (30.0, 600.0), (1e4, 2e5), (3e18, 6e19)])
def test_huge_and_tiny_logits(size: float, logits: float) -> None:
    """From nothing but ties to one key that takes all."""
    q, k, v = (normal(1, 1, 18, 16, seed=seed) for seed in range(3))
    assert float((size * q @ k.transpose(2, 3)).abs().max()) <= max(logits, 1.0)
    require_close(ours(size * q, k, v, 1.0), exact(size * q, k, v, 1.0), min(logits, 600.0))


def test_ones_by_hand() -> None:
    """Equal keys: the mean of the values that a query may see. Lower right, 2 queries, and 3 of 4 keys are there."""
    q, k = torch.ones(1, 1, 2, 4), torch.ones(1, 1, 4, 4)
    v = torch.tensor([1.0, 3.0, 8.0, torch.nan])[None, None, :, None].expand(1, 1, 4, 4).contiguous()
    lengths = torch.tensor([3], dtype=torch.int32)
    assert ours(q, k, v, 1.0, causal=True, lengths=lengths)[0, 0, :, 0].tolist() == [2.0, 4.0]
    for length in (0, -7):
        lengths[0] = length
        assert not ours(q, k, v, 1.0, causal=True, lengths=lengths).any()
    lengths[0] = 99  # more than there is room for: what is there
    v[..., 3, :] = 4.0
    assert ours(q, k, v, 1.0, lengths=lengths)[0, 0, :, 0].tolist() == [4.0, 4.0]


@pytest.mark.parametrize("split", [0, 2])
def test_causality_counts_from_lengths_beyond_the_room(split: int) -> None:
    """A length of T + 3 is as if three keys more had been there: query i sees up to T + 3 - S + i, of what there is."""
    S, T, lengths = 6, 16, [16, 19, 25, 40]
    q, k, v = (normal(4, 2, n, 16, seed=seed) for seed, n in enumerate((S, T, T)))
    found = ours(q, k, v, 0.25, lengths=torch.tensor(lengths, dtype=torch.int32), causal=True, split=split)
    require_close(found, exact(q, k, v, 0.25, seen=visible(lengths, S, T, causal=True)))


def test_nothing_to_compute() -> None:
    k = normal(1, 1, 5, 16)
    assert launches(k[:, :, :0], k, k, k[:, :, :0], tiles=SMALL) == []
    assert not ours(k, k[:, :, :0], k[:, :, :0], 1.0).any()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 2),
    heads=st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 2)]),
    S=st.integers(1, 40),
    T=st.integers(1, 70),
    D=st.integers(1, 48),
    causal=st.booleans(),
    masked=st.booleans(),
    tiles=st.sampled_from([TileSizes(16, 16), TileSizes(16, 32), TileSizes(32, 16)]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    seed=st.integers(0, 99),
)
def test_any_sizes(
    B: int,
    heads: tuple[int, int],
    S: int,
    T: int,
    D: int,
    causal: bool,
    masked: bool,
    tiles: TileSizes,
    dtype: Any,
    seed: int,
) -> None:
    H, shared = heads
    q = normal(B, H, S, D, seed=seed, dtype=dtype)
    k, v = (normal(B, shared, T, D, seed=seed + n, dtype=dtype) for n in (1, 2))
    lengths = torch.randint(0, T + 1, (B,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    for row, length in enumerate(lengths.tolist()):
        k[row, :, length:], v[row, :, length:] = torch.nan, torch.nan
    options: dict[str, Any] = {"lengths": lengths, "causal": causal, "tiles": tiles}
    seen = visible(lengths, S, T, causal=causal)
    if masked:
        options["mask"] = normal(B, 1, S, T, seed=seed + 3) > 0
        seen = seen & options["mask"]
    expected = exact(q, torch.nan_to_num(k), v, 0.3, seen=seen)
    for split in (0, 3) if S <= 20 else (0,):  # scores of at most 0.3 times the products of 48 normals
        require_close(ours(q, k, v, 0.3, split=split, **options), expected, scores=10.0)


@pytest.mark.parametrize(
    ("shapes", "options", "said"),
    [
        (((1, 1, 4, 264), (1, 1, 4, 264)), {}, "heads of 264; expected 1 to 256"),
        (((1, 3, 4, 8), (1, 2, 4, 8)), {}, r"keys of \(1, 2, 4, 8\)"),
        (((1, 2, 4, 8), (1, 2, 6, 8)), {"mask": torch.ones(1, 1, 4, 5)}, r"a mask of \(1, 1, 4, 5\)"),
        (
            ((1, 2, 4, 8), (1, 2, 6, 8)),
            {"lengths": torch.ones(1)},
            r"lengths of \(1,\) in float32; expected \(1,\) in int32",
        ),
        (((1, 2, 4, 8), (1, 2, 6, 8)), {"bias": torch.ones(1, 4, 6)}, r"a bias of \(1, 4, 6\); expected \(2, 4, 6\)"),
        (
            ((1, 2, 4, 8), (1, 2, 6, 8)),
            {"workspaces": (torch.ones(2, 2, 1, 2, 4), torch.ones(2, 1, 2, 4))},
            "workspaces of",
        ),
        (((1, 2, 4, 8), (1, 2, 6, 8)), {"precision": "fast"}, "precision is 'fast'; expected ieee or tf32"),
        (((2, 4, 8), (1, 2, 6, 8)), {}, r"tensors of \[3, 4, 4, 3\] axes"),
    ],
)
def test_what_does_not_fit_is_refused(shapes: Any, options: dict[str, Any], said: str) -> None:
    q, k = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(InputError, match=said):
        launches(q, k, k, torch.zeros_like(q), tiles=SMALL, **options)


def test_other_dtypes_and_views_are_refused() -> None:
    q = torch.zeros(1, 2, 4, 8)
    with pytest.raises(
        InputError, match="keys of float16, values of float16, an output of float32 for float32 queries"
    ):
        launches(q, q.half(), q.half(), q, tiles=SMALL)
    with pytest.raises(InputError, match="queries of float64; expected float32, float16, bfloat16"):
        launches(q.double(), q.double(), q.double(), q.double(), tiles=SMALL)
    with pytest.raises(InputError, match="a last axis that is not contiguous"):
        launches(q.transpose(2, 3), q.transpose(2, 3), q.transpose(2, 3), q.transpose(2, 3), tiles=SMALL)
    with pytest.raises(InputError, match="8 heads in groups of 3"):
        Variant("fp16", 64, heads=8, groups=3)
