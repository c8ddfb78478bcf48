"""Run graphs with an FP16 watch, and stop at the first value that FP16 may not hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from transom.export.passes.fp16_watch import WATCHED_SCORES, WATCHED_SUM
from transom.export.passes.half_precision import FP16_MAX
from transom.runtime.backends.base import Array, Backend
from transom.runtime.graph_spec import Graph, Tensor

WATCH = (Tensor(WATCHED_SUM, "float32", ()), Tensor(WATCHED_SCORES, "float32", ()))


class Fp16DoubtError(Exception):
    """A value of a run is beyond FP16, or no cheap bound shows that it is not: ranges have to be measured.

    No TransomError: no user sees it, and no sample is at fault.
    """


class WatchedBackend:
    """A backend of a graph that ``add_fp16_watch`` rewrote, without its two outputs.

    ``run`` raises Fp16DoubtError where FP16 may not have held every value.
    """

    device = "cpu"

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.graph = without_watch(backend.graph)

    def run(self, feeds: Mapping[str, Array], shapes: Mapping[str, Sequence[int]]) -> dict[str, Array]:
        """Run the graph as any backend does."""
        found = self._backend.run(feeds, {**shapes, **{tensor.name: () for tensor in WATCH}})
        total, scores = (float(found.pop(tensor.name)) for tensor in WATCH)
        if not (np.isfinite(total) and scores < FP16_MAX):
            raise Fp16DoubtError(f"a value of the graph {self.graph.name!r} may be beyond {FP16_MAX:g}")
        return found

    def give_back(self) -> None:
        """Give back what the backend holds between its runs, where it can."""
        getattr(self._backend, "give_back", lambda: None)()


def with_watch(graph: Graph) -> Graph:
    """Return the graph with the outputs that ``add_fp16_watch`` gives it."""
    return replace(graph, outputs=(*graph.outputs, *WATCH))


def without_watch(graph: Graph) -> Graph:
    """Return the graph without those outputs."""
    names = {tensor.name for tensor in WATCH}
    return replace(graph, outputs=tuple(tensor for tensor in graph.outputs if tensor.name not in names))


def watched(backend: Backend) -> Backend:
    """Return ``backend``, whose watch is read in every run where its graph has one."""
    return WatchedBackend(backend) if any(tensor.name == WATCHED_SUM for tensor in backend.graph.outputs) else backend
