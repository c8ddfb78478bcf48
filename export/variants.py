"""Variants: the files of a graph for each kind of device, made of the canonical graph, weights shared."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from transom.export.native.lists import BF16, LIST, NO_LISTS, NativeLists, lower_graphs, refused
from transom.export.parity.fp16_watch import watched
from transom.export.passes.compute_in_fp32 import compute_in_fp32
from transom.export.passes.fake_half import fake_half
from transom.export.passes.half_precision import HALF, convert_precision
from transom.export.stored_files import FolderFiles, StoredFile
from transom.export.weights_file import externalize, externalize_to
from transom.runtime.backends import open_chosen
from transom.runtime.backends.base import Backend
from transom.runtime.backends.kernels import AUTO, ONNXRUNTIME
from transom.runtime.bundle import Bundle
from transom.runtime.errors import ExportError, one_line
from transom.runtime.graph_spec import Graph
from transom.runtime.loading import load_with_backends
from transom.runtime.manifest_graphs import BOTH, CPU_ALONE, NATIVE, SIMULATED, TENSORRT_ALONE, GraphFile
from transom.runtime.native.operator_list import list_to_json
from transom.runtime.session import LoadedBundle

WEIGHTS = "model.weights"
EXTERNAL_ABOVE = 256 << 20  # bytes of weights; protobuf ends at 2 GiB and is parsed as a whole
STATE_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Variants:
    """``graphs`` and their ``files``, which ship, and ``emulated`` graphs, which do not.

    Those are the half-precision graphs as a GPU would round them, for parity and accuracy (BF16 ships them as the
    CPU's variant); they read from ``emulated_files``. A file that was written as it was made is among ``stored``
    instead, and both kinds of graphs read from it. ``native`` says of each graph what its list of operators fused, or
    why it has none; empty where none was to be made.
    """

    graphs: tuple[GraphFile, ...]
    files: Mapping[str, bytes]
    emulated: tuple[GraphFile, ...]
    emulated_files: Mapping[str, bytes]
    stored: Mapping[str, StoredFile] = field(default_factory=dict)
    native: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __call__(self, name: str) -> bytes:
        """Return the bytes of a file that ``graphs`` name."""
        return self.stored[name].path.read_bytes() if name in self.stored else self.files[name]

    def size(self, name: str) -> int:
        """Return the size of a file in bytes."""
        return self.stored[name].size if name in self.stored else len(self.files[name])

    def pieces(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of a file in order, each piece valid until the next."""
        if name in self.stored:
            return FolderFiles(self.stored[name].path.parent).pieces(name)
        return iter([memoryview(self.files[name])])


def make_variants(
    canonical: Mapping[str, ir.Model],
    graphs: tuple[Graph, ...],
    precision: str,
    external_above: int = EXTERNAL_ABOVE,
    folder: Path | None = None,
    made_for: str = BOTH,
    native: bool = False,
) -> Variants:
    """Convert copies of the canonical graphs to ``precision`` and serialise what ships, as ``pack`` does.

    With ``native`` a list of fused operators is made of each graph that a CPU executes, where there can be one.

    In half precision a variant for the CPU ships beside them: of FP16 one that computes in FP32, of BF16, and of FP16
    for TensorRT alone, the emulation. Of FP16 for the CPU alone that variant is all. Raises PrecisionError when a
    weight does not fit FP16.
    """
    models = {graph.name: canonical[graph.name].clone() for graph in graphs}
    for graph in graphs:
        convert_precision(models[graph.name], precision, state_names(graph))
    native = native and made_for != TENSORRT_ALONE
    if precision == "fp16" and made_for == CPU_ALONE:
        cpu = widened(models)
        lists = lower_graphs(cpu, graphs) if native else NO_LISTS
        return pack(graphs, {}, "float32", cpu=cpu, external_above=external_above, folder=folder, lists=lists)
    emulated = emulations(models) if precision in HALF else {}
    if precision == "bf16" or (precision == "fp16" and made_for == TENSORRT_ALONE):
        # ONNX Runtime's CPU has no BF16 kernels: it gets the emulation
        lists = refused(graphs, BF16) if native else NO_LISTS
        return pack(graphs, models, STATE_DTYPES[precision], cpu=emulated, folder=folder, lists=lists)
    cpu = widened(models) if precision == "fp16" else {}
    state = STATE_DTYPES[precision]
    lists = lower_graphs(cpu or models, graphs) if native else NO_LISTS
    return pack(
        graphs, models, state, cpu=cpu, emulated=emulated, external_above=external_above, folder=folder, lists=lists
    )


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
    folder: Path | None = None,
    lists: NativeLists = NO_LISTS,
) -> Variants:
    """Serialise ``models``, which ship, their variants for the CPU if there are any, and those for parity only.

    Without ``models`` the variants for the CPU ship alone. Weights that several of them hold, or ``lists`` of operators
    read, or of more than ``external_above`` bytes, lie in one file beside them, which is written to ``folder`` weight
    by weight, or held in memory without one. ``state`` is the dtype of the models' state. All models are consumed:
    their weights move to that file.
    """
    cpu, emulated = cpu or {}, emulated or {}
    named = {f"{name}.onnx": model for name, model in models.items()}
    named |= {f"{name}.cpu.onnx": model for name, model in cpu.items()}
    shipped = set(named)
    named |= {f"{name}.emulated.onnx": model for name, model in emulated.items()}
    files: dict[str, bytes] = {}
    stored: dict[str, StoredFile] = {}
    weights = None
    tensors = [weight.tensor for lowered in lists.lowered.values() for weight in lowered.weights.values()]
    if tensors or (cpu and models) or sum(map(weight_bytes, (models or cpu).values())) > external_above:
        weights = WEIGHTS
        if folder is None:
            files[weights], offsets = externalize([*named.values()], weights, tensors)
            shipped.add(weights)
        else:
            stored[weights], offsets = externalize_to([*named.values()], folder / weights, tensors)
        made = placed_lists(lists, weights, offsets)
        files |= made
        shipped |= {*made}
    files |= {name: serialized(model) for name, model in named.items()}

    def graph_files(kinds: Mapping[str, str]) -> tuple[GraphFile, ...]:
        return tuple(
            GraphFile(
                graph.with_state_dtype(state),
                {kind: f"{graph.name}{ending}" for kind, ending in kinds.items() if graph.name in having[kind]},
                weights,
            )
            for graph in graphs
        )

    every = [graph.name for graph in graphs]
    having = {"default": every, "cpu": cpu, NATIVE: lists.lowered}
    shipping = {"default": ".onnx"} if models else {}
    shipping |= ({"cpu": ".cpu.onnx"} if cpu else {}) | {NATIVE: LIST}

    return Variants(
        graphs=graph_files(shipping),
        files={name: data for name, data in files.items() if name in shipped},
        emulated=graph_files({"default": ".emulated.onnx"}) if emulated else (),
        emulated_files=files if emulated else {},
        stored=stored,
        native=lists.record,
    )


