"""Compute scales: clip ranges of activations, scales of weights, blocks for weight-only layers.

Pure functions of numpy arrays. Everywhere ``real = scale * (q - zero_point)``, rounded half to even as QuantizeLinear
rounds. No scale is ever zero, NaN or infinite. Those of weights are values of FP16, and those of activations not
smaller than its smallest, so that one number serves a graph in FP32 and one in FP16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.calib.histogram import Histogram
from transom.runtime.errors import CalibrationError

METHODS = ("minmax", "percentile", "entropy", "mse")
S8_MAX = 127  # symmetric: -128 is unused
U8_MAX = 255
S8_LEVELS, U8_LEVELS = 128, 256  # of |x| and of x: groups that "entropy" merges bins into
OUTLIERS = 1e-4  # share of the values that "percentile" gives up: 99.99 % stay
SMOOTHING = 1e-4  # share of Q spread evenly over the support of P, so that no logarithm is taken of zero
SMALLEST_SCALE = 2.0**-24  # FP16's smallest value above zero
NARROWEST = 2.0**-8  # of the whole range: "mse" tries nothing narrower
BITS = (8, 4)
BLOCKS = (32, 64, 128, 256)
# Of blocks: the value of largest magnitude lies this many steps from zero, on the side that has one level more.
# In 4 bits 8 is that last level; a larger reach clips the value for the sake of the others.
REACHES = {8: (128.0,), 4: (7.0, 7.5, 8.0, 8.25, 8.5, 8.75, 9.0, 9.25, 9.5, 9.75, 10.0, 10.5, 11.0)}

Float = NDArray[np.float32]
Cost = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]


@dataclass(frozen=True)
class Scale:
    """``real = scale * (q - zero_point)``; ``scale`` is a value of float32."""

    scale: float
    zero_point: int


def clip_range(histogram: Histogram, method: str, *, symmetric: bool) -> tuple[float, float]:
    """Return the range ``low <= 0 <= high``, low < high, onto which values are clipped; low == -high if ``symmetric``.

    - ``minmax``: all values.
    - ``percentile``: 99.99 % of the values: of |x| if symmetric, else half of the rest goes from either end.
    - ``entropy``: least KL divergence between the values and their quantised form (Migacz, "8-bit Inference with
      TensorRT", GTC 2017): of |x| over 128 levels if symmetric, else over 256 with both ends free.
    - ``mse``: least expected squared error of quantisation and clipping, both ends free unless symmetric.

    Of nothing but zeros the range is (-1, 1) or (0, 1). Raises CalibrationError for an unknown method
    and for a histogram without values.
    """
    if method not in METHODS:
        raise CalibrationError(f"method is {method!r}, which is unknown. Choose one of {', '.join(METHODS)}.")
    if histogram.count == 0:
        raise CalibrationError("a histogram has no values. Calibrate with samples that reach every tensor.")
    low, high = min(float(histogram.minimum), 0.0), max(float(histogram.maximum), 0.0)
    if low == high:
        return (-1.0 if symmetric else 0.0), 1.0
    if symmetric:
        low, high = -max(-low, high), max(-low, high)
    if method == "percentile":
        below, above = _percentile(histogram, symmetric)
    elif method == "entropy":
        below, above = _least_entropy_range(histogram, low, high, symmetric)
    elif method == "mse":
        below, above = _search(squared_error(histogram, symmetric), low, high, symmetric)
    else:
        below, above = low, high
    return min(max(below, low), 0.0) + 0.0, max(min(above, high), 0.0)  # + 0.0: no -0.0


def activation_scale(low: float, high: float, *, signed: bool) -> Scale:
    """Return the scale of a range: S8 symmetric, -127..127 with zero point 0, or U8 asymmetric, 0..255.

    U8 widens the range to hold zero, which is then exactly a level; that moves the ends by at most half a step.
    Raises CalibrationError for a range that is reversed, not finite, or too wide for float32.
    """
    if not (np.isfinite([low, high]).all() and low <= high):
        raise CalibrationError(f"a range is {low:g}..{high:g}; expected finite numbers in order. Calibrate again.")
    low, high = min(low, 0.0), max(high, 0.0)
    width, levels = (max(-low, high), S8_MAX) if signed else (high - low, U8_MAX)
    if not width <= float(np.finfo(np.float32).max):
        raise CalibrationError(f"a range is {low:g}..{high:g}, too wide for float32. Calibrate again.")
    step = float(np.float32(max(width / levels, SMALLEST_SCALE)))
    return Scale(step, 0 if signed else min(round(-low / step), U8_MAX))


def weight_scales(weight: Float, levels: int = S8_MAX) -> Float:
    """Return the symmetric scale of each output channel of a weight (K, N): float32 (N,), values of FP16.

    They are rounded up, so that nothing is clipped at ``levels`` (63 for 7-bit weights). A channel of zeros gets 1.
    Raises CalibrationError for a weight that is not finite or whose scale FP16 cannot hold.
    """
    largest = np.maximum(weight.max(0, initial=0), -weight.min(0, initial=0))
    return _half(largest / np.float32(levels), up=True)


def quantize_weight(weight: Float, scales: Float, levels: int = S8_MAX) -> NDArray[np.int8]:
    """Quantise a weight (K, N) in steps of ``scales`` (N,): int8 (K, N), -levels..levels."""
    steps = weight / scales
    np.rint(steps, out=steps)
    return np.clip(steps, -levels, levels, out=steps).astype(np.int8)


def block_scales(weight: Float, bits: int, block: int) -> Float:
    """Return the scale of each block of ``block`` inputs of a weight (K, N): float32 (N, ceil(K / block)), FP16 values.

    Levels are asymmetric, -8..7 and -128..127, so the scale takes the sign that makes the value of largest magnitude
    negative; its size is the one of REACHES with the least squared error. A block of zeros gets 1.
    Raises CalibrationError as ``weight_scales`` does and for other ``bits`` and ``block``.
    """
    blocks = _blocks(weight, bits, block)  # (N, ceil(K / block), block)
    high, low = blocks.max(-1), blocks.min(-1)
    extreme = np.where(high > -low, high, low)
    first, *others = REACHES[bits]
    best = _half(-extreme / np.float32(first))
    least = _block_errors(blocks, best) if others else best
    for reach in others:
        scales = _half(-extreme / np.float32(reach))
        errors = _block_errors(blocks, scales)
        best = np.where(errors < least, scales, best)
        least = np.minimum(errors, least)
    return best


def quantize_blocks(weight: Float, scales: Float, bits: int, block: int) -> NDArray[np.uint8]:
    """Quantise a weight (K, N) as input B of com.microsoft.MatMulNBits: uint8 (N, ceil(K / block), block * bits / 8).

    The zero point is the operator's default, 2**(bits - 1). In 4 bits two values share a byte, the first in the low
    nibble. Inputs beyond K hold the zero point. Raises CalibrationError as ``block_scales`` does.
    """
    zero_point = 1 << (bits - 1)
    levels = _blocks(weight, bits, block) / scales[..., None]
    np.rint(levels, out=levels)
    levels += zero_point
    packed = np.clip(levels, 0, 2 * zero_point - 1, out=levels).astype(np.uint8)
    return packed if bits == 8 else np.asarray(packed[..., 0::2] | packed[..., 1::2] << 4, np.uint8)


def dequantize_blocks(packed: NDArray[np.uint8], scales: Float, bits: int, inputs: int) -> Float:
    """Return the weight that MatMulNBits multiplies by: float32 (inputs, N)."""
    if bits == 4:
        packed = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:2], -1)
    blocks = (packed.astype(np.float32) - (1 << (bits - 1))) * scales[..., None]
    return np.ascontiguousarray(blocks.reshape(len(blocks), -1)[:, :inputs].T)


def _half(scales: NDArray[Any], *, up: bool = False) -> Float:
    """Round scales to values of FP16, in float32: away from zero if ``up``, else to the nearest; 1 in place of 0."""
    if not (np.abs(scales) <= np.finfo(np.float16).max).all():
        raise CalibrationError(
            "a weight holds NaN or Inf, or values whose scale FP16 cannot hold. Check the checkpoint's weights."
        )
    halves = scales.astype(np.float16)
    if up:
        halves = np.where(halves < scales, np.nextafter(halves, np.float16(np.inf)), halves)
    else:
        smallest = np.copysign(np.float16(SMALLEST_SCALE), scales)
        halves = np.where((halves == 0) & (scales != 0), smallest, halves)
    return np.where(halves == 0, 1, halves).astype(np.float32)


def _blocks(weight: Float, bits: int, block: int) -> Float:
    """Reshape a weight (K, N) to (N, ceil(K / block), block), padded with zeros."""
    if bits not in BITS or block not in BLOCKS:
        raise CalibrationError(
            f"weight-only layers were asked for in {bits} bits and blocks of {block}; "
            f"choose bits from {', '.join(map(str, BITS))} and the block from {', '.join(map(str, BLOCKS))}."
        )
    inputs, outputs = weight.shape
    count = -(-inputs // block)
    padded = np.zeros((outputs, count * block), np.float32)
    padded[:, :inputs] = weight.T
    return padded.reshape(outputs, count, block)


def _block_errors(blocks: Float, scales: Float) -> Float:
    """Return the squared error of each 4-bit block at these scales: (N, ceil(K / block))."""
    steps = blocks / scales[..., None]
    levels = np.rint(steps)
    np.clip(levels, -8, 7, out=levels)
    steps -= levels
    return np.asarray(np.einsum("nkb,nkb->nk", steps, steps) * scales * scales)


def _percentile(histogram: Histogram, symmetric: bool) -> tuple[float, float]:
    """Return the edges of the bins that hold all but OUTLIERS of the values: no more than that is clipped."""
    width, half = histogram.width, histogram.counts.size // 2
    if symmetric:
        kept = histogram.count - int(histogram.count * OUTLIERS)
        edge = width * float(np.searchsorted(np.cumsum(_magnitudes(histogram.counts)), kept) + 1)
        return -edge, edge
    kept = histogram.count - int(histogram.count * OUTLIERS / 2)
    above = float(np.searchsorted(np.cumsum(histogram.counts), kept) + 1 - half)
    below = float(np.searchsorted(np.cumsum(histogram.counts[::-1]), kept) + 1 - half)
    return -width * below, width * above


def _least_entropy_range(histogram: Histogram, low: float, high: float, symmetric: bool) -> tuple[float, float]:
    """Return the range of ``entropy``. Ranges of fewer bins than levels tell nothing: no candidates.

    Zero is a level of every range, so exact zeros (half of what ReLU gives) need no resolution, but a spike of them
    would draw the range in to resolve it: its bin counts for no more than its larger neighbour.
    """
    width, half = histogram.width, histogram.counts.size // 2
    if high - low < U8_LEVELS * width:
        return low, high
    counts = histogram.counts.copy()
    counts[half] = min(counts[half], max(counts[half - 1], counts[half + 1]))
    if symmetric:
        stops = np.arange(S8_LEVELS, int(high / width) + 2)  # the last has the bin of the largest value in it
        divergence = kl_divergence(_magnitudes(counts), np.zeros_like(stops), stops, S8_LEVELS)
        edge = width * float(stops[divergence.argmin()])
        return -edge, edge

    def cost(lows: NDArray[np.float64], highs: NDArray[np.float64]) -> NDArray[np.float64]:
        starts = half + np.floor(lows / width).astype(np.int64)
        stops = half + np.floor(highs / width).astype(np.int64) + 1
        costs = np.full(len(starts), np.inf)
        wide = stops - starts >= U8_LEVELS
        costs[wide] = kl_divergence(counts, starts[wide], stops[wide], U8_LEVELS)
        return costs

    below, above = _search(cost, low, high, symmetric)
    return width * float(np.floor(below / width)), width * float(np.floor(above / width) + 1)


def kl_divergence(
    counts: NDArray[np.int64], starts: NDArray[np.int64], stops: NDArray[np.int64], levels: int
) -> NDArray[np.float64]:
    """Return KL(P || Q) of each candidate, the bins start..stop of the counts.

    P is the candidate's bins, with all that lies outside added to its first and last. Q is the same bins without what
    lies outside, merged into ``levels`` groups, each spread evenly over those of its bins that P fills; a share
    SMOOTHING of it is spread over all that P fills. All sums over bins are differences of running sums, so a candidate
    costs as much as it has levels.
    """
    running = np.concatenate([[0], np.cumsum(counts)])
    filled = np.concatenate([[0], np.cumsum(counts > 0)])
    entropy = np.concatenate([[0.0], np.cumsum(_x_log_x(counts))])
    bins = stops - starts
    edges = starts[:, None] + np.arange(levels + 1) * bins[:, None] // levels  # (C, levels + 1)
    inside, support = np.diff(running[edges]), np.diff(filled[edges])  # (C, levels)
    below, above = running[starts], running[-1] - running[stops]
    first, last = counts[starts], counts[stops - 1]
    support[:, 0] += (below > 0) & (first == 0)
    support[:, -1] += (above > 0) & (last == 0)

    kept = np.maximum(inside.sum(1, keepdims=True), 1)
    q = (1 - SMOOTHING) * inside / (np.maximum(support, 1) * kept) + SMOOTHING / support.sum(1, keepdims=True)
    log_q = np.log(q)
    p_log_q = (inside * log_q).sum(1) + below * log_q[:, 0] + above * log_q[:, -1]
    p_log_p = entropy[stops] - entropy[starts] - _x_log_x(first) - _x_log_x(last)
    p_log_p += _x_log_x(first + below) + _x_log_x(last + above)
    total = float(running[-1])
    return np.asarray((p_log_p - p_log_q) / total - np.log(total))


def _x_log_x(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.asarray(counts * np.log(np.maximum(counts, 1)))


def squared_error(histogram: Histogram, symmetric: bool) -> Cost:
    """Return the mean squared error, in bins, of quantising to a candidate range, values spread evenly in their bin.

    With u = x / step and n = clip(round(u)), the integral of (u - n)**2 du from zero is n / 12 + (u - n)**3 / 3, on
    the grid and beyond its ends. So the error of a bin is exact however many levels it spans.
    """
    occupied = np.flatnonzero(histogram.counts)
    first, stop = int(occupied[0]), int(occupied[-1]) + 1
    width = histogram.width
    edges = np.arange(first, stop + 1) - histogram.counts.size // 2  # in bins, as all of this
    share = histogram.counts[first:stop] / histogram.count

    def cost(lows: NDArray[np.float64], highs: NDArray[np.float64]) -> NDArray[np.float64]:
        steps = (highs - lows) / (width * (2 * S8_MAX if symmetric else U8_MAX))
        smallest = np.rint(lows / (width * steps))  # level; zero is one, as in activation_scale
        largest = smallest + (2 * S8_MAX if symmetric else U8_MAX)
        u = edges / steps[:, None]  # (C, bins + 1)
        n = np.rint(u)
        np.clip(n, smallest[:, None], largest[:, None], out=n)
        u -= n
        integral = u * u
        integral *= u
        integral *= 4
        integral += n
        return np.asarray((np.diff(integral) @ share) * steps**3 / 12)

    return cost


def _search(cost: Cost, low: float, high: float, symmetric: bool) -> tuple[float, float]:
    """Search the range of least cost within low..high: both ends in proportion, then, unless symmetric, by turns."""
    shares = np.geomspace(NARROWEST, 1.0, 48)
    best = shares[cost(shares * low, shares * high).argmin()]
    near = np.minimum(best * np.geomspace(0.9, 1 / 0.9, 17), 1.0)
    best = near[cost(near * low, near * high).argmin()]
    below, above = best * low, best * high
    for spread, tries in () if symmetric else ((1 / NARROWEST, 65), (1.5, 15), (1.1, 15)):
        steps = spread ** np.linspace(-1.0, 1.0, tries)  # 1 among them: no turn makes it worse
        highs = np.minimum(above * steps, high)
        above = highs[cost(np.full(tries, below), highs).argmin()]
        lows = np.maximum(below * steps, low)
        below = lows[cost(lows, np.full(tries, above)).argmin()]
    return float(below), float(above)


def _magnitudes(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the counts of |x|, from zero: int64 (BINS / 2,)."""
    half = counts.size // 2
    return counts[half:] + counts[:half][::-1]
