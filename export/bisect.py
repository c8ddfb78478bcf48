"""Which layers break a graph: found by restoring halves of them, in k log n measurements instead of 2^n.

Nothing here knows what a layer is or how its error is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)
SHARE = 0.1  # of the error that there is: the target where none is given
BROKEN = 0.01  # the target where the error is infinite
IN_VAIN = 3  # layers in a row that lower nothing: where errors are small and many, halves mislead


@dataclass(frozen=True)
class Step(Generic[T]):
    """One layer restored for good, and the error before and after."""

    layer: T
    before: float
    after: float


@dataclass(frozen=True)
class BisectResult(Generic[T]):
    """``shipped`` is the error with nothing restored, ``everything`` with all layers; the worst layer comes first."""

    shipped: float
    everything: float
    target: float
    steps: tuple[Step[T], ...]

    @property
    def left(self) -> float:
        """The error when all layers that were found are restored."""
        return self.steps[-1].after if self.steps else self.shipped


def bisect_layers(
    layers: Sequence[T], error: Callable[[frozenset[T]], float], *, target: float | None, most: int
) -> BisectResult[T]:
    """Restore the worst layer, then the worst of the rest, until the error is at most ``target``.

    ``error`` measures with these layers restored; infinity is an error like any other. Ends as well after ``most``
    layers, where IN_VAIN others lower nothing, and at once where restoring all of them lowers nothing: then the fault
    is not in the layers. ``target`` is SHARE of the shipped error where it is None.
    """
    known: dict[frozenset[T], float] = {}

    def measured(restored: frozenset[T]) -> float:
        if restored not in known:
            known[restored] = error(restored)
        return known[restored]

    everything = frozenset(layers)
    shipped, floor = measured(frozenset()), measured(everything)
    if target is None:
        target = SHARE * shipped if isfinite(shipped) else BROKEN
    restored: frozenset[T] = frozenset()
    in_vain: set[T] = set()
    steps: list[Step[T]] = []
    before = shipped
    while floor < shipped and before > target and len(steps) < most and len(in_vain) < IN_VAIN:
        candidates = [layer for layer in layers if layer not in restored and layer not in in_vain]
        if not candidates:
            break
        layer = worst(candidates, restored, everything, measured)
        after = measured(restored | {layer})
        if isfinite(before) and after >= before:
            in_vain.add(layer)
            continue
        steps.append(Step(layer, before, after))
        restored, before = restored | {layer}, after
        in_vain.clear()
    return BisectResult(shipped, floor, target, tuple(steps))


def worst(
    candidates: Sequence[T], restored: frozenset[T], everything: frozenset[T], error: Callable[[frozenset[T]], float]
) -> T:
    """The layer that halving ends at: each time the half is kept whose restoring, beside ``restored``, leaves less.

    Where both halves leave infinity, each hides a broken layer from the other: the half is kept that leaves more
    when everything but it is restored.
    """
    while len(candidates) > 1:
        middle = len(candidates) // 2
        halves = candidates[:middle], candidates[middle:]
        left = [error(restored.union(half)) for half in halves]
        if not any(map(isfinite, left)):
            left = [-error(everything.difference(half)) for half in halves]
        candidates = halves[0] if left[0] <= left[1] else halves[1]
    return candidates[0]
