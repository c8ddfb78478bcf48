"""Compare the kernels without products with numpy: embed, patches, prepend, select, pool, unpack."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from native_kernels import Case
from transom.runtime.native.library import NativeLibrary
from transom.runtime.native.records import (
    F16,
    F32,
    LAYER_NORM,
    NONE,
    POSITIONS,
    SEQUENCES,
    TOKENS,
    Embed,
    Patches,
    Pool,
    Prepend,
    Select,
    Unpack,
)

Floats = NDArray[np.float32]
STEP = 2e-6  # of values around 1: a rounding or two of float32


def floats(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def normalized(rows: NDArray[Any], weight: Floats, bias: Floats) -> NDArray[np.float64]:
    rows = rows.astype(np.float64)
    centred = rows - rows.mean(-1, keepdims=True)
    return np.asarray(centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias)


@pytest.mark.parametrize("n", [1, 7, 16, 513])
def test_embed_adds_rows_of_tables(kernels: NativeLibrary, place: str, n: int) -> None:
    words, types, places = floats(9, n), floats(3, n, seed=1).astype(np.float16), floats(4, n, seed=2)
    ids = np.array([[8, 0, 3, 3], [2, 0, 1, 2], [0, 1, 2, 3]], np.int32)
    case = Case(kernels, place, threads=3)
    embed = Embed(count=3, columns=n)
    for index, (table, scale) in enumerate(((words, 2.5), (types, 1.0), (places, 0.5))):
        embed.table[index] = case.constant(table, table.dtype)
        embed.dtype[index] = F16 if table.dtype == np.float16 else F32
        embed.ids[index], embed.scale[index] = case.slot(ids[index]), scale
    embed.then = case.then(out=case.out((4, n)))
    case.run(embed, tokens=4)
    wanted = 2.5 * words[ids[0]].astype(np.float64) + types[ids[1]] + 0.5 * places[ids[2]]
    np.testing.assert_allclose(case[embed.then.out], wanted, rtol=STEP, atol=STEP)


def test_embed_of_one_table_copies_bits(kernels: NativeLibrary, place: str) -> None:
    table = floats(5, 19)
    case = Case(kernels, place)
    embed = Embed(count=1, columns=19, then=case.then(out=case.out((3, 19))))
    embed.table[0], embed.dtype[0], embed.scale[0] = case.constant(table), F32, 1.0
    embed.ids[0] = case.slot(np.array([4, 4, 1], np.int32))
    case.run(embed, tokens=3)
    assert case[embed.then.out].tobytes() == table[[4, 4, 1]].tobytes()


@pytest.mark.parametrize(
    ("channels", "height", "width", "down", "across"), [(3, 8, 12, 4, 3), (1, 5, 3, 1, 1), (2, 33, 66, 33, 33)]
)
def test_patches_are_the_rows_of_a_convolution(
    kernels: NativeLibrary, place: str, channels: int, height: int, width: int, down: int, across: int
) -> None:
    images = floats(2, channels, height, width)
    rows, columns = height // down * (width // across), channels * down * across
    case = Case(kernels, place, threads=2)
    patches = Patches(
        input=case.slot(images), channels=channels, height=height, width=width, patch_height=down, patch_width=across,
        then=case.then(out=case.out((2 * rows, columns))),
    )  # fmt: skip
    case.run(patches, patches=2 * rows, sequences=2)
    cut = images.reshape(2, channels, height // down, down, width // across, across).transpose(0, 2, 4, 1, 3, 5)
    assert case[patches.then.out].tobytes() == np.ascontiguousarray(cut).tobytes()


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("position", [True, False])
def test_prepend_puts_a_row_before_each_image(kernels: NativeLibrary, place: str, first: bool, position: bool) -> None:
    n, count = 37, 4
    tokens = count + first
    rows, row, places = floats(2, count, n), floats(1, n, seed=1), floats(tokens, n, seed=2)
    case = Case(kernels, place)
    prepend = Prepend(
        input=case.slot(rows), columns=n, patches=count, first=case.constant(row) if first else None,
        position=case.constant(places) if position else None, then=case.then(out=case.out((2 * tokens, n))),
    )  # fmt: skip
    case.run(prepend, tokens=2 * tokens, sequences=2, patches=2 * count)
    wanted = np.concatenate([np.stack([row, row]), rows], 1) if first else rows
    wanted = wanted + places if position else wanted
    assert case[prepend.then.out].tobytes() == wanted.tobytes()


@pytest.mark.parametrize("n", [1, 16, 600])
def test_select_takes_rows_by_index_and_normalises_them(kernels: NativeLibrary, place: str, n: int) -> None:
    rows, weight, bias = floats(6, n), floats(n, seed=1), floats(n, seed=2)
    case = Case(kernels, place, threads=2)
    select = Select(
        rows=POSITIONS, input=case.slot(rows), index=case.slot(np.array([5, 0, 5], np.int32)), columns=n,
        then=case.then(
            norm=LAYER_NORM, epsilon=1e-5, norm_weight=weight, norm_bias=bias, out=case.out((3, n)),
        ),
    )  # fmt: skip
    case.run(select, positions=3)
    wanted = normalized(rows[[5, 0, 5]], weight, bias)
    np.testing.assert_allclose(case[select.then.out], wanted, rtol=1e-5, atol=1e-5)


def test_select_quantises_all_rows_without_writing_them(kernels: NativeLibrary, place: str) -> None:
    """Of two rows, scaled by 2 for the first column and 100 for the others, around 128; rounded half to even."""
    rows = np.array([[0.25, -0.5, 9.0], [0.75, 0.015, -9.0]], np.float32)
    case = Case(kernels, place)
    select = Select(
        rows=TOKENS, input=case.slot(rows), index=NONE, columns=3,
        then=case.then(
            quantized=case.out((2, 3), np.uint8), inverse_scale=np.array([2, 100, 100], np.float32), zero_point=128
        ),
    )  # fmt: skip
    case.run(select, tokens=2)
    assert case[select.then.quantized].tolist() == [[128, 78, 255], [130, 130, 0]]


def test_rows_are_added_to_in_place(kernels: NativeLibrary, place: str) -> None:
    """The residual and the result are one place: y = rows + y."""
    rows, before = floats(3, 700), floats(3, 700, seed=1)
    case = Case(kernels, place)
    there = case.slot(before, writable=True)
    select = Select(
        rows=TOKENS, input=case.slot(rows), index=NONE, columns=700, then=case.then(residual=there, out=there)
    )
    case.run(select, tokens=3)
    assert case[there].tobytes() == (rows + before).tobytes()


@pytest.mark.parametrize("n", [1, 20, 1100])
def test_pool_is_the_mean_of_rows_that_count(kernels: NativeLibrary, place: str, n: int) -> None:
    rows = floats(9, n)
    case = Case(kernels, place, threads=3)
    pool = Pool(input=case.slot(rows), columns=n, then=case.then(out=case.out((4, n))))
    case.run(pool, lengths=[4, 2, 0, 3], key_valid=[1, 0, 1, 1, 0, 0, 1, 1, 1])
    wanted = [rows[[0, 2, 3]].mean(0), np.zeros(n), np.zeros(n), rows[6:].mean(0)]
    np.testing.assert_allclose(case[pool.then.out], wanted, rtol=STEP, atol=STEP)
    everything = Case(kernels, place)
    pool = Pool(input=everything.slot(rows), columns=n, then=everything.then(out=everything.out((2, n))))
    everything.run(pool, lengths=[4, 5])
    wanted = [rows[:4].mean(0), rows[4:].mean(0)]
    np.testing.assert_allclose(everything[pool.then.out], wanted, rtol=STEP, atol=STEP)


@pytest.mark.parametrize("heads", [0, 3])
@pytest.mark.parametrize("column", [None, [1, 2, 0, 4, 5]])
@pytest.mark.parametrize("width", [1, 2000])
def test_unpack_gives_rows_back_where_they_stood(
    kernels: NativeLibrary, place: str, heads: int, column: list[int] | None, width: int
) -> None:
    """Columns 2 .. 2 + 3 width of wider rows; sequences of 2, 0 and 3 rows in arrays of 6."""
    columns = 3 * width
    rows = floats(5, columns + 4)
    case = Case(kernels, place, threads=2)
    shape = (3, heads, 6, width) if heads else (3, 6, columns)
    unpack = Unpack(
        input=case.slot(rows), stride=columns + 4, column=2, columns=columns, heads=heads, out=case.out(shape)
    )
    case.run(unpack, lengths=[2, 0, 3], column=column, padded_length=6)
    wanted = np.zeros((3, 6, columns), np.float32)
    for row, (sequence, position) in enumerate(zip([0, 0, 2, 2, 2], column or [0, 1, 0, 1, 2], strict=True)):
        wanted[sequence, position] = rows[row, 2:-2]
    if heads:
        wanted = wanted.reshape(3, 6, heads, width).transpose(0, 2, 1, 3)
    np.testing.assert_array_equal(case[unpack.out], wanted)


def test_nothing_is_written_for_no_rows(kernels: NativeLibrary, place: str) -> None:
    case = Case(kernels, place, threads=2)
    out = case.out((1, 5))
    rows = case.slot(floats(1, 5))
    case.run(
        Select(rows=SEQUENCES, input=rows, index=NONE, columns=5, then=case.then(out=out)),
        Pool(input=rows, columns=5, then=case.then(out=out)),
        Prepend(input=rows, columns=5, patches=1, first=None, position=None, then=case.then(out=out)),
        Unpack(input=rows, stride=5, columns=5, out=out),
        lengths=[],
        padded_length=3,
    )
    assert np.isnan(case[out]).all()


def test_rows_have_the_same_bits_on_any_number_of_threads(kernels: NativeLibrary) -> None:
    """And beside any others: 70 rows at once on 1, 2 and 5 threads, and row 41 alone."""
    rows, weight, bias = floats(70, 450), floats(450, seed=1), floats(450, seed=2)

    def select(some: Floats, threads: int) -> Floats:
        case = Case(kernels, threads=threads)
        out = case.out(some.shape)
        then = case.then(norm=LAYER_NORM, epsilon=1e-5, norm_weight=weight, norm_bias=bias, out=out)
        case.run(Select(rows=TOKENS, input=case.slot(some), index=NONE, columns=450, then=then), tokens=len(some))
        return case[out]

    alone = select(rows, 1)
    assert select(rows, 2).tobytes() == alone.tobytes()
    assert select(rows, 5).tobytes() == alone.tobytes()
    assert select(rows[41:42], 1).tobytes() == alone[41:42].tobytes()
