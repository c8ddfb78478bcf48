"""Read and draw questions about images of up to four scans of handwritten digits.

A question is a line of text: the question, its answer, where the scans lie, and the numbers of the examples that a
few-shot prompt shows before it, which are lines of another such file. The scans themselves lie elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from transom.calib.digit_compositions import Place, draw_scans, place


@dataclass(frozen=True)
class DigitQuestion:
    """A question, its one right answer, and the image that it is about.

    places      number, row and column of the upper left pixel of each scan, in reading order of the quarters
    examples    line numbers, from 0, of the questions that are answered before this one in a few-shot prompt
    """

    question: str
    answer: str
    places: tuple[Place, ...]
    examples: tuple[int, ...] = ()

    def draw(self, scans: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the image, uint8 (CANVAS, CANVAS) of 0..255; ``scans`` are uint8 (N, SCAN, SCAN)."""
        return draw_scans(self.places, scans)

    def line(self) -> str:
        """Return the line that ``read_questions`` reads."""
        places = ",".join(" ".join(map(str, place)) for place in self.places)
        fields = [self.question, self.answer, places, " ".join(map(str, self.examples))]
        return "\t".join(fields[: 4 if self.examples else 3])


def read_questions(text: str) -> list[DigitQuestion]:
    """Read one question per line."""
    return [question(line.split("\t")) for line in text.splitlines()]


def question(fields: list[str]) -> DigitQuestion:
    asked, answer, places, *examples = fields
    numbers = tuple(int(number) for listed in examples for number in listed.split(" "))
    return DigitQuestion(asked, answer, tuple(map(place, places.split(","))), numbers)
