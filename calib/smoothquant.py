"""Search SmoothQuant's factors (Xiao et al. 2022, arXiv:2211.10438): outliers move from activations into weights.

A few channels after a LayerNorm are tens of times as large as the others, and one scale for all of them leaves the
others a handful of levels. Dividing channel j by s_j (in the LayerNorm's gain and bias) and multiplying row j of the
weights that read it changes no result, and both sides become easy to quantise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.calib.histogram import Histogram
from transom.calib.scales import S8_MAX, U8_MAX, activation_scale, clip_range, quantize_weight, weight_scales

ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
LARGEST_FACTOR = 1024.0  # and 1 / 1024 the smallest: the gain and the weights stay far inside FP16
WORTH = 0.98  # smooth only if this much of the squared error is left, or less
COLUMNS = 1024  # of each weight, evenly spaced, stand for all when errors are compared

Float = NDArray[np.float32]


def smoothing_factors(activation_max: NDArray[Any], weights: Sequence[Float], alpha: float) -> Float:
    """Return s_j = max|X_j|**alpha / max|W_j|**(1 - alpha), divided by the median of s: float32 (E,).

    ``activation_max`` (E,) is the largest magnitude of each channel, ``weights`` are all that read it, (E, N) each.
    A factor common to all channels changes no quantised result; dividing by it keeps the layer's magnitude. A channel
    that is zero, or that no weight reads, keeps 1; the others lie within LARGEST_FACTOR.
    """
    channels = np.asarray(activation_max, np.float64)
    rows = _row_max(weights)
    live = (channels > 0) & (rows > 0)
    factors = np.ones(channels.shape)
    if live.any():
        found = channels[live] ** alpha / rows[live] ** (1 - alpha)
        factors[live] = np.clip(found / np.median(found), 1 / LARGEST_FACTOR, LARGEST_FACTOR)
    return factors.astype(np.float32)


def search_alpha(
    rows: Float,
    weights: Sequence[Float],
    *,
    method: str = "minmax",
    activation_max: NDArray[Any] | None = None,
    worth: float = WORTH,
) -> tuple[float, Float]:
    """Search the alpha with the least squared error of the quantised products; return it and its factors, float32 (E,).

    ``rows`` (R, E) are of an activation, a LayerNorm's result or another, ``weights`` (E, N) read it. Activations are
    quantised per tensor with ``method``'s clip range, weights per output channel. Every other row gives the factors to
    try, the rows between them the error: on the rows that gave them, factors make every channel's largest value fit, by
    chance too. The error compared is that of U8 activations; an alpha that is worse in S8 than no smoothing is refused.
    Where none leaves ``worth`` of the error or less the answer is (0.0, ones): leave it as it is. The factors returned
    are those of all rows, or of ``activation_max`` (E,), the largest magnitudes in all of the data, where known.
    """
    plain = np.ones(rows.shape[1], np.float32)
    parts = [weight[:, :: -(-weight.shape[1] // COLUMNS)] for weight in weights if weight.shape[1]]
    if not (parts and rows.size):
        return 0.0, plain
    seen, unseen = _magnitudes(rows[::2]), rows[1::2] if len(rows) > 1 else rows
    joined = np.concatenate(parts, axis=1)
    plainly = QuantizedProduct(unseen, joined, unseen @ joined, method)
    best, least = 0.0, worth * plainly.error(signed=False)
    for alpha in ALPHAS:
        factors = smoothing_factors(seen, weights, alpha)
        product = QuantizedProduct(unseen / factors, joined * factors[:, None], plainly.exact, method)
        error = product.error(signed=False)
        if error < least and product.error(signed=True) <= plainly.error(signed=True):
            best, least = alpha, error
    if not best:
        return 0.0, plain
    return best, smoothing_factors(_magnitudes(rows) if activation_max is None else activation_max, weights, best)


def _magnitudes(rows: Float) -> Float:
    """Return the largest magnitude of each channel: (E,)."""
    return np.asarray(np.maximum(rows.max(0), -rows.min(0)))


def _row_max(weights: Sequence[Float]) -> NDArray[np.float64]:
    """Return the largest magnitude that any of the weights has in each row: (E,)."""
    return np.asarray(np.max([np.abs(weight).max(1, initial=0) for weight in weights], axis=0), np.float64)


class QuantizedProduct:
    """The product of ``rows`` (R, E) and a ``weight`` (E, N), both quantised, beside the ``exact`` one (R, N)."""

    def __init__(self, rows: Float, weight: Float, exact: Float, method: str) -> None:
        self.exact = exact
        self._rows, self._method = rows, method
        self._histogram = Histogram()
        self._histogram.update(rows)
        scales = weight_scales(weight)
        self._restored = quantize_weight(weight, scales) * scales
        self._errors: dict[bool, float] = {}

    def error(self, *, signed: bool) -> float:
        """Return the squared error with rows in S8 if ``signed``, else in U8; computed once."""
        if signed not in self._errors:
            lowest, highest = (-S8_MAX, S8_MAX) if signed else (0, U8_MAX)
            found = activation_scale(*clip_range(self._histogram, self._method, symmetric=signed), signed=signed)
            levels = np.rint(self._rows / np.float32(found.scale)) + np.float32(found.zero_point)
            np.clip(levels, lowest, highest, out=levels)
            levels -= found.zero_point
            levels *= np.float32(found.scale)
            difference = levels @ self._restored
            difference -= self.exact
            self._errors[signed] = float(np.square(difference, dtype=np.float64).sum())
        return self._errors[signed]
