"""Compare the linear kernel of uint8 rows and int8 weights with numpy's integer sums, its epilogue with float64."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from native_kernels import Case
from transom.runtime.native.library import NativeLibrary
from transom.runtime.native.records import (
    GELU,
    GELU_TANH,
    IDENTITY,
    L2_NORM,
    LAYER_NORM,
    NONE,
    QUICK_GELU,
    RELU,
    RMS_NORM,
    S8,
    SILU,
    TANH,
    TOKENS,
    Linear,
    Matrix,
)

Array = NDArray[Any]
# Rows, k, n: one of each; k that fills no group of 4 or 2; n beside a panel of 64 and a vector of 16 or 8.
SIZES = [(1, 1, 1), (1, 3, 5), (2, 4, 64), (5, 7, 65), (6, 64, 130), (7, 127, 3), (13, 770, 17), (3, 4096, 33)]
ERF = np.vectorize(math.erf)
ACTIVATIONS = {
    IDENTITY: lambda y: y,
    RELU: lambda y: np.maximum(y, 0),
    GELU: lambda y: y * (1 + ERF(y / math.sqrt(2))) / 2,
    GELU_TANH: lambda y: y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))) / 2,
    QUICK_GELU: lambda y: y / (1 + np.exp(-1.702 * y)),
    SILU: lambda y: y / (1 + np.exp(-y)),
    TANH: np.tanh,
}


def operands(rows: int, k: int, n: int, seed: int = 0) -> tuple[Array, Array]:
    """Return rows (rows, k) uint8 and a weight (k, n) int8, of all their values."""
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (rows, k), np.uint8), random.integers(-128, 128, (k, n), np.int8)


def floats(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def sums_of(x: Array, weight: Array, zero_point: int) -> NDArray[np.int64]:
    return np.asarray((x.astype(np.int64) - zero_point) @ weight.astype(np.int64))


def linear(case: Case, x: Array, weight: Array, then: dict[str, Any], **fields: Any) -> None:
    """Run one linear; its matrix has a scale of 1 unless ``scale`` is given."""
    n = weight.shape[1]
    scale = fields.pop("scale", np.ones(n, np.float32))
    fields = {"row_scale": NONE, "zero_point": 0, "matrix": None} | fields
    fields["matrix"] = fields["matrix"] or case.matrix(weight, scale)
    case.run(Linear(rows=TOKENS, input=case.slot(x), then=case.then(**then), **fields), tokens=len(x))


@pytest.mark.parametrize(("rows", "k", "n"), SIZES)
@pytest.mark.parametrize("zero_point", [0, 77, 255])
def test_sums_are_those_of_integers(
    kernels: NativeLibrary, place: str, rows: int, k: int, n: int, zero_point: int
) -> None:
    x, weight = operands(rows, k, n)
    case = Case(kernels, place, threads=2)
    out = case.out((rows, n))
    linear(case, x, weight, {"out": out}, zero_point=zero_point)
    assert (case[out] == sums_of(x, weight, zero_point).astype(np.float32)).all()


def test_the_largest_products_do_not_saturate(kernels: NativeLibrary) -> None:
    x = np.array([[255] * 4096, [0] * 4096], np.uint8)
    weight = np.full((4096, 2), -128, np.int8)
    weight[:, 1] = 127
    for zero_point, wanted in ((0, [[-133693440, 132648960], [0, 0]]), (255, [[0, 0], [133693440, -132648960]])):
        case = Case(kernels)
        out = case.out((2, 2))
        linear(case, x, weight, {"out": out}, zero_point=zero_point)
        assert case[out].astype(np.int64).tolist() == np.float32(wanted).astype(np.int64).tolist()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("starts", [(0, 30, 69, 70), (0, 64, 70), (0, 70)])
def test_column_sums_and_parts_of_a_weight(
    kernels: NativeLibrary, place: str, starts: tuple[int, ...], transposed: bool
) -> None:
    """Weights side by side, packed one after the other, are one weight; zeros that pad it overwrite what was there.

    Some of them fill a panel of 64 columns. 9 rows are two groups of four, or four of two, and one more.
    """
    x, weight = operands(3, 9, 70)
    case = Case(kernels, place)
    room = np.full(kernels.packed_bytes(S8, 9, 70), 0xA5, np.uint8)
    panels = case.memory.put(room, align=64, writable=True)
    sums = case.memory.put(np.zeros(70, np.int32), writable=True)
    for column, end in pairwise(starts):
        columns = end - column
        part = weight[:, column : column + columns]
        source = case.memory.put(part.T if transposed else part)
        kernels.pack(
            S8, 9, 70, source=source.ctypes.data, source_dtype=S8, stride=source.shape[1], transposed=transposed,
            panels=panels.ctypes.data, column_sum=sums.ctypes.data, column=column, columns=columns,
        )  # fmt: skip
    assert (sums == weight.astype(np.int32).sum(0)).all()
    out = case.out((3, 70))
    matrix = Matrix(k=9, n=70, dtype=S8, panels=panels.ctypes.data, column_sum=sums.ctypes.data)
    matrix.scale = case.constant(np.ones(70))
    linear(case, x, weight, {"out": out}, matrix=matrix, zero_point=3)
    assert (case[out] == sums_of(x, weight, 3)).all()


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations_over_their_range(kernels: NativeLibrary, activation: int) -> None:
    """x = 0 .. 255 against 128 and weights of 1 with 40 scales: y from -64 to 64 in steps down to 0.002."""
    scale = np.geomspace(0.002, 0.5, 40).astype(np.float32)
    case = Case(kernels)
    out = case.out((256, 40))
    x = np.arange(256, dtype=np.uint8)[:, None]
    linear(case, x, np.ones((1, 40), np.int8), {"out": out, "activation": activation}, scale=scale, zero_point=128)
    y = (x.astype(np.float64) - 128) * scale.astype(np.float64)
    assert (np.abs(case[out] - ACTIVATIONS[activation](y)) / np.maximum(np.abs(y), 1)).max() < 1e-6


@pytest.mark.parametrize("norm", [LAYER_NORM, RMS_NORM, L2_NORM])
@pytest.mark.parametrize(("rows", "n"), [(1, 1), (5, 17), (40, 200)])
def test_bias_residual_norm_and_quantised_rows(
    kernels: NativeLibrary, place: str, norm: int, rows: int, n: int
) -> None:
    x, weight = operands(rows, 33, n)
    scale = np.linspace(0.001, 0.002, n, dtype=np.float32)
    bias, residual, gain, shift = floats(n), floats(rows, n, seed=1), floats(n, seed=2), floats(n, seed=3)
    inverse = np.linspace(20, 60, n, dtype=np.float32)
    case = Case(kernels, place, threads=2)
    total, out, quantized = case.out((rows, n)), case.out((rows, n)), case.out((rows, n), np.uint8)
    weights = {} if norm == L2_NORM else {"norm_weight": gain} | ({"norm_bias": shift} if norm == LAYER_NORM else {})
    then = {"bias": bias, "activation": GELU, "residual": case.slot(residual), "sum": total, "norm": norm} | weights
    then |= {"epsilon": 1e-5, "out": out, "quantized": quantized, "inverse_scale": inverse, "zero_point": 101}
    linear(case, x, weight, then, scale=scale, zero_point=128)

    y = sums_of(x, weight, 128) * scale.astype(np.float64) + bias
    y = ACTIVATIONS[GELU](y) + residual
    np.testing.assert_allclose(case[total], y, rtol=2e-6, atol=4e-6)
    if norm == LAYER_NORM:
        y = (y - y.mean(1, keepdims=True)) / np.sqrt(y.var(1, keepdims=True) + 1e-5) * gain + shift
    elif norm == RMS_NORM:
        y = y / np.sqrt((y**2).mean(1, keepdims=True) + 1e-5) * gain
    else:
        y = y / np.sqrt((y**2).sum(1, keepdims=True))
    if norm != LAYER_NORM or n > 1:  # of one column, the difference to its mean is all rounding
        np.testing.assert_allclose(case[out], y, rtol=1e-5, atol=1e-5)
    wanted = np.clip(np.rint(case[out] * inverse) + 101, 0, 255)
    assert (case[quantized] == wanted).all()


@pytest.mark.parametrize("n", [5, 130])
def test_rows_quantised_by_their_largest_value(kernels: NativeLibrary, place: str, n: int) -> None:
    x, weight = operands(3, 12, n)
    x[1] = 9  # the zero point: a row of zeros
    multiplier, factor = np.linspace(0.5, 2, n, dtype=np.float32), np.float32([0.25, 3, 0.001])
    case = Case(kernels, place)
    out, quantized, scale = case.out((3, n)), case.out((3, n), np.uint8), case.out((3,))
    then = {"out": out, "quantized": quantized, "row_scale": scale, "multiplier": multiplier, "zero_point": 128}
    linear(case, x, weight, then, row_scale=case.slot(factor), zero_point=9)
    y = sums_of(x, weight, 9) * factor[:, None]
    np.testing.assert_allclose(case[out], y, rtol=1e-6)
    largest = np.abs(case[out] * multiplier).max(1)
    assert (case[scale] == largest / np.float32(127)).all()
    assert case[scale][1] == 0
    assert (case[quantized][1] == 128).all()
    for row in (0, 2):
        wanted = np.rint(case[out][row].astype(np.float64) * multiplier / case[scale][row]) + 128
        assert np.abs(case[quantized][row] - wanted).max() <= 1
        assert np.abs(case[quantized][row].astype(int) - 128).max() == 127


def test_columns_quantised_as_they_come(kernels: NativeLibrary, place: str) -> None:
    """0.5 and 1.5 go to the even neighbour, what is too large to its bound."""
    x = np.array([[1], [3], [255]], np.uint8)
    weight = np.array([[1, -1, 127]], np.int8)
    case = Case(kernels, place)
    quantized = case.out((3, 3), np.uint8)
    then = {"quantized": quantized, "inverse_scale": np.full(3, 0.5, np.float32), "zero_point": 100}
    linear(case, x, weight, then)
    assert case[quantized].tolist() == [[100, 100, 164], [102, 98, 255], [228, 0, 255]]


@pytest.mark.parametrize("rows", [1, 40, 150])
@pytest.mark.parametrize("whole_rows", [False, True])
def test_bits_do_not_depend_on_threads_or_neighbours(kernels: NativeLibrary, rows: int, whole_rows: bool) -> None:
    x, weight = operands(rows, 50, 300)
    then = {"bias": floats(300), "activation": GELU_TANH, "zero_point": 128}
    if whole_rows:
        then |= {"norm": LAYER_NORM, "epsilon": 1e-5, "norm_weight": floats(300, seed=1)}

    def run(part: Array, threads: int) -> tuple[bytes, bytes]:
        case = Case(kernels, threads=threads)
        out, quantized = case.out((len(part), 300)), case.out((len(part), 300), np.uint8)
        slots: dict[str, Any] = {"out": out, "quantized": quantized}
        slots |= {"row_scale": case.out((len(part),))} if whole_rows else {"inverse_scale": np.full(300, 9, np.float32)}
        linear(case, part, weight, then | slots, scale=np.full(300, 1e-3, np.float32), zero_point=128)
        return case[out].tobytes(), case[quantized].tobytes()

    out, quantized = run(x, 1)
    assert run(x, 2) == run(x, 3) == (out, quantized)
    for first, count in ((0, 1), (rows - 1, 1), (rows // 3, rows - rows // 3)):
        alone = run(x[first : first + count], 2)
        assert alone[0] == out[first * 1200 : (first + count) * 1200]
        assert alone[1] == quantized[first * 300 : (first + count) * 300]


def test_no_rows_write_nothing(kernels: NativeLibrary) -> None:
    x, weight = operands(1, 8, 20)
    case = Case(kernels, threads=2)
    out = case.out((1, 20))
    record = Linear(
        rows=TOKENS, input=case.slot(x), row_scale=NONE, matrix=case.matrix(weight, np.ones(20, np.float32)),
        then=case.then(out=out),
    )  # fmt: skip
    case.run(record, tokens=0)
    assert np.isnan(case[out]).all()
