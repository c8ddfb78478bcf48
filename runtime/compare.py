"""Compare two outputs: the worst element, its index, and its difference on the tensor's own scale."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.runtime.backends.base import Array
from transom.runtime.graph_spec import Graph

EXPONENTS = 256  # of a float32, as it stores them: a number of exponent e is in 2^(e - BIAS) up to twice that
BIAS = 127
BLOCK = 1 << 20  # elements that are compared at a time: what is computed of them takes 30 MB
LOGIT = 1.0  # the least scale of logits: a difference of d multiplies odds by exp(d), however small the logits are


@dataclass(frozen=True)
class Comparison:
    """The worst element of a tensor: ``difference`` is max|ours - theirs|, ``scale`` is max|theirs|.

    The difference is infinite where a shape differs or a value is not finite. ``histogram``, int64 (EXPONENTS,),
    counts the elements by the exponent of their |ours - theirs|; at 0 are those that are equal.
    """

    tensor: str
    shape: tuple[int, ...]
    difference: float
    scale: float
    index: tuple[int, ...]  # of the worst element
    ours: float
    theirs: float
    histogram: NDArray[np.int64] = field(
        default_factory=lambda: np.zeros(EXPONENTS, np.int64), compare=False, repr=False
    )

    @property
    def error(self) -> float:
        """Return the difference on the tensor's own scale; the difference itself where that is zero."""
        return self.difference / (self.scale or 1.0)

    def to_json(self) -> dict[str, Any]:
        """Return every field but the histogram, and the error computed from them."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "histogram"}
        return {**values, "error": self.error}

    def __str__(self) -> str:
        where = ", ".join(map(str, self.index))
        return f"{self.tensor}[{where}] is {self.ours:.8g}, expected {self.theirs:.8g} (error {self.error:.2e})"


def compare(
    tensor: str,
    ours: NDArray[np.float32],
    theirs: NDArray[np.float32],
    real: NDArray[np.bool_] | None = None,
) -> Comparison:
    """Compare ``ours`` with ``theirs``, both floating point of the same shape.

    The scale is the tensor's largest absolute value, since that is what the next layer's sums are
    made of; a tensor of zeros is compared absolutely. A NaN or infinity on either side is an
    infinite error even where both have it: nothing is proven there. ``real``, which broadcasts to the
    tensor, says which positions count.
    """
    if ours.shape != theirs.shape:
        return Comparison(tensor, theirs.shape, math.inf, 1.0, (), math.nan, math.nan)
    if theirs.size == 0:
        return Comparison(tensor, theirs.shape, 0.0, 1.0, (), 0.0, 0.0)
    worst, index, scale = -1.0, (0,) * theirs.ndim, 0.0
    histogram = np.zeros(EXPONENTS, np.int64)
    for where in blocks(theirs.shape):  # one at a time: logits over a vocabulary take gigabytes
        counted = None if real is None else np.broadcast_to(real, theirs.shape)[where]
        difference, largest, padding = compare_block(ours[where], theirs[where], counted)
        histogram += exponents(difference)
        histogram[0] -= padding  # left out, though its difference was set to 0
        place = int(difference.argmax())
        if difference.flat[place] > worst:
            worst = float(difference.flat[place])
            starts = [part.start or 0 for part in where] + [0] * (theirs.ndim - len(where))
            found = np.unravel_index(place, difference.shape)
            index = tuple(int(i) + start for i, start in zip(found, starts, strict=True))
        scale = max(scale, largest)
    return Comparison(tensor, theirs.shape, worst, scale, index, float(ours[index]), float(theirs[index]), histogram)


def blocks(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Yield, in order, slices of the first two axes that cut a tensor into parts of about BLOCK elements."""
    inner = prod(shape[2:])
    step = max(1, BLOCK // max(inner, 1))
    if len(shape) < 2:
        yield tuple(slice(None) for _ in shape)
        return
    for row in range(shape[0]):
        for start in range(0, shape[1], step):
            yield slice(row, row + 1), slice(start, start + step)


def compare_block(
    ours: NDArray[np.float32], theirs: NDArray[np.float32], real: NDArray[np.bool_] | None
) -> tuple[NDArray[np.float32], float, int]:
    """Return |ours - theirs| of one block, infinite where either is not finite, and the largest |theirs| that counts.

    The third is how many elements are finite padding, whose difference is 0.
    """
    finite = np.isfinite(ours) & np.isfinite(theirs)
    with np.errstate(invalid="ignore"):
        difference = np.where(finite, np.abs(ours - theirs), np.float32(np.inf))
    size = np.where(finite, np.abs(theirs), np.float32(0))
    left_out = 0
    if real is not None:
        padding = np.broadcast_to(~real, theirs.shape)
        difference[padding & finite] = 0
        size[padding] = 0
        left_out = int((padding & finite).sum())
    return difference, float(size.max()), left_out


def exponents(difference: NDArray[np.float32]) -> NDArray[np.int64]:
    """Count how many of these, none negative, have each exponent of a float32: int64 (EXPONENTS,)."""
    bits = np.ascontiguousarray(difference, np.float32).reshape(-1).view(np.uint32)
    return np.bincount(bits >> 23, minlength=EXPONENTS)


def compare_outputs(
    graph: Graph, inputs: Mapping[str, Array], ours: Mapping[str, Array], theirs: Mapping[str, Array]
) -> tuple[Comparison, ...]:
    """Compare each of ``theirs`` with ``ours``, except positions that ``attention_mask`` calls padding.

    What a model computes for padding is never read and is not kept within any bounds by training:
    counted, it would ask for tolerances ten times as wide for everything else. It must be finite.
    """
    floors = {name: LOGIT if name.endswith("logits") else 0.0 for name in theirs}
    axes = {tensor.name: tensor.shape for tensor in graph.outputs}
    mask = inputs.get("attention_mask")
    compared = (
        compare(name, ours[name], expected, None if mask is None else real_positions(mask, axes[name]))
        for name, expected in theirs.items()
    )
    return on_scales(compared, floors)


def real_positions(attention_mask: Array, axes: tuple[str | int, ...]) -> NDArray[np.bool_] | None:
    """Return ``attention_mask`` (B, S) as bool that broadcasts to ``axes``; None where those have not both B and S."""
    if axes[0] != "B" or "S" not in axes:
        return None
    shape = [1] * len(axes)
    shape[0], shape[axes.index("S")] = attention_mask.shape
    return np.not_equal(attention_mask, 0).reshape(shape)


def largest_scales(comparisons: Iterable[Comparison]) -> dict[str, float]:
    """Return each tensor's largest scale over many runs."""
    scales: dict[str, float] = {}
    for comparison in comparisons:
        scales[comparison.tensor] = max(comparison.scale, scales.get(comparison.tensor, 0.0))
    return scales


def on_scales(comparisons: Iterable[Comparison], scales: Mapping[str, float]) -> tuple[Comparison, ...]:
    """Return the comparisons on the given scales, where those are larger.

    One run may be too little to tell a tensor's scale: a single logit near zero has none.
    """
    return tuple(
        replace(comparison, scale=max(comparison.scale, scales.get(comparison.tensor, 0.0)))
        for comparison in comparisons
    )
