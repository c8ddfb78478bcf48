"""Check a decoder: logits of given tokens, step by step, and a whole greedy generation.

The export compares PyTorch and the artefact by these, ``transom selftest`` the golden values and the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from transom.runtime.backends.base import Array
from transom.runtime.decoder import Decoder
from transom.runtime.errors import ParityError
from transom.runtime.tasks.generator import Generator
from transom.runtime.tasks.image_prompts import Pixels
from transom.runtime.tasks.interleaved_prompts import InterleavedPrompt
from transom.runtime.tasks.prompts import Prompt, padded

Chunk = NDArray[np.int64] | list[InterleavedPrompt]  # tokens (R, n), or R rows of n tokens with new images among them

PAD = -1  # fills rows of tokens that ended early
TOP = 16  # logits of each step that golden values keep: a side that chose another token chose one of these
SLACK = 1e-3  # of the largest logit: what a row's logits differ by between a generation and its replay
PYTORCH = "PyTorch's"  # the generation that ours is compared with, in words


class AppendsImages(Protocol):
    """A generator whose rows get new images between tokens."""

    def append_images(self, decoder: Decoder, images: Sequence[Sequence[Pixels]]) -> None:
        """Give each row the images of the marks among its next tokens."""


def forced_logits(
    bundle: Generator, prompts: Sequence[Prompt], chunks: Sequence[Chunk], beams: int = 1
) -> Iterator[Array]:
    """Yield logits under teacher forcing: those of the prompts' last tokens (R, 1, V), then (R, n, V) of each chunk.

    With several ``beams`` each prompt has that many rows from its prefill on, one behind another.
    """
    prefilled = bundle.prefill(prompts)
    rows = np.repeat(np.arange(len(prompts)), beams)
    if beams > 1:
        prefilled.decoder.reorder(rows)
    yield prefilled.logits[rows, None]
    for chunk in chunks:
        tokens = chunk
        if isinstance(tokens, list):
            cast(AppendsImages, bundle).append_images(prefilled.decoder, [row.pixels for row in tokens])
            tokens = np.array([row.ids for row in tokens])
        yield prefilled.decoder.forward_logits(tokens)


@dataclass(frozen=True)
class GreedyTokens:
    """The tokens of a greedy generation of each prompt, and what they were chosen from.

    tokens      int64 (R, n), PAD behind a row's end
    margins     float32 (R, n): by how much each token's logit was above the best of the others
    top_ids     int64 (R, n, K): the tokens of the K largest logits of each step; None where they were not kept
    top_logits  float32 (R, n, K): those logits
    """

    tokens: NDArray[np.int64]
    margins: NDArray[np.float32]
    top_ids: NDArray[np.int64] | None = None
    top_logits: NDArray[np.float32] | None = None

    def to_arrays(self) -> dict[str, Array]:
        """Return the arrays by name, as golden values hold them."""
        return {name: array for name, array in vars(self).items() if array is not None}


@dataclass(frozen=True)
class GreedyGeneration:
    """A greedy generation per prompt: the ``chosen`` tokens and the ``logits`` of each step, float32 (R, n, V)."""

    chosen: GreedyTokens
    logits: NDArray[np.float32]


def greedy(bundle: Generator, prompts: Sequence[Prompt], new_tokens: int) -> GreedyGeneration:
    """Generate up to ``new_tokens`` for each prompt, all prompts in one batch."""
    rows = bundle.generate(
        list(prompts),
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
    )
    tokens = np.full((len(rows), new_tokens), PAD, np.int64)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
    logits = logits_along(bundle, prompts, tokens)
    chosen = np.maximum(tokens, 0)[:, :, None]
    others = logits.copy()
    np.put_along_axis(others, chosen, -np.inf, axis=2)
    mark = bundle.manifest.options.get("image_token_id")
    if mark is not None:
        others[:, :, mark] = -np.inf  # the mark of an image is never generated, however large its logit is
    margins = np.take_along_axis(logits, chosen, axis=2)[:, :, 0] - others.max(2)
    top_ids = np.argsort(-logits, axis=2, kind="stable")[:, :, :TOP]
    top_logits = np.take_along_axis(logits, top_ids, axis=2)
    margins = np.where(tokens == PAD, np.float32(0), margins)
    return GreedyGeneration(GreedyTokens(tokens, margins, top_ids, top_logits), logits)


def logits_along(bundle: Generator, prompts: Sequence[Prompt], tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the logits that each of ``tokens`` (R, n) was chosen from, fed one by one: (R, n, V)."""
    fed = np.maximum(tokens, 0)  # behind a row's end anything will do
    chunks = [fed[:, step : step + 1] for step in range(tokens.shape[1] - 1)]
    return np.concatenate(list(forced_logits(bundle, prompts, chunks)), axis=1)


