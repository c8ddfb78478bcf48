"""Small damages to a JSON value: what bad luck, or an attacker who knows the format, would do to a file of ours."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from random import Random
from typing import Any

ODD = (
    None, True, False, 0, 1, -1, 2, 7, 2**31 - 1, 2**31, 2**53, 2**63, -(2**63), 10**30, 0.0, -0.0, 0.5, 1e-300, 1e300,
    -1e300, 1.0, "", " ", "a", "x" * 300, "../x", "/etc/hostname", "a\0b", "a\nb", "\ud800", "\u202e", "é", "default",
    "B", "S", "C", "P", "input_ids", "write_indices", "count", "float32", "int64", "null", [], [[]], [None], [[1], [2]],
    ["B", "S"], ["B", "B"], {}, {"": {}}, {"default": "model.onnx"}, {"file": "x"}, {"type": "Sequence"},
)  # fmt: skip


def mutated(value: Any, rng: Random, others: Sequence[Any] = (), most: int = 4) -> Any:
    """A copy with one to ``most`` damages; parts of ``others`` may be put into it."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, most)):
        value = damaged(value, rng, others)
    return value


def damaged(value: Any, rng: Random, others: Sequence[Any]) -> Any:
    """Damage one place of ``value``, in place where it can be done."""
    parent, key = place(value, rng)
    if parent is None:
        return rng.choice(ODD)
    kind = rng.randrange(8)
    if kind == 0:
        del parent[key]
    elif kind == 1:  # once more, under another name
        if isinstance(parent, list):
            parent.insert(rng.randint(0, len(parent)), copy.deepcopy(parent[key]))
        else:
            parent[str(odd_text(rng, key))] = copy.deepcopy(parent[key])
    elif kind == 2 and isinstance(parent, dict):
        parent[str(odd_text(rng, key))] = parent.pop(key)
    elif kind == 3:
        other, name = place(rng.choice([value, *others]), rng)
        if other is not None:
            parent[key] = copy.deepcopy(other[name])
    elif kind <= 5:
        parent[key] = near(parent[key], rng)
    else:
        parent[key] = copy.deepcopy(rng.choice(ODD))
    return value


def place(value: Any, rng: Random) -> tuple[Any, Any]:
    """A container in ``value``, rather deep than shallow, and a key of it; (None, None) where there is none."""
    parent, key = None, None
    while isinstance(value, dict | list) and value and (parent is None or rng.random() < 0.9):
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        inner = [key for key in keys if isinstance(value[key], dict | list)] if rng.random() < 0.5 else []
        parent, key = value, rng.choice(inner or keys)
        value = value[key]
    return parent, key


def near(value: Any, rng: Random) -> Any:
    """A value much like this one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice(
            [value + 1, value - 1, -value, value * 2, value * 10**6, float(min(value, 2**53)), str(value)]
        )
    if isinstance(value, float):
        return rng.choice([-value, value * 2, value / 3, int(value) if abs(value) < 1e9 else 0, str(value)])
    if isinstance(value, str):
        return odd_text(rng, value)
    if isinstance(value, list):
        return rng.choice([value[::-1], value[:-1], value * 2, dict.fromkeys(map(str, value))])
    if isinstance(value, dict):
        return rng.choice([list(value), list(value.values()), {"": value}, dict(list(value.items())[:-1])])
    return 0


def odd_text(rng: Random, text: str) -> str:
    return rng.choice([f"{text}0", text[:-1], text.upper(), f"../{text}", f"{text}\0", text[::-1], text * 3, "\udfff"])
