"""Call NVIDIA's CUDA runtime through cuda-python: memory, streams and graphs, error codes raised as BackendError.

Nothing here runs when it is imported; a machine without a GPU finds out when it asks for one.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from transom.runtime.errors import BackendError, one_line
from transom.runtime.process_bound import ProcessBound

INSTALL = "pip install 'transom[rtx]'"
NO_GPU = ("cudaErrorNoDevice", "cudaErrorInsufficientDriver", "cudaErrorSystemDriverMismatch")
NO_MEMORY = "cudaErrorMemoryAllocation"


@dataclass(frozen=True)
class Gpu:
    """The GPU that this process runs on: memory in bytes, the driver's CUDA version as 13000 for 13.0."""

    name: str
    capability: tuple[int, int]
    memory: int
    driver: int

    @property
    def sm(self) -> str:
        return "sm{}{}".format(*self.capability)

    def __str__(self) -> str:
        return f"{self.name} ({self.sm.upper()})"


@cache
def runtime() -> ModuleType:
    """Import ``cuda.bindings.runtime``. Raises BackendError where it is absent, with the command that installs it."""
    try:
        return import_module("cuda.bindings.runtime")
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendError(
            f"cuda-python cannot be imported ({one_line(error, 100)}). Run `{INSTALL}`, on CUDA 12 "
            "`pip install 'cuda-bindings==12.*'`."
        ) from None


@cache
def driver() -> ModuleType:
    """Import ``cuda.bindings.driver`` of the same package, which loads and launches kernels."""
    runtime()
    return import_module("cuda.bindings.driver")


class OutOfMemory(BackendError):
    """The GPU has no memory for what was asked."""


def call(function: str, *arguments: Any) -> Any:
    """Call a function of the CUDA runtime and return what follows its error code: None, a value, or a tuple.

    Raises BackendError for every code but success.
    """
    try:
        code, *values = getattr(runtime(), function)(*arguments)
    except (OSError, RuntimeError) as error:  # without a driver some versions of cuda-python raise, others give a code
        raise BackendError(
            f"{function} cannot be called ({one_line(error, 100)}): expected a driver for CUDA {cuda_version()} or "
            "newer. Install or update the driver, or load with device='cpu'."
        ) from None
    if int(code) != 0:
        raise failure(function, str(getattr(code, "name", code)))
    return values[0] if len(values) == 1 else tuple(values) or None


def failure(function: str, code: str) -> BackendError:
    if code in NO_GPU:
        return BackendError(
            f"no NVIDIA GPU can be used here ({code}): expected one with a driver for CUDA {cuda_version()} or newer. "
            "Install or update the driver (CUDA 12: `pip install 'cuda-bindings==12.*'`), or load with device='cpu'."
        )
    if code == NO_MEMORY:
        return OutOfMemory(f"{function}: the GPU has no memory left. Give fewer or shorter inputs, or close others.")
    return BackendError(f"{function} failed on the GPU: {code}. Load the bundle again; `nvidia-smi` tells its state.")


def cuda_version() -> str:
    """Return the bindings' major version, ``13``. A driver of the same major version is enough."""
    return str(int(getattr(runtime(), "CUDART_VERSION", 0)) // 1000)


def find_gpu() -> Gpu:
    """Return this process' current device, the first of CUDA_VISIBLE_DEVICES. BackendError where there is none."""
    call("cudaGetDeviceCount")  # tells apart no driver and no device, where the others only fail
    properties = call("cudaGetDeviceProperties", call("cudaGetDevice"))
    name = properties.name.decode(errors="replace") if isinstance(properties.name, bytes) else str(properties.name)
    return Gpu(
        name.rstrip("\0"),
        (int(properties.major), int(properties.minor)),
        int(properties.totalGlobalMem),
        int(call("cudaDriverGetVersion")),
    )


class Memory(ProcessBound):
    """Bytes of the GPU's memory, freed with the last reference to this."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.address = int(call("cudaMalloc", max(size, 1)))
        self._free = weakref.finalize(self, quietly, runtime().cudaFree, self.address)

    def free(self) -> None:
        self._free()


class PinnedMemory(ProcessBound):
    """Bytes of host memory that the GPU copies from and to by itself, as one array of uint8."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.address = int(call("cudaMallocHost", max(size, 1)))
        self._free = weakref.finalize(self, quietly, runtime().cudaFreeHost, self.address)

    def bytes(self, size: int) -> NDArray[np.uint8]:
        """Return a view of the first ``size`` bytes, valid as long as this object lives."""
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.address))


def quietly(free: Callable[[int], Any], address: int) -> None:
    """Free without errors, for finalizers: at the end of a process the driver may be gone before they run."""
    free(address)


class Stream(ProcessBound):
    """A queue of work on the GPU, which runs in order; ``wait`` returns when all is done."""

    def __init__(self) -> None:
        self._stream = call("cudaStreamCreateWithFlags", runtime().cudaStreamNonBlocking)
        self.handle = int(self._stream)
        self._free = weakref.finalize(self, quietly, runtime().cudaStreamDestroy, self._stream)

    def copy(self, to: int, source: int, size: int) -> None:
        """Queue the copy of ``size`` bytes from one address to another; each may be of the GPU or pinned."""
        call("cudaMemcpyAsync", to, source, size, runtime().cudaMemcpyKind.cudaMemcpyDefault, self._stream)

    def copy_rows(self, to: int, to_pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        """Queue the copy of ``rows`` times ``width`` bytes, which lie ``pitch`` bytes apart on either side."""
        kind = runtime().cudaMemcpyKind.cudaMemcpyDefault
        call("cudaMemcpy2DAsync", to, to_pitch, source, source_pitch, width, rows, kind, self._stream)

    def clear(self, address: int, size: int) -> None:
        call("cudaMemsetAsync", address, 0, size, self._stream)

    def wait(self) -> None:
        """Return when all queued work is done; BackendError where some of it failed."""
        call("cudaStreamSynchronize", self._stream)

    def mark(self, event: Any) -> None:
        call("cudaEventRecord", event, self._stream)

    def capture(self, work: Callable[[], None]) -> CapturedGraph:
        """Record what ``work`` queues on this stream, instead of running it."""
        api = runtime()
        call("cudaStreamBeginCapture", self._stream, api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
        try:
            work()
        finally:
            graph = call("cudaStreamEndCapture", self._stream)
        try:
            return CapturedGraph(call("cudaGraphInstantiate", graph, 0), self._stream)
        finally:
            call("cudaGraphDestroy", graph)


class Event(ProcessBound):
    """A CUDA event: a mark in a stream, with the time at which the GPU got there."""

    def __init__(self) -> None:
        self._event = call("cudaEventCreate")
        self._free = weakref.finalize(self, quietly, runtime().cudaEventDestroy, self._event)

    def record(self, stream: Stream) -> None:
        stream.mark(self._event)

    def elapsed_ms(self, later: Event) -> float:
        """Return the milliseconds between this event and a later one, both of which have happened."""
        return float(call("cudaEventElapsedTime", self._event, later._event))


class CapturedGraph(ProcessBound):
    """A CUDA graph: work recorded once and launched as a whole, the same kernels on the same addresses."""

    def __init__(self, executable: Any, stream: Any) -> None:
        self._executable, self._stream = executable, stream
        self._free = weakref.finalize(self, quietly, runtime().cudaGraphExecDestroy, cast(Any, executable))

    def launch(self) -> None:
        call("cudaGraphLaunch", self._executable, self._stream)
