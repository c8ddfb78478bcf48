"""Open a graph on a device: ONNX Runtime, TensorRT, and the GPU below them.

The libraries are imported when the first graph is opened on their device.
"""

from __future__ import annotations

from transom.runtime.backends.base import Backend, Read
from transom.runtime.errors import BackendError
from transom.runtime.manifest_graphs import GraphFile

AUTO = "auto"
FASTEST_FIRST = ("tensorrt", "cuda", "cpu")
DEVICES = (*reversed(FASTEST_FIRST), AUTO)
MAX_THREADS = 1024  # more than any machine has cores; ONNX Runtime would try to start a million


def open_backend(graph: GraphFile, read: Read, device: str, threads: int | None) -> Backend:
    """Load ``graph`` on ``device``, its files through ``read``; "auto" is for ``load``, which opens all graphs on one.

    Raises BackendError when the device or its library is not there.
    """
    if device not in FASTEST_FIRST:
        raise BackendError(f"device is {device!r}; this version runs on {', '.join(DEVICES)}.")
    if threads is not None and (type(threads) is not int or not 1 <= threads <= MAX_THREADS):
        raise BackendError(f"threads is {threads!r}; expected 1..{MAX_THREADS}, or None for one per core.")
    if device == "tensorrt":
        from transom.runtime.backends.trt import TrtBackend

        return TrtBackend(graph, read)
    from transom.runtime.backends.ort import OrtBackend

    return OrtBackend(graph, read, device, threads)
