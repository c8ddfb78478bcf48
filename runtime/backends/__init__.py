"""Open a graph on a device: the native kernels, ONNX Runtime, TensorRT, and the GPU below them.

The libraries are imported when the first graph is opened on their device.
"""

from __future__ import annotations

from transom.runtime.backends.base import Backend, Read
from transom.runtime.backends.kernels import AUTO as AUTO_KERNELS
from transom.runtime.backends.kernels import KernelChoice, checked_kernels, choose_kernels
from transom.runtime.errors import BackendError
from transom.runtime.manifest_graphs import GraphFile

AUTO = "auto"
FASTEST_FIRST = ("tensorrt", "cuda", "cpu")
DEVICES = (*reversed(FASTEST_FIRST), AUTO)
MAX_THREADS = 1024  # more than any machine has cores; ONNX Runtime would try to start a million


def open_backend(graph: GraphFile, read: Read, device: str, threads: int | None) -> Backend:
    """Load ``graph`` on ``device``, its files through ``read``; "auto" is for ``load``, which opens all graphs on one.

    On the CPU what ``open_chosen`` chooses. Raises BackendError when the device or its library is not there.
    """
    return open_chosen(graph, read, device, threads)[0]


def open_chosen(
    graph: GraphFile, read: Read, device: str, threads: int | None, kernels: str = AUTO_KERNELS
) -> tuple[Backend, KernelChoice]:
    """Load ``graph`` as ``open_backend`` does, and return what executes it on the CPU, and why.

    ``kernels`` is "native", "onnxruntime", or "auto": the native ones where the bundle has a list of operators and
    the library runs here. Raises BackendError also where those that were asked for cannot be used.
    """
    if device not in FASTEST_FIRST:
        raise BackendError(f"device is {device!r}; this version runs on {', '.join(DEVICES)}.")
    if threads is not None and (type(threads) is not int or not 1 <= threads <= MAX_THREADS):
        raise BackendError(f"threads is {threads!r}; expected 1..{MAX_THREADS}, or None for one per core.")
    choice, library = choose_kernels(graph, device, checked_kernels(kernels))
    if device == "tensorrt":
        from transom.runtime.backends.trt import TrtBackend

        return TrtBackend(graph, read), choice
    if library is not None:
        from transom.runtime.native.backend import NativeBackend

        return NativeBackend(graph, read, threads, library), choice
    from transom.runtime.backends.ort import OrtBackend

    return OrtBackend(graph, read, device, threads), choice
