"""Read config.pbtxt strictly, for tests: the part of Triton's ``ModelConfig`` that repositories of ours use.

Triton's own message is in ``tritonclient``, which the environment of the tests may not have; what is not in MODEL is
refused here, as protobuf refuses a field that it does not know, a value of another type, and a field that is set twice.
"""

from __future__ import annotations

import re
from typing import Any

TENSOR: dict[str, Any] = {"name": str, "data_type": "TYPE_", "dims": [int], "reshape": {"shape": [int]}}
MODEL: dict[str, Any] = {
    "name": str,
    "platform": str,
    "backend": str,
    "max_batch_size": int,
    "input": [{**TENSOR, "optional": bool, "allow_ragged_batch": bool}],
    "output": [TENSOR],
    "dynamic_batching": {"max_queue_delay_microseconds": int},
    "model_transaction_policy": {"decoupled": bool},
    "instance_group": [{"count": int, "kind": "KIND_"}],
    "parameters": [{"key": str, "value": {"string_value": str}}],
}
WORDS = ("TYPE_BOOL", "TYPE_UINT16", "TYPE_INT64", "TYPE_INT32", "TYPE_FP16", "TYPE_FP32", "TYPE_BF16", "TYPE_STRING")
WORDS += ("KIND_CPU", "KIND_GPU", "KIND_MODEL")
TOKEN = re.compile(r"""\s*(?:([A-Za-z_]\w*)|(-?\d+)|"((?:[^"\\\n]|\\.)*)"|([\[\]{}:,]))""")


def read_config(text: str) -> dict[str, Any]:
    """Return the fields of a config.pbtxt as plain data, ``parameters`` as a dict; ValueError for another text."""
    tokens: list[tuple[str, str]] = []
    end = len(text.rstrip())
    place = 0
    while place < end:
        found = TOKEN.match(text, place)
        if found is None:
            raise ValueError(f"no token at {text[place : place + 30]!r}")
        tokens.append((("word", "number", "text", "sign")[(found.lastindex or 0) - 1], found[found.lastindex or 0]))
        place = found.end()
    reader = Reader(tokens)
    config = reader.message(MODEL, None)
    if "parameters" in config:
        config["parameters"] = {entry["key"]: entry["value"]["string_value"] for entry in config["parameters"]}
    return config


class Reader:
    """Reads messages of a schema from tokens."""

    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self._tokens = tokens[::-1]

    def message(self, schema: dict[str, Any], end: str | None) -> dict[str, Any]:
        """Read fields up to the sign ``end``, or the end of the text."""
        found: dict[str, Any] = {}
        while self._tokens:
            if self._take(end):
                return found
            _, name = self._tokens.pop()
            if name not in schema:
                raise ValueError(f"no field {name!r} in {sorted(schema)}")
            wanted = schema[name]
            if isinstance(wanted, list):
                found.setdefault(name, []).extend(self._repeated(wanted[0]))
            elif name in found:
                raise ValueError(f"{name} is set twice")
            else:
                found[name] = self._value(wanted)
            self._take(",")
        if end is not None:
            raise ValueError(f"the text ends before {end}")
        return found

    def _repeated(self, wanted: Any) -> list[Any]:
        colon = self._take(":")
        if not self._take("["):
            return [self._value(wanted, colon=not colon)]
        values: list[Any] = []
        while not self._take("]"):
            if values and not self._take(","):
                raise ValueError(f"no comma before {self._tokens[-1]}")
            values.append(self._value(wanted, colon=False))
        return values

    def _value(self, wanted: Any, *, colon: bool = True) -> Any:
        if isinstance(wanted, dict):
            self._take(":")
            if not self._take("{"):
                raise ValueError(f"{self._tokens[-1]} in place of a message")
            return self.message(wanted, "}")
        if colon and not self._take(":"):
            raise ValueError(f"{self._tokens[-1]} in place of a colon")
        kind, text = self._tokens.pop()
        if (wanted, kind) == (int, "number"):
            return int(text)
        if (wanted, kind) == (str, "text"):
            return text.encode().decode("unicode_escape").encode("latin-1").decode()
        if (wanted, kind) == (bool, "word") and text in ("true", "false"):
            return text == "true"
        if isinstance(wanted, str) and kind == "word" and text.startswith(wanted) and text in WORDS:
            return text
        raise ValueError(f"{text!r} is no {wanted}")

    def _take(self, sign: str | None) -> bool:
        if sign is None or not self._tokens or self._tokens[-1] != ("sign", sign):
            return False
        self._tokens.pop()
        return True
