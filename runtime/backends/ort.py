"""Execute graphs with ONNX Runtime: no telemetry, no quiet fallback, memory bound once where runs repeat."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np

from transom.runtime.backends.base import Array, Read, ReadInPieces, ReadLeased, with_dtypes
from transom.runtime.backends.external_data import foreign_location
from transom.runtime.backends.inlined_model import InlinedModel, inlined_model
from transom.runtime.backends.integer_sums import integer_sums
from transom.runtime.backends.malloc import large_blocks_apart
from transom.runtime.backends.mapped_model import Kept, session_from_mapping
from transom.runtime.backends.model_pipe import can_pipe, session_from_parts
from transom.runtime.backends.ort_bound import OrtBoundRun, RepeatedShapes, reason_of
from transom.runtime.backends.ort_cache import OrtDecoderState
from transom.runtime.backends.ort_library import FATAL, load_cuda, onnxruntime, version_of
from transom.runtime.backends.spinning import thread_entries
from transom.runtime.decoder_state import DecoderState, HostDecoderState
from transom.runtime.errors import BackendError, BundleError
from transom.runtime.graph_spec import cache_inputs
from transom.runtime.manifest_graphs import BLOCKS, PRODUCTS, SIMULATED, GraphFile
from transom.runtime.process_bound import ProcessBound

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# Of ONNX Runtime's fusions, those it is not to make. On the CPU SkipLayerNormalization takes five times as long as Add
# and LayerNormalization apart: without it BERT-base at S=128 on two cores is 2 to 6 % faster, 9 to 10 % in INT8.
SLOW_FUSIONS = {"cpu": ["SkipLayerNormFusion"]}

# From a model's path it reads a pipe, but older versions hold the interpreter's lock meanwhile: nothing could write.
READS_PIPES = (1, 31)
# Constants that ONNX Runtime computes when it makes a session, in bytes at most: else it transposes a tied table of
# embeddings of 147 MiB, before it packs that for the product that could have read it transposed.
FOLDED = ("optimization.constant_folding_max_output_size_in_bytes", str(64 << 20))
# Locations of weights are relative to the root: absolute ones are refused, and those that leave the folder.
FROM_ROOT = ("session.model_external_initializers_file_folder_path", "/")

# ONNX Runtime's names of the dtypes that cross a graph's edge.
DTYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(bfloat16)": "bfloat16"}
DTYPES |= {"tensor(int64)": "int64"}
GPU_MISSING = (  # what an onnxruntime that was compiled with CUDA may lack on the machine that it runs on
    "Is there a GPU (`nvidia-smi`), and are CUDA's libraries those that this onnxruntime takes? "
    "Or load with device='cpu'."
)
# By default CUDA multiplies FP32 in TF32, with 10 bits of each operand: a roundoff of 2^-11 instead of 2^-24.
PROVIDER_OPTIONS: dict[str, dict[str, str]] = {"cpu": {}, "cuda": {"use_tf32": "0"}}
# Elements of all inputs and outputs of a graph without state up to which they are copied to and from memory that stays
# bound: binding the five tensors of a BERT costs 20 us, copying 64 Ki floats 10 us.
SMALL = 1 << 16
RECORD_PROVIDERS = "session.record_ep_graph_assignment_info"  # which provider gets each node
# Operators that may stay on the CPU while a graph runs on a GPU: arithmetic on sizes and token ids. ONNX Runtime leaves
# it there because its inputs or its consumers are there. Any other operator would copy a layer's values to the host.
ALLOWED_ON_CPU = {
    "Add",
    "ArgMax",
    "Cast",
    "Concat",
    "Gather",
    "Mul",
    "Range",
    "Shape",
    "Slice",
    "Squeeze",
    "Sub",
    "Unsqueeze",
}

Prepare = Callable[[Any], object]  # adds to session options


class OrtBackend(ProcessBound):
    """A graph in an ONNX Runtime session."""

    def __init__(self, graph: GraphFile, read: Read, device: str, threads: int | None) -> None:
        self.device = device
        self._session = open_products(graph, read, device, threads)
        file = graph.file_for(device)
        self.graph = with_dtypes(graph.graph, tensor_dtypes(self._session), file, "Export the bundle again.")
        tensors = (*self.graph.inputs, *self.graph.outputs)
        self._small = RepeatedShapes(self._session, self.graph)
        self._plain = device == "cpu" and not any(t.aliases or t.dtype == "bfloat16" for t in tensors)

    def run(self, feeds: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> dict[str, Array]:
        if not self._plain or sum(map(prod, shapes.values())) + sum(map(np.size, feeds.values())) > SMALL:
            return self.bound_run(feeds, shapes).run()
        return self._small.run(feeds, shapes)

    def bound_run(self, feeds: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> OrtBoundRun:
        """Bind checked inputs, and the sizes of the outputs that are wanted, for many runs."""
        return OrtBoundRun(self._session, self.graph, self.device, feeds, shapes)

    def give_back(self) -> None:
        """Give what the arena holds back to the system, at the end of one run of the smallest shapes."""
        options = onnxruntime().RunOptions()
        options.add_run_config_entry("memory.enable_memory_arena_shrinkage", f"{self.device}:0")
        with suppress(Exception):  # an axis that may not be 1: the memory stays
            self._session.run(None, zeros_for(self._session), options)

    def new_decoder_state(self, rows: int, limit: int, encoder_outputs: Mapping[str, Array]) -> DecoderState:
        """Make caches that stay on a GPU, except BF16, which OrtValue cannot convert to numpy."""
        caches = cache_inputs(self.graph)
        if self.device == "cpu" or any(tensor.dtype == "bfloat16" for tensor in self.graph.inputs):
            return HostDecoderState(caches, rows, limit, encoder_outputs)
        return OrtDecoderState(onnxruntime(), self.device, caches, rows, limit, encoder_outputs)


def tensor_dtypes(session: Any) -> dict[str, str | None]:
    """Return numpy's name of each tensor's dtype in a session; None for a dtype that no bundle has."""
    return {value.name: DTYPES.get(value.type) for value in (*session.get_inputs(), *session.get_outputs())}


def session_entries(graph: GraphFile, device: str) -> Mapping[str, str]:
    """Return the session configuration that a graph needs on a device, as ONNX Runtime names its keys."""
    if device != "cpu":
        return {RECORD_PROVIDERS: "1"}
    if graph.integers == PRODUCTS:
        return integer_sums().entries
    if graph.integers == BLOCKS:  # KleidiAI, on Arm, rounds whole rows to 8 bits and scales to bfloat16
        return {"mlas.disable_kleidiai": "1"}
    if graph.integers == SIMULATED:  # S8 x S8 saturates too: Q/DQ pairs stay as they are, in float32
        return {"session.disable_quant_qdq": "1"}
    return {}


def open_products(graph: GraphFile, read: Read, device: str, threads: int | None) -> Any:
    """Open a session; of a graph that ONNX Runtime cannot make exact, one that computes its Q/DQ in float32.

    Where U8 x S8 saturates, ONNX Runtime makes weights unsigned. In graphs of version 0.1.0 that fails at a weight
    that two products share, when the session is made, and at one that no product took, at every run: one is tried.
    """
    if graph.integers != PRODUCTS or not session_entries(graph, device):
        return open_session(graph, read, device, threads)
    try:
        session = open_session(graph, read, device, threads)
        session.run(None, zeros_for(session))
    except Exception:  # the library raises bare RuntimeError and its own types alike
        return open_session(replace(graph, integers=SIMULATED), read, device, threads)
    return session


def zeros_for(session: Any) -> dict[str, Array]:
    """Make inputs of zeros, every named axis of size 1."""
    return {
        value.name: np.zeros([size if isinstance(size, int) else 1 for size in value.shape], DTYPES[value.type])
        for value in session.get_inputs()
    }


def open_session(graph: GraphFile, read: Read, device: str, threads: int | None) -> Any:
    """Open a session over bytes that were hashed as they were read; ONNX Runtime gets no path of a bundle to follow."""
    library = onnxruntime()
    if PROVIDERS[device] not in library.get_available_providers():
        raise BackendError(
            f"device {device!r} was asked for; onnxruntime {library.__version__} here offers "
            f"{', '.join(library.get_available_providers())}. Install onnxruntime-gpu in place of onnxruntime, "
            "or load with device='cpu'."
        )
    if device == "cuda":
        load_cuda()

    def make(model: str | bytes, prepare: Prepare) -> Any:
        options = library.SessionOptions()
        options.log_severity_level = FATAL
        options.intra_op_num_threads = threads or 0  # 0: one per physical core
        options.inter_op_num_threads = 1
        for key, setting in {**session_entries(graph, device), **thread_entries()}.items():
            options.add_session_config_entry(key, setting)
        prepare(options)
        return library.InferenceSession(
            model,
            options,
            providers=[PROVIDERS[device]],
            provider_options=[PROVIDER_OPTIONS[device]],
            disabled_optimizers=SLOW_FUSIONS.get(device),
            enable_fallback=0,  # else it prints to stdout and goes on with the CPU, here and in a run that fails
        )

    try:
        session = make_session(graph, read, device, make)
    except BundleError:
        raise
    except Exception as error:  # as above
        gpu = f". {GPU_MISSING}" if device != "cpu" else ""
        raise BackendError(
            f"ONNX Runtime cannot load {graph.file_for(device)} on {device}: {reason_of(error).rstrip('.')}{gpu}"
        ) from None
    if PROVIDERS[device] not in session.get_providers():
        raise BackendError(
            f"device {device!r} was asked for; ONNX Runtime chose {session.get_providers()} instead. {GPU_MISSING}"
        )
    if device != "cpu":
        require_on_device(session, device)
    return session


def make_session(graph: GraphFile, read: Read, device: str, make: Callable[[str | bytes, Prepare], Any]) -> Any:
    """Make a session of a graph's files; weights that lie outside of it are mapped, or pass through a pipe.

    Raises BundleError for files that are not those of bundle.json, and what the library raises.
    """
    model, weights, inlined = read(graph.file_for(device)), graph.weights, None
    if weights is not None and isinstance(read, ReadInPieces):
        inlined = inlined_model(model, weights, read.size(weights))
    require_own_weights(graph, device, model, 0 if inlined is None else len(inlined.tensors))

    def made(model: str | bytes, prepare: Prepare = lambda options: None) -> Any:
        def prepare_all(options: Any) -> None:
            if inlined is not None and inlined.is_float32:
                options.add_session_config_entry(*FOLDED)
            prepare(options)

        session = make(model, prepare_all)
        session._model_bytes = None  # it keeps them, to be made again on another device
        return session

    if weights is not None and inlined is not None and can_pipe() and version_of(onnxruntime()) >= READS_PIPES:
        for way in (mapped_session, piped_session) if device == "cpu" else (piped_session,):
            try:
                session = way(inlined, weights, read, made)
            except BundleError:
                raise
            except Exception:  # it names a path that is not the bundle's: what bytes give is the error
                continue
            if session is not None:
                return session
    with large_blocks_apart():
        if weights is None:
            return made(model)
        data = read(weights)
        return made(model, lambda o: o.add_external_initializers_from_files_in_memory([weights], [data], [len(data)]))


def mapped_session(model: InlinedModel, weights: str, read: Any, make: Callable[..., Any]) -> Any | None:
    """Make a session that maps its weights from their file while that is under a lease; None where it cannot be so."""
    if not isinstance(read, ReadLeased):
        return None

    def make_mapped(data: bytes, kept: Kept) -> Any:
        library = onnxruntime()
        values = {name: library.OrtValue.ortvalue_from_numpy_with_onnx_type(*each) for name, each in kept.items()}

        def prepare(options: Any) -> None:
            options.add_session_config_entry(*FROM_ROOT)
            for name, value in values.items():
                options.add_initializer(name, value)

        session = make(data, prepare)
        session.transom_values = values  # which it reads, and does not own
        return session

    with read.leased(weights) as file:
        return None if file is None else session_from_mapping(model, file, make_mapped)


def piped_session(model: InlinedModel, weights: str, read: Any, make: Callable[..., Any]) -> Any | None:
    """Make a session of a model that passes through a pipe; None where the library did not read it whole."""
    with large_blocks_apart():
        return session_from_parts(model.parts(read.pieces(weights)), make)


def require_own_weights(graph: GraphFile, device: str, model: bytes, inlined: int) -> None:
    """Raise BundleError where a graph reads another file than the weights that bundle.json gives it."""
    file = graph.file_for(device)
    try:
        foreign = foreign_location(model, graph.weights, inlined)
    except (ValueError, IndexError) as error:
        raise BundleError(f"{file} is no ONNX model ({error}); export the bundle again.") from None
    if foreign is not None:
        expected = "no other file" if graph.weights is None else repr(graph.weights)
        raise BundleError(
            f"{file} reads weights from {foreign[:100]!r}; bundle.json has {expected} for it. A bundle must hold its "
            "own files: export it again."
        )


def require_on_device(session: Any, device: str) -> None:
    """Raise BackendError where ONNX Runtime assigned more of the graph to the CPU than sizes and token ids.

    Its own ``session.disable_cpu_ep_fallback`` refuses those too, and every graph of a bundle has some.
    """
    kept = Counter(
        node.op_type
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name != PROVIDERS[device]
        for node in part.get_nodes()
        if node.op_type not in ALLOWED_ON_CPU
    )
    if kept:
        found = ", ".join(f"{count} {operator}" for operator, count in sorted(kept.items()))
        raise BackendError(
            f"ONNX Runtime {onnxruntime().__version__} has no kernels on {device} for {found} of this graph, and would "
            "compute them on the CPU. Run `pip install --upgrade onnxruntime-gpu`, or load with device='cpu'."
        )
