"""Test sampling: frequencies compared with probabilities, seeds and generators per row, and beam sampling."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tiny_decoders import Table
from transom.runtime.generation import GenerationConfig, generate, with_keywords
from transom.runtime.generation.sampling import draw, row_rngs

DRAWS = 5_000
# 99.9 % of chi-square values lie below, by degrees of freedom; any table of the distribution has them
CHI_SQUARE = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32}

LOGITS = np.log(np.array([0.4, 0.2, 0.15, 0.1, 0.08, 0.05, 0.02], dtype=np.float32))


def first_tokens(**keywords: Any) -> list[int]:
    """Return the first tokens of DRAWS rows whose logits are all LOGITS."""
    model = Table(LOGITS[None], [0] * DRAWS)
    config = with_keywords(GenerationConfig(), max_new_tokens=1, do_sample=True, seed=11, **keywords)
    return [row[0] for row in generate([[0]] * DRAWS, model.logits(), model, config)]


def chi_square(found: list[int], expected: NDArray[np.float64]) -> tuple[float, int]:
    """Return Pearson's statistic and its degrees of freedom; tokens of probability 0 must not occur at all."""
    counts = np.bincount(found, minlength=len(expected))
    possible = expected > 0
    assert counts[~possible].sum() == 0
    due = expected[possible] / expected.sum() * len(found)
    return float(((counts[possible] - due) ** 2 / due).sum()), int(possible.sum()) - 1


@pytest.mark.parametrize(
    ("keywords", "expected"),
    [
        ({}, [0.4, 0.2, 0.15, 0.1, 0.08, 0.05, 0.02]),
        ({"temperature": 0.5}, [0.16, 0.04, 0.0225, 0.01, 0.0064, 0.0025, 0.0004]),  # squares
        ({"top_k": 3}, [0.4, 0.2, 0.15, 0, 0, 0, 0]),
        ({"top_p": 0.7}, [0.4, 0.2, 0.15, 0, 0, 0, 0]),
        ({"temperature": 0.5, "top_k": 4, "top_p": 0.9}, [0.16, 0.04, 0.0225, 0, 0, 0, 0]),  # 0.89 of the four: 0.96
        ({"repetition_penalty": 2.0}, [0.16, 0.2, 0.15, 0.1, 0.08, 0.05, 0.02]),  # token 0 is the prompt
    ],
)
def test_tokens_are_drawn_as_often_as_they_are_likely(keywords: dict[str, Any], expected: list[float]) -> None:
    statistic, freedom = chi_square(first_tokens(**keywords), np.array(expected))
    assert statistic < CHI_SQUARE[freedom]


def test_the_statistic_tells_probabilities_apart() -> None:
    """Ten per cent off in one token is found, so the test above can fail."""
    statistic, freedom = chi_square(first_tokens(), np.array([0.36, 0.24, 0.15, 0.1, 0.08, 0.05, 0.02]))
    assert statistic > CHI_SQUARE[freedom]


def test_one_seed_gives_one_text_and_another_seed_another() -> None:
    table = np.random.default_rng(0).standard_normal((7, 7)).astype(np.float32)

    def sampled(seed: int | None) -> list[list[int]]:
        model = Table(table, [0, 0])
        config = with_keywords(GenerationConfig(), max_new_tokens=40, do_sample=True, seed=seed)
        return generate([[0], [0]], model.logits(), model, config)

    assert sampled(3) == sampled(3)
    assert sampled(3) != sampled(4)
    assert sampled(None) != sampled(None)  # 7**80 texts
    assert sampled(3)[0] != sampled(3)[1]  # the same prompt, but each row has a generator of its own


