"""Variants: the files of a graph for each kind of device, made of the canonical graph, weights shared."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import onnx_ir as ir

from transom.export.passes.compute_in_fp32 import compute_in_fp32
from transom.export.passes.fake_half import fake_half
from transom.export.passes.half_precision import HALF, convert_precision
from transom.runtime.backends.base import Backend
from transom.runtime.backends.ort import OrtBackend
from transom.runtime.bundle import Bundle
from transom.runtime.errors import ExportError, one_line
from transom.runtime.graph_spec import Graph
from transom.runtime.loading import load_with_backends
from transom.runtime.manifest_graphs import SIMULATED, GraphFile
from transom.runtime.session import LoadedBundle

WEIGHTS = "model.weights"
EXTERNAL_ABOVE = 256 << 20  # bytes of weights; protobuf ends at 2 GiB and is parsed as a whole
SMALLEST = 1024  # bytes; scalars and shapes stay in the graph, where shape inference can see them
ALIGNMENT = 64  # bytes: a cache line
STATE_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Variants:
    """``graphs`` and their ``files``, which ship, and ``emulated`` graphs, which do not.

    Those are the half-precision graphs as a GPU would round them, for parity and accuracy (BF16 ships them as the
    CPU's variant); they read from ``emulated_files``.
    """

    graphs: tuple[GraphFile, ...]
    files: Mapping[str, bytes]
    emulated: tuple[GraphFile, ...]
    emulated_files: Mapping[str, bytes]


def make_variants(
    canonical: Mapping[str, ir.Model], graphs: tuple[Graph, ...], precision: str, external_above: int = EXTERNAL_ABOVE
) -> Variants:
    """Convert copies of the canonical graphs to ``precision`` and serialise what ships.

    In half precision a variant for the CPU ships beside them: of FP16 one that computes in FP32, of BF16 the
    emulation. Raises PrecisionError when a weight does not fit FP16.
    """
    models = {graph.name: canonical[graph.name].clone() for graph in graphs}
    for graph in graphs:
        convert_precision(models[graph.name], precision, state_names(graph))
    emulated = emulations(models) if precision in HALF else {}
    if precision == "bf16":  # ONNX Runtime's CPU has no BF16 kernels: it gets the emulation
        return pack(graphs, models, STATE_DTYPES[precision], cpu=emulated)
    cpu = widened(models) if precision == "fp16" else {}
    return pack(graphs, models, STATE_DTYPES[precision], cpu=cpu, emulated=emulated, external_above=external_above)


def widened(models: Mapping[str, ir.Model]) -> dict[str, ir.Model]:
    """Copy half-precision graphs and make the copies compute in FP32, for any CPU."""
    wide = {name: model.clone() for name, model in models.items()}
    for model in wide.values():
        compute_in_fp32(model)
    return wide


def emulations(models: Mapping[str, ir.Model]) -> dict[str, ir.Model]:
    """Copy half-precision graphs and make the copies round as a GPU would, on any CPU."""
    emulated = {name: model.clone() for name, model in models.items()}
    for model in emulated.values():
        fake_half(model)
    return emulated


def pack(
    graphs: tuple[Graph, ...],
    models: Mapping[str, ir.Model],
    state: str,
    *,
    cpu: Mapping[str, ir.Model] | None = None,
    emulated: Mapping[str, ir.Model] | None = None,
    external_above: int = EXTERNAL_ABOVE,
) -> Variants:
    """Serialise ``models``, which ship, their variants for the CPU if there are any, and those for parity only.

    Weights that several of them hold, or of more than ``external_above`` bytes, lie in one file beside them.
    ``state`` is the dtype of the models' state. All models are consumed: their weights move to that file.
    """
    cpu, emulated = cpu or {}, emulated or {}
    named = {f"{name}.onnx": model for name, model in models.items()}
    named |= {f"{name}.cpu.onnx": model for name, model in cpu.items()}
    shipped = set(named)
    named |= {f"{name}.emulated.onnx": model for name, model in emulated.items()}
    files: dict[str, bytes] = {}
    weights = None
    if cpu or sum(map(weight_bytes, models.values())) > external_above:
        weights = WEIGHTS
        files[weights] = externalize([*named.values()], weights)
        shipped.add(weights)
    files |= {name: serialized(model) for name, model in named.items()}

    def graph_files(kinds: Mapping[str, str]) -> tuple[GraphFile, ...]:
        return tuple(
            GraphFile(
                graph.with_state_dtype(state),
                {kind: f"{graph.name}{ending}" for kind, ending in kinds.items() if kind != "cpu" or graph.name in cpu},
                weights,
            )
            for graph in graphs
        )

    return Variants(
        graphs=graph_files({"default": ".onnx"} | ({"cpu": ".cpu.onnx"} if cpu else {})),
        files={name: data for name, data in files.items() if name in shipped},
        emulated=graph_files({"default": ".emulated.onnx"}) if emulated else (),
        emulated_files=files if emulated else {},
    )


def weight_bytes(model: ir.Model) -> int:
    """Return the size of all weights in bytes."""
    return sum(w.const_value.nbytes for w in model.graph.initializers.values() if w.const_value is not None)


def externalize(models: Sequence[ir.Model], location: str) -> bytes:
    """Point the models' weights at ``location`` and return that file's bytes; equal weights are stored once."""
    blob = bytearray()
    places: dict[bytes, tuple[int, int]] = {}
    for model in models:
        for name, weight in model.graph.initializers.items():
            tensor = weight.const_value
            if tensor is None or tensor.nbytes < SMALLEST:
                continue
            data = tensor.tobytes()
            key = hashlib.sha256(data).digest()
            if key not in places:
                blob += bytes(-len(blob) % ALIGNMENT)
                places[key] = (len(blob), len(data))
                blob += data
            offset, length = places[key]
            weight.const_value = ir.ExternalTensor(
                location, offset, length, tensor.dtype, shape=ir.Shape(tensor.numpy().shape), name=name, base_dir=""
            )
    return bytes(blob)


def with_integers(variants: Variants, integers: Mapping[str, str]) -> Variants:
    """Return the variants with how a CPU session computes each graph's integers, as ``manifest_graphs`` names it."""

    def marked(files: tuple[GraphFile, ...]) -> tuple[GraphFile, ...]:
        return tuple(replace(file, integers=integers[file.graph.name]) for file in files)

    return replace(variants, graphs=marked(variants.graphs), emulated=marked(variants.emulated))


def simulated(variants: Variants) -> Variants:
    """Return graphs for TensorRT marked as such: a CPU session then computes their Q/DQ in float32."""
    return with_integers(variants, dict.fromkeys((file.graph.name for file in variants.graphs), SIMULATED))


def open_variants(
    bundle: Bundle, variants: Variants, around: Callable[[Backend], Backend] = lambda backend: backend
) -> LoadedBundle:
    """Load ``bundle`` around graphs that are not in it, on the CPU; ``around`` wraps each backend."""
    opened = {file.graph.name: OrtBackend(file, variants.files.__getitem__, "cpu", None) for file in variants.graphs}
    return load_with_backends(bundle, {name: around(backend) for name, backend in opened.items()})


def emulated_variants(variants: Variants) -> Variants:
    """Return the emulated graphs as variants of their own, to be opened."""
    return Variants(variants.emulated, variants.emulated_files, (), {})


def state_names(graph: Graph) -> frozenset[str]:
    """Return the names of the graph's state tensors."""
    return frozenset(tensor.name for tensor in (*graph.inputs, *graph.outputs) if tensor.state)


def serialized(model: ir.Model) -> bytes:
    """Serialise the model as protobuf; ``check_file`` checks it when it is written."""
    data: bytes = ir.to_proto(model).SerializeToString()
    return data


def check_file(path: Path) -> None:
    """Check the operators, types and shapes of a written ONNX file, its weights beside it, by the specification.

    Raises ExportError where they do not hold together, whether or not anything here could execute it.

    Not checked by onnx 1.23: operators of domains other than ONNX's (MatMulNBits of int4) and what is computed from
    them, which ONNX Runtime checks when parity opens that file; and the places of weights in their file, which
    ``externalize`` gives and the bundle's hashes keep.
    """
    try:
        with decodable(path) as readable:
            onnx.checker.check_model(readable, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            f"{path.name} is no valid ONNX model: {one_line(error)}. Nothing was written; report this, with the "
            "checkpoint's config.json."
        ) from None


@contextmanager
def decodable(path: Path) -> Iterator[str]:
    """Yield the path as onnx 1.23 takes it: names that are no Unicode go through a link."""
    try:
        path.as_posix().encode()
    except UnicodeEncodeError:
        with tempfile.TemporaryDirectory() as folder:
            link = Path(folder, "bundle")
            link.symlink_to(path.parent.resolve(), target_is_directory=True)
            yield str(link / path.name)
    else:
        yield str(path)
