"""Candidates of beam search from the logits, bit for bit those of the whole log-softmax, and the places of beams."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from transom.runtime.generation.beam_search import BeamHypotheses, kept_in_place
from transom.runtime.generation.config import GenerationConfig
from transom.runtime.numeric import log_normalisers, log_softmax

K, V = 4, 3000


def logits_of(kind: str, seed: int) -> NDArray[np.float32]:
    """Logits that tie exactly, or only once rounding has made their sums equal, or of which many are ruled out."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (K, V)).astype(np.float32)
    if kind == "rounded":
        logits = np.round(logits)
    elif kind == "close":  # neighbouring numbers of FP32 near the top, far from each other in place
        top = rng.permuted(np.tile(np.arange(V), (K, 1)), axis=1)[:, :200]
        near = np.float32(9) + np.arange(200, dtype=np.float32) * np.float32(2**-20)
        logits[np.arange(K)[:, None], top] = near
    elif kind == "ruled out":
        logits[rng.random((K, V)) < 0.999] = -np.inf
        logits[:, 5] = 1
    return logits


@pytest.mark.parametrize("kind", ["normal", "rounded", "close", "ruled out"])
@pytest.mark.parametrize("seed", range(3))
def test_few_logits_give_the_candidates_of_all(kind: str, seed: int) -> None:
    logits = logits_of(kind, seed)
    search = BeamHypotheses(GenerationConfig(num_beams=K, eos_token_id=(3,)), limit=9)
    search.running = (-np.sort(np.random.default_rng(seed).exponential(40, K)).astype(np.float32)).tolist()
    order = np.random.default_rng(seed).permutation(K)
    expected = search.candidates(log_softmax(logits)[order], None)
    highest = logits.max(axis=1)
    normalisers = log_normalisers(logits, highest, np.empty((K + 1, V), np.float32))
    found = search.candidates_of_logits(logits, highest, normalisers, order.tolist())
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype


def test_beams_that_never_began_lose_all_differences() -> None:
    """-1e9 of the first step's other beams swallows every logit: the first token wins."""
    logits = logits_of("normal", 0)
    search = BeamHypotheses(GenerationConfig(num_beams=K), limit=9)
    search.running[0] = -1.0e9
    normalisers = log_normalisers(logits, logits.max(axis=1), np.empty_like(logits))
    _, beams, tokens = search.candidates_of_logits(logits, logits.max(axis=1), normalisers, range(K))
    expected = search.candidates(log_softmax(logits), None)
    assert (beams.tolist(), tokens.tolist()) == (expected[1].tolist(), expected[2].tolist())


def test_sums_that_lose_their_difference_in_fp32_keep_the_order_of_the_candidates() -> None:
    search = BeamHypotheses(GenerationConfig(num_beams=2), limit=9)
    assert search.continue_with([-3.0, -1.0, -2.0, -4.0], [True, True, False, True]) == [2, 0]
    assert search.running == [-2.0, -1.0e9]


@pytest.mark.parametrize("early", [False, True, "never"])
@pytest.mark.parametrize("penalty", [-2.0, 0.0, 1.0, 3.0])
def test_a_search_is_done_when_no_running_beam_can_pass_the_worst_that_is_finished(early: Any, penalty: float) -> None:
    search = BeamHypotheses(GenerationConfig(num_beams=2, early_stopping=early, length_penalty=penalty), limit=9)
    for scores, complete in (([-1e9, -1e9], [0, 0]), ([-2.0, -1e9], [1, 0]), ([-2.0, -3.0], [1, 1])):
        for running in (0.0, -1.0, -8.0, -4e8, -1e9, -2e9):
            search.running, search.scores, search.complete = [running, running], scores, [bool(one) for one in complete]
            for length in (1, 5, 9):
                highest = running / (9 if early == "never" and penalty > 0 else length) ** penalty
                better = any(highest > (min(scores) if one else -1e9) for one in complete)
                assert search.is_done([False, True], length) == (not better or (early is True and all(complete)))
                assert search.is_done([True, True], length)


def test_a_beam_that_goes_on_stays_where_it_is() -> None:
    for parents in product(range(4), repeat=4):
        sources, where = kept_in_place(parents)
        assert sorted(where) == [0, 1, 2, 3]
        assert [sources[row] for row in where] == list(parents)
        assert sum(source != row for row, source in enumerate(sources)) == 4 - len(set(parents))
