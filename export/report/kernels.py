"""Classify an engine's kernels by the names that TensorRT gives them, the only information without a GPU."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from transom.runtime.format import at, list_of, natural

ATTENTION, INTEGERS, PRODUCTS, CHAINS = "fused attention", "integer products", "other products", "fused elementwise"
MOVES, SINGLE, UNNAMED = "data movement", "single steps", "not named"
KINDS = (ATTENTION, INTEGERS, PRODUCTS, CHAINS, MOVES, SINGLE, UNNAMED)
MOST_NAMES = 2000  # of kernels in one profile that are read
MOST_LETTERS = 400  # of a kernel's name, and of a node's
FUSED_ATTENTION = re.compile(r"_mha_v\d")  # _gemm_mha_v2, _gemv_mha_v1
CHAIN = "__myl_"  # prefix of a kernel that the compiler generated from steps: __myl_FcAddAdd
COPY = "copy_"  # between host and device
STEP = re.compile(r"[A-Z][a-z0-9]*")
PRODUCT_STEP = "Fc"
MOVING_STEPS = {"Resh", "Tran", "Move", "Repl", "Conc", "Slic", "Gath", "Scat", "Cast"}
PROFILE = re.compile(r" \[profile \d+\]")
SERIAL = re.compile(r"__mye\d+")  # differs from build to build
POOL = "max_pool"  # in the name of a maximum over patches
INTEGER_PRODUCT = ".product"  # suffix of the export's quantised products


def kind_of(name: str, dequantized: Collection[str]) -> str:
    """Return one of KINDS. ``dequantized`` are the quantised products that multiply in floating point.

    1. Attention has names of its own.
    2. ``__myl_`` and steps: a product if one of them is; else only moves and casts, or a single step, or several.
    3. A copy, and a maximum over patches.
    4. Any other name lists the nodes it computes, separated by "+": only products and convolutions have such names.
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
    if POOL in name:
        return SINGLE
    nodes = PROFILE.sub("", name).split("+")
    return INTEGERS if all(node.endswith(INTEGER_PRODUCT) and node not in dequantized for node in nodes) else PRODUCTS


@dataclass(frozen=True)
class Kernels:
    """The kernels of one profile: (kind, name, count), and the count of each kind."""

    named: tuple[tuple[str, str, int], ...]
    counts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.counts.values())


def kernels_from_json(profile: Any) -> Kernels:
    """Read a profile of bundle.json: the counts by name under ``alike``; the rest of ``kernels`` is not named."""
    counts_by_name, dequantized = at(profile, "alike"), set(texts(at(profile, "int8", "dequantized")))
    named = tuple(
        (kind_of(name, dequantized), name, count)
        for name, count in (
            (SERIAL.sub("__mye", str(name)[:MOST_LETTERS]), natural(value) or 0)
            for name, value in islice(counts_by_name.items() if isinstance(counts_by_name, Mapping) else (), MOST_NAMES)
        )
        if count
    )
    counts: Counter[str] = Counter()
    for kind, _, count in named:
        counts[kind] += count
    counts[UNNAMED] = max((natural(at(profile, "kernels")) or 0) - counts.total(), 0)
    return Kernels(named, {kind: counts[kind] for kind in KINDS if counts[kind]})


def texts(value: Any) -> tuple[str, ...]:
    """Return the strings in a list, cut; nothing for anything else."""
    return tuple(each[:MOST_LETTERS] for each in list_of(value)[:MOST_NAMES] if isinstance(each, str))
