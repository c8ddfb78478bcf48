"""Define what a served bundle can be asked for: rows in, an answer for each row out."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transom.runtime.generation.field_specs import FieldSpec
from transom.runtime.serving.ports import Array, Port, arrays_of, rows_of

Row = tuple[Any, ...]  # a value of each input, or of each output
Parameters = Mapping[str, Any]


@dataclass(frozen=True)
class Operation:
    """Describe what a bundle is asked for.

    inputs, outputs  the tensors of a request and of its answer
    answer           rows and parameters -> an answer for each row, in their order
    parameters       those that a request may have, by name: what each allows
    stream           a row and parameters -> its answer in pieces; None where answers come at once
    alone            whether rows of another request would change the answer: random numbers, say
    key              what rows must have in common to share a call, such as the sizes of their arrays
    """

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    answer: Callable[[Sequence[Row], Parameters], Sequence[Row]]
    parameters: Mapping[str, FieldSpec] = field(default_factory=dict)
    stream: Callable[[Row, Parameters], Generator[Row, None, None]] | None = None
    alone: Callable[[Parameters], bool] = lambda parameters: False
    key: Callable[[Row], object] = lambda row: None

    def read(self, arrays: Mapping[str, Array]) -> list[Row]:
        """Return the rows of a request; InputError for arrays that do not fit the inputs."""
        return rows_of(self.inputs, arrays)

    def write(self, answers: Sequence[Row]) -> dict[str, Array]:
        """Return the arrays of the answers to a request's rows."""
        return arrays_of(self.outputs, answers)
