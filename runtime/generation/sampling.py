"""Greedy search and sampling: one token after the other, the most likely one or one that is drawn.

As ``GenerationMixin._sample`` of transformers 5.23, with the finished rows taken out of the batch instead of
being fed with padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from transom.runtime.errors import InputError
from transom.runtime.finite import check_finite
from transom.runtime.generation.config import GenerationConfig
from transom.runtime.generation.logits_processors import logits_processors, process_logits, unmasked
from transom.runtime.generation.sequences import DecoderProtocol, Sequences, reorder_decoder
from transom.runtime.generation.stopping_criteria import StoppingCriteria


def sample(
    sequences: Sequences,
    logits: NDArray[np.float32],
    decoder: DecoderProtocol,
    config: GenerationConfig,
    stopping: StoppingCriteria,
    numbers: NDArray[np.intp],
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.int64]]]:
    """Yield, step by step, the rows that are unfinished and the new token of each: (N,) rows of the start, (N,) ids.

    ``sequences`` and ``decoder`` lose the rows that are finished. Each sampled row has a random generator of
    its own, so that no row's text depends on how many others there are or when they finish; ``numbers`` are the
    prompts' in the caller's list.
    """
    processors = logits_processors(config)
    live = np.arange(len(sequences))
    prompts = numbers[live // config.num_return_sequences]
    rngs = row_rngs(config, prompts) if config.do_sample else []
    step = 1
    while True:
        if config.do_sample or processors:
            check_logits(logits, prompts[live], step)
            scores = process_logits(logits, sequences, processors)
            tokens = draw(scores, [rngs[row] for row in live]) if config.do_sample else scores.argmax(axis=1)
            if processors:
                check_choice(scores[np.arange(len(tokens)), tokens], prompts[live], step)
        else:  # one pass over the logits: argmax finds NaN, too
            tokens = logits.argmax(axis=1)
            check_logits(logits[np.arange(len(tokens)), tokens, None], prompts[live], step)
        yield live, tokens
        finished = stopping.is_eos(tokens) | (sequences.lengths + 1 >= sequences.limits)
        for row in np.flatnonzero(~finished).tolist() if stopping.strings else ():
            finished[row] = stopping.completes_stop_string(sequences.row(row), int(tokens[row]))
        some = bool(finished.any())
        if some and finished.all():
            return
        sequences.append(tokens)
        if some:
            left = np.flatnonzero(~finished)
            sequences.reorder(left)
            reorder_decoder(decoder, left, len(live))
            live, tokens = live[left], tokens[left]
        logits = decoder.decode_step(tokens)
        step += 1


def row_rngs(config: GenerationConfig, prompts: NDArray[np.intp]) -> list[np.random.Generator]:
    """Return a random generator for each row, of the prompts with these numbers (R,), each prompt's copies together.

    PCG64, seeded with the seed, the prompt's number and the copy's.
    """
    root = np.random.SeedSequence(config.seed)
    copies = config.num_return_sequences
    seeds = [
        np.random.SeedSequence(root.entropy, spawn_key=(int(prompt), row % copies))
        for row, prompt in enumerate(prompts)
    ]
    return [np.random.Generator(np.random.PCG64(seed)) for seed in seeds]


def draw(scores: NDArray[np.float32], rngs: Sequence[np.random.Generator]) -> NDArray[np.int64]:
    """Draw one token per row (R,) with the probabilities softmax(scores), by one uniform number each.

    A row whose scores are all -inf gets token 0, which the caller checks for.
    """
    tokens = np.zeros(len(scores), dtype=np.int64)
    for row, rng in enumerate(rngs):
        candidates, values = unmasked(scores[row])
        if len(candidates):
            weights = np.exp(values - values.max())
            cumulative = np.cumsum(weights, dtype=np.float64)
            at = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
            tokens[row] = candidates[min(at, int(np.flatnonzero(weights)[-1]))]
    return tokens


def check_logits(logits: NDArray[np.float32], prompts: NDArray[np.intp], step: int) -> None:
    """Raise NotFiniteError if a row of the logits (R, V) has NaN or +inf, or nothing but -inf."""
    check_finite(logits, "logits", lambda row: f"prompt {prompts[row]}", when=f" at new token {step}", ruled_out=True)


def check_choice(scores: NDArray[np.float32], prompts: NDArray[np.intp], step: int) -> None:
    """Raise InputError if the score (R,) of a chosen token is -inf: the config rules out every token."""
    if (scores == -np.inf).any():
        row = int(np.flatnonzero(scores == -np.inf)[0])
        raise InputError(
            f"the settings rule out every token for prompt {prompts[row]} at new token {step}, expected one that may "
            "follow. Loosen no_repeat_ngram_size, bad_words_ids, suppress_tokens or min_new_tokens."
        )
