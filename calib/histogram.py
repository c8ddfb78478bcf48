"""Count values in one pass and bounded memory, in a histogram whose bins only ever merge exactly.

The bins are equally wide and lie evenly around zero. Their outermost edges are a power of two that
doubles when a value does not fit: neighbouring bins become one, and no count has to be split. So the
result depends on the values alone, not on their order, on their division into arrays, or on the first
sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from copy import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.runtime.errors import CalibrationError
from transom.runtime.json_reader import Fields

BINS = 4096  # over [-limit, limit): at least 1024 for what lies on one side of zero
HALF = BINS // 2
MIN_LIMIT = 2.0**-64  # of a tensor of zeros
MAX_LIMIT = 2.0**128  # every float32 is below
SLAB = 1 << 16  # values at a time: the temporaries stay in the cache
MAX_COUNT = 2**53  # of one bin, in JSON: every reader of JSON has these integers exactly


class Histogram:
    """Counts of values in BINS bins; ``update`` adds values.

    minimum, maximum  of all values, 0.0 while there are none
    count             of the values
    limit             power of two, strictly above every absolute value
    counts            int64 (BINS,): bin i has the values with -limit + i * width <= value < -limit + (i + 1) * width
    """

    def __init__(self) -> None:
        self.minimum = 0.0
        self.maximum = 0.0
        self.count = 0
        self.limit = MIN_LIMIT
        self.counts: NDArray[np.int64] = np.zeros(BINS, np.int64)

    @property
    def width(self) -> float:
        """The width of a bin; a power of two as well."""
        return self.limit / HALF

    @property
    def edges(self) -> NDArray[Any]:
        """float64 (BINS + 1,) from -limit to limit."""
        return np.arange(-HALF, HALF + 1) * np.float64(self.width)

    @property
    def centres(self) -> NDArray[Any]:
        """float64 (BINS,), the middle of each bin."""
        return (np.arange(-HALF, HALF) + 0.5) * np.float64(self.width)

    def update(self, values: NDArray[Any]) -> None:
        """Count ``values``: floats of any shape, taken as float32. CalibrationError if any is NaN or infinite."""
        flat = np.asarray(values, dtype=np.float32).reshape(-1)
        if not flat.size:
            return
        low, high = float(flat.min()), float(flat.max())  # NaN if there is one
        if not (math.isfinite(low) and math.isfinite(high)):
            raise CalibrationError("NaN" if np.isnan(flat).any() else "an infinite value")
        self._widen(limit_above(max(-low, high)))
        self.minimum, self.maximum = (min(low, self.minimum), max(high, self.maximum)) if self.count else (low, high)
        self.count += flat.size
        self.counts += count_bins(flat, self.width)

    @classmethod
    def merged(cls, histograms: Iterable[Histogram]) -> Histogram:
        """Return the histogram of all values of several: that of one which got them all."""
        total = cls()
        for other in histograms:
            if not other.count:
                continue
            added = copy(other)
            added.counts = other.counts.copy()
            added._widen(total.limit)
            total._widen(added.limit)
            ends = [(each.minimum, each.maximum) for each in (total, other) if each.count]
            total.minimum, total.maximum = min(low for low, _ in ends), max(high for _, high in ends)
            total.count += other.count
            total.counts += added.counts
        return total

    def _widen(self, limit: float) -> None:
        """Merge neighbouring bins until ``limit`` is reached."""
        doublings = round(math.log2(max(limit / self.limit, 1)))
        for _ in range(min(doublings, HALF.bit_length())):  # after which everything is in the middle two
            merged = self.counts.reshape(HALF, 2).sum(axis=1)
            self.counts[:] = 0
            self.counts[HALF // 2 : HALF // 2 + HALF] = merged
        self.limit = max(limit, self.limit)

    def to_json(self) -> dict[str, Any]:
        """Return the histogram for JSON: ``bins`` is the counts in order, a negative number that many empty bins."""
        return {
            "min": self.minimum,
            "max": self.maximum,
            "limit": self.limit,
            "bins": list(with_runs(self.counts.tolist())),
        }

    @classmethod
    def from_json(cls, value: Any, where: str, problems: list[str]) -> Histogram:
        """Read what ``to_json`` returned; problems are added to ``problems``, and the histogram is then unusable."""
        fields = Fields(value, where, problems)
        before = len(problems)
        minimum = fields.take("min", is_finite, "a finite number")
        maximum = fields.take("max", is_finite, "a finite number")
        limit = fields.take("limit", is_limit, f"a power of two from {MIN_LIMIT:g} to {MAX_LIMIT:g}")
        bins = fields.take("bins", is_bins, f"counts of {BINS} bins, a negative number for a run of empty ones")
        fields.done()
        found = cls()
        if len(problems) > before:
            return found
        found.minimum, found.maximum, found.limit = float(minimum), float(maximum), float(limit)
        found.counts = np.array(without_runs(bins), np.int64)
        found.count = int(found.counts.sum())
        if not found._consistent():
            problems.append(f"{where} has min {minimum!r:.40} and max {maximum!r:.40}, its bins end elsewhere")
        return found

    def _consistent(self) -> bool:
        """Return whether the outermost bins that are not empty hold the minimum and the maximum."""
        used = np.flatnonzero(self.counts)
        if not len(used):
            return self.minimum == self.maximum == 0
        ends = [math.floor(value / self.width) + HALF for value in (self.minimum, self.maximum)]
        return ends == [used[0], used[-1]] and self.minimum <= self.maximum


def limit_above(value: float) -> float:
    """Return the smallest power of two above ``value``, at least MIN_LIMIT."""
    return max(math.ldexp(1.0, math.frexp(value)[1]), MIN_LIMIT) if value > 0 else MIN_LIMIT


def count_bins(flat: NDArray[np.float32], width: float) -> NDArray[np.int64]:
    """Count the values of ``flat``, finite and within the limit, in each bin: (BINS,).

    Nothing is rounded: a float times a power of two is exact unless it underflows, which float64 prevents;
    and only whole numbers are added.
    """
    exact = np.float32 if width <= 1 else np.float64
    scaled = np.empty(min(SLAB, flat.size), exact)
    index = np.empty(scaled.size, np.intp)
    counts = np.zeros(BINS, np.int64)
    for start in range(0, flat.size, SLAB):
        slab = flat[start : start + SLAB]
        here, bins = scaled[: slab.size], index[: slab.size]
        np.multiply(slab, exact(1 / width), out=here, dtype=exact)
        np.floor(here, out=here)
        np.add(here, exact(HALF), out=here)
        np.copyto(bins, here, casting="unsafe")
        counts += np.bincount(bins, minlength=BINS)
    return counts


def with_runs(counts: Iterable[int]) -> Iterator[int]:
    """Encode runs of empty bins: [0, 0, 5, 0, 7] -> -2, 5, -1, 7."""
    empty = 0
    for count in counts:
        if count:
            if empty:
                yield -empty
            yield count
        empty = 0 if count else empty + 1
    if empty:
        yield -empty


def without_runs(bins: Iterable[int]) -> list[int]:
    """Decode runs of empty bins: [-2, 5, -1, 7] -> [0, 0, 5, 0, 7]."""
    return [count for number in bins for count in ([0] * -number if number < 0 else [number])]


def is_bins(value: Any) -> bool:
    """Return whether counts and runs of empty bins make BINS together; nothing is decoded before this is known."""
    return (
        isinstance(value, list)
        and len(value) <= BINS
        and all(type(number) is int and -BINS <= number <= MAX_COUNT and number != 0 for number in value)
        and sum(-number if number < 0 else 1 for number in value) == BINS
    )


def is_finite(value: Any) -> bool:
    """Return whether a number of a JSON file, which may be an integer of any size, is within float32."""
    return type(value) in (int, float) and abs(value) < MAX_LIMIT


def is_limit(value: Any) -> bool:
    return type(value) in (int, float) and MIN_LIMIT <= value <= MAX_LIMIT and math.frexp(value)[0] == 0.5
