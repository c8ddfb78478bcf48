"""Define what a loaded bundle needs of a library that executes graphs: the Backend protocol and its types."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from transom.runtime.errors import BundleError
from transom.runtime.graph_spec import Graph, Tensor
from transom.runtime.leased_file import LeasedFile
from transom.runtime.manifest_graphs import Plan

Array = NDArray[Any]
Read = Callable[[str], bytes]  # the checked bytes of a bundle's file


@runtime_checkable
class ReadInPieces(Protocol):
    """A ``Read`` that gives a file in pieces as well, so that it need not be in memory."""

    def __call__(self, name: str) -> bytes:
        """Return the checked bytes of a file."""
        ...

    def size(self, name: str) -> int:
        """Return the size of a file in bytes."""
        ...

    def pieces(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of a file in order, each piece valid until the next.

        What was yielded is checked when the iterator ends: BundleError where it is not what bundle.json says.
        """
        ...


@runtime_checkable
class ReadLeased(ReadInPieces, Protocol):
    """A ``ReadInPieces`` that can keep a file as it is while it is read by its path."""

    def leased(self, name: str) -> AbstractContextManager[LeasedFile | None]:
        """Give the open file, under a lease; None where there is none to be had."""
        ...


class Backend(Protocol):
    """One graph, loaded on one device; callable from many threads at once.

    ``graph`` is the graph as loaded: a variant for one device may hold its state tensors in another dtype
    than bundle.json says.
    """

    device: str
    graph: Graph

    def run(self, feeds: Mapping[str, Array], shapes: Mapping[str, Sequence[int]]) -> dict[str, Array]:
        """Execute on checked inputs; ``shapes`` names the outputs that are wanted and their sizes.

        Returns fresh arrays that no later call touches. An output that ``writes`` an input changes the
        array that was fed there, and is not returned.
        """
        ...


class BoundRun(Protocol):
    """A graph with fixed inputs, whose values may change between runs. Not to be shared by threads."""

    def run(self, *, reused: bool = False) -> dict[str, Array]:
        """Execute as ``Backend.run`` does on what the inputs hold now.

        If ``reused``, the arrays returned may be those that the next such run writes again.
        """
        ...


@runtime_checkable
class SupportsBoundRuns(Protocol):
    """A backend that a run costs less whose memory it got before."""

    def bound_run(self, feeds: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> BoundRun:
        """Take the arguments of ``Backend.run`` for many runs. Raises BackendError."""
        ...


@dataclass(frozen=True)
class RepeatedRun:
    """The same arguments of ``Backend.run`` again and again: the BoundRun of a backend that has none of its own."""

    backend: Backend
    feeds: Mapping[str, Any]
    shapes: Mapping[str, Sequence[int]]

    def run(self, *, reused: bool = False) -> dict[str, Array]:
        return self.backend.run(self.feeds, self.shapes)


def bound_run(backend: Backend, feeds: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> BoundRun:
    """Return a run of ``backend`` over these inputs, which are read anew each time."""
    if isinstance(backend, SupportsBoundRuns):
        return backend.bound_run(feeds, shapes)
    return RepeatedRun(backend, feeds, shapes)


@runtime_checkable
class PacksRows(Protocol):
    """A backend that computes only what counts: padding costs nothing, and bounds of axes do not bind it."""

    packs_rows: bool  # of this graph, which has a mask


@runtime_checkable
class FromPlan(Protocol):
    """A backend of an engine, whose bounds may be narrower than the bundle's."""

    plan: Plan


def with_dtypes(graph: Graph, found: Mapping[str, str | None], file: str, remedy: str) -> Graph:
    """Return the graph with the dtypes of its state as a library ``found`` them in ``file``, by tensor.

    Raises BundleError, which ends in ``remedy``, where names or other dtypes are not those of bundle.json.
    """
    declared = {tensor.name: tensor for tensor in (*graph.inputs, *graph.outputs)}
    wrong = found.keys() ^ declared.keys()
    wrong |= {
        name
        for name in found.keys() & declared.keys()
        if found[name] is None or not (declared[name].state or found[name] == declared[name].dtype)
    }
    if wrong:
        raise BundleError(f"{file} and bundle.json disagree about {', '.join(sorted(wrong))}. {remedy}")

    def loaded(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(replace(tensor, dtype=str(found[tensor.name])) for tensor in tensors)

    return replace(graph, inputs=loaded(graph.inputs), outputs=loaded(graph.outputs))
