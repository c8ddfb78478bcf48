"""The vocabulary of a graph: its tensors, their named axes and the bounds of those axes.

Every room speaks these three words; they import nothing but the standard library.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """Bounds of a named dynamic axis, in elements; ``opt`` is the size to tune for."""

    min: int
    opt: int
    max: int


@dataclass(frozen=True)
class Tensor:
    """A graph's input or output: numpy dtype name and a shape of axis names and fixed sizes.

    ``default`` fills an input that the caller leaves out (an attention mask of ones, say);
    ``below`` bounds the values of an index: 0 <= value < below.
    """

    name: str
    dtype: str
    shape: tuple[str | int, ...]
    default: int | None = None
    below: int | None = None


@dataclass(frozen=True)
class Graph:
    """One ONNX graph: its name (the file is ``<name>.onnx``), inputs and outputs in order."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
