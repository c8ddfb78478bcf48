"""Put a call's keywords on top of a generation config, and refuse what is contradictory or does not fit the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from transom.runtime.errors import InputError
from transom.runtime.generation.config import GenerationConfig
from transom.runtime.generation.field_specs import FIELD_SPECS, SEED

KEYWORDS = {**FIELD_SPECS, "seed": SEED}
# Keywords that one decoding strategy alone uses, and their values that have no effect
SAMPLING_ONLY: Mapping[str, tuple[object, ...]] = {"temperature": (1.0,), "top_k": (0, 50), "top_p": (1.0,)}
BEAMS_ONLY: Mapping[str, tuple[object, ...]] = {"length_penalty": (1.0,), "early_stopping": (False,)}
# A padding token past the vocabulary is common, and harmless: rows are never padded here
TOKEN_FIELDS = (
    "eos_token_id", "bos_token_id", "decoder_start_token_id", "bad_words_ids", "forced_bos_token_id",
    "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens",
)  # fmt: skip


def with_keywords(config: GenerationConfig, /, **keywords: Any) -> GenerationConfig:
    """Return the config with a call's keywords on top, as transformers' ``model.generate(**keywords)`` does.

    None switches a field off. Raises InputError for a keyword that does not exist, has a wrong
    type or is out of range, and where keywords contradict each other or would have no effect:
    ``top_p`` without ``do_sample``, ``length_penalty`` without beams, ``max_length`` beside
    ``max_new_tokens``. The checkpoint's own config may hold such pairs: transformers passes over
    them, and so does this runtime.
    """
    values = parse_keywords(keywords)
    changed = replace(config, **values, keywords=config.keywords | values.keys())
    problem = contradiction(changed, values)
    if problem:
        raise InputError(problem)
    return changed


def parse_keywords(keywords: Mapping[str, object]) -> dict[str, Any]:
    """Return the values as GenerationConfig stores them; InputError names the first that is unknown or wrong."""
    values = {}
    for name, value in keywords.items():
        spec = KEYWORDS.get(name)
        if spec is None:
            near = get_close_matches(name, KEYWORDS, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(KEYWORDS)}."
            raise InputError(f"{name} is no generation keyword that this runtime knows. {hint}")
        try:
            values[name] = spec.parse(value)
        except ValueError:
            advice = " For the most likely token, leave it and do_sample out." if name == "temperature" else ""
            raise InputError(f"{name} is {value!r:.60}, expected {spec.expected}.{advice}") from None
    return values


def contradiction(config: GenerationConfig, given: Mapping[str, Any]) -> str | None:
    """Return what is contradictory about ``config``, ``given`` the keywords in it; None where nothing is."""
    for name, idle in SAMPLING_ONLY.items():
        if name in given and given[name] not in idle and not config.do_sample:
            return f"{name}={given[name]} has no effect without do_sample. Pass do_sample=True, or leave {name} out."
    for name, idle in BEAMS_ONLY.items():
        if name in given and given[name] not in idle and config.num_beams == 1:
            return (
                f"{name}={given[name]!r} has no effect with num_beams=1. Pass num_beams of 2 or more, or leave "
                f"{name} out."
            )
    for name, first in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        if given.get(name) and getattr(config, first) is not None:
            whose = "" if first in given else "the model's own "
            return (
                f"{name}={given[name]} has no effect beside {whose}{first}={getattr(config, first)}, which takes "
                f"precedence. Pass {first} alone, or {first}=None with {name}."
            )
    most = config.max_new_tokens if config.max_new_tokens is not None else config.max_length
    least = config.min_new_tokens
    if least is not None and most is not None and least > most and "min_new_tokens" in config.keywords:
        limit = "max_new_tokens" if config.max_new_tokens is not None else "max_length"
        return f"min_new_tokens={least} is above {limit}={most}. Lower it, or raise {limit}."
    total = config.max_length if config.max_new_tokens is None else None
    if total is not None and "min_length" in config.keywords and config.min_length > total:
        return f"min_length={config.min_length} is above max_length={total}. Lower it, or raise max_length."
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        value = getattr(config, name)
        forced = set(value) if isinstance(value, tuple) else {value}
        if forced and forced <= set(config.suppress_tokens):
            return f"{name}={value} is in suppress_tokens, too: no token is left to choose. Take it out of one of them."
    if config.num_return_sequences > 1 and config.num_beams == 1 and not config.do_sample:
        return (
            f"num_return_sequences={config.num_return_sequences} would give the same text each time. Pass "
            "do_sample=True, or num_beams."
        )
    if 1 < config.num_beams < config.num_return_sequences:
        return (
            f"num_return_sequences={config.num_return_sequences} is above num_beams={config.num_beams}. Raise "
            "num_beams."
        )
    return None


def check_for_model(config: GenerationConfig, vocabulary: int, *, text: bool, streaming: bool = False) -> None:
    """Raise InputError if a model of ``vocabulary`` tokens, with a tokenizer if ``text``, cannot follow the config."""
    for name in TOKEN_FIELDS:
        past = [number for number in _flat(getattr(config, name)) if number >= vocabulary]
        if past:
            raise InputError(
                f"{name} has the token {past[0]}, but the model has {vocabulary}: 0..{vocabulary - 1}. "
                "Name tokens of this model's own."
            )
    if config.stop_strings and not text:
        raise InputError(
            f"stop_strings is {list(config.stop_strings)!r:.60}, but this bundle has no tokenizer to find them with. "
            "Pass eos_token_id instead, and stop_strings=None."
        )
    if streaming and (config.num_beams > 1 or config.num_return_sequences > 1):
        name = "num_beams" if config.num_beams > 1 else "num_return_sequences"
        raise InputError(
            f"{name} is {getattr(config, name)}, but a stream is one row whose tokens are final at once. "
            f"Pass {name}=1, or call generate."
        )
    if config.candidates > config.num_beams * vocabulary:
        raise InputError(
            f"num_beams={config.num_beams} scores {config.candidates} continuations in a step, but a vocabulary of "
            f"{vocabulary} has fewer. Pass fewer eos_token_id."
        )


def _flat(value: Any) -> list[int]:
    if value is None:
        return []
    if isinstance(value, tuple):
        return [number for item in value for number in _flat(item)]
    return [value]
