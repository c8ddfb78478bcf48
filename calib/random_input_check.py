"""Detect random calibration data by the inputs of a graph, whatever file they came from: a .npz, images, ids.

Ranges of random inputs are ranges that no real input has. Neighbouring pixels of a picture are correlated, and few
tokens of a language make up most of its texts; neither is true of independent draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.runtime.backends.base import Array
from transom.runtime.errors import CalibrationError

IDS, MASK, PIXELS = "input_ids", "attention_mask", "pixel_values"

LEAST_CORRELATION = 0.2  # of neighbouring pixels: of noise 0, of noise at half its size 0.16, of scans of 8 x 8 0.7
PAIRS = 1000  # of neighbours, or no correlation is computed: of 1,000 independent ones 0.1 is three sigmas
SIGMAS = 4  # of the ids' unevenness that uniform draws have: ten texts have hundreds
TOKENS = 100  # or no unevenness is computed: fewer may all be different
SMALL_VOCABULARY = 256  # ids of so few kinds may well be even: bytes, letters of a genome, digits
MOST_IDS = 1 << 20  # counted; no vocabulary is larger
GROUPS = 256  # of neighbouring ids, at most
EXPECTED = 8  # ids in a group, or more: the chi-square distribution holds from 5 on (Cochran, 1954)


class RandomInputCheck:
    """Statistics of all inputs of a graph; ``check`` raises where they look like independent draws."""

    def __init__(self) -> None:
        self._products = np.zeros((2, 3))  # of neighbours below and beside: sum of a b, a a, b b
        self._pairs = 0
        self._counts: NDArray[np.int64] = np.zeros(0, np.int64)

    def update(self, feeds: Mapping[str, Array]) -> None:
        """Count ``pixel_values``, floats (B, C, H, W), and ``input_ids``, integers (B, S), of the inputs."""
        if PIXELS in feeds and feeds[PIXELS].ndim == 4:
            self._count_pixels(feeds[PIXELS].astype(np.float64))
        if IDS in feeds and feeds[IDS].ndim == 2:
            self._count_ids(feeds[IDS], feeds.get(MASK))

    def _count_pixels(self, pixels: NDArray[np.float64]) -> None:
        centred = pixels - pixels.mean((2, 3), keepdims=True)
        if not np.isfinite(centred).all():  # the collector raises for these
            return
        for axis, (a, b) in enumerate(((centred[:, :, 1:], centred[:, :, :-1]), (centred[..., 1:], centred[..., :-1]))):
            self._products[axis] += (a * b).sum(), (a * a).sum(), (b * b).sum()
            self._pairs += a.size

    def _count_ids(self, ids: Array, mask: Array | None) -> None:
        shown = np.ones(ids.shape, bool) if mask is None or mask.shape != ids.shape else mask != 0
        for row, there in zip(ids, shown, strict=True):
            inner = row[there][1:-1]  # the first and the last are often the same in every text
            inner = inner[(inner >= 0) & (inner < MOST_IDS)]
            if inner.size:
                counts = np.bincount(inner)
                self._counts.resize(max(len(self._counts), len(counts)), refcheck=False)
                self._counts[: len(counts)] += counts

    @property
    def correlation(self) -> float | None:
        """Correlate neighbouring pixels: sum of a b / sqrt(sum of a a * sum of b b) about each picture's mean.

        The larger of vertical and horizontal neighbours'; None of too few, and of plain areas alone.
        """
        ab, aa, bb = self._products.T
        if self._pairs < PAIRS or not (aa * bb).all():
            return None
        return float((ab / np.sqrt(aa * bb)).max())

    @property
    def unevenness(self) -> float | None:
        """Chi-square of the ids for a uniform distribution over smallest..largest, per degree of freedom.

        Pearson (1900): sum of (count - expected)^2 / expected, over one less than the number of kinds. None of too few
        ids, and of a small vocabulary.
        """
        counts = self._spanned
        if counts.sum() < TOKENS or len(counts) <= SMALL_VOCABULARY:
            return None
        return chi_square(counts, np.ones(len(counts)))

    @property
    def grouped(self) -> float:
        """Compute the same chi-square over groups of neighbouring ids, where ``unevenness`` is not None.

        A list of words, each there once, is even id by id; but a tokenizer orders its ids by frequency, so that words
        crowd in some groups.
        """
        group = self._group
        return chi_square(np.bincount(group, self._spanned), np.bincount(group))

    @property
    def _spanned(self) -> NDArray[np.int64]:
        """Return the counts from the smallest id seen on: draws may leave out a tokenizer's special tokens."""
        return self._counts[int(np.argmax(self._counts > 0)) :] if len(self._counts) else self._counts

    @property
    def _group(self) -> NDArray[np.int64]:
        """Return the group of each spanned id, 0..groups - 1, all of about one width."""
        spanned = self._spanned
        return np.arange(len(spanned)) * min(GROUPS, int(spanned.sum()) // EXPECTED) // len(spanned)

    @property
    def chance(self) -> float:
        """Return what the unevenness of uniform draws hardly exceeds: 1 and SIGMAS of its standard deviation."""
        return hardly_exceeded(len(self._spanned))

    def check(self, graph: str) -> None:
        """Raise CalibrationError where the inputs of the graph of that name look like independent draws."""
        correlation, unevenness = self.correlation, self.unevenness
        if correlation is not None and correlation < LEAST_CORRELATION:
            found = f"neighbouring pixels have a correlation of {correlation:.2f}, at least {LEAST_CORRELATION:g}"
        elif (
            unevenness is not None
            and unevenness < self.chance
            and self.grouped < hardly_exceeded(int(self._group[-1]) + 1)
        ):
            found = f"token ids are as even as dice: chi-square {unevenness:.3f} per kind, more than {self.chance:.3f}"
        else:
            return
        raise CalibrationError(
            f"the calibration data looks random to the graph {graph!r}: {found} is expected of real inputs. Ranges of "
            "noise are ranges that no real input has; give images or texts like those the model will see."
        )


def chi_square(counts: NDArray[Any], widths: NDArray[Any]) -> float:
    """Return Pearson's chi-square (1900) per degree of freedom; expectations are in proportion to ``widths``."""
    expected = widths * (counts.sum() / widths.sum())
    return float((np.square(counts - expected) / expected).sum() / (len(counts) - 1))


def hardly_exceeded(kinds: int) -> float:
    """Return a high quantile of chi-square per degree of freedom, of mean 1 and variance 2 / (kinds - 1)."""
    return 1 + SIGMAS * sqrt(2 / max(kinds - 1, 1))
