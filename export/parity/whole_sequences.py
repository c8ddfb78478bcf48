"""Compute the logits of an interleaved scenario without caches: the side that cached steps are compared with.

Every row runs alone, all of its tokens and all of its images in one call. So neither a KV cache, nor an image cache
that feeds only what is seen, nor rows that share images have a part in it: what one of them does wrong is a difference.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from transom.export.parity.scenarios import Scenario
from transom.runtime.backends.base import Array
from transom.runtime.feeds import IMAGE_INDICES, LOGITS_POSITIONS
from transom.runtime.image_cache import image_inputs
from transom.runtime.session import LoadedBundle
from transom.runtime.tasks.interleaved_prompts import InterleavedPrompt


def whole_logits(bundle: LoadedBundle, scenario: Scenario) -> Iterator[Array]:
    """Yield what ``forced_logits`` yields of a scenario: (R, 1, V) of the prompts, then (R, n, V) of each chunk."""
    rows = [row for prompt in scenario.prompts for row in [prompt] * scenario.beams]
    chunks = [rows_of(chunk) for chunk in scenario.chunks]
    found = [
        logits_of(bundle, joined([row, *(chunk[number] for chunk in chunks)]), first=len(row) - 1)
        for number, row in enumerate(rows)
    ]
    ends = np.cumsum([1, *(len(chunk[0]) for chunk in chunks)])
    for start, end in zip([0, *ends], ends, strict=False):
        yield np.stack([logits[start:end] for logits in found])


def rows_of(chunk: NDArray[np.int64] | list[InterleavedPrompt]) -> list[InterleavedPrompt]:
    """Return the rows of a chunk, those without new images too, as tokens with their images."""
    return [InterleavedPrompt(row.tolist(), []) for row in chunk] if isinstance(chunk, np.ndarray) else chunk


def joined(parts: list[InterleavedPrompt]) -> InterleavedPrompt:
    """Return parts of a row, one behind another, as one."""
    return InterleavedPrompt(
        [token for part in parts for token in part.ids], [pixels for part in parts for pixels in part.pixels]
    )


def logits_of(bundle: LoadedBundle, row: InterleavedPrompt, first: int) -> NDArray[np.float32]:
    """Return the logits behind the tokens of a row from ``first`` on, float32 (n, V)."""
    ids = np.array([row.ids])
    feeds: dict[str, Array] = {"input_ids": ids}
    if row.pixels:
        encoded = [bundle.run({"pixel_values": pixels[None]}) for pixels in row.pixels]
        names = [tensor.name for tensor in image_inputs(bundle.backend("decoder").graph)]
        feeds |= {name: np.concatenate([image[name] for image in encoded], axis=2) for name in names}
        feeds[IMAGE_INDICES] = np.cumsum(ids == bundle.manifest.options["image_token_id"], axis=1)
    most = bundle.max_size("P")
    wanted = np.arange(first, ids.shape[1])[None]
    parts = [wanted[:, start : start + most] for start in range(0, wanted.shape[1], most)]
    logits = [bundle.run({**feeds, LOGITS_POSITIONS: part}, ["logits"])["logits"][0] for part in parts]
    return np.concatenate(logits)
