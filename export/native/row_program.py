"""Steps on rows, one for each thing that a graph does to an activation, before they are fused.

Each step has one result, rows of ``columns`` columns, and reads the results of earlier ones. Those in ANCHORS become
operators; all others go into the epilogue of the step that they read, or of a copy where they do not fit there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from transom.runtime.native import operators as ops


class CannotLowerError(Exception):
    """A graph does something that no operator of a list computes; the message names the node."""


@dataclass(frozen=True, eq=False)
class Weight:
    """A tensor of the list: its name, the stored tensor, and the shape that the list gives it."""

    name: str
    tensor: ir.TensorProtocol
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Step:
    """Fields of every step: the name of its result, what its rows are, and how many columns they have."""

    name: str
    rows: str
    columns: int

    @property
    def sources(self) -> Sequence[Step]:
        """The steps that this one reads."""
        return ()


@dataclass(frozen=True, eq=False)
class View:
    """Some columns of a step's result."""

    step: Step
    column: int
    columns: int

    @property
    def whole(self) -> bool:
        return self.columns == self.step.columns


@dataclass(frozen=True, eq=False)
class Lookup:
    """Rows of a table by ids, an input's name or COLUMN."""

    table: Weight
    ids: str
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class EmbedStep(Step):
    lookups: tuple[Lookup, ...]


@dataclass(frozen=True, eq=False)
class _Unary(Step):
    source: Step

    @property
    def sources(self) -> Sequence[Step]:
        return (self.source,)


@dataclass(frozen=True, eq=False)
class LinearStep(_Unary):
    """``source`` is a QuantiseStep where the weight is int8, which ``scale`` belongs to."""

    weight: Weight
    transposed: bool
    scale: Weight | None


@dataclass(frozen=True, eq=False)
class BiasStep(_Unary):
    bias: Weight


@dataclass(frozen=True, eq=False)
class ActivationStep(_Unary):
    function: str


@dataclass(frozen=True, eq=False)
class ResidualStep(_Unary):
    other: Step

    @property
    def sources(self) -> Sequence[Step]:
        return (self.source, self.other)


@dataclass(frozen=True, eq=False)
class NormStep(_Unary):
    kind: str
    epsilon: float
    weight: Weight | None = None
    bias: Weight | None = None


@dataclass(frozen=True, eq=False)
class QuantiseStep(_Unary):
    """``scale`` is None where each row has its own."""

    scale: float | None
    zero_point: int
    multiplier: Weight | None = None


@dataclass(frozen=True, eq=False)
class AttentionStep(Step):
    query: View
    key: View | None
    value: View | None
    heads: int
    key_heads: int
    head_dim: int
    scale: float
    causal: bool = False
    key_cache: str | None = None
    value_cache: str | None = None
    cross_key: str | None = None
    cross_value: str | None = None
    cross_mask: str | None = None

    @property
    def views(self) -> Sequence[View]:
        return [view for view in (self.query, self.key, self.value) if view is not None]

    @property
    def sources(self) -> Sequence[Step]:
        return [view.step for view in self.views]


@dataclass(frozen=True, eq=False)
class PatchesStep(Step):
    image: str
    patch_height: int
    patch_width: int


@dataclass(frozen=True, eq=False)
class PrependStep(_Unary):
    first: Weight | None
    position: Weight | None


@dataclass(frozen=True, eq=False)
class SelectStep(_Unary):
    rule: str
    input: str | None = None
    value: int | None = None


@dataclass(frozen=True, eq=False)
class PoolStep(_Unary):
    """The mean of a sequence's rows."""


ANCHORS = (EmbedStep, LinearStep, AttentionStep, PatchesStep, PrependStep, SelectStep, PoolStep)


@dataclass(frozen=True, eq=False)
class Output:
    """A graph output: columns of a step, for token rows in ``heads`` where there are any."""

    name: str
    view: View
    heads: int = 0


@dataclass(frozen=True)
class RowProgram:
    """The steps of a graph in their order, what becomes of them, and the inputs that say how many rows there are.

    dropped  how many Q/DQ pairs were left out that no integer product reads
    """

    steps: Sequence[Step]
    outputs: Sequence[Output]
    ids: str
    mask: str | None
    dropped: int


TOKENS, SEQUENCES, POSITIONS, PATCHES = ops.TOKENS, ops.SEQUENCES, ops.POSITIONS, ops.PATCHES
