"""Test the logits processors by hand-computed cases, and compare them with transformers' own, in its order."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tiny_decoders import VOCABULARY, tiny_gpt
from transom.runtime.generation import GenerationConfig
from transom.runtime.generation import logits_processors as steps
from transom.runtime.generation.sequences import Sequences

NEG_INF = -np.inf


def rows_of(*sequences: list[int], prompt: int = 1, limit: int = 9, shortest: int = 0) -> Sequences:
    """Return sequences whose first ``prompt`` tokens are the prompt."""
    rows = Sequences(
        [sequence[:prompt] for sequence in sequences], [limit] * len(sequences), [shortest] * len(sequences)
    )
    for position in range(prompt, len(sequences[0])):
        rows.append(np.array([sequence[position] for sequence in sequences]))
    return rows


def after(name: str, scores: list[list[float]], rows: Sequences, **options: Any) -> list[list[float]]:
    array = np.array(scores, dtype=np.float32)
    getattr(steps, name)(array, rows, **options)
    return array.tolist()


def test_repetition_divides_what_is_positive_and_multiplies_what_is_negative() -> None:
    rows = rows_of([1, 2, 1], [0, 0, 0])
    scores = [[4.0, 3.0, -2.0], [4.0, 3.0, -2.0]]
    assert after("penalise_repetition", scores, rows, penalty=2.0) == [[4.0, 1.5, -4.0], [2.0, 3.0, -2.0]]


def test_the_token_that_would_repeat_a_bigram_is_banned() -> None:
    rows = rows_of([1, 2, 1], [0, 0, 3])  # after 1 came 2; after 3 came nothing yet
    assert after("ban_repeated_ngrams", [[0.0] * 4] * 2, rows, size=2) == [[0.0, 0.0, NEG_INF, 0.0], [0.0] * 4]


def test_unigrams_ban_every_token_seen_and_longer_ones_wait() -> None:
    rows = rows_of([1, 2, 1])
    assert after("ban_repeated_ngrams", [[0.0] * 4], rows, size=1) == [[0.0, NEG_INF, NEG_INF, 0.0]]
    assert after("ban_repeated_ngrams", [[0.0] * 4], rows, size=4) == [[0.0] * 4]


def test_a_bad_word_is_banned_at_its_last_token() -> None:
    rows = rows_of([5, 1, 2], [5, 2, 1])
    words = [(0,), (1, 2, 3), (2, 1, 4), (9, 9, 9, 9, 5)]
    assert after("ban_words", [[0.0] * 6] * 2, rows, words=words) == [
        [NEG_INF, 0.0, 0.0, NEG_INF, 0.0, 0.0],
        [NEG_INF, 0.0, 0.0, 0.0, NEG_INF, 0.0],
    ]


def test_no_end_before_the_shortest_length() -> None:
    assert after("ban_early_eos", [[0.0] * 3], rows_of([0, 1], shortest=3), eos=[1, 2]) == [[0.0, NEG_INF, NEG_INF]]
    assert after("ban_early_eos", [[0.0] * 3], rows_of([0, 1, 1], shortest=3), eos=[1, 2]) == [[0.0] * 3]


def test_forced_tokens_stand_first_and_last() -> None:
    assert after("force_first", [[7.0, 8.0]], rows_of([0]), token=0) == [[0.0, NEG_INF]]
    assert after("force_first", [[7.0, 8.0]], rows_of([0, 0]), token=0) == [[7.0, 8.0]]
    assert after("force_last", [[7.0, 8.0, 9.0]], rows_of([0, 0], limit=3), tokens=[0, 1]) == [[0.0, 0.0, NEG_INF]]
    assert after("force_last", [[7.0, 8.0, 9.0]], rows_of([0], limit=3), tokens=[0]) == [[7.0, 8.0, 9.0]]


def test_suppressed_tokens_and_those_of_the_beginning() -> None:
    assert after("suppress", [[1.0, 2.0]], rows_of([0]), tokens=[1]) == [[1.0, NEG_INF]]
    first = {"tokens": [1], "after_forced": False}
    assert after("suppress_at_begin", [[1.0, 2.0]], rows_of([0]), **first) == [[1.0, NEG_INF]]
    assert after("suppress_at_begin", [[1.0, 2.0]], rows_of([0, 1]), **first) == [[1.0, 2.0]]
    second = {"tokens": [1], "after_forced": True}
    assert after("suppress_at_begin", [[1.0, 2.0]], rows_of([0]), **second) == [[1.0, 2.0]]
    assert after("suppress_at_begin", [[1.0, 2.0]], rows_of([0, 1]), **second) == [[1.0, NEG_INF]]


def test_top_k_keeps_what_equals_the_last_it_keeps() -> None:
    assert after("keep_top_k", [[3.0, 1.0, 2.0, 2.0, 0.0]], rows_of([0]), count=2) == [
        [3.0, NEG_INF, 2.0, 2.0, NEG_INF]
    ]
    assert after("keep_top_k", [[3.0, 1.0]], rows_of([0]), count=5) == [[3.0, 1.0]]


def test_top_p_keeps_the_fewest_that_pass_the_mass() -> None:
    halves = np.log(np.array([[0.5, 0.25, 0.125, 0.125]], dtype=np.float32)).tolist()
    for mass, kept in ((0.4, 1), (0.6, 2), (0.8, 3), (0.95, 4)):
        found = np.array(after("keep_top_p", halves, rows_of([0]), mass=mass, least=1))
        # of the two eighths the later one stays longer
        assert np.flatnonzero(found[0] > NEG_INF).tolist() == [[0], [0, 1], [0, 1, 3], [0, 1, 2, 3]][kept - 1]
    assert np.isfinite(after("keep_top_p", halves, rows_of([0]), mass=0.01, least=2)).sum() == 2
    # what adds up to exactly 1 - mass goes
    assert after("keep_top_p", [[0.0] * 4], rows_of([0]), mass=0.5, least=1) == [[NEG_INF, NEG_INF, 0.0, 0.0]]


def test_renormalised_scores_are_logarithms_of_probabilities() -> None:
    found = after("renormalise", [[1.0, 1.0], [0.0, NEG_INF]], rows_of([0], [0]))
    assert found == [[-np.log(np.float32(2))] * 2, [0.0, NEG_INF]]


def test_an_empty_chain_copies_nothing_and_a_full_one_leaves_the_logits_alone() -> None:
    logits, rows = np.ones((1, 4), dtype=np.float32), rows_of([1])
    assert steps.process_logits(logits, rows, steps.logits_processors(GenerationConfig())) is logits
    changed = steps.process_logits(logits, rows, steps.logits_processors(GenerationConfig(suppress_tokens=(2,))))
    assert changed.tolist() == [[1.0, 1.0, NEG_INF, 1.0]]
    assert logits.min() == 1


tokens = st.integers(0, VOCABULARY - 1)
some_tokens = st.lists(tokens, min_size=1, max_size=4, unique=True)
asked_for = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.sampled_from([0.7, 1.3, 2.0]),
        "no_repeat_ngram_size": st.integers(1, 4),
        "bad_words_ids": st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3), min_size=1, max_size=6),
        "min_length": st.integers(1, 9),
        "min_new_tokens": st.integers(1, 6),
        "forced_bos_token_id": tokens,
        "forced_eos_token_id": st.one_of(tokens, some_tokens),
        "suppress_tokens": some_tokens,
        "begin_suppress_tokens": some_tokens,
        "do_sample": st.just(True),
        "temperature": st.sampled_from([0.3, 0.7, 1.5]),
        "top_k": st.sampled_from([0, 1, 3, 10, 23, 50]),
        "top_p": st.sampled_from([0.05, 0.5, 0.9, 0.99]),
        "renormalize_logits": st.just(True),
        "num_beams": st.integers(2, 3),
    },
)


@settings(max_examples=150, deadline=None)
@given(
    asked=asked_for,
    eos=st.one_of(st.none(), tokens, some_tokens),
    prompt=st.integers(1, 4),
    new=st.integers(0, 5),
    seed=st.integers(0, 2**32 - 1),
    ties=st.booleans(),
)
def test_the_chain_is_that_of_transformers(
    asked: dict[str, Any], eos: Any, prompt: int, new: int, seed: int, ties: bool
) -> None:
    for name in ("forced_bos_token_id", "forced_eos_token_id"):  # refused on both sides
        assume(name not in asked or not set(np.ravel(asked[name])) <= set(asked.get("suppress_tokens", ())))
    random = np.random.default_rng(seed)
    ids = random.integers(0, 6, (2, prompt + new))  # few enough to repeat
    scores = (random.standard_normal((2, VOCABULARY)) * 3).astype(np.float32)
    if ties:
        scores = scores.round()
    limit = prompt + 6
    ours = GenerationConfig(
        **{name: read(name, value) for name, value in asked.items()}, eos_token_id=read("eos_token_id", eos)
    )
    rows = rows_of(*ids.tolist(), prompt=prompt, limit=limit, shortest=ours.shortest(prompt))
    mine = steps.process_logits(scores, rows, steps.logits_processors(ours))
    other = theirs(asked, eos, ids, scores, prompt, limit)
    equal = ties or np.size(asked.get("forced_eos_token_id")) > 1  # forced tokens all score 0
    if equal and ours.do_sample and ours.top_p < 1:  # which of equal ones go, torch.sort leaves open
        mine, other = np.sort(mine, axis=1), np.sort(other, axis=1)
    assert_same(mine, other)


def read(name: str, value: Any) -> Any:
    from transom.runtime.generation.field_specs import FIELD_SPECS

    return FIELD_SPECS[name].parse(value)


def theirs(
    asked: dict[str, Any], eos: Any, ids: NDArray[np.int64], scores: NDArray[np.float32], prompt: int, limit: int
) -> NDArray[np.float32]:
    """Return the scores after the processors that transformers' ``generate`` builds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformers.GenerationConfig(**{"top_k": 50, **asked}, eos_token_id=eos, max_length=limit)
        if config.bad_words_ids and eos is not None:  # it refuses a list of nothing but ends
            ends = [eos] if isinstance(eos, int) else eos
            config.bad_words_ids = [
                word for word in config.bad_words_ids if word not in [[end] for end in ends]
            ] or None
        model = tiny_gpt()
        model._prepare_special_tokens(config, device="cpu")
        if config.min_new_tokens is not None:
            config.min_length = prompt + config.min_new_tokens
        chain = model._get_logits_processor(config, input_ids_seq_length=prompt, device="cpu")
    found: NDArray[np.float32] = chain(torch.from_numpy(ids), torch.from_numpy(scores.copy())).numpy()
    return found


