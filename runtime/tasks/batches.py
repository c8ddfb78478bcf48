"""Group the rows of a call into batches, and collect their results in the caller's order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

# What a run of an encoder costs on a CPU, in the time of a token, fitted to MiniLM on a grid of batches. Times hardly
# depend on these: half or twice each changes them by 5 % at most (docs/performance.md, Packing).
RUN = 64  # the run itself: kernels that start, weights that are read
ATTENTION = 2048  # a token of a row this long costs twice one of a short row
CROWDED = 16384  # a token of a batch of so many costs twice one alone: activations leave the caches

Places = NDArray[np.intp]  # (R,) positions in the caller's list
Name = Callable[[int], str]  # the name of the input at a place, in errors
BatchRows = tuple[Places, NDArray[np.float32]]  # a batch's places, and a result for each


def batches(lengths: Sequence[int], most: int) -> Iterator[Places]:
    """Group rows of these ``lengths`` into as few batches of at most ``most`` as can be, rows of like length together.

    No other place decides it. Rows of equal length keep the caller's order.
    """
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), most):
        yield order[start : start + most]


def packed(lengths: Sequence[int], most: int, padded: Callable[[int], int]) -> Iterator[Places]:
    """Group rows of these ``lengths`` into the batches of at most ``most`` that cost least on a CPU.

    ``padded`` gives the length of a batch's rows of the length of its longest. Of all ways to cut the rows in order of
    their lengths this has the smallest sum of ``batch_costs``, and no other way to group them has a smaller one, since
    costs rise with the length. Rows of equal length keep the caller's order. Takes O(rows x most).
    """
    order = np.argsort(lengths, kind="stable")
    costs: dict[int, NDArray[np.float64]] = {}
    least = np.zeros(len(order) + 1)  # of the first rows, the cost of the best way to cut them
    sizes = np.zeros(len(order), np.int32)  # of the last batch of that way
    for last, place in enumerate(order.tolist()):
        length = padded(lengths[place])
        if length not in costs:
            costs[length] = batch_costs(most, length)
        count = min(most, last + 1)
        sums = costs[length][:count] + least[last + 1 - count : last + 1][::-1]
        sizes[last] = count - int(sums[::-1].argmin())  # of equal ones the larger
        least[last + 1] = sums[sizes[last] - 1]
    cuts, end = [], len(order)
    while end:
        cuts.append((end - int(sizes[end - 1]), end))
        end = cuts[-1][0]
    for start, end in reversed(cuts):
        yield order[start:end]


def by_tokens(lengths: Sequence[int], most: int) -> Iterator[Places]:
    """Group rows of these ``lengths`` in the caller's order, as many as have ``most`` tokens together, at least one.

    For backends that compute no padding: what a batch costs depends on its tokens alone.
    """
    start, tokens = 0, 0
    for place, length in enumerate(lengths):
        if place > start and tokens + length > most:
            yield np.arange(start, place)
            start, tokens = place, 0
        tokens += length
    if start < len(lengths):
        yield np.arange(start, len(lengths))


def batch_costs(most: int, length: int) -> NDArray[np.float64]:
    """Return the costs of batches of 1 to ``most`` rows of ``length`` tokens, (most,), in tokens of long texts."""
    rows = np.arange(1, most + 1)
    tokens = rows * length
    return RUN + tokens * (1 + length / ATTENTION + tokens / CROWDED)


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
