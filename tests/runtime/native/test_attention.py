"""Compare attention with numpy in float64: packed sequences, caches, cross attention, and both arithmetics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from native_kernels import Case
from transom.runtime.native.library import NativeLibrary
from transom.runtime.native.records import AVX512_BF16, IN_BF16, IN_F32, NONE, Attention

Floats = NDArray[np.float32]
F32_STEP = 3e-6  # of sums of weights that add up to 1, of values around 1
BF16_STEP = 4e-2  # query, key, weight and value are each rounded to 8 bits


def floats(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@dataclass
class Given:
    """The rows of sequences (tokens, [query | key | value]) and what they attend to."""

    lengths: list[int]
    heads: int = 2
    key_heads: int = 2
    dim: int = 8
    causal: bool = False
    arithmetic: int = IN_F32
    valid: list[int] | None = None
    past: list[int] | None = None
    capacity: int = 0
    key_cache: Floats | None = None  # (sequences, key_heads, capacity, dim)
    value_cache: Floats | None = None
    cross_key: Floats | None = None  # (sequences, key_heads, cross_length, dim)
    cross_value: Floats | None = None
    cross_valid: NDArray[np.uint8] | None = None  # (sequences, cross_length)
    rows: Floats = field(default_factory=lambda: np.zeros((0, 0), np.float32))

    def __post_init__(self) -> None:
        if not self.rows.size:
            self.rows = floats(sum(self.lengths), (self.heads + 2 * self.key_heads) * self.dim, seed=len(self.lengths))

    @property
    def scale(self) -> float:
        return self.dim**-0.5 * 1.25


@dataclass
class Got:
    out: Floats
    key_cache: Floats | None
    value_cache: Floats | None


def attend(kernels: NativeLibrary, given: Given, place: str = "end", threads: int = 1, **then: Any) -> Got:
    """Run the kernel over rows that hold query, key and value side by side."""
    case = Case(kernels, place, threads)
    n, width = given.heads * given.dim, given.rows.shape[1]
    rows, out = case.slot(given.rows), case.out((len(given.rows), n))
    of_cache = [
        NONE if cache is None else case.slot(cache, writable=True) for cache in (given.key_cache, given.value_cache)
    ]
    of_cross = [NONE if cross is None else case.slot(cross) for cross in (given.cross_key, given.cross_value)]
    own = NONE if given.cross_key is not None else rows
    attention = Attention(
        query=rows, key=own, value=own, query_stride=width, key_stride=width, value_stride=width,
        query_column=0, key_column=n, value_column=n + given.key_heads * given.dim,
        heads=given.heads, key_heads=given.key_heads, head_dim=given.dim, scale=given.scale, causal=int(given.causal),
        key_cache=of_cache[0], value_cache=of_cache[1], cross_key=of_cross[0], cross_value=of_cross[1],
        arithmetic=given.arithmetic, then=case.then(out=out),
    )  # fmt: skip
    cross_length = 0 if given.cross_key is None else given.cross_key.shape[2]
    past = given.past or [0] * len(given.lengths)
    keys = max([cross_length, *(a + b for a, b in zip(given.lengths, past, strict=True))])
    case.scores(attention, keys)
    case.run(
        attention, lengths=given.lengths, key_valid=given.valid, past=given.past, capacity=given.capacity,
        cross_length=cross_length, cross_valid=given.cross_valid,
    )  # fmt: skip
    caches = [None if slot == NONE else case[slot] for slot in of_cache]
    return Got(np.asarray(case[out]), caches[0], caches[1])


def expected(given: Given) -> NDArray[np.float64]:
    """Return what transom.h says, in float64, one row and one head after the other."""
    n, kn, dim = given.heads * given.dim, given.key_heads * given.dim, given.dim
    rows = given.rows.astype(np.float64)
    out, first = np.zeros((len(rows), n)), 0
    for sequence, length in enumerate(given.lengths):
        own = rows[first : first + length]
        for head in range(given.heads):
            group = head // (given.heads // given.key_heads)
            keys = own[:, n + group * dim :][:, :dim]
            values = own[:, n + kn + group * dim :][:, :dim]
            seen = np.ones((length, length), bool) if given.valid is None else np.tile(
                np.array(given.valid[first : first + length], bool), (length, 1)
            )  # fmt: skip
            if given.causal:
                seen = np.tril(seen)
            if given.key_cache is not None and given.value_cache is not None and given.past is not None:
                past = given.past[sequence]
                keys = np.concatenate([given.key_cache[sequence, group, :past], keys])
                values = np.concatenate([given.value_cache[sequence, group, :past], values])
                seen = np.tril(np.ones((length, past + length), bool), past)
            if given.cross_key is not None and given.cross_value is not None:
                keys = given.cross_key[sequence, group].astype(np.float64)
                values = given.cross_value[sequence, group].astype(np.float64)
                valid = np.ones(len(keys), bool) if given.cross_valid is None else given.cross_valid[sequence] != 0
                seen = np.tile(valid, (length, 1))
            scores = np.where(seen, own[:, head * dim :][:, :dim] @ keys.T * given.scale, -np.inf)
            top = scores.max(-1, keepdims=True, initial=-np.inf)
            weights = np.where(seen, np.exp(scores - np.where(np.isfinite(top), top, 0)), 0)
            total = weights.sum(-1, keepdims=True)
            out[first : first + length, head * dim : (head + 1) * dim] = (
                weights / np.where(total > 0, total, 1) @ values
            )
        first += length
    return out


def check(kernels: NativeLibrary, given: Given, place: str = "end", threads: int = 1) -> Got:
    got = attend(kernels, given, place, threads)
    in_bf16 = given.arithmetic == IN_BF16 and kernels.isa == AVX512_BF16
    np.testing.assert_allclose(got.out, expected(given), rtol=0, atol=BF16_STEP if in_bf16 else F32_STEP)
    return got


def cached(lengths: list[int], past: list[int], capacity: int, **fields: Any) -> Given:
    """Caches that hold NaN wherever no position is."""
    given = Given(lengths, past=past, capacity=capacity, **fields)
    shape = (len(lengths), given.key_heads, capacity, given.dim)
    given.key_cache, given.value_cache = floats(*shape, seed=8), floats(*shape, seed=9)
    for sequence, positions in enumerate(past):
        given.key_cache[sequence, :, positions:] = np.nan
        given.value_cache[sequence, :, positions:] = np.nan
    return given


@pytest.mark.parametrize("arithmetic", [IN_F32, IN_BF16])
@pytest.mark.parametrize("dim", [1, 5, 8, 32, 64, 80, 128])
def test_every_head_dim(kernels: NativeLibrary, place: str, dim: int, arithmetic: int) -> None:
    check(kernels, Given([37, 1, 14], dim=dim, arithmetic=arithmetic), place)


@pytest.mark.parametrize("arithmetic", [IN_F32, IN_BF16])
@pytest.mark.parametrize("length", [1, 2, 12, 13, 16, 33, 128, 129, 300])
@pytest.mark.parametrize("causal", [False, True])
def test_every_length(kernels: NativeLibrary, place: str, length: int, causal: bool, arithmetic: int) -> None:
    check(kernels, Given([length], dim=16, causal=causal, arithmetic=arithmetic), place)


@pytest.mark.parametrize("arithmetic", [IN_F32, IN_BF16])
@pytest.mark.parametrize("causal", [False, True])
def test_rows_that_do_not_count(kernels: NativeLibrary, place: str, causal: bool, arithmetic: int) -> None:
    """Masked keys, in the middle and at both ends; in the last sequence nothing is left to attend to."""
    lengths = [20, 5, 3]
    valid = [0, 0, 1, 0] + [1] * 15 + [0] + [1, 1, 0, 1, 1] + [0, 0, 0]
    got = check(kernels, Given(lengths, valid=valid, causal=causal, arithmetic=arithmetic), place)
    assert not got.out[25:].any()
    assert got.out[:2].any() != causal


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1), (15, 3)])
def test_grouped_heads(kernels: NativeLibrary, place: str, heads: tuple[int, int]) -> None:
    check(kernels, Given([9, 26], heads=heads[0], key_heads=heads[1], causal=True), place, threads=2)


@pytest.mark.parametrize("arithmetic", [IN_F32, IN_BF16])
@pytest.mark.parametrize(
    ("lengths", "past", "capacity"),
    [([1], [0], 1), ([1, 1, 1], [130, 0, 7], 131), ([40, 3], [0, 0], 64), ([5, 1, 20], [125, 3, 0], 140)],
)
def test_caches_are_written_and_read_in_place(
    kernels: NativeLibrary, place: str, lengths: list[int], past: list[int], capacity: int, arithmetic: int
) -> None:
    given = cached(lengths, past, capacity, heads=4, key_heads=2, dim=16, arithmetic=arithmetic)
    got = check(kernels, given, place, threads=3)
    first, n = 0, 4 * 16
    for sequence, (length, positions) in enumerate(zip(lengths, past, strict=True)):
        rows = given.rows[first : first + length, n:].reshape(length, 2, 2, 16)  # (rows, key or value, head, dim)
        for which, (before, after) in enumerate(
            ((given.key_cache, got.key_cache), (given.value_cache, got.value_cache))
        ):
            assert before is not None
            assert after is not None
            wanted = before[sequence].copy()
            wanted[:, positions : positions + length] = rows[:, which].transpose(1, 0, 2)
            assert after[sequence].tobytes() == wanted.tobytes()
        first += length


@pytest.mark.parametrize("arithmetic", [IN_F32, IN_BF16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("keys", [1, 17, 200])
def test_cross_attention(kernels: NativeLibrary, place: str, keys: int, masked: bool, arithmetic: int) -> None:
    """Of 1 row and of 19 rows; the second sequence of the masked ones has nothing to attend to."""
    given = Given([1, 19], heads=4, key_heads=4, arithmetic=arithmetic)
    given.cross_key, given.cross_value = floats(2, 4, keys, 8, seed=5), floats(2, 4, keys, 8, seed=6)
    if masked:
        given.cross_valid = np.zeros((2, keys), np.uint8)
        given.cross_valid[0, keys // 2 :] = 1
    got = check(kernels, given, place)
    assert got.out[0].any()
    assert got.out[1:].any() != masked


def test_no_keys_give_zeros(kernels: NativeLibrary, place: str) -> None:
    given = Given([2])
    given.cross_key = given.cross_value = np.zeros((1, 2, 0, 8), np.float32)
    assert not attend(kernels, given, place).out.any()


@pytest.mark.parametrize("arithmetic", [IN_F32, IN_BF16])
def test_threads_do_not_change_bits(kernels: NativeLibrary, arithmetic: int) -> None:
    for given in (
        Given([150, 3, 40], dim=32, causal=True, arithmetic=arithmetic),
        cached([30], [9], 64, heads=4, key_heads=1, dim=16, arithmetic=arithmetic),
    ):
        alone = attend(kernels, given)
        for threads in (2, 5):
            assert attend(kernels, given, threads=threads).out.tobytes() == alone.out.tobytes()


@pytest.mark.parametrize("arithmetic", [IN_F32, IN_BF16])
def test_neighbours_do_not_change_bits(kernels: NativeLibrary, arithmetic: int) -> None:
    lengths = [7, 140, 1, 33]
    given = Given(lengths, dim=24, arithmetic=arithmetic)
    together, first = attend(kernels, given, threads=2).out, 0
    for length in lengths:
        rows = given.rows[first : first + length]
        alone = attend(kernels, Given([length], dim=24, arithmetic=arithmetic, rows=rows)).out
        assert alone.tobytes() == together[first : first + length].tobytes()
        first += length


@pytest.mark.parametrize("arithmetic", [IN_F32, IN_BF16])
def test_a_step_has_the_bits_of_the_whole(kernels: NativeLibrary, arithmetic: int) -> None:
    """Rows of a decoder one at a time, five at a time, and all at once: with caches and as causal sequences."""
    whole = Given([145], dim=16, causal=True, arithmetic=arithmetic)
    together = attend(kernels, whole).out
    for step in (1, 5, 145):
        given = cached([step], [0], 150, dim=16, arithmetic=arithmetic)
        for start in range(0, 145, step):
            given.past, given.rows = [start], whole.rows[start : start + step]
            got = attend(kernels, given)
            assert got.out.tobytes() == together[start : start + step].tobytes(), (step, start)
            given.key_cache, given.value_cache = got.key_cache, got.value_cache


def test_large_scores_do_not_overflow(kernels: NativeLibrary) -> None:
    """Scores up to 1600: differences beyond 88 weigh nothing; others are off by a rounding of the score itself."""
    given = Given([40], dim=16)
    given.rows[:, : 2 * 2 * 16] *= 20
    np.testing.assert_allclose(attend(kernels, given).out, expected(given), rtol=0, atol=1600 * 2.0**-23)


@pytest.mark.parametrize("dynamic", [False, True])
def test_rows_are_quantised(kernels: NativeLibrary, place: str, dynamic: bool) -> None:
    """By static scales of the columns of each head, or by the row's largest value over all heads."""
    given, n = Given([21, 4], heads=5, key_heads=5, dim=10), 50
    plain = attend(kernels, given).out
    case = Case(kernels, place, threads=2)
    rows, out, quantized = case.slot(given.rows), case.out((25, n)), case.out((25, n), np.uint8)
    scale = np.linspace(0.01, 0.03, n).astype(np.float32)
    then = case.then(out=out, quantized=quantized, zero_point=128 if dynamic else 90)
    if dynamic:
        then.row_scale = case.out((25,))
    else:
        then.inverse_scale = case.constant(1 / scale)
    attention = Attention(
        query=rows, key=rows, value=rows, query_stride=150, key_stride=150, value_stride=150, key_column=50,
        value_column=100, heads=5, key_heads=5, head_dim=10, scale=given.scale, key_cache=NONE, value_cache=NONE,
        cross_key=NONE, cross_value=NONE, then=then,
    )  # fmt: skip
    case.scores(attention, 21)
    case.run(attention, lengths=given.lengths)
    assert case[out].tobytes() == plain.tobytes()
    if dynamic:
        np.testing.assert_allclose(case[then.row_scale], np.abs(plain).max(-1) / 127, rtol=1e-6)
        assert np.abs(case[quantized] - 128.0 - plain / case[then.row_scale][:, None]).max() < 0.501
    else:
        assert (case[quantized] == np.clip(np.rint(plain * (1 / scale)) + 90, 0, 255)).all()