def assert_same(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> None:
    """Compare up to the rounding of a temperature or a logarithm; -inf exactly."""
    np.testing.assert_array_equal(np.isneginf(ours), np.isneginf(theirs))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize(("top_k", "top_p"), [(50, 1.0), (0, 0.9), (40, 0.5), (0, 0.999), (0, 0.1)])
@pytest.mark.parametrize("width", [0.3, 3.0])
def test_a_large_vocabulary_is_cut_like_a_small_one(top_k: int, top_p: float, width: float) -> None:
    """Of 50,257 logits, where the short cuts of top-k and top-p are taken, with and without equal ones."""
    random = np.random.default_rng(7)
    for decimals in (8, 1):
        scores = (random.standard_normal((2, 50257)) * width).round(decimals).astype(np.float32)
        asked = {"do_sample": True, "top_k": top_k, "top_p": top_p}
        rows = rows_of([0], [1])
        ours = steps.process_logits(scores, rows, steps.logits_processors(GenerationConfig(**asked)))
        other = theirs(asked, None, np.array([[0], [1]]), scores, 1, 9)
        for mine, their in zip(ours, other, strict=True):
            kept, expected = np.sort(mine[np.isfinite(mine)]), np.sort(their[np.isfinite(their)])
            # sums of 50,257 probabilities are rounded differently, so that a token may fall either way; and
            # which of equal ones go is left open by torch.sort, which is not stable at this size
            assert abs(len(kept) - len(expected)) <= 2 * (top_p < 1)
            common = min(len(kept), len(expected))
            assert kept[-common:].tolist() == expected[-common:].tolist()