@dataclass(frozen=True)
class Divergence:
    """The first step at which two greedy generations differ in a row.

    ``margin`` is how far the other side's token was above its next best; infinite behind that side's end.
    """

    row: int
    step: int
    ours: int
    theirs: int
    margin: float

    def __str__(self) -> str:
        return self.describe(PYTORCH)

    def describe(self, other: str) -> str:
        """Describe it in words; ``other`` names the other generation, as PYTORCH does."""
        return (
            f"greedy token {self.step} of row {self.row} is {self.ours}, {other} is {self.theirs} "
            f"(its margin {self.margin:.2e})"
        )


def divergences(ours: NDArray[np.int64], theirs: GreedyTokens) -> list[Divergence]:
    """Return the first step at which each row of ``ours``, int64 (R, n), differs from ``theirs``."""
    found = []
    for row in range(len(theirs.tokens)):
        steps = np.flatnonzero(ours[row] != theirs.tokens[row])
        if len(steps):
            step = int(steps[0])
            token = int(theirs.tokens[row, step])
            margin = math.inf if token == PAD else float(abs(theirs.margins[row, step]))
            found.append(Divergence(row, step, int(ours[row, step]), token, margin))
    return found


def explained_margin(ours: GreedyGeneration, theirs: GreedyTokens, divergence: Divergence) -> float:
    """Return the largest margin of ``theirs`` that the logits of both sides explain where the tokens differ.

    Twice the largest difference between them, for one token may have lost as much as another won, and SLACK. No margin
    where our token is none of the largest there; any where the other side's logits were not kept.
    """
    if theirs.top_ids is None or theirs.top_logits is None:
        return math.inf
    ids, expected = (array[divergence.row, divergence.step] for array in (theirs.top_ids, theirs.top_logits))
    if divergence.ours != PAD and divergence.ours not in ids:
        return 0.0
    found = ours.logits[divergence.row, divergence.step, ids]
    return float(2 * np.abs(found - expected).max() + SLACK * np.abs(expected).max())


def require_same_tokens(
    ours: GreedyGeneration, theirs: GreedyTokens, tolerance: float, other: str = PYTORCH
) -> list[Divergence]:
    """Return the near ties, the rows that differ where ``theirs`` was itself undecided.

    That is where its margin is below both sides' ``tolerance`` of a logit, and no larger than ``explained_margin``.
    ``other`` names ``theirs`` in messages. Raises ParityError for a row that differs elsewhere.
    """
    found = divergences(ours.chosen.tokens, theirs)
    for divergence in found:
        allowed = min(2 * tolerance, explained_margin(ours, theirs, divergence))
        if not divergence.margin <= allowed:  # NaN explains nothing
            raise ParityError(
                f"{divergence.describe(other)}; only a margin below {allowed:.2e} would explain that. The decoder's "
                f"cache is not what {other} is: export again, or report it."
            )
    return found


def prompts_to_arrays(prompts: Sequence[Prompt]) -> dict[str, Array]:
    """Return prompts as golden values hold them: ``prompts`` (R, S) and their ``lengths`` (R,), or pixels (R, C, H, W).

    Pixels have no lengths. Those of interleaved prompts stand beside their tokens: ``images`` int64 (R,), how many a
    row has, and ``pixel_values`` float32 (R, I, C, H, W), I the most of them, zeros behind a row's last one.
    """
    if isinstance(prompts[0], np.ndarray):
        return {"prompts": np.stack(prompts)}
    if not isinstance(prompts[0], InterleavedPrompt):
        ids, lengths = padded(prompts)
        return {"prompts": ids, "lengths": lengths}
    ids, lengths = padded([prompt.ids for prompt in prompts])
    images = np.array([len(prompt.pixels) for prompt in prompts])
    found = {"prompts": ids, "lengths": lengths, "images": images}
    shape = next((pixels.shape for prompt in prompts for pixels in prompt.pixels), None)
    if shape is not None:
        found["pixel_values"] = np.zeros((len(prompts), int(images.max()), *shape), np.float32)
        for row, prompt in zip(found["pixel_values"], prompts, strict=True):
            for place, pixels in enumerate(prompt.pixels):
                row[place] = pixels
    return found


def prompts_from_arrays(arrays: Mapping[str, Array]) -> list[Prompt]:
    """Return the prompts that ``prompts_to_arrays`` took."""
    if "lengths" not in arrays:
        return list(arrays["prompts"])
    rows = [row[:length].tolist() for row, length in zip(arrays["prompts"], arrays["lengths"], strict=True)]
    if "images" not in arrays:
        return rows
    pixels = arrays.get("pixel_values", np.empty((len(rows), 0)))
    images = [list(row[:count]) for row, count in zip(pixels, arrays["images"], strict=True)]
    return [InterleavedPrompt(ids, own) for ids, own in zip(rows, images, strict=True)]
