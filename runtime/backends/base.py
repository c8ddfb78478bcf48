"""What a backend is: the one thing a loaded bundle needs from a library that executes graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from numpy.typing import NDArray

from transom.runtime.devices import AUTO, FASTEST_FIRST
from transom.runtime.errors import BackendError
from transom.runtime.graph_spec import Graph
from transom.runtime.manifest_graphs import GraphFile, Plan

Array = NDArray[Any]
Read = Callable[[str], bytes]  # the checked bytes of a bundle's file
MAX_THREADS = 1024  # more than any machine has cores; ONNX Runtime would try to start a million
DEVICES = (*reversed(FASTEST_FIRST), AUTO)


class Backend(Protocol):
    """One graph, loaded on one device; callable from many threads at once.

    ``graph`` is what was loaded: a variant for one device may hold its state tensors in another dtype
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


@runtime_checkable
class FromPlan(Protocol):
    """A backend of an engine, whose bounds may be narrower than the bundle's."""

    plan: Plan


def open_backend(graph: GraphFile, read: Read, device: str, threads: int | None) -> Backend:
    """Load ``graph`` on ``device``, its files through ``read``; "auto" is for ``load``, which opens all graphs on one.

    Raises BackendError when the device or its library is not there.
    """
    from transom.runtime.backends import ort

    if device not in FASTEST_FIRST:
        raise BackendError(f"device is {device!r}; this version runs on {', '.join(DEVICES)}.")
    if threads is not None and (type(threads) is not int or not 1 <= threads <= MAX_THREADS):
        raise BackendError(f"threads is {threads!r}; expected 1..{MAX_THREADS}, or None for one per core.")
    if device == "tensorrt":
        from transom.runtime.backends.trt import TrtBackend

        return TrtBackend(graph, read)
    return ort.OrtBackend(graph, read, device, threads)
