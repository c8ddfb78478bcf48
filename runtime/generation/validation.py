"""The keywords of one call: read, and refused where they contradict each other."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from transom.runtime.errors import InputError
from transom.runtime.generation.field_specs import FIELD_SPECS, SEED

if TYPE_CHECKING:
    from transom.runtime.generation.config import GenerationConfig

KEYWORDS = {**FIELD_SPECS, "seed": SEED}
# Keywords that only one way of choosing looks at, and the values with which they say nothing
SAMPLING_ONLY: Mapping[str, tuple[object, ...]] = {"temperature": (1.0,), "top_k": (0, 50), "top_p": (1.0,)}
BEAMS_ONLY: Mapping[str, tuple[object, ...]] = {"length_penalty": (1.0,), "early_stopping": (False,)}


def read_keywords(keywords: Mapping[str, object]) -> dict[str, Any]:
    """The values as GenerationConfig keeps them; InputError names the first that is unknown or wrong."""
    values = {}
    for name, value in keywords.items():
        rule = KEYWORDS.get(name)
        if rule is None:
            near = get_close_matches(name, KEYWORDS, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"There are: {', '.join(KEYWORDS)}."
            raise InputError(f"{name} is no generation keyword that this runtime knows. {hint}")
        try:
            values[name] = rule.read(value)
        except ValueError:
            advice = " For the most likely token, leave it and do_sample out." if name == "temperature" else ""
            raise InputError(f"{name} is {value!r:.60}, expected {rule.expected}.{advice}") from None
    return values


def contradiction(settings: GenerationConfig, given: Mapping[str, Any]) -> str | None:
    """What is contradictory about ``settings``, given the keywords read into it; None where nothing is."""
    for name, idle in SAMPLING_ONLY.items():
        if name in given and given[name] not in idle and not settings.do_sample:
            return f"{name}={given[name]} has no effect without do_sample. Pass do_sample=True, or leave {name} out."
    for name, idle in BEAMS_ONLY.items():
        if name in given and given[name] not in idle and settings.num_beams == 1:
            return (
                f"{name}={given[name]!r} has no effect with num_beams=1. Pass num_beams of 2 or more, or leave "
                f"{name} out."
            )
    for name, first in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        if given.get(name) and getattr(settings, first) is not None:
            whose = "" if first in given else "the model's own "
            return (
                f"{name}={given[name]} has no effect beside {whose}{first}={getattr(settings, first)}, which goes "
                f"first. Pass {first} alone, or {first}=None with {name}."
            )
    most = settings.max_new_tokens if settings.max_new_tokens is not None else settings.max_length
    least = settings.min_new_tokens
    if least is not None and most is not None and least > most and "min_new_tokens" in settings.keywords:
        limit = "max_new_tokens" if settings.max_new_tokens is not None else "max_length"
        return f"min_new_tokens={least} is above {limit}={most}. Lower it, or raise {limit}."
    total = settings.max_length if settings.max_new_tokens is None else None
    if total is not None and "min_length" in settings.keywords and settings.min_length > total:
        return f"min_length={settings.min_length} is above max_length={total}. Lower it, or raise max_length."
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        value = getattr(settings, name)
        forced = set(value) if isinstance(value, tuple) else {value}
        if forced and forced <= set(settings.suppress_tokens):
            return f"{name}={value} is in suppress_tokens, too: no token is left to choose. Take it out of one of them."
    if settings.num_return_sequences > 1 and settings.num_beams == 1 and not settings.do_sample:
        return (
            f"num_return_sequences={settings.num_return_sequences} would give the same text each time. Pass "
            "do_sample=True, or num_beams."
        )
    if 1 < settings.num_beams < settings.num_return_sequences:
        return (
            f"num_return_sequences={settings.num_return_sequences} is above num_beams={settings.num_beams}. Raise "
            "num_beams."
        )
    return None
