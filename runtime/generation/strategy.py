"""Generate by the decoding strategy that a config asks for: greedy search, sampling or beam search."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from transom.runtime.generation.beam_search import beam_search
from transom.runtime.generation.config import GenerationConfig
from transom.runtime.generation.sampling import sample
from transom.runtime.generation.sequences import DecoderProtocol, Sequences
from transom.runtime.generation.stopping_criteria import Decode, StoppingCriteria
from transom.runtime.generation.validation import check_for_model


def generate(
    prompts: Sequence[Sequence[int]],
    logits: NDArray[np.float32],
    decoder: DecoderProtocol,
    config: GenerationConfig,
    *,
    decode: Decode | None = None,
    positions: int | None = None,
    numbers: Sequence[int] | None = None,
) -> list[list[int]]:
    """Return new token ids for each prompt, ``num_return_sequences`` rows of each, as transformers' ``generate`` does.

    ``prompts`` are R rows of ids that ``decoder`` has read, for an encoder-decoder the decoder's;
    ``logits`` (R, V) float32 are those of the next token. A row ends with the token that ends it, an
    end-of-sequence token included, and has no padding. Each row equals transformers' for that
    prompt alone: without padding, prompts of different lengths do not influence each other.

    ``decode`` gives the text of ids with special tokens kept, which stop strings may be part of;
    ``positions`` is how many tokens the context holds, as for ``config.new_tokens``;
    ``numbers`` (R,) are the prompts' places in the caller's list, where one call is split into batches: they keep
    the random generators apart and name rows in errors. None: the prompts are the whole list.

    Sampling draws with numpy's PCG64 from ``config.seed``, each row from a generator of its own: the
    same seed gives the same rows, and a row does not depend on its neighbours. Seed None is new
    randomness each time. Raises InputError as ``check_for_model`` and ``config.new_tokens`` do, and
    where a row's logits are not finite, before any token is chosen from them.
    """
    sequences, stopping = start(prompts, logits, config, decode, positions, streaming=False)
    places = np.arange(len(sequences)) if numbers is None else np.asarray(numbers, np.intp)
    if config.num_beams > 1:
        return beam_search(sequences, logits, decoder, config, stopping, places)
    copies = config.num_return_sequences
    if copies > 1:
        repeated = np.repeat(np.arange(len(sequences)), copies)
        sequences.reorder(repeated)
        decoder.reorder(repeated)
        logits = logits[repeated]
    new_tokens: list[list[int]] = [[] for _ in range(len(sequences))]
    for live, tokens in sample(sequences, logits, decoder, config, stopping, places):
        for place, row in enumerate(live):
            new_tokens[row].append(tokens[place])
    return new_tokens


def stream(
    prompt: Sequence[int],
    logits: NDArray[np.float32],
    decoder: DecoderProtocol,
    config: GenerationConfig,
    *,
    decode: Decode | None = None,
    positions: int | None = None,
) -> Iterator[int]:
    """Yield the row that ``generate`` returns for one prompt, token by token; ``logits`` is (1, V).

    Raises as ``generate`` does, at once where the config is the reason, and InputError for
    ``num_beams`` above 1. The iterator holds nothing open: the owner of the decoder may leave it half-way.
    """
    sequences, stopping = start([prompt], logits, config, decode, positions, streaming=True)
    steps = sample(sequences, logits, decoder, config, stopping, np.zeros(1, np.intp))
    return (tokens[0] for _, tokens in steps)


def start(
    prompts: Sequence[Sequence[int]],
    logits: NDArray[np.float32],
    config: GenerationConfig,
    decode: Decode | None,
    positions: int | None,
    *,
    streaming: bool,
) -> tuple[Sequences, StoppingCriteria]:
    """Check the config against the model and the prompts, and return the state that generation begins with."""
    check_for_model(config, logits.shape[1], text=decode is not None, streaming=streaming)
    lengths = [len(prompt) for prompt in prompts]
    limits = [length + config.new_tokens(length, positions) for length in lengths]
    shortest = [config.shortest(length) for length in lengths]
    return Sequences(prompts, limits, shortest), StoppingCriteria(config, decode)
