"""Execute a bundle's plans with TensorRT: contexts, streams and buffers for a few calls at once.

Outputs are copied to the host before a call returns, a decoder's caches stay on the GPU and are written in place. A
recurrent state, some kilobytes a row, goes to the GPU and back at every step.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from transom.runtime.backends.base import Array, Read, with_dtypes
from transom.runtime.backends.cuda import CapturedGraph, OutOfMemory, Stream, find_gpu
from transom.runtime.backends.trt_kernel_cache import KernelCache
from transom.runtime.backends.trt_library import NAMES, library
from transom.runtime.backends.trt_memory import DeviceArray, Pool, Staging, TrtDecoderState, repeated_rows
from transom.runtime.backends.trt_plans import kind_of, pick_plan, require_version
from transom.runtime.errors import BackendError, BundleError, ShapeError, one_line
from transom.runtime.feeds import check_positions, storage
from transom.runtime.graph_spec import Tensor, cache_inputs, grouped_inputs, is_cache, is_decoder, token_input
from transom.runtime.manifest_graphs import GraphFile
from transom.runtime.process_bound import ProcessBound

DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT64": "int64"}
GRAPHS_OFF = "TRANSOM_CUDA_GRAPHS"  # set to 0, steps are launched kernel by kernel
MAX_GRAPHS = 4  # kept per CallContext: each is one batch's addresses
MESSAGES = 20  # of TensorRT's, kept for the next error
# Calls that are on the GPU at once, whatever the number of threads: each has contexts, a stream and staging of its own.
# Two keep the GPU busy: while one copies, the other computes. The others are for the host's share of a call.
MAX_CONCURRENT_CALLS = 4
KEPT_SHARE = 8  # a pool keeps 1/KEPT_SHARE of the GPU's memory for later calls

Sizes = tuple[int, ...]


class Engine(ProcessBound):
    """A deserialised plan, which all threads share."""

    def __init__(self, file: GraphFile, read: Read) -> None:
        self.gpu = find_gpu()
        self.plan = plan = pick_plan(file, self.gpu)
        kind = kind_of(plan)
        self.name, self.file, self.trt = NAMES[kind], plan.file, library(kind)
        require_version(plan, str(self.trt.__version__))
        self.messages: list[str] = []
        self._logger = trt_logger(self.trt, self.messages)
        self._runtime = self.trt.Runtime(self._logger)  # has to live as long as the engine
        data = read(plan.file)
        self.engine = self._runtime.deserialize_cuda_engine(data)
        if self.engine is None:
            raise self.failure("cannot load", "Build it again with `transom build`, with the library that is here")
        self.graph = with_dtypes(file.graph, tensor_dtypes(self.engine), plan.file, "Build the engine again.")
        self.kernels = KernelCache(self.engine, data, f"{kind}-{self.trt.__version__}-{self.gpu.sm}-{self.gpu.driver}")
        self.profiles = [self._bounds(index) for index in range(self.engine.num_optimization_profiles)]
        # The profile of a decoder's steps, which repeat: the last, and the only one where the state is recurrent
        self.steps = len(self.profiles) - 1 if is_decoder(self.graph) else None
        self.lock = threading.Lock()
        self.grouped = grouped_inputs(self.graph) if is_decoder(self.graph) else []  # it takes a group for each row
        written = cache_inputs(self.graph)
        self.caches, self.length = written, int(self.engine.get_tensor_shape(written[0].name)[2]) if written else 0
        for output in self.graph.outputs:
            if is_cache(output) and self.engine.get_aliased_input_tensor(output.name) != output.aliases:
                raise BundleError(f"{plan.file} does not write {output.aliases} in place; build it again.")

    def _bounds(self, profile: int) -> dict[str, tuple[Sizes, Sizes]]:
        found = {}
        for tensor in self.graph.inputs:
            least, _, most = self.engine.get_tensor_profile_shape(tensor.name, profile)
            found[tensor.name] = (tuple(least), tuple(most))
        return found

    def profile_for(self, shapes: Mapping[str, Sizes]) -> int:
        """Return the last profile that takes these shapes, which is the narrowest. ShapeError where none does."""
        for index in reversed(range(len(self.profiles))):
            if not any(outside(shape, *self.profiles[index][name]) for name, shape in shapes.items()):
                return index
        name, shape = next((n, s) for n, s in shapes.items() if outside(s, *self.profiles[0][n]))
        least, most = self.profiles[0][name]
        raise ShapeError(
            f"input {name!r} has shape {shape}; the engine {self.file} takes {least} to {most}. Run `transom build "
            f"BUNDLE --target {self.plan.target}` with other --min or --max."
        )

    def context(self, profile: int, stream: Stream, *, whole_graph: bool) -> Any:
        """Make an execution context; TensorRT-RTX compiles kernels here, or takes them from the cache."""
        with self.lock:
            config = self.kernels.config(whole_graph=whole_graph)
            context = self.engine.create_execution_context(**({} if config is None else {"runtime_config": config}))
            if context is None:
                raise self.failure("cannot make a context of", "Free some of the GPU's memory, or use smaller inputs")
            self.require(context.set_optimization_profile_async(profile, stream.handle), "cannot switch the profile of")
            stream.wait()
            return context

    def require(self, fine: bool, what: str) -> None:
        if not fine:
            raise self.failure(what, "Build it again with `transom build`, or load with device='cpu'")

    def failure(self, what: str, remedy: str) -> BackendError:
        """Return an error that ends in TensorRT's last message."""
        reason = one_line(RuntimeError(self.messages[-1])) if self.messages else "it gave no reason"
        return BackendError(f"{self.name} {what} {self.file} on {self.gpu}: {reason}. {remedy}.")