def placed_lists(lists: NativeLists, weights: str, offsets: Sequence[int]) -> dict[str, bytes]:
    """Return the files of lists by name; ``offsets`` are those of their tensors in the file ``weights``, in order."""
    left = iter(offsets)
    placed = {
        name: lowered.placed(weights, {tensor: next(left) for tensor in lowered.weights})
        for name, lowered in lists.lowered.items()
    }
    return {
        f"{name}{LIST}": json.dumps(list_to_json(operators), allow_nan=False).encode()
        for name, operators in placed.items()
    }


def weight_bytes(model: ir.Model) -> int:
    """Return the size of all weights in bytes."""
    return sum(w.const_value.nbytes for w in model.graph.initializers.values() if w.const_value is not None)


def with_integers(variants: Variants, integers: Mapping[str, str]) -> Variants:
    """Return the variants with how a CPU session computes each graph's integers, as ``manifest_graphs`` names it."""

    def marked(files: tuple[GraphFile, ...]) -> tuple[GraphFile, ...]:
        return tuple(replace(file, integers=integers[file.graph.name]) for file in files)

    return replace(variants, graphs=marked(variants.graphs), emulated=marked(variants.emulated))


def simulated(variants: Variants) -> Variants:
    """Return graphs for TensorRT marked as such: a CPU session then computes their Q/DQ in float32."""
    return with_integers(variants, dict.fromkeys((file.graph.name for file in variants.graphs), SIMULATED))


def open_variants(
    bundle: Bundle,
    variants: Variants,
    around: Callable[[Backend], Backend] = lambda backend: backend,
    *,
    native: bool = False,
) -> LoadedBundle:
    """Load ``bundle`` around graphs that are not in it, on the CPU; ``around`` wraps each backend.

    With ``native`` a graph's list of operators is executed, where it has one. A graph with an FP16 watch raises
    Fp16DoubtError in a run in which FP16 may not hold every value.
    """
    kernels = AUTO if native else ONNXRUNTIME
    opened = {file.graph.name: open_chosen(file, variants, "cpu", None, kernels)[0] for file in variants.graphs}
    return load_with_backends(bundle, {name: around(watched(backend)) for name, backend in opened.items()})


def emulated_variants(variants: Variants) -> Variants:
    """Return the emulated graphs as variants of their own, to be opened."""
    return Variants(variants.emulated, variants.emulated_files, (), {}, variants.stored)


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
