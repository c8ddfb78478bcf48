"""Compare whole generations with transformers' ``generate``, token by token, and count the model's steps.

The models have random weights and 23 tokens, of which up to six end a row, so that rows end early,
late and in the middle of a beam.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tiny_decoders import START, Recomputed, Table, tiny_gpt, tiny_marian
from transom.runtime.errors import InputError
from transom.runtime.generation import GenerationConfig, generate, stream, with_keywords

PROMPTS = [[1, 2, 3], [7, 8, 20, 4, 4], [6]]
SOURCES = [[3, 4, 5, 0], [9, 10, 0], [12, 1, 17, 17, 2, 0]]
WAYS: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.8, "min_new_tokens": 4},
    {"no_repeat_ngram_size": 2},
    {"bad_words_ids": [[3], [4, 7], [17, 17], [5]], "renormalize_logits": True},
    {"forced_eos_token_id": 5, "suppress_tokens": [1, 8], "begin_suppress_tokens": [2]},
    {"forced_bos_token_id": 10, "min_length": 6},
]
ENDS = [[5], [5, 9, 11, 13, 17, 20]]


@pytest.fixture(autouse=True)
def _quietly_on_one_core() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are far too small to share out
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of transformers, about combinations that we mean
        yield
    torch.set_num_threads(threads)


def trimmed(row: list[int], eos: list[int]) -> list[int]:
    """Return the row without the padding after the first end-of-sequence token."""
    end = next((index for index, token in enumerate(row) if token in eos), len(row) - 1)
    return row[: end + 1]


def gpt_theirs(prompts: list[list[int]], keywords: dict[str, Any]) -> list[list[int]]:
    """Each prompt alone: transformers' rows depend on the padding beside them, ours must not."""
    found = []
    for prompt in prompts:
        rows = tiny_gpt().generate(torch.tensor([prompt]), pad_token_id=0, use_cache=False, **keywords)
        found += [trimmed(row[len(prompt) :], keywords["eos_token_id"]) for row in rows.tolist()]
    return found


def gpt_ours(prompts: list[list[int]], keywords: dict[str, Any]) -> list[list[int]]:
    model = Recomputed(tiny_gpt(), prompts)
    return generate(prompts, model.logits(), model, with_keywords(GenerationConfig(), **keywords))


def marian_theirs(keywords: dict[str, Any]) -> list[list[int]]:
    """One batch, padded on the encoder's side, where the attention mask hides it."""
    longest = max(map(len, SOURCES))
    ids = torch.tensor([source + [START] * (longest - len(source)) for source in SOURCES])
    rows = tiny_marian().generate(ids, attention_mask=(ids != START).long(), use_cache=False, **keywords)
    return [trimmed(row[1:], keywords["eos_token_id"]) for row in rows.tolist()]


def marian_ours(keywords: dict[str, Any]) -> list[list[int]]:
    prompts = [[START]] * len(SOURCES)
    model = Recomputed(tiny_marian(), prompts, SOURCES)
    return generate(prompts, model.logits(), model, with_keywords(GenerationConfig(), **keywords))


