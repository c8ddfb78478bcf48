"""The cases of a parity run: the same inputs, in the same order, on every side that is compared.

An encoder runs over a grid of shapes. A decoder reads prompts of every kind, chunk by chunk and token by
token, so that each case depends on the state that those before it left.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from transom.export.parity.inputs import ParityInputs
from transom.export.parity.interleaved_scenarios import interleaved_scenarios
from transom.export.parity.scenarios import Scenario, prompt_length, scenarios
from transom.export.parity.whole_sequences import whole_logits
from transom.runtime.backends.base import Array, Backend
from transom.runtime.backends.malloc import trim
from transom.runtime.errors import ExportError
from transom.runtime.feeds import IMAGE_INDICES
from transom.runtime.graph_spec import Axis, Graph, is_decoder
from transom.runtime.greedy_check import forced_logits
from transom.runtime.manifest import Manifest
from transom.runtime.session import LoadedBundle
from transom.runtime.tasks import task_class
from transom.runtime.tasks.generator import Generator
from transom.runtime.tasks.prompts import Prompt

LARGE = 256  # tokens, or elements of all inputs of an encoder; giving memory back takes longer than a smaller case
PYTORCH = "pytorch"  # the device of a bundle around the PyTorch module


def grid(axes: Mapping[str, Axis]) -> list[dict[str, int]]:
    """Return every corner of the axes' bounds, the size to tune for, and awkward sizes in between.

    Corners first: 1x1 and the maximum are where shapes go wrong.
    """
    corners = itertools.product(*(sorted({axis.min, axis.max}) for axis in axes.values()))
    inside = [
        [clamped(axis, size) for axis, size in zip(axes.values(), sizes, strict=True)]
        for sizes in (
            [axis.opt for axis in axes.values()],
            list(itertools.islice(itertools.cycle((2, 7)), len(axes))),
            list(itertools.islice(itertools.cycle((3, 67)), len(axes))),
        )
    ]
    unique = dict.fromkeys(tuple(sizes) for sizes in (*corners, *inside))
    return [dict(zip(axes, sizes, strict=True)) for sizes in unique]


def clamped(axis: Axis, size: int) -> int:
    return max(axis.min, min(size, axis.max))


@runtime_checkable
class GivesBack(Protocol):
    """A backend that holds memory between its runs that it can do without: mapped weights, an arena."""

    def give_back(self) -> None:
        """Give that memory back to the system until the next run."""
        ...


def give_back(backend: Backend, size: int) -> None:
    """Let a backend give memory back after a run of ``size``, if that was LARGE, and the C library what is free."""
    if size >= LARGE and isinstance(backend, GivesBack):
        backend.give_back()
        trim()


@dataclass(frozen=True)
class Run:
    """One execution on one side: ``sizes`` name the case, ``graph`` and ``feeds`` say which elements count."""

    sizes: Mapping[str, int]
    graph: Graph
    feeds: Mapping[str, Array]
    outputs: Mapping[str, Array]


class ParityCases:
    """Every case for the bundle that ``manifest`` describes, known before anything runs.

    ``inputs`` makes the feeds of each graph, by the graph's name. Raises ExportError where a graph has no case.
    """

    def __init__(self, manifest: Manifest, inputs: Mapping[str, ParityInputs]) -> None:
        self._inputs = inputs
        self._grids: dict[str, list[dict[str, int]]] = {}
        graphs = {file.graph.name: file.graph for file in manifest.graphs}
        for name, graph in graphs.items():
            if not is_decoder(graph):
                named = {size for tensor in graph.inputs for size in tensor.shape if isinstance(size, str)}
                self._grids[name] = grid({size: axis for size, axis in manifest.axes.items() if size in named})
        generates = "decoder" in graphs and issubclass(task_class(manifest.family, manifest.task), Generator)
        self._scenarios: list[Scenario] = []
        self._interleaved = generates and IMAGE_INDICES in {tensor.name for tensor in graphs["decoder"].inputs}
        if generates:
            self._scenarios = (interleaved_scenarios if self._interleaved else scenarios)(manifest, inputs)
        covered = {*self._grids, *(["decoder"] if self._scenarios else [])}
        missed = [name for name in graphs if name not in covered]
        if missed:
            raise ExportError(
                f"no case runs the graph {missed[0]!r} of this {manifest.family}; expected some for each graph. "
                "Only generators may have a graph that writes caches, called 'decoder'."
            )

    @property
    def greedy_prompts(self) -> list[Prompt]:
        """The prompts whose whole generations are compared: those of the scenario with the most steps."""
        return self._scenarios[-1].prompts

    @property
    def greedy_tokens(self) -> int:
        """The number of tokens to generate; each is followed by one that is fed."""
        return len(self._scenarios[-1].chunks)

    def __len__(self) -> int:
        return sum(map(len, self._grids.values())) + sum(scenario.steps for scenario in self._scenarios)

    def runs(self, bundle: LoadedBundle, *, by_row: bool = False, most: int | None = None) -> Iterator[Run]:
        """Run all cases on ``bundle``; ``by_row`` or ``most`` run a batch of an encoder in parts, to save memory.

        Parts are single rows, or as many as have ``most`` elements of inputs: PyTorch adds up other numbers of rows in
        another order, which a recurrent encoder makes larger with every token.
        A backend that can give memory back until its next run does so after each large case.
        """
        for name, shapes in self._grids.items():
            backend = bundle.backend(name)
            graph = backend.graph
            for sizes in shapes:
                feeds = self._inputs[name].feeds(sizes)
                outputs = run_parts(bundle, feeds, 0 if by_row else most)
                give_back(backend, sum(array.size for array in feeds.values()))
                yield Run(sizes, graph, feeds, outputs)
                del outputs  # of the largest case they can be gigabytes, and the next is computed meanwhile
        if isinstance(bundle, Generator):
            backend = bundle.backend("decoder")
            graph = backend.graph
            for scenario in self._scenarios:
                longest = max(map(prompt_length, scenario.prompts))
                logits = self._logits(bundle, scenario)
                for step, found in enumerate(logits):
                    new = longest if step == 0 else found.shape[1]
                    sizes = {"B": len(found), "prompt": longest, "chunk": step, "tokens": new}
                    give_back(backend, len(found) * new)
                    yield Run(sizes, graph, {}, {graph.outputs[0].name: found})

    def _logits(self, bundle: Generator, scenario: Scenario) -> Iterator[Array]:
        """Yield the logits of a scenario's steps; PyTorch computes those of interleaved prompts without any cache."""
        if self._interleaved and bundle.device == PYTORCH:
            return whole_logits(bundle, scenario)
        return forced_logits(bundle, scenario.prompts, scenario.chunks, scenario.beams)


def run_parts(bundle: LoadedBundle, feeds: Mapping[str, Array], most: int | None) -> dict[str, Array]:
    """Run a batch in parts of at most ``most`` elements, and of a row at least; whole for None.

    Where rows cannot affect each other, this takes a fraction of the memory.
    """
    rows = len(next(iter(feeds.values())))
    size = rows if most is None else max(1, most * rows // max(1, sum(array.size for array in feeds.values())))
    if size >= rows:
        return bundle.run(feeds)
    starts = range(0, rows, size)
    parts = [bundle.run({name: array[start : start + size] for name, array in feeds.items()}) for start in starts]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
