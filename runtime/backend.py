"""What a backend is: the one thing a loaded bundle needs from a library that executes graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

from numpy.typing import NDArray

from transom.runtime.bundle import GraphFile
from transom.runtime.errors import BackendError
from transom.runtime.spec import Graph

Array = NDArray[Any]
Read = Callable[[str], bytes]  # the checked bytes of a bundle's file
MAX_THREADS = 1024  # more than any machine has cores; ONNX Runtime would try to start a million
DEVICES = ("cpu", "cuda", "tensorrt", "auto")


class Backend(Protocol):
    """One graph, loaded on one device; callable from many threads at once.

    ``graph`` is what was loaded: a flavour for one device may hold its state tensors in another dtype
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


def open_backend(graph: GraphFile, read: Read, device: str, threads: int | None) -> Backend:
    """Load ``graph`` on ``device``, its files through ``read``.

    Raises BackendError when the device or its library is not there.
    """
    from transom.runtime.backends import ort

    if device not in DEVICES:
        raise BackendError(f"device is {device!r}; this version runs on {', '.join(DEVICES)}.")
    if threads is not None and (type(threads) is not int or not 1 <= threads <= MAX_THREADS):
        raise BackendError(f"threads is {threads!r}; expected 1..{MAX_THREADS}, or None for one per core.")
    chosen = best_device(graph) if device == "auto" else device
    if chosen == "tensorrt":
        from transom.runtime.backends.trt import TrtBackend

        return TrtBackend(graph, read)
    return ort.OrtBackend(graph, read, chosen, threads)


def best_device(graph: GraphFile) -> str:
    """What ``auto`` chooses: an engine for the GPU that is here, else CUDA where this onnxruntime offers it, else the
    CPU."""
    from transom.runtime.backends import ort

    if graph.plans:
        from transom.runtime.backends.cuda import find_gpu
        from transom.runtime.backends.plans import kind_of, pick_plan
        from transom.runtime.backends.trt_library import library

        with suppress(BackendError):  # no GPU, no cuda-python, no plan for it, no library that loads it
            library(kind_of(pick_plan(graph, find_gpu())))
            return "tensorrt"
    return ort.best_device()
