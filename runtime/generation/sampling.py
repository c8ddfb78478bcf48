"""One token after the other: the most likely one, or one that is drawn.

As ``GenerationMixin._sample`` of transformers 5.23, with the rows that are finished taken out of the
batch instead of being fed with padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from transom.runtime.errors import InputError
from transom.runtime.finite import check_finite
from transom.runtime.generation.config import GenerationConfig
from transom.runtime.generation.logits_processors import processed, processors, unmasked
from transom.runtime.generation.sequences import DecoderProtocol, Sequences, reorder
from transom.runtime.generation.stopping import StoppingCriteria


def tokens_of_rows(
    rows: Sequences,
    logits: NDArray[np.float32],
    continuation: DecoderProtocol,
    settings: GenerationConfig,
    stopping: StoppingCriteria,
    first: int = 0,
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.int64]]]:
    """Yield, step by step, which rows go on and the token of each: (N,) positions in ``rows``, (N,) ids.

    ``rows`` and ``continuation`` lose the rows that are finished. Sampled rows draw from streams of
    their own, so that no row's text depends on how many others there are or when they finish;
    ``first`` is the number of the first prompt.
    """
    chain = processors(settings)
    live = np.arange(len(rows))
    prompts = first + live // settings.num_return_sequences
    streams = row_rngs(settings, prompts) if settings.do_sample else []
    step = 1
    while True:
        check_logits(logits, prompts[live], step)
        scores = processed(logits, rows, chain)
        tokens = draw(scores, [streams[row] for row in live]) if settings.do_sample else scores.argmax(axis=1)
        if chain:
            check_choice(scores[np.arange(len(tokens)), tokens], prompts[live], step)
        yield live, tokens
        done = stopping.ends(tokens) | (rows.lengths + 1 >= rows.limits)
        for row in np.flatnonzero(~done).tolist() if stopping.strings else ():
            done[row] = stopping.completes(rows.sequence(row), int(tokens[row]))
        if done.all():
            return
        rows.append(tokens)
        if done.any():
            stay = np.flatnonzero(~done)
            rows.select(stay)
            reorder(continuation, stay, len(live))
            live, tokens = live[stay], tokens[stay]
        logits = continuation.decode_step(tokens)
        step += 1


def row_rngs(settings: GenerationConfig, prompts: NDArray[np.intp]) -> list[np.random.Generator]:
    """A random stream for each row, of the prompts with these numbers (R,), each prompt's copies together.

    PCG64, seeded with the seed, the prompt's number and the copy's.
    """
    root = np.random.SeedSequence(settings.seed)
    copies = settings.num_return_sequences
    seeds = [
        np.random.SeedSequence(root.entropy, spawn_key=(int(prompt), row % copies))
        for row, prompt in enumerate(prompts)
    ]
    return [np.random.Generator(np.random.PCG64(seed)) for seed in seeds]


def draw(scores: NDArray[np.float32], streams: Sequence[np.random.Generator]) -> NDArray[np.int64]:
    """One token per row (R,) with the probabilities softmax(scores), by one uniform number each.

    A row whose scores are all -inf gets token 0, for the caller to see.
    """
    tokens = np.zeros(len(scores), dtype=np.int64)
    for row, stream in enumerate(streams):
        may, values = unmasked(scores[row])
        if len(may):
            weights = np.exp(values - values.max())
            reached = np.cumsum(weights, dtype=np.float64)
            at = int(np.searchsorted(reached, stream.random() * reached[-1], side="right"))
            tokens[row] = may[min(at, int(np.flatnonzero(weights)[-1]))]
    return tokens


def check_logits(logits: NDArray[np.float32], prompts: NDArray[np.intp], step: int) -> None:
    """Raise NotFiniteError if a row of the logits (R, V) has NaN or +inf, or nothing but -inf."""
    check_finite(logits, "logits", lambda row: f"prompt {prompts[row]}", when=f" at new token {step}", ruled_out=True)


def check_choice(scores: NDArray[np.float32], prompts: NDArray[np.intp], step: int) -> None:
    """InputError if the score (R,) of a chosen token is -inf: the settings rule out every token."""
    if (scores == -np.inf).any():
        row = int(np.flatnonzero(scores == -np.inf)[0])
        raise InputError(
            f"the settings rule out every token for prompt {prompts[row]} at new token {step}, expected one that may "
            "follow. Loosen no_repeat_ngram_size, bad_words_ids, suppress_tokens or min_new_tokens."
        )
