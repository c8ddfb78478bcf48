"""Test GenerationConfig: keywords and stored fields that are read or refused, and lengths."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tiny_decoders import VOCABULARY, tiny_gpt
from transom.export.processors.generation_config import generation_from_checkpoint
from transom.runtime.errors import BundleError, CheckpointError, InputError
from transom.runtime.generation import GenerationConfig, check_for_model, with_keywords
from transom.runtime.generation.field_specs import FIELD_SPECS

DEFAULTS = GenerationConfig()


def test_the_defaults_are_those_of_transformers() -> None:
    theirs = transformers.GenerationConfig._get_default_generation_params()
    theirs["max_length"] = None  # its 20 is counted from the prompt's end, as our None is
    for name, spec in FIELD_SPECS.items():
        if name in theirs:
            ours = None if name == "max_length" else spec.parse(theirs[name])
            assert getattr(DEFAULTS, name) == ours, name


def test_keywords_are_read_into_one_form() -> None:
    found = with_keywords(DEFAULTS,
        eos_token_id=5, stop_strings="x", bad_words_ids=[[1], (2, 3)], max_new_tokens=np.int64(7),
        do_sample=True, temperature=np.float32(0.5), top_k=None, top_p=1, forced_eos_token_id=[1, 2], seed=0,
    )  # fmt: skip
    assert found.eos_token_id == (5,)
    assert found.stop_strings == ("x",)
    assert found.bad_words_ids == ((1,), (2, 3))
    assert (type(found.max_new_tokens), found.max_new_tokens) == (int, 7)
    assert (type(found.temperature), found.temperature) == (float, 0.5)
    assert (found.top_k, found.top_p, found.seed, found.forced_eos_token_id) == (0, 1.0, 0, (1, 2))
    assert with_keywords(found, eos_token_id=None, stop_strings=None).eos_token_id == ()
    assert with_keywords(found, eos_token_id=np.array([3, 4])).eos_token_id == (3, 4)
    assert with_keywords(found, eos_token_id=np.array(3)).eos_token_id == (3,)


@pytest.mark.parametrize(
    "keywords",
    [
        {"max_new_tokens": True}, {"max_new_tokens": 0}, {"max_new_tokens": 2.0}, {"max_new_tokens": "5"},
        {"max_length": 0}, {"min_new_tokens": -1}, {"min_length": 1.5}, {"do_sample": 1}, {"do_sample": "yes"},
        {"temperature": 0, "do_sample": True}, {"temperature": -1.0, "do_sample": True},
        {"temperature": float("nan"), "do_sample": True}, {"temperature": float("inf"), "do_sample": True},
        {"temperature": True, "do_sample": True}, {"temperature": "1", "do_sample": True},
        {"temperature": np.ones(2), "do_sample": True}, {"temperature": 10**400, "do_sample": True},
        {"top_k": -1, "do_sample": True}, {"top_k": 3.0, "do_sample": True}, {"top_p": 0.0, "do_sample": True},
        {"top_p": 1.01, "do_sample": True}, {"top_p": float("nan"), "do_sample": True},
        {"repetition_penalty": 0.0}, {"repetition_penalty": -1.0}, {"no_repeat_ngram_size": -1},
        {"num_beams": 0}, {"num_beams": None}, {"num_beams": True}, {"num_beams": 2.0}, {"num_beams": 10**9},
        {"length_penalty": float("inf"), "num_beams": 2}, {"length_penalty": 1000.0, "num_beams": 2},
        {"early_stopping": "always", "num_beams": 2}, {"early_stopping": 1, "num_beams": 2},
        {"stop_strings": ""}, {"stop_strings": ["a", ""]}, {"stop_strings": [b"a"]}, {"stop_strings": 3},
        {"stop_strings": "\ud800"}, {"seed": -1}, {"seed": 1.0}, {"seed": True},
        {"eos_token_id": -1}, {"eos_token_id": True}, {"eos_token_id": [1, "2"]}, {"eos_token_id": np.array([[1, 2]])},
        {"num_beams": np.array([2, 3])}, {"eos_token_id": 2**31},
        {"bad_words_ids": [1, 2]}, {"bad_words_ids": [[]]}, {"bad_words_ids": [None]}, {"bad_words_ids": 3},
        {"suppress_tokens": 3}, {"num_return_sequences": 0},
    ],
    ids=str,
)  # fmt: skip
def test_a_wrong_value_is_named_with_what_was_expected(keywords: dict[str, Any]) -> None:
    name = next(iter(keywords))
    with pytest.raises(InputError, match=rf"^{name} is .*, expected "):
        with_keywords(DEFAULTS, **keywords)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"temperature": 0.7}, "temperature=0.7 has no effect without do_sample. Pass do_sample=True"),
        ({"top_k": 5}, "top_k=5 has no effect without do_sample"),
        ({"top_p": 0.9, "do_sample": False}, "top_p=0.9 has no effect without do_sample"),
        ({"top_p": 0.9, "num_beams": 2}, "top_p=0.9 has no effect without do_sample"),
        ({"length_penalty": 0.6}, "length_penalty=0.6 has no effect with num_beams=1. Pass num_beams of 2 or more"),
        ({"early_stopping": True}, "early_stopping=True has no effect with num_beams=1"),
        ({"early_stopping": "never", "num_beams": 1}, "early_stopping='never' has no effect"),
        ({"max_length": 9, "max_new_tokens": 5}, "max_length=9 has no effect beside max_new_tokens=5"),
        ({"min_length": 9, "min_new_tokens": 5}, "min_length=9 has no effect beside min_new_tokens=5"),
        ({"min_new_tokens": 6, "max_new_tokens": 5}, "min_new_tokens=6 is above max_new_tokens=5"),
        ({"min_new_tokens": 6, "max_length": 5}, "min_new_tokens=6 is above max_length=5"),
        ({"min_length": 6, "max_length": 5}, "min_length=6 is above max_length=5"),
        (
            {"num_return_sequences": 2},
            "num_return_sequences=2 would give the same text each time. Pass do_sample=True, or num_beams",
        ),
        ({"num_return_sequences": 3, "num_beams": 2}, "num_return_sequences=3 is above num_beams=2"),
        ({"forced_eos_token_id": 3, "suppress_tokens": [3, 4]}, "is in suppress_tokens, too: no token is left"),
        ({"temprature": 0.7}, "temprature is no generation keyword .* Did you mean temperature"),
        ({"use_cache": True}, "use_cache is no generation keyword .* There are: max_new_tokens, "),
    ],
    ids=str,
)
def test_contradictory_keywords_are_refused(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        with_keywords(DEFAULTS, **keywords)


def test_values_that_say_nothing_contradict_nothing() -> None:
    with_keywords(DEFAULTS, temperature=1.0, top_p=1.0, top_k=50, length_penalty=1.0, early_stopping=False, seed=3)
    with_keywords(DEFAULTS, max_length=9, max_new_tokens=None, min_length=0, min_new_tokens=2)


def test_what_the_checkpoint_says_is_passed_over_and_what_the_caller_says_is_not() -> None:
    stored = GenerationConfig(temperature=0.6, top_p=0.9, length_penalty=0.6, max_new_tokens=9, min_length=50)
    assert with_keywords(stored).new_tokens(4) == 9  # fifty are out of reach, as in transformers
    assert with_keywords(stored, do_sample=True).temperature == 0.6
    assert with_keywords(stored).new_tokens(4, 7) == 3  # a bundle may be exported with less room than that
    assert with_keywords(GenerationConfig(max_length=512)).new_tokens(1, 64) == 63
    assert with_keywords(stored, max_new_tokens=9).new_tokens(4, 7) == 9  # asked for: refused where it does not fit
    with pytest.raises(InputError, match="max_length=30 has no effect beside the model's own max_new_tokens=9"):
        with_keywords(stored, max_length=30)
    assert with_keywords(stored, max_length=30, max_new_tokens=None).new_tokens(4) == 26
    with pytest.raises(InputError, match="at least 16 new tokens are asked for after a prompt of 4, at most 9"):
        with_keywords(stored, min_length=20).new_tokens(4)


@pytest.mark.parametrize(
    ("prompt", "keywords"),
    [(3, {}), (40, {}), (5, {"max_length": 12}), (5, {"max_new_tokens": 7}), (47, {}), (5, {"max_length": 6})],
)
def test_an_answer_is_as_long_as_transformers_makes_it(prompt: int, keywords: dict[str, Any]) -> None:
    model = tiny_gpt()  # 48 positions
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        row = model.generate(torch.ones((1, prompt), dtype=torch.long), eos_token_id=None, do_sample=False, **keywords)
    assert with_keywords(DEFAULTS, **keywords).new_tokens(prompt, positions=48) == row.shape[1] - prompt


def test_a_prompt_without_room_is_refused() -> None:
    with pytest.raises(InputError, match="the prompt is 48 tokens, but the context holds 48: no room for a new one"):
        DEFAULTS.new_tokens(48, positions=48)
    with pytest.raises(InputError, match="the prompt is 9 tokens, but max_length is 8: no room"):
        with_keywords(DEFAULTS, max_length=8).new_tokens(9)
    assert DEFAULTS.new_tokens(48) == 20
    assert with_keywords(DEFAULTS, max_new_tokens=5).new_tokens(48, positions=48) == 5  # the caller's cache says no


def test_rows_and_the_start_token() -> None:
    assert DEFAULTS.rows(3) == 3
    assert GenerationConfig(num_beams=4, num_return_sequences=2).rows(3) == 12
    assert GenerationConfig(do_sample=True, num_return_sequences=2).rows(3) == 6
    assert GenerationConfig(bos_token_id=4).start_token == 4
    assert GenerationConfig(bos_token_id=4, decoder_start_token_id=0).start_token == 0


@pytest.mark.parametrize("name", ["eos_token_id", "bad_words_ids", "forced_bos_token_id", "suppress_tokens"])
def test_a_token_past_the_vocabulary_is_refused(name: str) -> None:
    value: Any = {"bad_words_ids": [[1, 23]], "suppress_tokens": [23]}.get(name, 23)
    asked = with_keywords(DEFAULTS, **{name: value})
    with pytest.raises(InputError, match=rf"{name} has the token 23, but the model has 23: 0..22"):
        check_for_model(asked, VOCABULARY, text=True)
    check_for_model(asked, VOCABULARY + 1, text=True)


def test_more_ends_than_the_vocabulary_leaves_room_for() -> None:
    asked = with_keywords(DEFAULTS, num_beams=2, eos_token_id=[0, 1, 2])
    with pytest.raises(InputError, match="scores 8 continuations in a step, but a vocabulary of 3 has fewer"):
        check_for_model(asked, 3, text=True)


FULL: dict[str, Any] = {
    "max_new_tokens": 7, "max_length": 8, "min_new_tokens": 1, "min_length": 2, "do_sample": True, "temperature": 0.5,
    "top_k": 0, "top_p": 0.9, "repetition_penalty": 1.5, "no_repeat_ngram_size": 3, "num_beams": 4,
    "length_penalty": 0.6, "early_stopping": "never", "num_return_sequences": 2, "renormalize_logits": True,
    "stop_strings": ["a", "b"], "eos_token_id": [1, 2], "pad_token_id": 3, "bos_token_id": 4,
    "decoder_start_token_id": 5, "bad_words_ids": [[6], [7, 8]], "forced_bos_token_id": 9,
    "forced_eos_token_id": [1], "suppress_tokens": [10], "begin_suppress_tokens": [11],
}  # fmt: skip


def test_settings_survive_the_way_through_json() -> None:
    assert set(FULL) == set(FIELD_SPECS)
    config = GenerationConfig.from_json(FULL)
    assert config.to_json() == FULL
    assert GenerationConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert DEFAULTS.to_json() == {}
    assert GenerationConfig.from_json({}) == DEFAULTS
    assert "seed" not in with_keywords(DEFAULTS, seed=3).to_json()


@pytest.mark.parametrize(
    ("obj", "message"),
    [
        ([], "generation is a list, expected an object"),
        ({"num_beams": 0, "top_p": 2}, "generation.top_p is 2, expected a number .*; generation.num_beams is 0"),
        ({"temperature": None}, "generation.temperature is None"),
        ({"eos_token_id": [[1]]}, "generation.eos_token_id is"),
        ({"seed": 3}, "unknown key 'seed'"),
        ({"do_sample": "true"}, "generation.do_sample is 'true', expected True or False"),
    ],
)
def test_a_damaged_object_is_refused(obj: object, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        GenerationConfig.from_json(obj)


def checkpoint(folder: Path, generation: dict[str, Any] | None, config: dict[str, Any] | None = None) -> Path:
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "gpt2"}))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


MARIAN = {
    "_from_model_config": True, "bad_words_ids": [[22]], "bos_token_id": 0, "decoder_start_token_id": 22,
    "eos_token_id": 0, "forced_eos_token_id": 0, "max_length": 512, "num_beams": 4, "pad_token_id": 22,
    "renormalize_logits": True, "transformers_version": "4.30.0",
}  # fmt: skip


@pytest.mark.parametrize("generation", [MARIAN, {"eos_token_id": [1, 2], "top_k": None, "alignment_heads": [[1, 2]]}])
def test_generation_config_json_is_read_as_transformers_reads_it(tmp_path: Path, generation: dict[str, Any]) -> None:
    folder = checkpoint(tmp_path, generation, {"num_beams": 7, "eos_token_id": 9})
    ours = generation_from_checkpoint(folder, VOCABULARY)
    same_as_theirs(ours, transformers.GenerationConfig.from_pretrained(folder))
    assert ours.num_beams == (4 if generation is MARIAN else 1)
    assert ours.top_k == 50


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gpt2", "bos_token_id": 5, "eos_token_id": 6, "task_specific_params": {"x": {"max_length": 50}}},
        {**MARIAN, "max_length": None, "vocab_size": 23, "force_bos_token_to_be_generated": True},
        {"decoder": {"num_beams": 3, "eos_token_id": 4}, "eos_token_id": 6},
    ],
)
def test_without_it_config_json_is_read_as_transformers_reads_it(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = checkpoint(tmp_path, None, config)
    theirs = transformers.GenerationConfig.from_pretrained(
        folder, config_file_name="config.json", _from_model_config=True
    )
    same_as_theirs(generation_from_checkpoint(folder, VOCABULARY), theirs)


def same_as_theirs(ours: GenerationConfig, theirs: transformers.GenerationConfig) -> None:
    for name, spec in FIELD_SPECS.items():
        value = getattr(theirs, name)
        assert getattr(ours, name) == (getattr(DEFAULTS, name) if value is None else spec.parse(value)), name


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        (
            {"min_p": 0.1, "guidance_scale": 2},
            r"sets min_p=0.1, guidance_scale=2, which the runtime does not follow.* Delete",
        ),
        ({"encoder_no_repeat_ngram_size": 3}, "sets encoder_no_repeat_ngram_size=3"),
        ({"exponential_decay_length_penalty": [5, 1.1]}, "sets exponential_decay_length_penalty"),
        ({"num_beams": "4"}, "num_beams is '4', expected an int"),
        ({"top_p": 1.5}, "top_p is 1.5, expected a number above 0 to 1"),
        ({"eos_token_id": 23}, "eos_token_id has the token 23, but the model has 23"),
        ({"num_return_sequences": 2}, "num_return_sequences=2 would give the same text each time"),
    ],
)
def test_a_generation_config_that_cannot_be_followed_is_refused(
    tmp_path: Path, generation: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"generation_config.json:? ?{message}"):
        generation_from_checkpoint(checkpoint(tmp_path, generation), VOCABULARY)


def test_fields_without_effect_are_passed_over(tmp_path: Path) -> None:
    idle = {
        "use_cache": False, "cache_implementation": "static", "output_attentions": True, "transformers_version": "5",
        "return_dict_in_generate": True, "typical_p": 1.0, "epsilon_cutoff": 0.0, "guidance_scale": None,
        "num_beam_groups": 1, "diversity_penalty": 0.0, "remove_invalid_values": False, "max_time": None,
        "encoder_repetition_penalty": 1.0, "pad_token_id": -1, "num_assistant_tokens": 20, "no_such_field": 3,
    }  # fmt: skip
    assert generation_from_checkpoint(checkpoint(tmp_path, idle), VOCABULARY) == DEFAULTS


def test_a_padding_token_past_the_vocabulary_is_never_used(tmp_path: Path) -> None:
    assert generation_from_checkpoint(checkpoint(tmp_path, {"pad_token_id": 23}), VOCABULARY).pad_token_id == 23


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    checkpoint(tmp_path, {})
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json is not valid JSON"):
        generation_from_checkpoint(tmp_path, VOCABULARY)