def outside(shape: Sizes, least: Sizes, most: Sizes) -> bool:
    return len(shape) != len(least) or not all(
        low <= n <= high for low, n, high in zip(least, shape, most, strict=True)
    )


def trt_logger(trt: Any, messages: list[str]) -> Any:
    """Make TensorRT's logger: its errors are appended to ``messages``, the last MESSAGES stay; nothing is printed."""
    errors = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)

    class TrtLogger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in errors:
                messages.append(message)
                del messages[:-MESSAGES]

    return TrtLogger()


def tensor_dtypes(engine: Any) -> dict[str, str | None]:
    """Return numpy's name of each tensor's dtype in an engine; None for a dtype that no bundle has."""
    names = (engine.get_tensor_name(index) for index in range(engine.num_io_tensors))
    return {name: DTYPES.get(engine.get_tensor_dtype(name).name) for name in names}


class TrtBackend(ProcessBound):
    """A graph in a TensorRT engine."""

    device = "tensorrt"

    def __init__(self, file: GraphFile, read: Read) -> None:
        self._engine = Engine(file, read)
        self._pool = Pool(self._engine.gpu.memory // KEPT_SHARE)
        self._turn = threading.BoundedSemaphore(MAX_CONCURRENT_CALLS)
        self._idle: list[CallContext] = []
        self.graph, self.plan = self._engine.graph, self._engine.plan

    def run(self, feeds: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> dict[str, Array]:
        """Execute as a backend does; inputs may be numpy arrays, or what ``new_decoder_state`` made.

        A call beyond MAX_CONCURRENT_CALLS waits for its turn.
        """
        with self._turn:
            try:
                call = self._idle.pop()  # the one of the last call, whose recorded steps are of use
            except IndexError:
                call = CallContext(self._engine)
            try:
                return call.run(feeds, shapes)
            except OutOfMemory:  # free the pool's unused memory; a repeated step writes the same
                self._pool.clear()
                return call.run(feeds, shapes)
            finally:
                self._idle.append(call)

    def new_decoder_state(self, rows: int, limit: int, encoder_outputs: Mapping[str, Array]) -> TrtDecoderState:
        length = self._engine.length or limit  # no cache bounds a state that is all recurrent
        return TrtDecoderState(self._pool, self._engine.caches, length, rows, limit, encoder_outputs)


class CallContext(ProcessBound):
    """The parts of an engine for one call at a time: a stream, a context per profile, buffers allocated once."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._graph = engine, engine.graph
        self._stream = Stream()
        self._contexts: dict[int, Any] = {}
        self._staging: defaultdict[str, Staging] = defaultdict(Staging)
        self._graphs: OrderedDict[Any, CapturedGraph | None] = OrderedDict()
        self._use_graphs = os.environ.get(GRAPHS_OFF) != "0"

    def run(self, feeds: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> dict[str, Array]:
        """Execute as a backend does. Even after an error no work is left that could write into memory of others."""
        try:
            return self._run(feeds, shapes)
        except BaseException:
            self._stream.wait()
            raise

    def _run(self, feeds: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> dict[str, Array]:
        engine = self._engine
        if engine.caches:
            new = feeds[token_input(self._graph).name].shape[1]
            check_positions(new, min(feeds[tensor.name].shape[2] for tensor in engine.caches), feeds)
        feeds = {**feeds, **self._ungrouped(feeds)}
        sizes = {tensor.name: self._size(tensor, feeds[tensor.name]) for tensor in self._graph.inputs}
        profile = engine.profile_for(sizes)
        context = self._context(profile)
        bound: dict[str, int] = {}

        def bind(name: str, address: int) -> None:
            bound[name] = address
            engine.require(context.set_tensor_address(name, address), f"refuses the address of {name!r} of")

        for tensor in self._graph.inputs:
            engine.require(context.set_input_shape(tensor.name, sizes[tensor.name]), f"refuses {tensor.name!r} of")
            bind(tensor.name, self._fed(tensor, feeds[tensor.name], sizes[tensor.name]))
        missing = context.infer_shapes()
        engine.require(not missing, f"has no shape for {', '.join(missing)} of")
        made: dict[str, Sizes] = {}
        for tensor in self._graph.outputs:
            made[tensor.name] = tuple(context.get_tensor_shape(tensor.name))
            size = prod(made[tensor.name]) * storage(tensor).itemsize
            staging = self._staging[tensor.name]
            in_place = tensor.aliases is not None and is_cache(tensor)
            bind(tensor.name, bound[str(tensor.aliases)] if in_place else staging.reserve_bytes(size))
        kept = all(isinstance(feeds[tensor.name], DeviceArray) for tensor in engine.caches)
        self._execute(context, (*bound.items(), *sizes.items()), repeats=profile == engine.steps and kept)
        return self._fetched(feeds, shapes, made)

    def _ungrouped(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Return what groups of rows share with a copy for each row; on the GPU it is so already."""
        rows = feeds[token_input(self._graph).name].shape[0] if self._engine.grouped else 0
        found = {tensor.name: feeds[tensor.name] for tensor in self._engine.grouped}
        return {name: repeated_rows(value, rows) for name, value in found.items() if not isinstance(value, DeviceArray)}

    def _context(self, profile: int) -> Any:
        if profile not in self._contexts:
            whole = self._use_graphs and profile == self._engine.steps
            self._contexts[profile] = self._engine.context(profile, self._stream, whole_graph=whole)
        return self._contexts[profile]

    def _size(self, tensor: Tensor, value: Any) -> Sizes:
        """Return the shape for the engine: a cache in host memory may be shorter than the one length it takes."""
        shape: Sizes = tuple(value.shape)
        if tensor in self._engine.caches and not isinstance(value, DeviceArray):
            return (*shape[:2], self._engine.length, *shape[3:])
        return shape

    def _fed(self, tensor: Tensor, value: Any, size: Sizes) -> int:
        """Return the address of an input; its copy to the GPU is queued where it is not there."""
        if isinstance(value, DeviceArray):
            return value.address
        staging = self._staging[tensor.name]
        value = np.ascontiguousarray(value)
        on_host = self._engine.engine.get_tensor_location(tensor.name) == self._engine.trt.TensorLocation.HOST
        if on_host or value.shape == size:
            return staging.keep(value) if on_host else staging.put(value, self._stream)
        return staging.put_padded(value, size, self._stream)

    def _execute(self, context: Any, key: Any, *, repeats: bool) -> None:
        """Queue the engine's work; where it ``repeats`` on the same addresses, as one launch of a recorded graph.

        TensorRT-RTX records by itself.
        """

        def enqueue() -> None:
            self._engine.require(context.execute_async_v3(self._stream.handle), "failed in")

        if not (repeats and self._use_graphs) or self._engine.kernels.records:
            enqueue()
            return
        if key not in self._graphs:  # the first time TensorRT may allocate, which a recording does not allow
            self._graphs[key] = None
            enqueue()
        else:
            self._graphs[key] = self._graphs[key] or self._stream.capture(enqueue)
            self._graphs[key].launch()  # type: ignore[union-attr]
        self._graphs.move_to_end(key)
        while len(self._graphs) > MAX_GRAPHS:
            self._graphs.popitem(last=False)

    def _fetched(
        self, feeds: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], made: Mapping[str, Sizes]
    ) -> dict[str, Array]:
        """Return the wanted outputs, and write state of host memory back, when all work is done."""
        outputs = [tensor for tensor in self._graph.outputs if tensor.name in shapes]
        replaced = [tensor for tensor in self._graph.outputs if tensor.aliases and not is_cache(tensor)]
        for tensor in outputs:
            if made[tensor.name] != tuple(shapes[tensor.name]):
                raise self._engine.failure(f"gives {tensor.name!r} of {made[tensor.name]} in", "Build it again")
        hosts = {}
        for tensor in (*outputs, *replaced):
            size = prod(made[tensor.name]) * storage(tensor).itemsize
            hosts[tensor.name] = self._staging[tensor.name].fetch(size, self._stream)
        written = [tensor for tensor in self._engine.caches if not isinstance(feeds[tensor.name], DeviceArray)]
        backs = {
            t.name: self._staging[t.name].fetch_padded(feeds[t.name], self._engine.length, self._stream)
            for t in written
        }
        self._stream.wait()
        for tensor in written:
            feeds[tensor.name][...] = backs[tensor.name].view(storage(tensor)).reshape(feeds[tensor.name].shape)
        for tensor in replaced:
            feeds[str(tensor.aliases)][...] = hosts[tensor.name].view(storage(tensor)).reshape(made[tensor.name])
        return {
            tensor.name: hosts[tensor.name].view(storage(tensor)).reshape(made[tensor.name]).copy()
            for tensor in outputs
        }
