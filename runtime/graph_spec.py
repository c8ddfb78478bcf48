"""Describe a graph: its tensors, their named axes and the bounds of those axes.

Every package uses these three words; they import nothing but the standard library. ``transom.runtime.manifest`` has
their JSON form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

CACHE = "C"  # the axis of a cache's positions
IMAGES = "I"  # the axis of the images that the tokens of a call can see
ARANGE = "arange"  # a Tensor.default: 0, 1, 2, ... along the last axis


@dataclass(frozen=True)
class Axis:
    """Bounds of a named dynamic axis, in elements; ``opt`` is the size to tune for.

    ``same_as`` names the axis whose size this one takes where no given input has it. ``divides`` names the axis whose
    size must be a multiple of this one's: of groups, say, of rows that share something. ``ceiling`` is the largest
    ``max`` that another export of the model could have, None where nothing but memory limits it.
    """

    min: int
    opt: int
    max: int
    same_as: str | None = None
    divides: str | None = None
    ceiling: int | None = field(default=None, compare=False)  # read from the model's config, no bound of this export


@dataclass(frozen=True)
class EngineAxis(Axis):
    """An axis in the narrower bounds of the engine for ``target``; ``exported`` has the bundle's."""

    target: str = ""
    exported: Axis | None = None


@dataclass(frozen=True)
class Tensor:
    """A graph's input or output: numpy dtype name and a shape of axis names and fixed sizes.

    default        fills an input that the caller leaves out: a number (an attention mask of ones, say), or ARANGE
    exclusive_max  bounds the values of an index: 0 <= value < exclusive_max
    state          passed from call to call, or from graph to graph, and not read in between: kept in the graph's own
                   precision, where all other tensors are float32 or int64
    aliases        of an output: the input whose buffer gets it. A cache, which has the axis CACHE, is written in place
                   at some positions; any other state is replaced, by what the graph computed of all of it
    """

    name: str
    dtype: str
    shape: tuple[str | int, ...]
    default: int | str | None = None
    exclusive_max: int | None = None
    state: bool = False
    aliases: str | None = None


@dataclass(frozen=True)
class Graph:
    """One ONNX graph: its name (the file is ``<name>.onnx``), inputs and outputs in order."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @cached_property
    def inputs_by_name(self) -> Mapping[str, Tensor]:
        return {tensor.name: tensor for tensor in self.inputs}

    @cached_property
    def outputs_by_name(self) -> Mapping[str, Tensor]:
        """The outputs; a buffer that is written in place goes by the name of its input."""
        return {tensor.aliases or tensor.name: tensor for tensor in self.outputs}

    @cached_property
    def written(self) -> tuple[str, ...]:
        """The names of the inputs whose buffers get an output."""
        return tuple(tensor.aliases for tensor in self.outputs if tensor.aliases is not None)

    @cached_property
    def named_axes(self) -> frozenset[str]:
        """The named axes of the inputs."""
        return frozenset(size for tensor in self.inputs for size in tensor.shape if isinstance(size, str))

    def with_state_dtype(self, dtype: str) -> Graph:
        """Return the graph with its state tensors in ``dtype``."""

        def converted(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(replace(tensor, dtype=dtype) if tensor.state else tensor for tensor in tensors)

        return replace(self, inputs=converted(self.inputs), outputs=converted(self.outputs))


def is_decoder(graph: Graph) -> bool:
    """Return whether the graph updates a state: caches, or recurrent state."""
    return any(tensor.aliases is not None for tensor in graph.outputs)


def token_input(graph: Graph) -> Tensor:
    """Return the input of a decoder graph that takes the new tokens, int64 (B, S): its first."""
    return graph.inputs[0]


def state_inputs(graph: Graph) -> list[Tensor]:
    """Return the inputs whose buffers get an output: a decoder's caches, and its recurrent state."""
    written = {tensor.aliases for tensor in graph.outputs}
    return [tensor for tensor in graph.inputs if tensor.name in written]


def cache_inputs(graph: Graph) -> list[Tensor]:
    """Return the inputs that the graph writes in place: its caches (B, H, C, D)."""
    return [tensor for tensor in state_inputs(graph) if is_cache(tensor)]


def recurrent_inputs(graph: Graph) -> list[Tensor]:
    """Return the inputs that an output replaces as a whole: recurrent state (B, ...)."""
    return [tensor for tensor in state_inputs(graph) if not is_cache(tensor)]


def grouped_inputs(graph: Graph) -> list[Tensor]:
    """Return the inputs of a decoder that groups of rows share: their first axis is another than the tokens'."""
    rows = token_input(graph).shape[0]
    return [
        tensor
        for tensor in graph.inputs
        if tensor.state and isinstance(tensor.shape[0], str) and tensor.shape[0] != rows
    ]


def is_cache(tensor: Tensor) -> bool:
    """Return whether a state tensor is a cache, which grows with every token."""
    return CACHE in tensor.shape


def shape_of(tensor: Tensor, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the tensor's shape with every axis name replaced by its size."""
    return tuple(sizes[size] if isinstance(size, str) else size for size in tensor.shape)