def test_a_row_s_generator_does_not_depend_on_its_neighbour() -> None:
    """Row 0 is finished at once; row 1 draws what it draws beside a row that is not."""
    table = np.random.default_rng(0).standard_normal((7, 7)).astype(np.float32)
    table[5] = [0, 0, 0, 0, 0, 0, 1e9]
    config = with_keywords(GenerationConfig(), max_new_tokens=30, do_sample=True, seed=3, eos_token_id=6)
    beside_short, beside_long = (Table(table, [first, 0]) for first in (5, 1))
    short = generate([[5], [0]], beside_short.logits(), beside_short, config)
    long = generate([[1], [0]], beside_long.logits(), beside_long, config)
    assert short[0] == [6]
    assert len(long[0]) > 1
    assert short[1] == long[1]


def test_sequences_of_one_prompt_differ_and_the_first_is_that_of_one_alone() -> None:
    table = np.random.default_rng(0).standard_normal((7, 7)).astype(np.float32)

    def sampled(prompts: list[int], copies: int) -> list[list[int]]:
        model = Table(table, prompts)
        config = with_keywords(
            GenerationConfig(), max_new_tokens=20, do_sample=True, seed=3, num_return_sequences=copies
        )
        return generate([[prompt] for prompt in prompts], model.logits(), model, config)

    three = sampled([0, 1], 3)
    assert len(three) == 6
    assert len({tuple(row) for row in three}) == 6
    assert [three[0], three[3]] == sampled([0, 1], 1)


@pytest.mark.parametrize("beams", [1, 2])
def test_a_call_split_into_batches_draws_as_one(beams: int) -> None:
    table = np.random.default_rng(0).standard_normal((7, 7)).astype(np.float32)
    config = with_keywords(GenerationConfig(), max_new_tokens=20, do_sample=True, seed=3, num_beams=beams)

    def sampled(prompts: list[int], first: int) -> list[list[int]]:
        model = Table(table, prompts)
        return generate(
            [[prompt] for prompt in prompts], model.logits(), model, config, numbers=range(first, first + len(prompts))
        )

    whole = sampled([0, 0, 0], 0)
    assert whole == sampled([0, 0], 0) + sampled([0], 2)
    assert len({tuple(row) for row in whole}) == 3


def test_a_drawn_token_is_never_one_that_is_ruled_out() -> None:
    scores = np.full((1, 5), -np.inf, dtype=np.float32)
    scores[0, 3] = -200.0
    rngs = row_rngs(GenerationConfig(seed=0), np.array([0]))
    assert {int(draw(scores, rngs)[0]) for _ in range(50)} == {3}


def test_beams_are_drawn_without_replacement() -> None:
    """Two beams, one token: of the two drawn the likelier is the answer.

    Of probabilities p the pair {i, j} is drawn with p_i p_j / (1 - p_i) + p_j p_i / (1 - p_j).
    """
    p = np.array([0.5, 0.3, 0.15, 0.05])
    expected = np.zeros(4)
    for i in range(4):
        for j in range(i + 1, 4):
            expected[i] += p[i] * p[j] / (1 - p[i]) + p[j] * p[i] / (1 - p[j])
    table = np.log(p).astype(np.float32)[None]
    model = Table(table, [0] * 3000)
    config = with_keywords(GenerationConfig(), max_new_tokens=1, do_sample=True, seed=2, num_beams=2, top_k=0)
    found = [row[0] for row in generate([[0]] * 3000, model.logits(), model, config)]
    statistic, freedom = chi_square(found, expected)
    assert statistic < CHI_SQUARE[freedom]


def test_drawn_beams_go_on_and_are_repeatable() -> None:
    table = np.random.default_rng(0).standard_normal((7, 7)).astype(np.float32)
    found = []
    for seed in (1, 1, 2):
        model = Table(table, [0, 1])
        config = with_keywords(
            GenerationConfig(),
            max_new_tokens=12,
            do_sample=True,
            seed=seed,
            num_beams=3,
            top_p=0.9,
            temperature=2.0,
            eos_token_id=6,
        )
        found.append(generate([[0], [1]], model.logits(), model, config))
    assert found[0] == found[1]
    assert found[0] != found[2]