def test_greedy_tokens_are_those_of_transformers() -> None:
    compared, ended = 0, 0
    for eos, way in itertools.product(ENDS, WAYS):
        keywords = {"eos_token_id": eos, "max_new_tokens": 9, "do_sample": False, **way}
        for ours, theirs in (
            (gpt_ours(PROMPTS, keywords), gpt_theirs(PROMPTS, keywords)),
            (marian_ours(keywords), marian_theirs(keywords)),
        ):
            assert ours == theirs, keywords
            compared += len(ours)
            ended += sum(row[-1] in eos and len(row) < 9 for row in ours)
    assert compared == len(ENDS) * len(WAYS) * 6
    assert ended > compared / 3


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("num_beams", [2, 4])
def test_beams_are_those_of_transformers(num_beams: int, early_stopping: bool | str) -> None:
    """Every length penalty with both kinds of ends, each with two of the seven ways in turn."""
    compared, ended = 0, 0
    grid = itertools.product((-1.0, 0.0, 0.6, 1.0, 2.0), ENDS, range(2))
    for case, (length_penalty, eos, _) in enumerate(grid):
        keywords = {
            "num_beams": num_beams, "early_stopping": early_stopping, "length_penalty": length_penalty,
            "eos_token_id": eos, "max_new_tokens": 8, "do_sample": False,
            **WAYS[(case + num_beams) % len(WAYS)],
        }  # fmt: skip
        if case % 3 == 0:
            keywords["num_return_sequences"] = 2
        if case % 2 == 0:
            ours, theirs = marian_ours(keywords), marian_theirs(keywords)
        else:
            prompts = [PROMPTS[case % 3], PROMPTS[(case + 1) % 3]]
            ours, theirs = gpt_ours(prompts, keywords), gpt_theirs(prompts, keywords)
        assert ours == theirs, keywords
        compared += len(ours)
        ended += sum(row[-1] in eos and len(row) < 8 for row in ours)
    assert compared == 68
    assert ended > compared / 4


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    for keywords in ({}, {"num_beams": 3}, {"do_sample": True, "seed": 5}):
        keywords = {"max_new_tokens": 9, "eos_token_id": ENDS[1], **keywords}
        together = gpt_ours(PROMPTS, keywords)
        assert together[0] == gpt_ours(PROMPTS[:1], keywords)[0]
        assert gpt_ours(PROMPTS[:2], keywords) == together[:2]
        if "seed" not in keywords:  # the second row's stream is not that of a first
            assert [gpt_ours([prompt], keywords)[0] for prompt in PROMPTS] == together


# From 0 to 1 to 2 to 3 and so on, with 9 as the end
CHAIN = np.full((10, 10), -5, dtype=np.float32)
CHAIN[np.arange(9), np.arange(1, 10)] = 5


def test_rows_are_selected_only_when_one_is_finished() -> None:
    model = Table(CHAIN, [5, 7, 6])
    config = with_keywords(GenerationConfig(), max_new_tokens=6, eos_token_id=9)
    assert generate([[5], [7], [6]], model.logits(), model, config) == [[6, 7, 8, 9], [8, 9], [7, 8, 9]]
    assert model.selected == [[0, 2], [0]]
    assert model.fed == 3


def test_beams_are_reordered_only_when_they_change() -> None:
    """Two beams that each go their way are forked once and never reordered; one that dies out is replaced."""
    config = with_keywords(GenerationConfig(), max_new_tokens=3, num_beams=2)
    for second, selected in ((4, [[0, 0]]), (-4, [[0, 0], [0, 0]])):
        table = CHAIN.copy()
        table[0, 5], table[5] = second, 0  # beside 0 -> 1 also 0 -> 5, and then ten equal chances
        model = Table(table, [0])
        assert generate([[0]], model.logits(), model, config) == [[1, 2, 3]]
        assert model.selected == selected


def test_a_prompt_that_is_done_leaves_the_beams_of_the_others() -> None:
    model = Table(CHAIN, [7, 3])
    config = with_keywords(GenerationConfig(), max_new_tokens=6, num_beams=2, eos_token_id=[9, 0], length_penalty=0.0)
    assert generate([[7], [3]], model.logits(), model, config) == [[8, 9], [4, 5, 6, 7, 8, 9]]
    forked, left = model.selected[:2]
    assert forked == [0, 0, 1, 1]
    assert len(left) == 2
    assert set(left) <= {2, 3}


