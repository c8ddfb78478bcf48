"""Make what a generator reads in a parity run: prompts of every kind in one call, then chunks and single tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from transom.export.parity.inputs import ParityInputs
from transom.runtime.decoder import context_length
from transom.runtime.graph_spec import is_decoder
from transom.runtime.greedy_check import Chunk
from transom.runtime.kv_cache import STEP
from transom.runtime.manifest import Manifest
from transom.runtime.tasks.prompts import Prompt

FORCED_STEPS = 64  # tokens fed one by one
LONG_CHUNK = 300  # tokens, all with logits: of a vocabulary of 50,000, 60 MB on each side


@dataclass(frozen=True)
class Scenario:
    """Prompts, ids or pixels, that are read in one call, then chunks of R rows. Each prompt has ``beams`` of them."""

    prompts: list[Prompt]
    chunks: Sequence[Chunk]
    beams: int = 1

    @property
    def steps(self) -> int:
        return 1 + len(self.chunks)


def prompt_length(prompt: Prompt) -> int:
    """Return the tokens of a prompt; an image counts as one."""
    return 1 if isinstance(prompt, np.ndarray) else len(prompt)


def scenarios(manifest: Manifest, inputs: Mapping[str, ParityInputs]) -> list[Scenario]:
    """Make prompts from one token to the longest, of one row up to the most rows, then chunks to the context's end.

    Without an encoder the prompts go to the decoder, and share its context with the tokens that are generated. Where
    they are images, each has one length.
    """
    graphs = [file.graph for file in manifest.graphs]
    decoder = next(graph for graph in graphs if graph.name == "decoder")
    tokens = decoder.inputs[0]
    encoders = [graph for graph in graphs if not is_decoder(graph)]
    prompted, shares = (encoders[0], False) if encoders else (decoder, True)
    largest = {name: axis.max for name, axis in manifest.axes.items()}
    context = context_length(decoder, manifest.axes, manifest.options)
    images = prompted.inputs[0].dtype == "float32"
    longest = 1 if images else min(largest["S"], context) if shares else largest["S"]

    def prompts(lengths: Sequence[int]) -> list[Prompt]:
        if images:
            return list(inputs[prompted.name].feeds({"B": len(lengths)})[prompted.inputs[0].name])
        below = prompted.inputs[0].exclusive_max or 1
        return [inputs["decoder"].ids((1, length), below)[0].tolist() for length in lengths]

    def scenario(lengths: Sequence[int], chunks: Sequence[int]) -> Scenario:
        lengths = [max(1, min(length, longest)) for length in lengths[: largest["B"]]]
        left = context - (max(lengths) if shares else 1)
        kept = []
        for chunk in chunks:
            chunk = min(chunk, left)
            if chunk > 0:
                kept.append(inputs["decoder"].ids((len(lengths), chunk), tokens.exclusive_max or 1))
            left -= chunk
        return Scenario(prompts(lengths), kept)

    forced, before = single_steps(context)
    return [
        scenario([1], [1]),
        scenario([context - 3 if shares else longest], [1, 1, 1]),
        scenario([67 - 7 * row for row in range(largest["B"])], [1, 1, 1]),
        scenario([5, 2], [5, 1, 7, 3]),
        scenario([7], [LONG_CHUNK]),
        scenario([before, before // 2], [1] * forced),
    ]


def single_steps(context: int, least: int = 1) -> tuple[int, int]:
    """Return how many tokens are fed one by one, and the length of the prompt before them.

    The steps cross a growth of the buffers. The prompt has ``least`` tokens, where the context holds as many.
    """
    forced = min(FORCED_STEPS, max(context - least, 0))
    return forced, min(max(STEP - forced // 2, 1), context - forced)
