"""Meanings of a graph's values to a list of operators: rows, weights, or something on the way to them."""

from __future__ import annotations

from dataclasses import dataclass

from transom.export.native.axes import Dims
from transom.export.native.row_program import LinearStep, Step, View, Weight


@dataclass(frozen=True, eq=False)
class Meaning:
    """The meaning of a value."""


@dataclass(frozen=True, eq=False)
class Unknown(Meaning):
    """Nothing that an operator computes, and why; ``of_rows`` where it was to be computed of activations."""

    reason: str
    of_rows: bool


@dataclass(frozen=True, eq=False)
class Rows(Meaning):
    """Columns of a step's rows, in the shape ``dims``."""

    view: View
    dims: Dims

    @property
    def step(self) -> Step:
        return self.view.step


@dataclass(frozen=True, eq=False)
class Scaled(Meaning):
    """Rows times a number; a gate is the sigmoid of that."""

    rows: Rows
    factor: float
    gate: bool = False


@dataclass(frozen=True, eq=False)
class Multiplied(Meaning):
    """Rows times a vector of their columns, on the way to being quantised."""

    rows: Rows
    multiplier: Weight


@dataclass(frozen=True, eq=False)
class Image(Meaning):
    """A graph input (B, channels, height, width)."""

    name: str
    shape: tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class State(Meaning):
    """A graph input that attention reads: (B, heads, positions, head_dim)."""

    name: str
    heads: int
    head_dim: int


@dataclass(frozen=True, eq=False)
class Written(Meaning):
    """A cache, with rows written to it where it ended."""

    cache: State
    rows: Rows


@dataclass(frozen=True, eq=False)
class Integers(Meaning):
    """Rows or an image quantised; without ``scale`` each row by its own. ``dequantised`` again, if said."""

    source: Rows | Multiplied | Image
    scale: float | None
    zero_point: int
    dequantised: bool = False


@dataclass(frozen=True, eq=False)
class RowScale(Meaning):
    """Something of each row on the way to its scale: its magnitudes, the largest of them, or that over 127."""

    rows: Rows | Multiplied
    stage: str  # MAGNITUDE, LARGEST or SCALE


MAGNITUDE, LARGEST, SCALE = "magnitude", "largest", "scale"


@dataclass(frozen=True, eq=False)
class Product(Meaning):
    """The integer sums of a linear layer times its weight's scales, not yet times the scale of each row."""

    step: LinearStep
    dims: Dims
    source: Rows | Multiplied


@dataclass(frozen=True, eq=False)
class Length(Meaning):
    """The L2 norm of each row, at least ``epsilon`` where it is limited."""

    rows: Rows
    epsilon: float | None


@dataclass(frozen=True, eq=False)
class MaskedRows(Meaning):
    """Token rows, zero where the mask is; ``summed`` over each sequence, if said, several times the same."""

    rows: Rows
    mask: str
    summed: bool = False
    repeated: bool = False


@dataclass(frozen=True, eq=False)
class ClassRow(Meaning):
    """One row of weights for each sequence."""

    weight: Weight


@dataclass(frozen=True, eq=False)
class Matrix(Meaning):
    """A weight, float or int8 with its scales, perhaps to be read transposed."""

    weight: Weight
    transposed: bool = False
    scale: Weight | None = None
