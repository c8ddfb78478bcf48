"""Scales: the arithmetic by hand, then against onnxruntime.quantization where that one is right, and its kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnxruntime.quantization.calibrate import HistogramCollector
from onnxruntime.quantization.quant_utils import compute_scale_zp, quantize_nparray

from transom.calib.histogram import BINS, Histogram
from transom.calib.scales import (
    METHODS,
    SMALLEST_SCALE,
    Scale,
    activation_scale,
    block_scales,
    clip_range,
    dequantize_blocks,
    kl_divergence,
    quantize_blocks,
    quantize_weight,
    squared_error,
    weight_scales,
)
from transom.runtime.errors import CalibrationError

Float = NDArray[np.float32]


def histogram_of(values: Any) -> Histogram:
    histogram = Histogram()
    histogram.update(np.asarray(values, np.float32))
    return histogram


def normal(*shape: int, seed: int = 0) -> Float:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def error_of(values: Float, low: float, high: float, signed: bool) -> float:
    """Mean squared error of quantising to a range, value by value."""
    found = activation_scale(low, high, signed=signed)
    levels = np.rint(values / found.scale) + found.zero_point
    levels = np.clip(levels, -127 if signed else 0, 127 if signed else 255)
    return float(np.square((levels - found.zero_point) * found.scale - values).mean())


@pytest.mark.parametrize(
    ("low", "high", "signed", "scale", "zero_point"),
    [
        (-0.5, 1.27, True, 0.01, 0),  # 1.27 / 127
        (-2.54, 1.27, True, 0.02, 0),
        (-1.0, 1.55, False, 0.01, 100),  # 2.55 / 255, and -1.0 is 100 steps below zero
        (0.0, 5.1, False, 0.02, 0),
        (1.0, 5.1, False, 0.02, 0),  # zero is always within
        (-5.1, 0.0, False, 0.02, 255),
        (-5.1, -1.0, False, 0.02, 255),
        (0.0, 0.0, True, SMALLEST_SCALE, 0),
        (0.0, 0.0, False, SMALLEST_SCALE, 0),
        (-1e-30, 1e-30, False, SMALLEST_SCALE, 0),
    ],
)
def test_activation_scale(low: float, high: float, signed: bool, scale: float, zero_point: int) -> None:
    assert activation_scale(low, high, signed=signed) == Scale(float(np.float32(scale)), zero_point)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (-0.17, 8.2), (0.0, 6.0), (-9.1, -2.0), (-3.3, 3.1)])
def test_activation_scale_is_onnxruntimes(low: float, high: float) -> None:
    ends = np.float32(low), np.float32(high)
    zero_point, scale = compute_scale_zp(*ends, np.int8(-127), np.int8(127), symmetric=True)
    assert activation_scale(low, high, signed=True) == Scale(pytest.approx(float(scale), rel=1e-6), int(zero_point))
    zero_point, scale = compute_scale_zp(*ends, np.uint8(0), np.uint8(255))
    assert activation_scale(low, high, signed=False) == Scale(pytest.approx(float(scale), rel=1e-6), int(zero_point))


@pytest.mark.parametrize(("low", "high"), [(1.0, -1.0), (float("nan"), 1.0), (0.0, float("inf")), (-3e38, 3e38)])
def test_an_impossible_range_is_refused(low: float, high: float) -> None:
    with pytest.raises(CalibrationError, match=r"a range is .*Calibrate again"):
        activation_scale(low, high, signed=False)


def test_weights_by_hand() -> None:
    """127 / 127 = 1, zeros get 1, 254 / 127 = 2; then -63.5 / 1 rounds half to even, -64, and 1 / 2 to 0."""
    weight = np.array([[127, 0, -254], [-63.5, 0, 1]], np.float32)
    scales = weight_scales(weight)
    assert scales.dtype == np.float32
    assert scales.tolist() == [1, 1, 2]
    levels = quantize_weight(weight, scales)
    assert levels.dtype == np.int8
    assert levels.tolist() == [[127, 0, -127], [-64, 0, 0]]


def test_weights_of_seven_bits_by_hand() -> None:
    """126 / 63 = 2, zeros get 1; 1 / 2 rounds to 0, 3 / 2 to 2."""
    weight = np.array([[126, 0], [1, 0], [3, 0]], np.float32)
    scales = weight_scales(weight, levels=63)
    assert scales.tolist() == [2, 1]
    assert quantize_weight(weight, scales, levels=63).tolist() == [[63, 0], [0, 0], [2, 0]]


def test_weights_as_onnxruntime_quantises_them() -> None:
    weight = normal(64, 24) * np.float32(0.03)
    scales = weight_scales(weight)
    theirs = [compute_scale_zp(c.min(), c.max(), np.int8(-127), np.int8(127), symmetric=True)[1] for c in weight.T]
    assert np.array_equal(scales, scales.astype(np.float16))  # ours are values of FP16,
    assert (scales >= np.float32(theirs)).all()  # rounded up
    np.testing.assert_allclose(scales, theirs, rtol=2**-10)
    np.testing.assert_array_equal(
        quantize_weight(weight, scales), quantize_nparray(TensorProto.INT8, weight, scales, 0)
    )


def test_tiny_and_huge_weights() -> None:
    assert weight_scales(np.full((2, 1), 1e-30, np.float32)).tolist() == [SMALLEST_SCALE]
    for value in (1e7, np.inf, np.nan):
        with pytest.raises(CalibrationError, match="FP16 cannot hold"):
            weight_scales(np.array([[1, value]], np.float32))
        with pytest.raises(CalibrationError, match="FP16 cannot hold"):
            block_scales(np.array([[1, value]], np.float32), 4, 32)


def test_four_bit_blocks_by_hand() -> None:
    """-4 is -8 * 0.5, so nothing is lost; 1.5 is level 3, stored as 11. 4 is -8 * -0.5, and 1.5 level -3, stored as 5.

    7 is -8 * -0.875, and 0.875 level -1, stored as 7.
    """
    weight = np.zeros((34, 2), np.float32)
    weight[:2] = [[-4, 4], [1.5, 1.5]]
    weight[32:, 0] = [0.875, 7]  # a second block, all but empty
    scales = block_scales(weight, 4, 32)
    assert scales.tolist() == [[0.5, -0.875], [-0.5, 1]]  # a block of zeros: 1
    packed = quantize_blocks(weight, scales, 4, 32)
    assert packed.dtype == np.uint8
    assert packed.shape == (2, 2, 16)
    assert packed[:, :, 0].tolist() == [[0 | 11 << 4, 7 | 0 << 4], [0 | 5 << 4, 0x88]]  # the first in the low nibble
    assert (packed[:, :, 1:] == 0x88).all()
    np.testing.assert_array_equal(dequantize_blocks(packed, scales, 4, 34), weight)


def test_eight_bit_blocks_by_hand() -> None:
    """-64 is -128 * 0.5, stored as 0; 1.5 is level 3, stored as 131."""
    weight = np.zeros((33, 1), np.float32)
    weight[:2, 0] = [-64, 1.5]
    scales = block_scales(weight, 8, 32)
    assert scales.tolist() == [[0.5, 1]]
    packed = quantize_blocks(weight, scales, 8, 32)
    assert packed.shape == (1, 2, 32)
    assert packed[0, 0, :3].tolist() == [0, 131, 128]
    np.testing.assert_array_equal(dequantize_blocks(packed, scales, 8, 33), weight)


@pytest.mark.parametrize("accuracy_level", [0, 4])
@pytest.mark.parametrize(("bits", "block"), [(4, 32), (4, 128), (8, 32), (8, 64), (4, 256)])
def test_onnxruntime_multiplies_by_the_same_blocks(bits: int, block: int, accuracy_level: int) -> None:
    """K = 200 is no multiple of any block. Level 4 rounds the activations to 8 bits as well."""
    weight, x = normal(200, 48), normal(3, 200, seed=1)
    weight[:, 5] = 0
    scales = block_scales(weight, bits, block)
    packed = quantize_blocks(weight, scales, bits, block)
    sizes = {"K": 200, "N": 48, "bits": bits, "block_size": block, "accuracy_level": accuracy_level}
    graph = helper.make_graph(
        [helper.make_node("MatMulNBits", ["x", "b", "s"], ["y"], domain="com.microsoft", **sizes)],
        "blocks",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 200])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 48])],
        [onnx.numpy_helper.from_array(packed, "b"), onnx.numpy_helper.from_array(scales, "s")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (theirs,) = session.run(None, {"x": x})
    ours = x @ dequantize_blocks(packed, scales, bits, 200)
    largest = np.abs(ours).max()
    np.testing.assert_allclose(theirs, ours, atol=largest * (2e-2 if accuracy_level else 1e-5), rtol=0)


@pytest.mark.parametrize("block", [32, 128])
def test_the_search_of_four_bit_scales_pays(block: int) -> None:
    """Against absmax / 7 a sixth of the error goes away at least, against absmax / 8 on the wide side a twentieth."""

    def error(scales: Float) -> float:
        dequantized = dequantize_blocks(quantize_blocks(weight, scales, 4, block), scales, 4, len(weight))
        return float(np.sqrt(np.square(dequantized - weight).mean()))

    weight = normal(512, 32)
    blocks = weight.T.reshape(32, -1, block)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(-1)[..., None], -1)[..., 0]
    ours = error(block_scales(weight, 4, block))
    assert ours < 5 / 6 * error(np.abs(extreme) / 7) * 1.02
    assert ours < 0.96 * error(extreme / -8)


def test_blocks_of_another_size_are_refused() -> None:
    with pytest.raises(CalibrationError, match=r"in 3 bits and blocks of 32; choose bits from 8, 4 and"):
        block_scales(normal(32, 2), 3, 32)
    with pytest.raises(CalibrationError, match=r"in 4 bits and blocks of 48; .*the block from 32, 64, 128, 256"):
        block_scales(normal(32, 2), 4, 48)


def test_unknown_method_and_empty_histogram() -> None:
    with pytest.raises(CalibrationError, match=r"'kl', which is unknown. Choose one of minmax, percentile, entropy, m"):
        clip_range(histogram_of([1.0]), "kl", symmetric=True)
    with pytest.raises(CalibrationError, match="no values"):
        clip_range(Histogram(), "mse", symmetric=True)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_zeros_and_constants(method: str, symmetric: bool) -> None:
    """A constant is an end of its range; of zeros alone the range is one wide, for want of anything to go by."""
    for value in (3.0, 2.0, -3.0, 1e-30, 0.0):
        wanted = (-abs(value), abs(value)) if symmetric else (min(value, 0.0), max(value, 0.0))
        if value == 0.0:
            wanted = (-1.0, 1.0) if symmetric else (0.0, 1.0)
        assert clip_range(histogram_of([value] * 50), method, symmetric=symmetric) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    "values", [normal(500), np.abs(normal(500)), -np.abs(normal(500)) - 1, normal(2), normal(500) ** 9]
)
@pytest.mark.parametrize("method", METHODS)
def test_every_range_holds_zero_and_lies_within_what_was_seen(method: str, values: Float) -> None:
    low, high = clip_range(histogram_of(values), method, symmetric=False)
    assert min(values.min(), 0) <= low <= 0 <= high <= max(values.max(), 0)
    assert low < high
    low, high = clip_range(histogram_of(values), method, symmetric=True)
    assert 0 < high == -low <= np.abs(values).max()


def test_minmax() -> None:
    histogram = histogram_of([-2.5, 0.0, 4.0])
    assert clip_range(histogram, "minmax", symmetric=False) == (-2.5, 4.0)
    assert clip_range(histogram, "minmax", symmetric=True) == (-4.0, 4.0)


def test_percentile_by_hand() -> None:
    """Bins are 4 / 2048 = 1/512 wide. Of 20,000 values two may go: two of |x|, or one from either end."""
    values = np.concatenate([np.full(10000, -1.0), np.full(9998, 1.0), [-3.0, 3.9]])
    histogram = histogram_of(values)
    assert clip_range(histogram, "percentile", symmetric=True) == (-1 - 1 / 512, 1 + 1 / 512)
    assert clip_range(histogram, "percentile", symmetric=False) == (-1.0, 1 + 1 / 512)
    histogram.update(np.array([3.9, -3.0], np.float32))  # the second of either; still only two may go
    assert clip_range(histogram, "percentile", symmetric=True)[1] == pytest.approx(3.0, abs=1 / 256)
    assert clip_range(histogram, "percentile", symmetric=False) == (-3.0, pytest.approx(3.9))


def test_percentile_of_many_values() -> None:
    values = normal(200_000)
    low, high = clip_range(histogram_of(values), "percentile", symmetric=False)
    width = 8 / 2048
    assert 0 <= high - np.quantile(values, 1 - 5e-5) <= 2 * width
    assert 0 <= np.quantile(values, 5e-5) - low <= 2 * width
    _, high = clip_range(histogram_of(values), "percentile", symmetric=True)
    assert 0 <= high - np.quantile(np.abs(values), 1 - 1e-4) <= 2 * width


def test_percentile_is_onnxruntimes_but_for_one_bin() -> None:
    """On the same counts: theirs ends at the lower edge of the bin that the percentile lies in, ours at the upper."""
    values = normal(200_000)
    histogram = histogram_of(values)
    low, high = clip_range(histogram, "percentile", symmetric=False)
    collector = HistogramCollector("percentile", False, BINS, 128, 99.99, "same")
    collector.histogram_dict = {"x": (histogram.counts, histogram.edges, values.min(), values.max(), histogram.limit)}
    theirs = collector.compute_percentile()["x"]
    assert (low, high) == (pytest.approx(theirs[0]), pytest.approx(theirs[1] + histogram.width))


def test_divergence_by_hand() -> None:
    """Counts 1 3 2 2 and 4 outside. P = 1 3 2 6 / 12. Two groups, 1 + 3 and 2 + 2, spread evenly: Q = 1/4 each.

    KL = 1/12 ln(4/12) + 3/12 ln(12/12) + 2/12 ln(8/12) + 6/12 ln(24/12) = 0.18744.
    """
    counts = np.array([1, 3, 2, 2, 4])
    start, stop = np.array([0]), np.array([4])
    assert kl_divergence(counts, start, stop, 2) == pytest.approx(0.18744, abs=1e-5)
    assert kl_divergence(counts[::-1], start + 1, stop + 1, 2) == pytest.approx(0.18744, abs=1e-5)


def test_empty_bins_do_not_diverge_and_outliers_always_do() -> None:
    """2 0 2 0 in two groups is spread over the bins that are filled, and so is exact. 2 2 0 0 with 4 outside is not:

    P = 2 2 0 4 / 8, Q = 1/2 1/2 0 0 but for a share of 0.0001, of which each of three filled bins has a third.
    KL = 2 * 1/4 ln(1/2) + 1/2 ln(1/2 / 0.0000333) = 4.4613.
    """
    start, stop = np.array([0]), np.array([4])
    assert kl_divergence(np.array([2, 0, 2, 0]), start, stop, 2) == pytest.approx(0, abs=1e-12)
    assert kl_divergence(np.array([2, 2, 0, 0, 4]), start, stop, 2) == pytest.approx(4.4613, abs=1e-3)


def test_entropy_clips_a_stray_and_keeps_a_uniform() -> None:
    uniform = np.linspace(-1, 1, 400_001)[:-1]
    assert clip_range(histogram_of(uniform), "entropy", symmetric=False) == pytest.approx((-1, 1), abs=0.02)
    stray = np.append(normal(200_000), [40.0])
    low, high = clip_range(histogram_of(stray), "entropy", symmetric=True)
    assert 3 < high < 6
    low, high = clip_range(histogram_of(stray), "entropy", symmetric=False)
    assert -5 < low < -3
    assert 3 < high < 12


def test_entropy_is_not_drawn_to_a_spike_at_zero() -> None:
    """Half of what ReLU gives is exactly zero, which every range has a level for."""
    values = np.maximum(normal(200_000), 0)
    for symmetric in (True, False):
        assert clip_range(histogram_of(values), "entropy", symmetric=symmetric)[1] > 3.5


def test_squared_error_by_hand() -> None:
    """One value in every bin, a step of d = 4096/254 bins: d²/12. At half the range half of the values have (d/2)²/12,

    the other half lie evenly 0 to 1024 bins beyond an end: 1024²/3.
    """
    histogram = Histogram()
    histogram.minimum, histogram.maximum, histogram.limit, histogram.count = -1.0, 1.0, 1.0, BINS
    histogram.counts[:] = 1
    step = 4096 / 254
    errors = squared_error(histogram, True)(np.array([-1.0, -0.5]), np.array([1.0, 0.5]))
    assert errors == pytest.approx([step**2 / 12, step**2 / 96 + 1024**2 / 6])


@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_is_the_least_error_on_the_values_themselves(symmetric: bool) -> None:
    """Of sparse outliers, of a long tail, and of GELU-like values all on one side: no shrunken range is better."""
    sample = normal(50_000)
    for values in (np.append(sample, [60.0]), sample**3, np.maximum(sample, -0.17)):
        values = values.astype(np.float32)
        low, high = clip_range(histogram_of(values), "mse", symmetric=symmetric)
        ours = error_of(values, low, high, symmetric)
        ends = clip_range(histogram_of(values), "minmax", symmetric=symmetric)
        for below in np.geomspace(0.02, 1, 16):
            for above in [below] if symmetric else np.geomspace(0.02, 1, 16):
                assert ours <= 1.03 * error_of(values, ends[0] * below, ends[1] * above, symmetric)


def test_mse_gives_a_stray_up_where_it_pays() -> None:
    """A stray 60 among 500,000 costs (60 - high)² / 500,000; keeping it costs (120 / 254)² / 12 for every value."""
    values = np.append(normal(500_000), [60.0]).astype(np.float32)
    low, high = clip_range(histogram_of(values), "mse", symmetric=True)
    assert error_of(values, low, high, True) < 0.6 * error_of(values, -60.0, 60.0, True)
