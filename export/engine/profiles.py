"""Optimization profiles from a bundle's axes: the sizes that an engine takes, and those it is tuned for.

An encoder has one. A decoder has two, because reading a prompt and the step of one token are different work: in
"decode" each row has one new token and one position whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from transom.runtime.inputs import is_decoder
from transom.runtime.spec import Axis, Graph

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Profile:
    """Per input of the graph its (min, opt, max) shapes."""

    name: str
    shapes: Mapping[str, tuple[Sizes, Sizes, Sizes]]


def profiles_of(graph: Graph, axes: Mapping[str, Axis]) -> tuple[Profile, ...]:
    """The profiles of a graph whose cache, if it has one, has its greatest length."""
    if not is_decoder(graph):
        return (profile("all", graph, axes),)
    fixed = {axis: Axis(size, size, size) for axis, size in cache_sizes(graph, axes).items()}
    single = {axis: Axis(1, 1, 1) for axis in step_axes(graph)}
    return (
        profile("prefill", graph, {**axes, **fixed}),
        profile("decode", graph, {**axes, **fixed, **single}),
    )


def profile(name: str, graph: Graph, axes: Mapping[str, Axis]) -> Profile:
    def shape(sizes: tuple[str | int, ...], bound: str) -> Sizes:
        return tuple(size if isinstance(size, int) else getattr(axes[size], bound) for size in sizes)

    return Profile(
        name, {t.name: (shape(t.shape, "min"), shape(t.shape, "opt"), shape(t.shape, "max")) for t in graph.inputs}
    )


def cache_sizes(graph: Graph, axes: Mapping[str, Axis]) -> dict[str, int]:
    """The axes of the buffers that a decoder writes but the batch's, at their greatest."""
    batch = graph.inputs[0].shape[0]
    written = {tensor.writes for tensor in graph.outputs}
    names = {size for tensor in graph.inputs if tensor.name in written for size in tensor.shape}
    return {name: axes[name].max for name in sorted(str(n) for n in names if isinstance(n, str)) if name != batch}


def step_axes(graph: Graph) -> tuple[str, ...]:
    """The axes that have one element in a step: the new tokens, and the positions whose logits are wanted."""
    tokens = graph.inputs[0].shape[1]
    positions = [tensor.shape[1] for tensor in graph.inputs if tensor.name == "logits_positions"]
    return tuple(str(axis) for axis in (tokens, *positions) if isinstance(axis, str))
