"""Interpolated modified Kneser-Ney over bytes: the baseline of the reference GPT.

Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling" (1998), section 3: the highest
order counts occurrences, each lower one counts the different bytes seen before an n-gram, every order subtracts a
discount of its own for counts of 1, 2 and more, and what they subtract goes to the order below, at last to 1/256.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MOST = 8  # bytes of an n-gram fit one uint64

Codes = NDArray[np.uint64]


def grams(text: bytes, n: int) -> Codes:
    """The n-gram that ends at each byte of ``text`` from the n-th on, one number each: big end first."""
    data = np.frombuffer(text, np.uint8).astype(np.uint64)
    codes = np.zeros(len(data) - n + 1, np.uint64)
    for offset in range(n):
        codes = codes << np.uint64(8) | data[offset : offset + len(codes)]
    return codes


def tail(codes: Codes, n: int) -> Codes:
    """The last n bytes of each n-gram."""
    return codes & np.uint64((1 << 8 * n) - 1)


def look_up(table: tuple[Codes, NDArray[np.float64]], codes: Codes) -> NDArray[np.float64]:
    """The value of each code in a table of ascending codes, 0 where it is absent."""
    keys, values = table
    at = np.searchsorted(keys, codes).clip(max=len(keys) - 1)
    return np.where(keys[at] == codes, values[at], 0.0)


def discounts(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """What to subtract from a count of 0, 1, 2, and 3 or more. Bytes alone have no rare ones to estimate it from."""
    ones, twos, threes, fours = (int((counts == c).sum()) for c in (1, 2, 3, 4))
    if not (ones and twos and threes and fours):
        return np.array([0.0, 0.5, 0.5, 0.5])
    y = ones / (ones + 2 * twos)
    return np.array([0.0, 1 - 2 * y * twos / ones, 2 - 3 * y * threes / twos, 3 - 4 * y * fours / threes])


class KneserNey:
    """``order`` = bytes of the longest n-gram: the byte and ``order`` - 1 before it. At most 8."""

    def __init__(self, text: bytes, order: int) -> None:
        if not 1 <= order <= MOST:
            raise ValueError(f"order is {order}; expected 1 to {MOST}.")
        self.order = order
        self.kept, self.spread = {}, {}  # n -> (n-gram -> its share of its context), (context -> what it gives down)
        seen, counts = np.unique(grams(text, order), return_counts=True)
        for n in range(order, 0, -1):
            taken = discounts(counts)[np.minimum(counts, 3)]
            contexts, owner = np.unique(seen >> np.uint64(8), return_inverse=True)
            totals = np.bincount(owner, counts)
            self.kept[n] = seen, (counts - taken) / totals[owner]
            self.spread[n] = contexts, np.bincount(owner, taken) / totals
            if n > 1:
                seen, counts = np.unique(tail(seen, n - 1), return_counts=True)

    def bits(self, text: bytes) -> NDArray[np.float64]:
        """-log2 of the probability of every byte from the ``order``-th on, given those before it."""
        codes = grams(text, self.order)
        probability = np.full(len(codes), 1 / 256)
        for n in range(1, self.order + 1):
            ends = tail(codes, n) if n < MOST else codes
            contexts = ends >> np.uint64(8)
            spread = np.where(np.isin(contexts, self.spread[n][0]), look_up(self.spread[n], contexts), 1.0)
            probability = look_up(self.kept[n], ends) + spread * probability
        return -np.log2(probability)
