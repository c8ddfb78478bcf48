"""Compare the product of float32 rows and a packed weight with numpy's in float64, on every instruction set."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from native_kernels import Case
from transom.runtime.native.library import NativeLibrary
from transom.runtime.native.records import (
    F32,
    GELU,
    LAYER_NORM,
    NONE,
    POSITIONS,
    TANH,
    TOKENS,
    Linear,
)

Floats = NDArray[np.float32]
# (rows, k, n): one of each, parts of a panel, of a tile and of a block of k, rows 4096 bytes apart, several tasks of
# rows and of columns.
SIZES = [(1, 1, 1), (3, 7, 5), (5, 400, 31), (13, 385, 65), (12, 768, 64), (25, 2048, 40), (140, 130, 400), (61, 3, 97)]


def floats(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def close(k: int) -> dict[str, float]:
    """A chain of k products of values around 1: k roundings, in float32, of partial sums that grow to some sqrt(k)."""
    return {"rtol": 0.0, "atol": 2.0**-22 * (k + 8)}


def product(
    kernels: NativeLibrary,
    x: Floats,
    weight: NDArray[Any],
    place: str = "end",
    threads: int = 1,
    transposed: bool = False,
) -> Floats:
    """Return x (rows, k) times a weight (k, n), or (n, k) where transposed."""
    case = Case(kernels, place, threads)
    rows, n = len(x), weight.shape[0 if transposed else 1]
    out = case.out((rows, n))
    linear = Linear(
        rows=TOKENS, input=case.slot(x), row_scale=NONE, matrix=case.matrix(weight, dtype=F32, transposed=transposed),
        then=case.then(out=out),
    )  # fmt: skip
    case.run(linear, tokens=rows)
    return np.asarray(case[out])


@pytest.mark.parametrize(("rows", "k", "n"), SIZES)
def test_products_are_numpys(kernels: NativeLibrary, place: str, rows: int, k: int, n: int) -> None:
    x, weight = floats(rows, k), floats(k, n, seed=1)
    wanted = x.astype(np.float64) @ weight
    np.testing.assert_allclose(product(kernels, x, weight, place), wanted, **close(k))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_weights_come_as_they_are_stored(kernels: NativeLibrary, place: str, dtype: Any, transposed: bool) -> None:
    x, weight = floats(9, 50), floats(50, 45, seed=1).astype(dtype)
    stored = np.ascontiguousarray(weight.T) if transposed else weight
    ours = product(kernels, x, stored, place, transposed=transposed)
    assert ours.tobytes() == product(kernels, x, weight.astype(np.float32)).tobytes()
    np.testing.assert_allclose(ours, x.astype(np.float64) @ weight.astype(np.float64), **close(50))


def test_weights_lie_side_by_side(kernels: NativeLibrary, place: str) -> None:
    """Three weights in one matrix: what each gives alone, bit by bit."""
    x, parts = floats(4, 33), [floats(33, n, seed=n) for n in (19, 40, 6)]
    case = Case(kernels, place)
    matrix = case.matrix(np.zeros((33, 65), np.float32))
    panels, column = int(matrix.panels or 0), 0
    for part in parts:
        n = part.shape[1]
        kernels.pack(
            F32, 33, 65, source=case.constant(part), source_dtype=F32, stride=n, transposed=False, panels=panels,
            column=column, columns=n,
        )  # fmt: skip
        column += n
    out = case.out((4, 65))
    case.run(Linear(rows=TOKENS, input=case.slot(x), row_scale=NONE, matrix=matrix, then=case.then(out=out)), tokens=4)
    assert case[out].tobytes() == np.concatenate([product(kernels, x, part) for part in parts], 1).tobytes()


@pytest.mark.parametrize(("rows", "k", "n"), [(140, 400, 70), (3, 1000, 130), (1, 500, 1000)])
def test_threads_do_not_change_bits(kernels: NativeLibrary, rows: int, k: int, n: int) -> None:
    x, weight = floats(rows, k), floats(k, n, seed=1)
    alone = product(kernels, x, weight)
    for threads in (2, 3, 7):
        assert product(kernels, x, weight, threads=threads).tobytes() == alone.tobytes()


def test_neighbours_do_not_change_bits(kernels: NativeLibrary) -> None:
    x, weight = floats(150, 500), floats(500, 70, seed=1)
    together = product(kernels, x, weight, threads=2)
    for start, end in ((0, 1), (7, 8), (20, 22), (31, 36), (100, 150)):
        assert product(kernels, x[start:end], weight).tobytes() == together[start:end].tobytes()


def test_columns_are_finished(kernels: NativeLibrary, place: str) -> None:
    """Bias, activation, residual, sum, out and a static scale for each column, over two tasks of columns."""
    rows, k, n = 17, 70, 450
    x, weight, bias, residual = floats(rows, k), floats(k, n, seed=1) / 8, floats(n, seed=2), floats(rows, n, seed=3)
    scale = np.linspace(0.01, 0.02, n).astype(np.float32)
    case = Case(kernels, place, threads=2)
    total, out, quantized = case.out((rows, n)), case.out((rows, n)), case.out((rows, n), np.uint8)
    then = case.then(
        bias=bias, activation=TANH, residual=case.slot(residual), sum=total, out=out, quantized=quantized,
        inverse_scale=1 / scale, zero_point=100,
    )  # fmt: skip
    case.run(
        Linear(rows=POSITIONS, input=case.slot(x), row_scale=NONE, matrix=case.matrix(weight), then=then),
        positions=rows,
    )
    wanted = np.tanh(x.astype(np.float64) @ weight + bias) + residual
    np.testing.assert_allclose(case[out], wanted, rtol=0, atol=3e-6)
    assert case[total].tobytes() == case[out].tobytes()
    steps = np.clip(np.rint(case[out] * (1 / scale)) + 100, 0, 255)
    assert (case[quantized] == steps).all()


@pytest.mark.parametrize("rows", [1, 30])
def test_rows_are_finished_as_a_whole(kernels: NativeLibrary, place: str, rows: int) -> None:
    """A norm, and a scale of each row, of columns that several tasks computed."""
    k, n = 40, 410
    x, weight, gain, bias = floats(rows, k), floats(k, n, seed=1) / 6, floats(n, seed=2), floats(n, seed=3)
    x[rows // 2] = 0
    case = Case(kernels, place, threads=3)
    out, quantized, row_scale = case.out((rows, n)), case.out((rows, n), np.uint8), case.out((rows,))
    then = case.then(
        activation=GELU, norm=LAYER_NORM, epsilon=1e-5, norm_weight=gain, norm_bias=bias, out=out,
        quantized=quantized, row_scale=row_scale, zero_point=128,
    )  # fmt: skip
    case.run(
        Linear(rows=TOKENS, input=case.slot(x), row_scale=NONE, matrix=case.matrix(weight), then=then), tokens=rows
    )
    y = x.astype(np.float64) @ weight
    y = y * (1 + np.vectorize(math.erf)(y / math.sqrt(2))) / 2
    centred = y - y.mean(-1, keepdims=True)
    wanted = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * gain + bias
    np.testing.assert_allclose(case[out], wanted, rtol=0, atol=3e-5)
    np.testing.assert_allclose(case[row_scale], np.abs(case[out]).max(-1) / 127, rtol=1e-6)
    assert np.abs(case[quantized] - 128.0 - case[out] / case[row_scale][:, None]).max() < 0.501


def test_no_rows_are_no_work(kernels: NativeLibrary) -> None:
    assert product(kernels, floats(0, 5), floats(5, 3)).shape == (0, 3)
