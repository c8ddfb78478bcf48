"""A GPU for machines that have none: CUDA's memory and streams, and TensorRT's engines, with their rules.

What runs an engine here is ONNX Runtime, on the very graph that TensorRT is given. What the rules are is read from
NVIDIA's documentation: work on a stream happens later, at the latest when somebody waits; fresh memory holds anything
(here NaN); a copy outside of an allocation is an error; a write past the end of a cache is dropped without a word.
This proves our bookkeeping, and nothing about a GPU's numbers. ``names_of`` lets a test hold the names against the
real libraries'.
"""

from __future__ import annotations

import ctypes
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

Put = Callable[..., Path]  # a bundle's folder -> that of a copy with plans for the emulated GPU

DTYPES = {1: "FLOAT", 10: "HALF", 16: "BF16", 7: "INT64"}  # of ONNX, as TensorRT calls them
NUMPY = {1: np.float32, 10: np.float16, 16: np.uint16, 7: np.int64}
GARBAGE = 0xFF  # four bytes of it are a NaN


class EmulatedCuda:
    """``cuda.bindings.runtime`` as far as the runtime uses it; constants and enumerations are the real ones."""

    def __init__(self, real: Any, memory: int = 1 << 32, capability: tuple[int, int] = (8, 9)) -> None:
        self._real, self.total, self.capability = real, memory, capability
        self.blocks: dict[int, Any] = {}  # address -> ctypes buffer
        self.device_bytes = self.peak = self.allocations = 0
        self.streams: list[EmulatedStream] = []
        self.launches = 0  # of captured graphs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def _fine(self, *values: Any) -> tuple[Any, ...]:
        return (self._real.cudaError_t.cudaSuccess, *values)

    def _wrong(self, name: str = "cudaErrorInvalidValue", *values: Any) -> tuple[Any, ...]:
        return (getattr(self._real.cudaError_t, name), *values)

    def cudaGetDeviceCount(self) -> Any:
        return self._fine(1)

    def cudaGetDevice(self) -> Any:
        return self._fine(0)

    def cudaDriverGetVersion(self) -> Any:
        return self._fine(13000)

    def cudaGetDeviceProperties(self, device: int) -> Any:
        major, minor = self.capability
        return self._fine(SimpleNamespace(name=b"Emulated", major=major, minor=minor, totalGlobalMem=self.total))

    def cudaMemGetInfo(self) -> Any:
        return self._fine(self.total - self.device_bytes, self.total)

    def _allocate(self, size: int) -> int:
        buffer = (ctypes.c_uint8 * size)()
        ctypes.memset(buffer, GARBAGE, size)
        self.blocks[ctypes.addressof(buffer)] = buffer
        return ctypes.addressof(buffer)

    def cudaMalloc(self, size: int) -> Any:
        if self.device_bytes + size > self.total:
            return self._wrong("cudaErrorMemoryAllocation", None)
        self.device_bytes += size
        self.allocations += 1
        self.peak = max(self.peak, self.device_bytes)
        return self._fine(self._allocate(size))

    def cudaMallocHost(self, size: int) -> Any:
        return self._fine(self._allocate(size))

    def cudaFree(self, address: int) -> Any:
        for stream in self.streams:  # it waits for all work
            stream.finish()
        self.device_bytes -= len(self.blocks[address])
        del self.blocks[address]
        return self._fine()

    def cudaFreeHost(self, address: int) -> Any:
        for stream in self.streams:
            stream.finish()
        del self.blocks[address]
        return self._fine()

    def inside(self, address: int, size: int) -> bool:
        """Whether these bytes lie in one allocation that is alive."""
        return any(start <= address and address + size <= start + len(block) for start, block in [*self.blocks.items()])

    def cudaStreamCreateWithFlags(self, flags: int) -> Any:
        self.streams.append(EmulatedStream(self))
        return self._fine(self.streams[-1])

    def cudaStreamDestroy(self, stream: EmulatedStream) -> Any:
        stream.finish()
        return self._fine()

    def cudaStreamSynchronize(self, stream: EmulatedStream) -> Any:
        return self._wrong("cudaErrorIllegalAddress") if stream.finish() else self._fine()

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: Any, stream: EmulatedStream) -> Any:
        return self.cudaMemcpy2DAsync(to, size, source, size, size, 1, kind, stream)

    def cudaMemcpy2DAsync(
        self, to: int, pitch: int, source: int, source_pitch: int, width: int, rows: int, kind: Any, stream: Any
    ) -> Any:
        if width > min(pitch, source_pitch):
            return self._wrong()

        def copy() -> bool:
            for row in range(rows):
                end, start = to + row * pitch, source + row * source_pitch
                if not (self.inside(end, width) and self.inside(start, width)):
                    return False
                ctypes.memmove(end, start, width)
            return True

        stream.put(copy)
        return self._fine()

    def cudaMemsetAsync(self, address: int, value: int, size: int, stream: EmulatedStream) -> Any:
        def clear() -> bool:
            if not self.inside(address, size):
                return False
            ctypes.memset(address, value, size)
            return True

        stream.put(clear)
        return self._fine()

    def cudaEventCreate(self) -> Any:
        return self._fine(SimpleNamespace(at=None))

    def cudaEventDestroy(self, event: Any) -> Any:
        return self._fine()

    def cudaEventRecord(self, event: Any, stream: EmulatedStream) -> Any:
        def reached() -> bool:
            event.at = time.perf_counter()
            return True

        stream.put(reached)
        return self._fine()

    def cudaEventElapsedTime(self, start: Any, end: Any) -> Any:
        return self._fine(1e3 * (end.at - start.at))

    def cudaStreamBeginCapture(self, stream: EmulatedStream, mode: Any) -> Any:
        stream.recording = []
        return self._fine()

    def cudaStreamEndCapture(self, stream: EmulatedStream) -> Any:
        recorded, stream.recording = stream.recording, None
        return self._fine(recorded)

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> Any:
        return self._fine(list(graph))

    def cudaGraphDestroy(self, graph: Any) -> Any:
        return self._fine()

    def cudaGraphExecDestroy(self, executable: Any) -> Any:
        return self._fine()

    def cudaGraphLaunch(self, executable: Any, stream: EmulatedStream) -> Any:
        self.launches += 1
        for work in executable:
            stream.put(work)
        return self._fine()


