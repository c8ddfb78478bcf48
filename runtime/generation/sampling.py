"""Greedy search and sampling: one token after the other, the most likely one or one that is drawn.

As ``GenerationMixin._sample`` of transformers 5.23, with the finished rows taken out of the batch instead of
being fed with padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from math import isfinite

import numpy as np
from numpy.typing import NDArray

from transom.runtime.errors import InputError
from transom.runtime.finite import check_finite
from transom.runtime.generation.config import GenerationConfig
from transom.runtime.generation.logits_processors import logits_processors, process_logits, unmasked
from transom.runtime.generation.sequences import DecoderProtocol, Sequences
from transom.runtime.generation.stopping_criteria import StoppingCriteria


def sample(
    sequences: Sequences,
    logits: NDArray[np.float32],
    decoder: DecoderProtocol,
    config: GenerationConfig,
    stopping: StoppingCriteria,
    numbers: NDArray[np.intp],
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield, step by step, the rows that are unfinished and the new token of each: N rows of the start, N ids.

    ``decoder`` loses the rows that are finished, and ``sequences`` too where anything reads them. Each sampled row has
    a random generator of its own, so that no row's text depends on how many others there are or when they finish;
    ``numbers`` are the prompts' in the caller's list.

    Behind a large graph Python's own code is out of the processor's caches: numbers of a few rows are plain ints,
    which take less of it than arrays.
    """
    processors = logits_processors(config)
    live = list(range(len(sequences)))
    most = (sequences.limits - sequences.lengths).tolist()  # new tokens of each row
    prompts = numbers[np.arange(len(live)) // config.num_return_sequences]
    rngs = row_rngs(config, prompts) if config.do_sample else []
    for step in count(1):
        if config.do_sample or processors:
            check_logits(logits, prompts[live], step)
            scores = process_logits(logits, sequences, processors)
            tokens = draw(scores, [rngs[row] for row in live]) if config.do_sample else scores.argmax(axis=1)
            if processors:
                check_choice(scores[np.arange(len(tokens)), tokens], prompts[live], step)
            ids = tokens.tolist()
        else:  # one pass over the logits: argmax finds NaN, too
            tokens = logits.argmax(axis=1)
            ids = tokens.tolist()
            for row, token in enumerate(ids):
                if not isfinite(logits[row, token]):
                    check_logits(logits, prompts[live], step)
        yield live, ids
        finished = [ids[place] in stopping.eos or step >= most[row] for place, row in enumerate(live)]
        if stopping.strings:
            for row, token in enumerate(ids):
                finished[row] = finished[row] or stopping.completes_stop_string(sequences.row(row), token)
        if processors or stopping.strings:
            sequences.append(tokens)
        if True in finished:
            left = np.flatnonzero(np.logical_not(finished))
            if not len(left):
                return
            sequences.reorder(left)
            decoder.reorder(left)
            live, tokens = [live[row] for row in left], tokens[left]
        logits = decoder.decode_step(tokens)


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
