"""Images of one to four handwritten digits and questions about them: what the reference Flamingo sees and answers.

    python examples/digit_questions.py export/data/digit_questions_heldout.tsv

writes the 400 questions that score it, about scans that no reference model trains on; their examples are lines of
``calib/datasets/digit_questions.tsv``, of scans that train.

An image is a black canvas of 32x32 pixels in four quarters, of which one to four hold a scan of 8x8 somewhere. "Left
of" and "right of" a digit is the other quarter of its half, upper or lower, "above" and "below" that of its column:

    how many sevens?                "zero" to "four"
    what is left of the three?      a digit, or "nothing"; right of, above and below as well; one three is there
    which digits are there?         "three seven one", in reading order of the quarters
    how many digits?                "one" to "four"
    which is the largest digit?     "seven"; the smallest as well
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from digit_compositions import NAMES, endless
from numpy.typing import NDArray

from transom.calib.digit_compositions import CANVAS, SCAN, Place
from transom.calib.digit_questions import DigitQuestion
from transom.export.datasets import heldout_digits, question_examples

SEED = 20
QUARTER = CANVAS // 2
ROOM = QUARTER - SCAN  # rows and columns that a scan has in its quarter, so that two are a pixel apart at least
NUMBERS = ["zero", "one", "two", "three", "four"]
PLURALS = [name + ("es" if name == "six" else "s") for name in NAMES]
NOTHING = "nothing"
LIST, TOTAL, LARGEST, SMALLEST = WHOLE = (
    "which digits are there?",
    "how many digits?",
    "which is the largest digit?",
    "which is the smallest digit?",
)
COUNT, RELATION = "how many ...s?", "what is ... of the ...?"
KINDS = (COUNT, RELATION, *WHOLE)
DIRECTIONS = {"left of": 1, "right of": 1, "above": 2, "below": 2}  # quarters between the two: their numbers' XOR
CASES = {COUNT: 80, RELATION: 80, LIST: 60, TOTAL: 60, LARGEST: 60, SMALLEST: 60}  # that score
EXAMPLES = 4  # of each of them

Digits = list[int | None]  # of the four quarters, in reading order


def composed(pick: Callable[[int], int], rng: np.random.RandomState) -> tuple[Digits, tuple[Place, ...]]:
    """Compose one to four digits, every second time of two kinds; ``pick`` chooses the number of a digit's scan."""
    kinds = rng.permutation(10)[:2] if rng.rand() < 0.5 else np.arange(10)
    digits: Digits = [None] * 4
    places = []
    for quarter in sorted(rng.permutation(4)[: rng.choice([1, 2, 3, 4], p=[0.1, 0.25, 0.3, 0.35])]):
        digit = int(rng.choice(kinds))
        row, column = (half * QUARTER + int(rng.randint(ROOM)) for half in divmod(int(quarter), 2))
        digits[quarter] = digit
        places.append((pick(digit), row, column))
    return digits, tuple(places)


def caption(digits: Digits) -> str:
    """Describe every quarter: "top seven three, bottom nothing one"."""
    first, second, third, fourth = (NOTHING if digit is None else NAMES[digit] for digit in digits)
    return f"top {first} {second}, bottom {third} {fourth}"


def ask(kind: str, digits: Digits, rng: np.random.RandomState) -> tuple[str, str] | None:
    """A question of a kind and its answer; None where no digit is there once, which alone has a place."""
    present = [digit for digit in digits if digit is not None]
    if kind == COUNT:
        asked = int(rng.choice(present)) if rng.rand() < 0.65 else int(rng.randint(10))
        return f"how many {PLURALS[asked]}?", NUMBERS[present.count(asked)]
    if kind == RELATION:
        return ask_neighbour(digits, rng)
    answers = {
        LIST: " ".join(NAMES[digit] for digit in present),
        TOTAL: NUMBERS[len(present)],
        LARGEST: NAMES[max(present)],
        SMALLEST: NAMES[min(present)],
    }
    return kind, answers[kind]


def ask_neighbour(digits: Digits, rng: np.random.RandomState) -> tuple[str, str] | None:
    """What lies beside a digit; three times in four about one that has a neighbour there, where one has."""
    counts = Counter(digits)
    found = [
        (direction, digit, neighbour(digits, quarter, direction))
        for quarter, digit in enumerate(digits)
        if digit is not None and counts[digit] == 1
        for direction in DIRECTIONS
    ]
    if not found:
        return None
    with_neighbour = [each for each in found if each[2] is not None]
    if with_neighbour and rng.rand() < 0.75:
        found = with_neighbour
    direction, digit, answer = found[rng.randint(len(found))]
    return f"what is {direction} the {NAMES[digit]}?", NOTHING if answer is None else NAMES[answer]


def neighbour(digits: Digits, quarter: int, direction: str) -> int | None:
    """The digit in that direction of a quarter, if any."""
    other = quarter ^ DIRECTIONS[direction]
    return digits[other] if (other < quarter) == (direction in ("left of", "above")) else None


def training_scans(labels: NDArray[np.integer], rng: np.random.RandomState) -> Callable[[int], int]:
    """Return what picks the number of any scan of a digit."""
    numbers = [np.flatnonzero(labels == digit) for digit in range(10)]
    return lambda digit: int(rng.choice(numbers[digit]))


def questions(kind: str, pick: Callable[[int], int], rng: np.random.RandomState) -> Iterator[DigitQuestion]:
    """Questions of one kind without end, each about an image of its own."""
    while True:
        digits, places = composed(pick, rng)
        pair = ask(kind, digits, rng)
        if pair is not None:
            yield DigitQuestion(*pair, places)


def kind_of(question: str) -> str:
    """The kind of a question: one of KINDS."""
    if question in WHOLE:
        return question
    return COUNT if question.startswith("how many") else RELATION


def held_out(labels: NDArray[np.integer], examples: list[str]) -> list[DigitQuestion]:
    """The questions that score, every scan used about as often as the others of its digit.

    Each has EXAMPLES of its kind, numbers of ``examples``, which are the questions to choose from.
    """
    rng = np.random.RandomState(SEED)
    turns = [endless(np.flatnonzero(labels == digit), rng) for digit in range(10)]
    found = []
    for kind, cases in CASES.items():
        alike = [number for number, each in enumerate(examples) if kind_of(each) == kind]
        made = questions(kind, lambda digit: next(turns[digit]), rng)
        for _ in range(cases):
            each = next(made)
            shown = tuple(int(number) for number in rng.permutation(alike)[:EXAMPLES])
            found.append(DigitQuestion(each.question, each.answer, each.places, shown))
    return found


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    made = held_out(heldout_digits()[1], [asked for _, asked, _ in question_examples()])
    Path(sys.argv[1]).write_text("".join(f"{each.line()}\n" for each in made), encoding="ascii")


if __name__ == "__main__":
    main()
