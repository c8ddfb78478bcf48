"""Captioned images of one or two handwritten digits: what the reference Show, Attend and Tell looks at and writes.

    python examples/digit_compositions.py export/data/digit_compositions_heldout.tsv

writes the 500 compositions that score it: each of the 200 captions of two digits twice, each of the 10 of one digit
ten times, of scans that no reference model trains on.

A scan of 8x8 pixels lies anywhere on a black canvas of 32x32. Every image has exactly one caption:

- one digit: "a single five";
- two, whose rows do not meet and whose columns differ by at most 3: the upper one first, "a seven above an eight";
- two, whose columns do not meet and whose rows differ by at most 3: the left one first, "a two to the left of a nine".

No caption says "below" or "to the right of", and nothing lies in between. 20 of the captions of two digits never train.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from transom.calib.digit_compositions import CANVAS, SCAN, Composition
from transom.export.datasets import heldout_digits

SEED = 20
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
GAP = 1  # rows or columns between two scans, at least
SLANT = 3  # pixels that two scans may differ by across
SINGLE = 1 / 5  # of the images that train have one digit
REPEATS_SINGLE, REPEATS = 10, 2  # images of each caption that score
LAST = CANVAS - SCAN  # row or column of a scan


def named(digit: int) -> str:
    """The digit with its article."""
    return f"{'an' if NAMES[digit] == 'eight' else 'a'} {NAMES[digit]}"


def caption(digits: list[int], *, beside: bool) -> str:
    """The one caption of an image; ``beside`` is whether two digits lie side by side."""
    if len(digits) == 1:
        return f"a single {NAMES[digits[0]]}"
    first, second = map(named, digits)
    return f"{first} {'to the left of' if beside else 'above'} {second}"


CAPTIONS = [caption([digit], beside=False) for digit in range(10)] + [
    caption([first, second], beside=beside) for beside in (False, True) for first in range(10) for second in range(10)
]
# Each digit once in each place of each relation.
UNSEEN = {
    caption([digit, (digit + step) % 10], beside=beside)
    for step, beside in ((3, False), (7, True))
    for digit in range(10)
}


def places(count: int, *, beside: bool, rng: np.random.RandomState) -> list[tuple[int, int]]:
    """Row and column of each scan, in the order of the caption."""
    if count == 1:
        return [(rng.randint(LAST + 1), rng.randint(LAST + 1))]
    first = rng.randint(LAST - SCAN - GAP + 1)
    second = rng.randint(first + SCAN + GAP, LAST + 1)
    across = rng.randint(LAST + 1)
    slanted = int(np.clip(across + rng.randint(-SLANT, SLANT + 1), 0, LAST))
    upright = [(first, across), (second, slanted)]
    return [(column, row) for row, column in upright] if beside else upright


def composition(
    digits: list[int], pick: Callable[[int], int], *, beside: bool, rng: np.random.RandomState
) -> Composition:
    """Compose these digits; ``pick`` chooses the number of a scan of a digit."""
    where = places(len(digits), beside=beside, rng=rng)
    found = [(pick(digit), row, column) for digit, (row, column) in zip(digits, where, strict=True)]
    return Composition(caption(digits, beside=beside), tuple(found))


def training(labels: NDArray[np.integer], rng: np.random.RandomState, *, unseen: bool = False) -> Iterator[Composition]:
    """Compositions of the scans that ``labels`` are of, without end, and without the captions that never train.

    With ``unseen``, of these captions alone.
    """
    scans = [np.flatnonzero(labels == digit) for digit in range(10)]
    while True:
        digits = [int(digit) for digit in rng.randint(10, size=1 if rng.rand() < SINGLE else 2)]
        beside = bool(rng.randint(2))
        if (caption(digits, beside=beside) in UNSEEN) == unseen:
            yield composition(digits, lambda digit: int(rng.choice(scans[digit])), beside=beside, rng=rng)


def held_out(labels: NDArray[np.integer]) -> list[Composition]:
    """The compositions that score: every caption, every scan used about as often as the others of its digit."""
    rng = np.random.RandomState(SEED)
    turns = [endless(np.flatnonzero(labels == digit), rng) for digit in range(10)]
    found = [
        composition([digit], lambda digit: next(turns[digit]), beside=False, rng=rng)
        for digit in range(10)
        for _ in range(REPEATS_SINGLE)
    ]
    found += [
        composition([first, second], lambda digit: next(turns[digit]), beside=beside, rng=rng)
        for beside in (False, True)
        for first in range(10)
        for second in range(10)
        for _ in range(REPEATS)
    ]
    return found


def endless(numbers: NDArray[np.integer], rng: np.random.RandomState) -> Iterator[int]:
    """The numbers in one random order after another."""
    while True:
        yield from (int(number) for number in rng.permutation(numbers))


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    lines = [f"{each.line()}\n" for each in held_out(heldout_digits()[1])]
    Path(sys.argv[1]).write_text("".join(lines), encoding="ascii")


if __name__ == "__main__":
    main()
