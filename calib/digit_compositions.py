"""Read and draw compositions: captioned images of one or two scans of handwritten digits on a black canvas.

A composition is a line of text: the caption, then each scan that it names in its order, as the scan's number, row and
column. The scans themselves lie in another file, so that an image costs some thirty bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CANVAS, SCAN = 32, 8  # pixels a side


@dataclass(frozen=True)
class Composition:
    """A caption, and where the scans that it names lie: (number, row, column) of the upper left pixel of each."""

    caption: str
    places: tuple[tuple[int, int, int], ...]

    def draw(self, scans: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the image, uint8 (CANVAS, CANVAS) of 0..255; ``scans`` are uint8 (N, SCAN, SCAN)."""
        image = np.zeros((CANVAS, CANVAS), np.uint8)
        for number, row, column in self.places:
            image[row : row + SCAN, column : column + SCAN] = scans[number]
        return image

    def line(self) -> str:
        """Return the line that ``read_compositions`` reads."""
        return "\t".join([self.caption, *(" ".join(map(str, place)) for place in self.places)])


def read_compositions(text: str) -> list[Composition]:
    """Read one composition per line."""
    rows = (line.split("\t") for line in text.splitlines())
    return [Composition(caption, tuple(map(place, places))) for caption, *places in rows]


def place(text: str) -> tuple[int, int, int]:
    number, row, column = map(int, text.split(" "))
    return number, row, column