class EmulatedStream:
    """Work that is done when somebody waits for it, in order."""

    def __init__(self, cuda: EmulatedCuda) -> None:
        self._queue: list[Callable[[], bool]] = []
        self.recording: list[Callable[[], bool]] | None = None
        STREAMS[int(self)] = self

    def __int__(self) -> int:
        return id(self)

    def put(self, work: Callable[[], bool]) -> None:
        (self._queue if self.recording is None else self.recording).append(work)

    @property
    def waiting(self) -> int:
        """How much of it is not done."""
        return len(self._queue)

    def finish(self) -> bool:
        """Do it; whether some of it failed."""
        queue, self._queue = self._queue, []
        failed = False
        for work in queue:
            failed |= not work()
        return failed


STREAMS: dict[int, EmulatedStream] = {}


@dataclass
class Plan:
    """What stands behind the bytes of a plan: the ONNX graph, and per profile each input's (min, opt, max)."""

    model: bytes
    profiles: list[Mapping[str, Any]]


@dataclass
class EmulatedTensorRT:
    """The module ``tensorrt_rtx`` as far as the runtime uses it, with ``plans`` by the SHA-256 of their bytes."""

    real: Any
    cuda: EmulatedCuda
    plans: dict[str, Plan] = field(default_factory=dict)
    on_host: frozenset[str] = frozenset()  # inputs that shapes are computed of
    records_graphs: bool = True  # as TensorRT-RTX does; full TensorRT leaves that to its caller
    contexts: int = 0
    compiled: int = 0  # contexts that found nothing in a runtime cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    @property
    def __version__(self) -> str:
        return str(self.real.__version__)

    def Runtime(self, logger: Any) -> EmulatedRuntime:
        return EmulatedRuntime(self, logger)


class EmulatedRuntime:
    def __init__(self, library: EmulatedTensorRT, logger: Any) -> None:
        self._library, self._logger = library, logger

    def deserialize_cuda_engine(self, data: bytes) -> EmulatedEngine | None:
        plan = self._library.plans.get(hashlib.sha256(data).hexdigest())
        if plan is None:
            self._logger.log(self._library.ILogger.Severity.ERROR, "magic tag does not match")
            return None
        return EmulatedEngine(self._library, plan, self._logger)


