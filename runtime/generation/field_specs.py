"""Field specs: the values each generation keyword allows, for calls, bundle.json and generation_config.json."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

MAX_ID = 2**31 - 1  # of a token; no embedding table is longer
MAX_LENGTH = 1_000_000  # tokens; far past any position table
MAX_ROWS = 65_536  # beams or sequences of one prompt


@dataclass(frozen=True)
class FieldSpec:
    """One field's type and range; ``parse`` returns the value as GenerationConfig stores it, or raises ValueError."""

    parse: Callable[[Any], Any]
    expected: str

    def accepts_json(self, value: object) -> bool:
        """Return whether a file may hold the value; null is not one: a file leaves out what is not set."""
        if value is None:
            return False
        try:
            self.parse(value)
        except ValueError:
            return False
        return True


def integer_within(value: Any, least: int, most: int) -> int:
    """Return an int, numpy's included, within the bounds; ValueError for others, for a bool and for a float."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ValueError
    try:
        number = int(value.__index__())
    except TypeError:  # an array of several
        raise ValueError from None
    if not least <= number <= most:
        raise ValueError
    return number


def integer(least: int, most: int, none: Any = ...) -> FieldSpec:
    """Return the spec of an int; ``none`` is the value that None stands for, without it None is refused."""

    def parse(value: Any) -> Any:
        return none if value is None and none is not ... else integer_within(value, least, most)

    return FieldSpec(parse, f"an int, {least}..{most}")


def number(low: float, high: float, none: Any = ..., *, above: bool = False) -> FieldSpec:
    """Return the spec of a number; with ``above``, ``low`` itself is excluded."""

    def parse(value: Any) -> Any:
        if value is None and none is not ...:
            return none
        if isinstance(value, bool) or not (hasattr(value, "__float__") and hasattr(value, "__mul__")):
            raise ValueError
        if getattr(value, "shape", ()) != ():
            raise ValueError  # an array
        try:
            real = float(value)
        except (TypeError, OverflowError):
            raise ValueError from None
        if not math.isfinite(real) or not low <= real <= high or (above and real == low):
            raise ValueError
        return real

    start = f"above {low:g}" if above else f"from {low:g}"
    return FieldSpec(parse, f"a number {start} to {high:g}")


def boolean() -> FieldSpec:
    def parse(value: Any) -> bool:
        if value is None:
            return False
        if not isinstance(value, bool):
            raise ValueError
        return value

    return FieldSpec(parse, "True or False")


def items(value: Any) -> list[Any]:
    """Return the items of a list or tuple, or of a 1-D array; ValueError for anything else."""
    if isinstance(value, (list, tuple)):
        return list(value)
    if getattr(value, "ndim", None) == 1:
        return list(value)
    raise ValueError


def parse_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(integer_within(item, 0, MAX_ID) for item in items(value))


def parse_id_or_ids(value: Any) -> tuple[int, ...]:
    single = hasattr(value, "__index__") and getattr(value, "ndim", 0) == 0  # an array has the attribute, too
    return (integer_within(value, 0, MAX_ID),) if single else parse_ids(value)


def parse_words(value: Any) -> tuple[tuple[int, ...], ...]:
    words = () if value is None else tuple(parse_ids(word) for word in items(value))
    if not all(words):
        raise ValueError
    return words


def parse_strings(value: Any) -> tuple[str, ...]:
    strings = () if value is None else (value,) if isinstance(value, str) else tuple(items(value))
    for string in strings:
        if not isinstance(string, str) or not string or any("\ud800" <= letter <= "\udfff" for letter in string):
            raise ValueError
    return strings


def parse_early_stopping(value: Any) -> bool | str:
    if value is None:
        return False
    if isinstance(value, bool) or (isinstance(value, str) and value == "never"):
        return value
    raise ValueError


TOKEN = integer(0, MAX_ID, none=None)
TOKENS = FieldSpec(parse_ids, "a list of token ids")
TOKEN_OR_TOKENS = FieldSpec(parse_id_or_ids, "a token id or a list of them")

FIELD_SPECS: Mapping[str, FieldSpec] = {
    "max_new_tokens": integer(1, MAX_LENGTH, none=None),
    "max_length": integer(1, MAX_LENGTH, none=None),
    "min_new_tokens": integer(0, MAX_LENGTH, none=None),
    "min_length": integer(0, MAX_LENGTH, none=0),
    "do_sample": boolean(),
    "temperature": number(0, 1e6, none=1.0, above=True),
    "top_k": integer(0, MAX_ID, none=0),
    "top_p": number(0, 1, none=1.0, above=True),
    "repetition_penalty": number(0, 1e6, none=1.0, above=True),
    "no_repeat_ngram_size": integer(0, MAX_LENGTH, none=0),
    "num_beams": integer(1, MAX_ROWS),
    "length_penalty": number(-100, 100),  # 1e6**100 is a float, 1e6**1000 is none
    "early_stopping": FieldSpec(parse_early_stopping, 'True, False or "never"'),
    "num_return_sequences": integer(1, MAX_ROWS),
    "renormalize_logits": boolean(),
    "stop_strings": FieldSpec(parse_strings, "a str or a list of them, none of them empty"),
    "eos_token_id": TOKEN_OR_TOKENS,
    "pad_token_id": TOKEN,
    "bos_token_id": TOKEN,
    "decoder_start_token_id": TOKEN,
    "bad_words_ids": FieldSpec(parse_words, "a list of lists of token ids, none of them empty"),
    "forced_bos_token_id": TOKEN,
    "forced_eos_token_id": TOKEN_OR_TOKENS,
    "suppress_tokens": TOKENS,
    "begin_suppress_tokens": TOKENS,
}
SEED = integer(0, 2**128 - 1, none=None)  # the entropy of numpy's SeedSequence
