"""What an engine's kernels do, judged by the names that TensorRT gave them: there is nothing else without a GPU."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from transom.export.report.drawing.numbers import at, whole

ATTENTION, INTEGERS, PRODUCTS, CHAINS = "fused attention", "integer products", "other products", "fused elementwise"
MOVES, SINGLE, UNNAMED = "data movement", "single steps", "not named"
KINDS = (ATTENTION, INTEGERS, PRODUCTS, CHAINS, MOVES, SINGLE, UNNAMED)
MOST_NAMES = 2000  # of kernels in one profile that are looked at
MOST_LETTERS = 400  # of a kernel's name, and of a node's
FUSED_ATTENTION = re.compile(r"_mha_v\d")  # _gemm_mha_v2, _gemv_mha_v1
CHAIN = "__myl_"  # before the steps of a kernel that the compiler wrote: __myl_FcAddAdd
COPY = "copy_"  # between host and device
STEP = re.compile(r"[A-Z][a-z0-9]*")
PRODUCT_STEP = "Fc"
MOVING_STEPS = {"Resh", "Tran", "Move", "Repl", "Conc", "Slic", "Gath", "Scat", "Cast"}
PROFILE = re.compile(r" \[profile \d+\]")
SERIAL = re.compile(r"__mye\d+")  # differs from build to build
INTEGER_PRODUCT = ".product"  # how our quantised products end


def kind_of(name: str, wide: Collection[str]) -> str:
    """One of KINDS. ``wide`` are the quantised products that multiply in floating point after all.

    1. Attention has kernels of its own.
    2. ``__myl_`` and steps: with a product among them a product; else data is moved and cast only, or there is
       one step, or several.
    3. A copy.
    4. Everything else is called by the nodes it computes, parted by "+": products and convolutions alone are.
    """
    if FUSED_ATTENTION.search(name):
        return ATTENTION
    if name.startswith(CHAIN):
        steps = STEP.findall(name.removeprefix(CHAIN))
        if PRODUCT_STEP in steps:
            return PRODUCTS
        if steps and MOVING_STEPS.issuperset(steps):
            return MOVES
        return SINGLE if len(steps) == 1 else CHAINS
    if name.startswith(COPY):
        return MOVES
    nodes = PROFILE.sub("", name).split("+")
    return INTEGERS if all(node.endswith(INTEGER_PRODUCT) and node not in wide for node in nodes) else PRODUCTS


@dataclass(frozen=True)
class Kernels:
    """The kernels of one profile: (kind, name, how many), and how many of each kind."""

    named: tuple[tuple[str, str, int], ...]
    counts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.counts.values())


def kernels_from_json(profile: Any) -> Kernels:
    """What a profile in bundle.json says: the names under ``alike``, and of ``kernels`` what these leave over."""
    alike, wide = at(profile, "alike"), set(texts(at(profile, "int8", "dequantized")))
    named = tuple(
        (kind_of(name, wide), name, count)
        for name, count in (
            (SERIAL.sub("__mye", str(name)[:MOST_LETTERS]), whole(told) or 0)
            for name, told in islice(alike.items() if isinstance(alike, Mapping) else (), MOST_NAMES)
        )
        if count
    )
    counts: Counter[str] = Counter()
    for kind, _, count in named:
        counts[kind] += count
    counts[UNNAMED] = max((whole(at(profile, "kernels")) or 0) - counts.total(), 0)
    return Kernels(named, {kind: counts[kind] for kind in KINDS if counts[kind]})


def texts(value: Any) -> tuple[str, ...]:
    """The strings in a list, cut; empty for anything else."""
    return tuple(each[:MOST_LETTERS] for each in list_of(value)[:MOST_NAMES] if isinstance(each, str))


def list_of(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