class EmulatedEngine:
    def __init__(self, library: EmulatedTensorRT, plan: Plan, logger: Any) -> None:
        self.library, self.plan, self.logger = library, plan, logger
        model = onnx.load_from_string(plan.model)
        self._values = {value.name: value for value in (*model.graph.input, *model.graph.output)}
        self.inputs = [value.name for value in model.graph.input]
        self.outputs = [value.name for value in model.graph.output]
        self._written = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "TensorScatter"}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 4
        # Above, making a session of some FP16 graphs ends the process in version 1.32.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        self.session = onnxruntime.InferenceSession(plan.model, options, providers=["CPUExecutionProvider"])

    @property
    def num_io_tensors(self) -> int:
        return len(self._values)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.plan.profiles)

    def get_tensor_name(self, index: int) -> str:
        return [*self._values][index]

    def element(self, name: str) -> int:
        return int(self._values[name].type.tensor_type.elem_type)

    def get_tensor_dtype(self, name: str) -> Any:
        return getattr(self.library.DataType, DTYPES[self.element(name)])

    def dims(self, name: str) -> list[int | str]:
        return [dim.dim_param or dim.dim_value for dim in self._values[name].type.tensor_type.shape.dim]

    def get_tensor_shape(self, name: str) -> list[int]:
        return [-1 if isinstance(dim, str) else dim for dim in self.dims(name)]

    def get_tensor_location(self, name: str) -> Any:
        locations = self.library.TensorLocation
        return locations.HOST if name in self.library.on_host else locations.DEVICE

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[list[int]]:
        return [list(sizes) for sizes in self.plan.profiles[profile_index][name]]

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self._written.get(name)

    def create_runtime_config(self) -> Any:
        return EmulatedRuntimeConfig(self) if self.library.records_graphs else SimpleNamespace()

    def create_execution_context(self, runtime_config: EmulatedRuntimeConfig | None = None) -> EmulatedContext:
        self.library.contexts += 1
        if runtime_config is not None and runtime_config.cache is not None:
            self.library.compiled += not runtime_config.cache.kernels
            runtime_config.cache.kernels = b"compiled"
        return EmulatedContext(self)


class EmulatedRuntimeConfig:
    def __init__(self, engine: EmulatedEngine) -> None:
        self.cache: EmulatedRuntimeCache | None = None
        self.cuda_graph_strategy = engine.library.CudaGraphStrategy.DISABLED

    def create_runtime_cache(self) -> EmulatedRuntimeCache:
        return EmulatedRuntimeCache()

    def set_runtime_cache(self, cache: EmulatedRuntimeCache) -> bool:
        self.cache = cache
        return True


class EmulatedRuntimeCache:
    def __init__(self) -> None:
        self.kernels = b""

    def serialize(self) -> bytes:
        return self.kernels

    def deserialize(self, blob: bytes) -> bool:
        self.kernels = blob if blob == b"compiled" else b""
        return bool(self.kernels)


class EmulatedContext:
    def __init__(self, engine: EmulatedEngine) -> None:
        self._engine, self._profile = engine, 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self._profile = profile_index
        return profile_index < self._engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        least, _, most = self._engine.get_tensor_profile_shape(name, self._profile)
        fine = len(shape) == len(least) and all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True))
        if not fine:
            self._engine.logger.log(self._engine.library.ILogger.Severity.ERROR, f"{name} {shape} is out of profile")
        self._shapes[name] = tuple(shape)
        return fine

    def infer_shapes(self) -> list[str]:
        host = self._engine.library.on_host & {*self._engine.inputs}
        return [name for name in self._engine.inputs if name not in self._shapes] + [*(host - self._addresses.keys())]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        sizes = {
            dim: size
            for given, shape in self._shapes.items()
            for dim, size in zip(self._engine.dims(given), shape, strict=True)
        }
        return tuple(int(sizes.get(dim, dim)) for dim in self._engine.dims(name))

    def _one_size_per_name(self) -> bool:
        """TensorRT's rule for the axes of inputs that have a name."""
        sizes: dict[str, int] = {}
        return all(
            sizes.setdefault(dim, size) == size
            for name, shape in self._shapes.items()
            for dim, size in zip(self._engine.dims(name), shape, strict=True)
            if isinstance(dim, str)
        )

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        if {*self._engine.inputs, *self._engine.outputs} - self._addresses.keys() or not self._one_size_per_name():
            return False
        addresses, engine = dict(self._addresses), self._engine
        shapes = {name: self.get_tensor_shape(name) for name in addresses}

        def compute() -> bool:
            arrays = {}
            for name, address in addresses.items():
                dtype = np.dtype(NUMPY[engine.element(name)])
                size = int(np.prod(shapes[name])) * dtype.itemsize
                if not engine.library.cuda.inside(address, size):
                    return False
                arrays[name] = view(address, size).view(dtype).reshape(shapes[name])
            feeds = {name: arrays[name].copy() for name in engine.inputs}
            for name, array in zip(engine.outputs, engine.session.run(engine.outputs, feeds), strict=True):
                arrays[name][...] = array
            return True

        STREAMS[stream_handle].put(compute)
        return True


def view(address: int, size: int) -> NDArray[np.uint8]:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def names_of(kind: type) -> Iterator[str]:
    """The names that an emulation of TensorRT took from the original."""
    return (name for name in vars(kind) if not name.startswith("_") and name not in ("element", "dims"))
