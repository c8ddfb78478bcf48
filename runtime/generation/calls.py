"""What the tasks call: whole answers, or one row token by token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from transom.runtime.generation.beam_search import beam_search
from transom.runtime.generation.config import GenerationConfig
from transom.runtime.generation.sampling import tokens_of_rows
from transom.runtime.generation.sequences import DecoderProtocol, Sequences
from transom.runtime.generation.stopping import Decode, StoppingCriteria


def generate(
    prompts: Sequence[Sequence[int]],
    logits: NDArray[np.float32],
    continuation: DecoderProtocol,
    settings: GenerationConfig,
    *,
    decode: Decode | None = None,
    positions: int | None = None,
    first: int = 0,
) -> list[list[int]]:
    """New token ids for each prompt, ``num_return_sequences`` rows of each, as transformers' ``generate`` adds them.

    ``prompts`` are R rows of ids that ``continuation`` has read, for an encoder-decoder the decoder's;
    ``logits`` (R, V) float32 is what follows them. A row ends with the token that ends it, an
    end-of-sequence token included, and has no padding. Each row is what transformers gives for that
    prompt alone: without padding, prompts of different lengths do not touch each other.

    ``decode`` gives the text of ids with special tokens kept, which stop strings may be part of;
    ``positions`` is how many tokens the context holds, as for ``settings.new_tokens``;
    ``first`` is the number of the first prompt, where one call is split into batches: it keeps the
    random streams apart and names rows in errors.

    Sampling draws with numpy's PCG64 from ``settings.seed``, each row from a stream of its own: the
    same seed gives the same rows, and a row does not depend on its neighbours. Seed None is new
    randomness each time. Raises InputError as ``settings.check`` and ``settings.new_tokens`` do, and
    where a row's logits are not finite, before any token is chosen from them.
    """
    rows, stopping = start(prompts, logits, settings, decode, positions, streaming=False)
    if settings.num_beams > 1:
        return beam_search(rows, logits, continuation, settings, stopping, first)
    copies = settings.num_return_sequences
    if copies > 1:
        repeated = np.repeat(np.arange(len(rows)), copies)
        rows.select(repeated)
        continuation.reorder(repeated)
        logits = logits[repeated]
    found: list[list[int]] = [[] for _ in range(len(rows))]
    for live, tokens in tokens_of_rows(rows, logits, continuation, settings, stopping, first):
        for row, token in zip(live.tolist(), tokens.tolist(), strict=True):
            found[row].append(token)
    return found


def stream(
    prompt: Sequence[int],
    logits: NDArray[np.float32],
    continuation: DecoderProtocol,
    settings: GenerationConfig,
    *,
    decode: Decode | None = None,
    positions: int | None = None,
) -> Iterator[int]:
    """The row that ``generate`` gives for one prompt, each token as soon as it is chosen; ``logits`` is (1, V).

    Raises as ``generate`` does, at once where the settings are the reason, and InputError for
    ``num_beams`` above 1. The iterator holds nothing open: whoever owns the continuation may leave it
    half-way.
    """
    rows, stopping = start([prompt], logits, settings, decode, positions, streaming=True)
    steps = tokens_of_rows(rows, logits, continuation, settings, stopping)
    return (int(tokens[0]) for _, tokens in steps)


def start(
    prompts: Sequence[Sequence[int]],
    logits: NDArray[np.float32],
    settings: GenerationConfig,
    decode: Decode | None,
    positions: int | None,
    *,
    streaming: bool,
) -> tuple[Sequences, StoppingCriteria]:
    """The checked state that a search begins with."""
    settings.check(logits.shape[1], text=decode is not None, streaming=streaming)
    lengths = [len(prompt) for prompt in prompts]
    limits = [length + settings.new_tokens(length, positions) for length in lengths]
    shortest = [settings.shortest(length) for length in lengths]
    return Sequences(prompts, limits, shortest), StoppingCriteria(settings, decode)
