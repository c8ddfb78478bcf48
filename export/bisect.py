"""Find the layers that cause an error by bisection: in k log n measurements instead of 2^n.

Halves of the layers are switched to FP32 and the error is measured. What a layer is and how its error is measured is
the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)
DEFAULT_SHARE = 0.1  # of the shipped error: the default target
DEFAULT_TARGET = 0.01  # where the shipped error is infinite
MAX_FAILURES = 3  # layers in a row that lower nothing: where errors are small and many, halves mislead


@dataclass(frozen=True)
class Step(Generic[T]):
    """One layer switched to FP32 for good, and the error before and after."""

    layer: T
    before: float
    after: float


@dataclass(frozen=True)
class BisectResult(Generic[T]):
    """The layers found, the worst first.

    shipped     the error with no layer in FP32
    everything  the error with all layers in FP32
    """

    shipped: float
    everything: float
    target: float
    steps: tuple[Step[T], ...]

    @property
    def left(self) -> float:
        """The error with all layers that were found in FP32."""
        return self.steps[-1].after if self.steps else self.shipped


def bisect_layers(
    layers: Sequence[T], error: Callable[[frozenset[T]], float], *, target: float | None, most: int
) -> BisectResult[T]:
    """Switch the worst layer to FP32, then the worst of the rest, until the error is at most ``target``.

    ``error`` measures with these layers in FP32; infinity is an error like any other. Ends as well after ``most``
    layers, where MAX_FAILURES others lower nothing, and at once where all layers in FP32 lower nothing: then the fault
    is not in the layers. ``target`` is by default DEFAULT_SHARE of the shipped error.
    """
    known: dict[frozenset[T], float] = {}

    def measured(in_fp32: frozenset[T]) -> float:
        if in_fp32 not in known:
            known[in_fp32] = error(in_fp32)
        return known[in_fp32]

    everything = frozenset(layers)
    shipped, floor = measured(frozenset()), measured(everything)
    if target is None:
        target = DEFAULT_SHARE * shipped if isfinite(shipped) else DEFAULT_TARGET
    in_fp32: frozenset[T] = frozenset()
    failures: set[T] = set()
    steps: list[Step[T]] = []
    before = shipped
    while floor < shipped and before > target and len(steps) < most and len(failures) < MAX_FAILURES:
        candidates = [layer for layer in layers if layer not in in_fp32 and layer not in failures]
        if not candidates:
            break
        layer = worst_layer(candidates, in_fp32, everything, measured)
        after = measured(in_fp32 | {layer})
        if isfinite(before) and after >= before:
            failures.add(layer)
            continue
        steps.append(Step(layer, before, after))
        in_fp32, before = in_fp32 | {layer}, after
        failures.clear()
    return BisectResult(shipped, floor, target, tuple(steps))


def worst_layer(
    candidates: Sequence[T], in_fp32: frozenset[T], everything: frozenset[T], error: Callable[[frozenset[T]], float]
) -> T:
    """Halve ``candidates`` until one is left: each time keep the half that lowers the error more, beside ``in_fp32``.

    Where both halves leave infinity, each hides a broken layer from the other: then keep the half without which, all
    others in FP32, more error is left.
    """
    while len(candidates) > 1:
        middle = len(candidates) // 2
        halves = candidates[:middle], candidates[middle:]
        left = [error(in_fp32.union(half)) for half in halves]
        if not any(map(isfinite, left)):
            left = [-error(everything.difference(half)) for half in halves]
        candidates = halves[0] if left[0] <= left[1] else halves[1]
    return candidates[0]
