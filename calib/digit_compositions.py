"""Read and draw compositions: captioned images of one or two scans of handwritten digits on a black canvas.

A composition is a line of text: the caption, then each scan that it names in its order, as the scan's number, row and
column. The scans themselves lie in another file, so that an image costs some thirty bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CANVAS, SCAN = 32, 8  # pixels a side
Place = tuple[int, int, int]  # number of a scan, row and column of its upper left pixel


@dataclass(frozen=True)
class Composition:
    """A caption, and where the scans that it names lie: (number, row, column) of the upper left pixel of each."""

    caption: str
    places: tuple[Place, ...]

    def draw(self, scans: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the image, uint8 (CANVAS, CANVAS) of 0..255; ``scans`` are uint8 (N, SCAN, SCAN)."""
        return draw_scans(self.places, scans)

    def line(self) -> str:
        """Return the line that ``read_compositions`` reads."""
        return "\t".join([self.caption, *(" ".join(map(str, place)) for place in self.places)])


def draw_scans(places: Iterable[Place], scans: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Draw scans, uint8 (N, SCAN, SCAN), at their places on black: uint8 (CANVAS, CANVAS)."""
    image = np.zeros((CANVAS, CANVAS), np.uint8)
    for number, row, column in places:
        image[row : row + SCAN, column : column + SCAN] = scans[number]
    return image


def read_compositions(text: str) -> list[Composition]:
    """Read one composition per line."""
    rows = (line.split("\t") for line in text.splitlines())
    return [Composition(caption, tuple(map(place, places))) for caption, *places in rows]


def place(text: str) -> Place:
    number, row, column = map(int, text.split(" "))
    return number, row, column
