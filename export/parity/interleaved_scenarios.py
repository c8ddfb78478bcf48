"""Make what a generator that sees images reads in a parity run: images anywhere in prompts, new ones between tokens.

Each token sees the latest image before it. So the scenarios differ in where marks of images stand: at the start, in the
middle, nowhere, in other places and numbers in the rows of one batch, as many as the bundle takes, and in tokens that
are appended later, in chunks and single ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from transom.export.parity.inputs import ParityInputs
from transom.export.parity.scenarios import LONG_CHUNK, Scenario, single_steps
from transom.runtime.decoder import context_length
from transom.runtime.errors import BundleError
from transom.runtime.graph_spec import IMAGES
from transom.runtime.greedy_check import Chunk
from transom.runtime.manifest import Manifest
from transom.runtime.tasks.interleaved_prompts import InterleavedPrompt

POOL = 16  # different images, taken in turn
LEAST = 3  # tokens of a prompt that is continued: of fewer the mark in the middle would be the last one
Marks = Sequence[int]  # places of a row's tokens at which an image stands


class InterleavedRows:
    """Makes rows of ``vocabulary`` tokens with images at given places, each image another crop than the one before."""

    def __init__(self, manifest: Manifest, inputs: Mapping[str, ParityInputs]) -> None:
        graphs = {file.graph.name: file.graph for file in manifest.graphs}
        mark = manifest.options.get("image_token_id")
        if type(mark) is not int:
            raise BundleError("bundle.json: options.image_token_id is no integer; export the bundle again.")
        self._mark = mark
        self._ids = inputs["decoder"]
        self._vocabulary = graphs["decoder"].inputs[0].exclusive_max or 1
        self._pool: NDArray[np.float32] = inputs["encoder"].feeds({"B": POOL})["pixel_values"]
        self._taken = 0

    def prompts(self, lengths: Sequence[int], marks: Sequence[Marks]) -> list[InterleavedPrompt]:
        """Return a row of each length, with an image at each of its marks."""
        return [
            self._row(self._ids.ids((1, length), self._vocabulary)[0], places)
            for length, places in zip(lengths, marks, strict=True)
        ]

    def chunk(self, rows: int, length: int, marks: Mapping[int, Marks]) -> Chunk:
        """Return tokens (rows, length), with images at the marks of some rows, by the row's number."""
        tokens = self._ids.ids((rows, length), self._vocabulary)
        found = [self._row(row, marks.get(number, ())) for number, row in enumerate(tokens)]
        return found if any(row.pixels for row in found) else np.array([row.ids for row in found])

    def _row(self, ids: NDArray[np.int64], marks: Marks) -> InterleavedPrompt:
        """Return the tokens with marks at their places alone: one that is there by chance becomes the next token."""
        row = np.where(ids == self._mark, (ids + 1) % self._vocabulary, ids)
        row[list(marks)] = self._mark
        pixels = [self._pool[(self._taken + place) % POOL] for place in range(len(marks))]
        self._taken += len(marks)
        return InterleavedPrompt(row.tolist(), pixels)


def interleaved_scenarios(manifest: Manifest, inputs: Mapping[str, ParityInputs]) -> list[Scenario]:
    """Make prompts from one token to the longest, then chunks to the context's end, all with images or without.

    Nothing is longer than the context, of more rows than the bundle takes, or of more images in a row than axis I has.
    """
    largest = {name: axis.max for name, axis in manifest.axes.items()}
    decoder = next(file.graph for file in manifest.graphs if file.graph.name == "decoder")
    context = context_length(decoder, manifest.axes, manifest.options)
    most = largest[IMAGES]
    made = InterleavedRows(manifest, inputs)

    def scenario(
        prompts: Sequence[tuple[int, Marks]],
        chunks: Sequence[tuple[int, Mapping[int, Marks]]],
        beams: int = 1,
    ) -> Scenario:
        """Cut a scenario to what the bundle takes; chunks have the marks of their rows by number."""
        beams = min(beams, largest["B"])
        rows = [(max(1, min(length, context)), marks) for length, marks in prompts[: largest["B"] // beams]]
        placed = [[place for place in marks if place < length][:most] for length, marks in rows]
        seen = {row: len(places) for row, places in enumerate(placed)}
        lengths = [length for length, _ in rows]
        left, kept = context - max(lengths), []
        for length, marks in chunks:
            length = min(length, left)
            new = {row: [place for place in marks.get(row, ()) if place < length][: most - seen[row]] for row in seen}
            if length > 0:
                kept.append(made.chunk(len(rows) * beams, length, new))
                seen = {row: count + len(new[row]) for row, count in seen.items()}
            left -= length
        return Scenario(list(made.prompts(lengths, placed)), kept, beams)

    forced, before = single_steps(context, LEAST)
    longest = max(1, context - 3)
    new = {0: forced // 3, 2: forced // 2}  # steps with an image: of a row that had one, and of one without
    steps = [(1, {row: (0,) for row, step in new.items() if step == number}) for number in range(forced)]
    return [
        scenario([(1, ())], [(1, {})]),
        scenario([(1, (0,))], [(1, {}), (1, {})]),
        scenario([(longest, evenly(longest, most))], [(1, {})] * 3),
        scenario([(67 - 7 * row, staggered(row)) for row in range(largest["B"])], [(1, {})] * 3),
        scenario([(5, (1,)), (2, ())], [(5, {0: (0,)}), (1, {1: (0,)}), (7, {0: (3,), 1: (0, 4)}), (3, {})]),
        scenario([(7, (0,))], [(LONG_CHUNK, {0: (LONG_CHUNK // 2,)})]),
        scenario([(6, (0,)), (9, (2, 5))], [(1, {}), (4, {}), (1, {})], beams=2),
        scenario([(before, (0,)), (before // 2 + 2, (before // 4 + 1,)), (min(4, before), ())], steps),
    ]


def evenly(length: int, count: int) -> list[int]:
    """Return ``count`` different places of a row, spread over it from its first token on."""
    return list(dict.fromkeys(place * length // count for place in range(count)))


def staggered(row: int) -> list[int]:
    """Return the marks of a row of a batch: none to three images, two tokens apart, later ones in later rows."""
    return [row + 2 * image for image in range(row % 4)]
