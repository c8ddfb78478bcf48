"""How two answers are compared: the worst element, where it is, and how bad on the tensor's own scale."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Comparison:
    """``error`` is max|ours - theirs| / max|theirs|: infinite where a shape differs or a value is not finite."""

    tensor: str
    shape: tuple[int, ...]
    error: float
    index: tuple[int, ...]  # of the worst element
    ours: float
    theirs: float

    def __str__(self) -> str:
        where = ", ".join(map(str, self.index))
        return f"{self.tensor}[{where}] is {self.ours:.8g}, expected {self.theirs:.8g} (error {self.error:.2e})"


def compare(tensor: str, ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> Comparison:
    """Hold ``ours`` against ``theirs``, both floating point of the same shape.

    The scale is the tensor's largest absolute value, since that is what the next layer's sums are
    made of; a tensor of zeros is compared absolutely. A NaN or infinity on either side is an
    infinite error even where both have it: nothing is proven there.
    """
    if ours.shape != theirs.shape:
        return Comparison(tensor, theirs.shape, math.inf, (), math.nan, math.nan)
    if theirs.size == 0:
        return Comparison(tensor, theirs.shape, 0.0, (), 0.0, 0.0)
    finite = np.isfinite(ours) & np.isfinite(theirs)
    with np.errstate(invalid="ignore"):
        difference = np.where(finite, np.abs(ours - theirs), np.inf)
    index = tuple(int(i) for i in np.unravel_index(int(difference.argmax()), difference.shape))
    scale = float(np.abs(theirs, where=finite, out=np.zeros_like(theirs)).max()) or 1.0
    return Comparison(
        tensor, theirs.shape, float(difference[index]) / scale, index, float(ours[index]), float(theirs[index])
    )
