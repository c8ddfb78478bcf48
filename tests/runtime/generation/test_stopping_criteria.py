"""Compare stop strings across the borders of tokens, bytes and the prompt with transformers' StopStringCriteria."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.generation.stopping_criteria import StopStringCriteria

from tiny_decoders import Table
from transom.runtime.errors import InputError
from transom.runtime.generation import GenerationConfig, generate, stream, with_keywords
from transom.runtime.generation.stopping_criteria import StoppingCriteria, common_prefix

WORDS = ["st", "op", "stop", "opera", "sto", "pper", "las", "topper", "s", "to", "pped", " stop", "\n", "\n\n", "é"]


class Words:
    """A vocabulary of WORDS, token i is word i, and how a task decodes them."""

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(WORDS[number] for number in ids)


def completes(stop: str, *words: str) -> bool:
    ids = np.array([WORDS.index(word) for word in words])
    stopping = StoppingCriteria(with_keywords(GenerationConfig(), stop_strings=stop), Words().decode)
    return stopping.completes_stop_string(ids[:-1], int(ids[-1]))


@pytest.mark.parametrize(
    "words",
    [["st", "op"], ["stop"], ["st", "opera"], ["sto", "pper"], ["las", "topper"], ["s", "to", "pped"], [" stop"]],
)
def test_the_newest_token_completes_a_stop_string(words: list[str]) -> None:
    assert completes("stop", *words)


@pytest.mark.parametrize("words", [["stop", "s"], ["st", "op", "las"], ["st", "opera", "to"], ["to", "op"], ["s"]])
def test_a_stop_string_that_is_over_or_not_there_is_none(words: list[str]) -> None:
    assert not completes("stop", *words)


def test_a_stop_string_twice_stops_both_times() -> None:
    assert completes("\n\n", "\n", "\n")
    assert completes("\n\n", "\n\n", "\n")


def test_the_space_that_decoding_takes_from_the_first_token_is_not_missed() -> None:
    """As SentencePiece's decoders do; text before the stop string is decoded along with it."""
    words = ["a", " ", "t"]
    asked = with_keywords(GenerationConfig(), stop_strings=" t")
    stopping = StoppingCriteria(asked, lambda ids: "".join(words[number] for number in ids).lstrip(" "))
    assert stopping.completes_stop_string(np.array([0, 0, 0, 1]), 2)
    assert not stopping.completes_stop_string(np.array([0, 0, 0, 0]), 2)


def test_common_characters() -> None:
    assert common_prefix("abc", "abd") == 2
    assert common_prefix("ab\ufffd", "abé") == 2
    assert common_prefix("", "abc") == 0


def rows_after(prompt: list[str], following: dict[str, str], stop: str | list[str]) -> list[str]:
    table = np.full((len(WORDS), len(WORDS)), -5, dtype=np.float32)
    for word, after in following.items():
        table[WORDS.index(word), WORDS.index(after)] = 5
    ids = [WORDS.index(word) for word in prompt]
    found = []
    for beams in (1, 2):
        model = Table(table, ids[-1:])
        keywords = with_keywords(GenerationConfig(), max_new_tokens=5, stop_strings=stop, num_beams=beams)
        (row,) = generate([ids], model.logits(), model, keywords, decode=Words().decode)
        found.append([WORDS[token] for token in row])
    assert found[0] == found[1]
    return found[0]


def test_the_completing_token_stays_in_the_output() -> None:
    chain = {"las": "s", "s": "to", "to": "pped", "pped": "las"}
    assert rows_after(["las"], chain, "stop") == ["s", "to", "pped"]
    assert rows_after(["las"], chain, ["never there", "sto"]) == ["s", "to"]


def test_a_stop_string_may_begin_in_the_prompt_but_not_end_there() -> None:
    assert rows_after(["stop", "st"], {"st": "op", "op": "s"}, "stop") == ["op"]
    assert rows_after(["stop"], {"stop": "to", "to": "las", "las": "to"}, "stop") == ["to", "las", "to", "las", "to"]


def test_a_stop_string_never_met_runs_to_the_limit() -> None:
    assert len(rows_after(["las"], {"las": "to", "to": "las"}, "no such text")) == 5


def test_a_stream_ends_with_the_completing_token() -> None:
    table = np.eye(len(WORDS), k=1, dtype=np.float32) * 9  # each word is followed by the next of WORDS
    model = Table(table, [0])
    asked = with_keywords(GenerationConfig(), max_new_tokens=9, stop_strings=["pst"])
    assert list(stream([0], model.logits(), model, asked, decode=Words().decode)) == [1, 2]  # "op" + "stop"


def test_without_a_tokenizer_stop_strings_are_refused() -> None:
    model = Table(np.eye(3, dtype=np.float32), [0])
    asked = with_keywords(GenerationConfig(), stop_strings=["x"])
    with pytest.raises(InputError, match=r"stop_strings is \['x'\], but this bundle has no tokenizer"):
        generate([[0]], model.logits(), model, asked)
    assert model.fed == 0


@lru_cache
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte, and a few merges that cut "stop", "☃" and "é" in awkward places."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    merges: list[tuple[str, str]] = []
    for text in ("st", "op", "to", "pp", " s", "\n\n", "p☃"):
        letters = "".join(piece for piece, _ in level.pre_tokenize_str(text))
        merges.append((letters[0], letters[1]))
    vocab = [*alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(vocab)}, merges=merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = level, decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@lru_cache
def criteria(stops: tuple[str, ...]) -> StopStringCriteria:
    return StopStringCriteria(byte_tokenizer(), list(stops))


STOPS = [("stop",), ("\n\n",), ("☃",), ("é", "pp"), ("op☃s",), (" s", "xyz")]


@settings(max_examples=100, deadline=None)
@given(
    text=st.lists(st.sampled_from([*"stop ☃éx\n", "stop", "op☃s", "\n\n"]), min_size=1, max_size=12),
    stops=st.sampled_from(STOPS),
    cut=st.integers(0, 2**30),
)
def test_every_token_is_judged_as_by_transformers(text: list[str], stops: tuple[str, ...], cut: int) -> None:
    """Texts taken as bytes and put together again in random pieces of the vocabulary."""
    tokenizer = byte_tokenizer()
    vocab = tokenizer.get_vocab()
    letters = [tokenizer.convert_ids_to_tokens(number) for number in range(len(vocab))]
    written = "".join(
        piece for piece, _ in pre_tokenizers.ByteLevel(False, False, False).pre_tokenize_str("".join(text))
    )
    ids: list[int] = []
    while written:
        size = 2 if cut % 2 and written[:2] in vocab else 1
        ids.append(letters.index(written[:size]))
        written, cut = written[size:], cut // 2
    stopping = StoppingCriteria(
        with_keywords(GenerationConfig(), stop_strings=list(stops)),
        lambda numbers: tokenizer.decode(numbers, clean_up_tokenization_spaces=False),
    )
    for end in range(1, len(ids) + 1):
        theirs = bool(criteria(stops)(torch.tensor([ids[:end]]), None)[0])
        ours = stopping.completes_stop_string(np.array(ids[: end - 1], dtype=np.int64), ids[end - 1])
        assert ours == theirs, (ids[:end], stops)
