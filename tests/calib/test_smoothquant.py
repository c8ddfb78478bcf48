"""SmoothQuant: the factors by hand, and a search that rescues outlier channels and leaves the rest alone."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from transom.calib.histogram import Histogram
from transom.calib.scales import METHODS, activation_scale, clip_range, quantize_weight, weight_scales
from transom.calib.smoothquant import ALPHAS, LARGEST_FACTOR, search_alpha, smoothing_factors
from transom.runtime.errors import CalibrationError

Float = NDArray[np.float32]
CHANNELS = 96


def normal(*shape: int, seed: int = 0) -> Float:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def gain(*factors: float) -> Float:
    """Of a LayerNorm: 1 but for a few channels."""
    found = np.ones(CHANNELS, np.float32)
    found[7 : 7 + 20 * len(factors) : 20] = factors
    return found


def relative_error(rows: Float, weight: Float, factors: Float, signed: bool) -> float:
    """Of the product with min-max activations, so that none is clipped, and per-channel weights."""
    smooth, heavy = rows / factors, weight * factors[:, None]
    histogram = Histogram()
    histogram.update(smooth)
    found = activation_scale(*clip_range(histogram, "minmax", symmetric=signed), signed=signed)
    levels = np.clip(np.rint(smooth / found.scale), -127, 127) if signed else np.rint(smooth / found.scale)
    scales = weight_scales(heavy)
    exact = rows @ weight
    ours = (levels * found.scale) @ (quantize_weight(heavy, scales) * scales)
    return float(np.linalg.norm(ours - exact) / np.linalg.norm(exact))


def test_factors_by_hand() -> None:
    """Rows of both weights reach 4, 1, 1 and 4. Alpha 0.5: sqrt(64 / 4) = 4, sqrt(1 / 1) = 1, sqrt(1 / 1) = 1.

    The last channel was always zero, and keeps 1; the median of 4, 1, 1 is 1.
    """
    weights = [
        np.array([[4, 0], [0, 0.5], [1, 1], [4, 4]], np.float32),
        np.array([[2], [-1], [0.25], [0]], np.float32),
    ]
    factors = smoothing_factors(np.array([64, 1, 1, 0]), weights, 0.5)
    assert factors.dtype == np.float32
    assert factors.tolist() == [4, 1, 1, 1]


def test_factors_of_another_alpha_by_hand() -> None:
    """Alpha 0.75: 16**0.75 = 8 over 16**0.25 = 2 is 4; 256**0.75 = 64 over 1; 1. Over their median, 4: 1, 16, 1/4."""
    weights = [np.array([[16.0], [1.0], [1.0]], np.float32)]
    assert smoothing_factors(np.array([16, 256, 1]), weights, 0.75) == pytest.approx([1, 16, 0.25])


def test_a_common_factor_is_left_out() -> None:
    weights = [normal(CHANNELS, 8)]
    largest = np.abs(normal(CHANNELS, seed=1))
    ours = smoothing_factors(largest * np.float32(1000), weights, 0.5)
    np.testing.assert_allclose(ours, smoothing_factors(largest, weights, 0.5), rtol=1e-6)
    assert np.median(ours) == pytest.approx(1, rel=0.1)


def test_factors_stay_bounded() -> None:
    weights = [np.array([[1], [1], [1], [0]], np.float32)]
    factors = smoothing_factors(np.array([1e30, 1, 1e-30, 5]), weights, 0.5)
    assert factors.tolist() == [LARGEST_FACTOR, 1, 1 / LARGEST_FACTOR, 1]
    assert smoothing_factors(np.zeros(2), [np.ones((2, 1), np.float32)], 0.5).tolist() == [1, 1]
    assert smoothing_factors(np.ones(2), [np.zeros((2, 1), np.float32)], 0.5).tolist() == [1, 1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("compensated", [True, False])
def test_outlier_channels_are_rescued(method: str, compensated: bool) -> None:
    """On rows that the search has not seen, in both variants; compensated means that the weights hold the inverse."""
    loud = gain(20, 35, 60)
    weight = normal(CHANNELS, 64) / (loud[:, None] if compensated else 1)
    alpha, factors = search_alpha(normal(256, CHANNELS, seed=1) * loud, [weight[:, :40], weight[:, 40:]], method=method)
    assert alpha in ALPHAS
    assert factors.shape == (CHANNELS,)
    assert factors.dtype == np.float32
    assert factors[7] > 3
    new = normal(256, CHANNELS, seed=2) * loud
    for signed in (False, True):
        before, after = (relative_error(new, weight, each, signed) for each in (np.ones_like(factors), factors))
        assert after < before / (10 if compensated else 1.5)


def test_the_alpha_of_least_error_is_chosen() -> None:
    """Written out: factors of even rows, U8 error on odd ones. Not centred on zero, so that the zero point counts."""
    rows, weight = normal(256, CHANNELS) * gain(60, 20) + 1, normal(CHANNELS, 32, seed=1)
    errors = {}
    for alpha in ALPHAS:
        factors = smoothing_factors(np.abs(rows[::2]).max(0), [weight], alpha)
        errors[alpha] = relative_error(rows[1::2], weight, factors, signed=False)
    found, _ = search_alpha(rows, [weight])
    assert found == min(errors, key=lambda alpha: errors[alpha])
    assert sorted(errors.values())[1] > 1.01 * errors[found]  # and no near tie


def test_smoothing_changes_no_product() -> None:
    rows, weight = normal(64, CHANNELS) * gain(60, 20), normal(CHANNELS, 32, seed=1)
    _, factors = search_alpha(rows, [weight])
    assert not (factors == 1).all()
    np.testing.assert_allclose((rows / factors) @ (weight * factors[:, None]), rows @ weight, atol=5e-4)


@pytest.mark.parametrize("method", METHODS)
def test_what_needs_no_smoothing_is_left_as_it_is(method: str) -> None:
    """No channel is louder than another: factors could only fit the chance of these rows."""
    alpha, factors = search_alpha(normal(200, CHANNELS), [normal(CHANNELS, 64, seed=1)], method=method)
    assert alpha == 0
    assert factors.tolist() == [1] * CHANNELS


def test_little_to_go_by() -> None:
    weight = normal(4, 3)
    for rows in (np.zeros((5, 4), np.float32), np.zeros((0, 4), np.float32)):
        alpha, factors = search_alpha(rows, [weight])
        assert (alpha, factors.tolist()) == (0, [1, 1, 1, 1])
    assert search_alpha(normal(5, 4), [])[0] == 0
    loud = np.array([[100, 1, 1.03, 0.87]], np.float32)  # a single row gives the factors and the error
    alpha, factors = search_alpha(loud, [weight])
    assert np.isfinite(factors).all()


def test_the_factors_come_from_all_of_the_data_where_it_is_known() -> None:
    loud, weight = gain(40), normal(CHANNELS, 32) / gain(40)[:, None]
    rows = normal(128, CHANNELS, seed=1) * loud
    alpha, factors = search_alpha(rows, [weight], activation_max=5 * loud)
    assert alpha > 0
    np.testing.assert_array_equal(factors, smoothing_factors(5 * loud, [weight], alpha))


def test_only_some_columns_of_a_wide_weight_are_compared_but_all_are_in_the_factors() -> None:
    loud = gain(40, 40)
    weight = normal(CHANNELS, 3000) / loud[:, None]
    weight[7, 2998] = 50.0  # of a column between those that are compared
    rows = normal(64, CHANNELS, seed=1) * loud
    alpha, factors = search_alpha(rows, [weight])
    np.testing.assert_array_equal(factors, smoothing_factors(np.abs(rows).max(0), [weight], alpha))


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(CalibrationError, match="unknown"):
        search_alpha(normal(4, 4), [normal(4, 3)], method="best")
