"""Follow the axes of activations through Reshape and Transpose, whatever way a graph spells its shapes.

A shape is a tuple of dimensions, and a dimension a tuple of the axes that lie in it, outermost first: rows (B, S, n)
are ``((B,), (S,), (n,))``, split in heads ``((B,), (S,), (heads,), (head_dim,))``, flat ``((B, S), (n,))``. Axes of
size 1 are left out. Dynamic axes have two sample sizes, which are told apart in any product of sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

FEATURES = "features"


@dataclass(frozen=True)
class Axis:
    """An axis by name, its size in both samples; of FEATURES the part of each row that lies ``stride`` apart."""

    name: str
    sizes: tuple[int, int]
    stride: int = 0


Dims = tuple[tuple[Axis, ...], ...]


def features(columns: int) -> tuple[Axis, ...]:
    """Return the dimension of a row's ``columns``."""
    return () if columns == 1 else (Axis(FEATURES, (columns, columns), 1),)


def columns_in(dim: Sequence[Axis]) -> int | None:
    """Return how many columns of a row lie in a dimension, in their order; None where anything else does."""
    count = 1
    for axis in reversed(dim):
        if axis.name != FEATURES or axis.stride != count:
            return None
        count *= axis.sizes[0]
    return count


def heads_in(dim: Sequence[Axis], head_dim: int) -> int | None:
    """Return how many heads of ``head_dim`` columns a dimension has; None where anything else lies in it."""
    count = 1
    for axis in reversed(dim):
        if axis.name != FEATURES or axis.stride != count * head_dim:
            return None
        count *= axis.sizes[0]
    return count


def size_of(dims: Dims, sample: int) -> tuple[int, ...]:
    """Return the sizes of a shape in one of the samples."""
    return tuple(prod(axis.sizes[sample] for axis in dim) for dim in dims)


def reshaped(dims: Dims, targets: Sequence[Sequence[int]]) -> Dims | None:
    """Return the shape whose sizes ``targets`` are in both samples, -1 for what is left; None where axes would mix."""
    if len(targets[0]) != len(targets[1]):
        return None
    sizes = [resolved(target, prod(size_of(dims, sample))) for sample, target in enumerate(targets)]
    left = [axis for dim in dims for axis in dim]
    result = []
    for pair in zip(*sizes, strict=True):
        dim = take(left, pair)
        if dim is None:
            return None
        result.append(dim)
    return None if left else tuple(result)


def resolved(target: Sequence[int], count: int) -> list[int]:
    """Return the sizes of a Reshape with its -1 replaced, for ``count`` elements."""
    known = prod(size for size in target if size != -1)
    return [count // max(known, 1) if size == -1 else int(size) for size in target]


def take(left: list[Axis], sizes: tuple[int, ...]) -> tuple[Axis, ...] | None:
    """Take the axes of a dimension of ``sizes`` from the front of ``left``; the last may be cut in two.

    None where no whole number of axes has that size.
    """
    taken = []
    need = sizes
    while need != (1, 1):
        if not left:
            return None
        axis = left[0]
        if all(want % have == 0 for want, have in zip(need, axis.sizes, strict=True)):
            need = (need[0] // axis.sizes[0], need[1] // axis.sizes[1])
            taken.append(left.pop(0))
            continue
        size, part = axis.sizes[0], need[0]
        if axis.name != FEATURES or need[0] != need[1] or part == 0 or size % part:
            return None
        inner = size // part
        taken.append(Axis(FEATURES, (part, part), axis.stride * inner))
        left[0] = Axis(FEATURES, (inner, inner), axis.stride)
        need = (1, 1)
    return tuple(taken)
