"""Group the rows of a call into batches, and collect their results in the caller's order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Places = NDArray[np.intp]  # (R,) positions in the caller's list
Name = Callable[[int], str]  # the name of the input at a place, in errors
BatchRows = tuple[Places, NDArray[np.float32]]  # a batch's places, and a result for each


def batches(lengths: Sequence[int], most: int) -> Iterator[Places]:
    """Group rows of these ``lengths`` into batches of at most ``most``, rows of like length together.

    No other place decides it. Rows of equal length keep the caller's order.
    """
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), most):
        yield order[start : start + most]


def collected(parts: Iterable[BatchRows], count: int) -> NDArray[np.float32]:
    """Collect the rows of all batches, float32 (count, ...), in the caller's order; holds one batch beside them."""
    found = np.empty(0, np.float32)
    for places, rows in parts:
        if not len(found):
            found = np.empty((count, *rows.shape[1:]), rows.dtype)
        found[places] = rows
    return found


def name_of_row(places: Places, name: Name, row: int) -> str:
    """Return the name in errors of the input of a row of the batch at ``places``."""
    return name(int(places[row]))