@pytest.mark.parametrize("keywords", [{}, {"num_beams": 2}, {"do_sample": True, "seed": 1}])
@pytest.mark.parametrize(
    ("value", "kind"), [(np.nan, "NaN"), (np.inf, "infinite"), (-np.inf, "infinite")], ids=["nan", "inf", "-inf"]
)
def test_a_row_that_is_not_finite_is_named_and_nothing_else_suffers(
    keywords: dict[str, Any], value: float, kind: str
) -> None:
    config = with_keywords(GenerationConfig(), max_new_tokens=6, eos_token_id=9, **keywords)
    healthy = Table(CHAIN, [1, 2])
    before = generate([[1], [2]], healthy.logits(), healthy, config)
    table = CHAIN.copy()
    if np.isneginf(value):
        table[4] = value
    else:
        table[4, 7] = value  # what follows 4, which prompt 1 reaches first
    model = Table(table, [1, 2])
    with pytest.raises(InputError, match=rf"prompt 1 are {kind} at new token 3, expected finite"):
        generate([[1], [2]], model.logits(), model, config)
    again = Table(CHAIN, [1, 2])
    assert generate([[1], [2]], again.logits(), again, config) == before


def test_some_tokens_at_minus_infinity_are_a_model_s_right() -> None:
    table = CHAIN.copy()
    table[:, 3] = -np.inf
    for keywords in ({"no_repeat_ngram_size": 1}, {"num_beams": 2}, {"do_sample": True, "seed": 0}):
        model = Table(table, [0])
        config = with_keywords(GenerationConfig(), max_new_tokens=5, **keywords)
        (row,) = generate([[0]], model.logits(), model, config)
        assert 3 not in row


@pytest.mark.parametrize("keywords", [{}, {"num_beams": 2}, {"do_sample": True, "seed": 1}])
def test_settings_that_rule_out_every_token_are_refused(keywords: dict[str, Any]) -> None:
    table = np.zeros((4, 4), dtype=np.float32)
    model = Table(table, [0])
    config = with_keywords(GenerationConfig(), max_new_tokens=6, no_repeat_ngram_size=1, **keywords)
    with pytest.raises(InputError, match="rule out every token for prompt 0 at new token 4"):
        generate([[0]], model.logits(), model, config)


def test_a_stream_gives_each_token_before_the_next_is_computed() -> None:
    model = Table(CHAIN, [5])
    config = with_keywords(GenerationConfig(), max_new_tokens=6, eos_token_id=9)
    tokens = stream([5], model.logits(), model, config)
    assert next(tokens) == 6
    assert model.fed == 0
    assert next(tokens) == 7
    assert model.fed == 1
    assert list(tokens) == [8, 9]
    assert model.fed == 3


def test_a_stream_left_half_way_asks_nothing_more() -> None:
    model = Table(CHAIN, [0])
    tokens = stream([0], model.logits(), model, GenerationConfig(max_new_tokens=6))
    assert next(tokens) == 1
    tokens.close()  # type: ignore[attr-defined]
    assert list(tokens) == []
    assert model.fed == 0


def test_a_stream_s_tokens_are_those_of_generate() -> None:
    for keywords in ({}, {"do_sample": True, "seed": 3, "top_k": 5}):
        config = with_keywords(GenerationConfig(), max_new_tokens=9, eos_token_id=ENDS[1], **keywords)
        model = Recomputed(tiny_gpt(), PROMPTS[:1])
        streamed = list(stream(PROMPTS[0], model.logits(), model, config))
        assert streamed == gpt_ours(PROMPTS[:1], {"max_new_tokens": 9, "eos_token_id": ENDS[1], **keywords})[0]


@pytest.mark.parametrize(
    ("keywords", "name"), [({"num_beams": 2}, "num_beams"), ({"do_sample": True, "num_return_sequences": 2}, "num_ret")]
)
def test_only_one_row_can_be_streamed(keywords: dict[str, Any], name: str) -> None:
    model = Table(CHAIN, [0])
    config = with_keywords(GenerationConfig(), **keywords)
    with pytest.raises(InputError, match=rf"{name}.* is 2, but a stream is one row .*call generate"):
        stream([0], model.logits(), model, config)  # at once, not at the first token
