"""The range of every intermediate of a graph, measured in FP32, where nothing overflows; FP16 must hold it.

Probes are added to a graph as outputs:
1. A float32 result of any node gets ``ReduceMax(Abs(x))`` as a scalar output named ``max:<tensor>``.
2. The scores inside ``Attention`` (query times key, scaled) come out through its fourth output and are
   probed like any other tensor; FP16 kernels may hold them.
3. A ``MatMul``, ``Gemm`` or ``Conv`` gets the ``ReduceMax`` of the same operator over ``Abs`` of its inputs as
   ``sum:<tensor>``: no partial sum of its terms, in whatever order, is larger.
4. The scores of an ``Attention`` of heads (B, H, S, D) get the same, before they are scaled, for kernels scale them
   before or after. Its other product needs none: weights that add up to 1 make no sum larger than the largest value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from transom.calib.graph_hash import MODULE
from transom.export.parity.cases import ParityCases
from transom.export.passes._builder import NodeBuilder
from transom.export.passes.expose_attention import expose_scores
from transom.export.passes.half_precision import FP16_MAX, KEEP_FP32
from transom.runtime.backends.base import Array
from transom.runtime.backends.ort_library import onnxruntime
from transom.runtime.backends.spinning import thread_entries
from transom.runtime.bundle import Bundle
from transom.runtime.errors import PrecisionError
from transom.runtime.graph_spec import Graph
from transom.runtime.loading import load_with_backends

PREFIX, SUM = "max:", "sum:"  # of the names of probes
PRODUCTS = ("MatMul", "Gemm", "Conv")
Largest = Mapping[str, tuple[float, str]]  # tensor -> (value, path of the module it comes from)


@dataclass(frozen=True)
class Ranges:
    """Ranges of FP32 graphs: the ``tensors``' largest absolute values, and bounds of partial ``sums``.

    A bound is the largest sum of the absolute values of the terms of any element: what an accumulator may reach on the
    way, in whatever order it adds.
    """

    tensors: Largest = field(default_factory=dict)
    sums: Largest = field(default_factory=dict)


class RangeBackend:
    """A backend of an FP32 graph that records the largest absolute value of every intermediate.

    ``model`` is consumed: it gets probes as outputs; with ``sums`` those of partial sums too, which double the number
    of products.
    """

    device = "cpu"

    def __init__(self, model: ir.Model, graph: Graph, *, sums: bool = False) -> None:
        self.graph = graph
        self._modules = probe_ranges(model) | (probe_sums(model) if sums else {})
        self._values = dict.fromkeys(self._modules, 0.0)
        self._runs = 0
        library = onnxruntime()
        options = library.SessionOptions()
        options.log_severity_level = 4
        options.enable_cpu_mem_arena = False  # give memory back between shapes
        options.enable_mem_reuse = False  # ONNX Runtime infers a wrong shape for the scores of cross-attention
        for key, setting in thread_entries().items():
            options.add_session_config_entry(key, setting)
        self._session = library.InferenceSession(
            ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def run(self, feeds: Mapping[str, Array], shapes: Mapping[str, Sequence[int]]) -> dict[str, Array]:
        """Run the graph and its probes; return the outputs ``shapes`` names, as a backend does."""
        written = {tensor.name: tensor.aliases for tensor in self.graph.outputs if tensor.aliases is not None}
        names = [*self._modules, *shapes, *written]
        found = dict(zip(names, self._session.run(names, dict(feeds)), strict=True))
        self._runs += 1
        for name in self._modules:
            self._values[name] = float(np.maximum(self._values[name], found[name]))  # a NaN stays: max would drop it
        for name, buffer in written.items():
            feeds[buffer][...] = found[name]
        return {name: found[name] for name in shapes}

    def require_runs(self, name: str) -> None:
        """Raise PrecisionError where the graph, called ``name``, never ran: its ranges are all 0."""
        if self._runs == 0:
            raise PrecisionError(
                f"the graph {name} was never run, so no range of its tensors is known; expected a case of each graph. "
                "Report this, with the checkpoint's config.json; --precision fp32 needs no ranges."
            )

    @property
    def largest(self) -> dict[str, tuple[float, str]]:
        """Largest absolute value of every intermediate: tensor -> (value, module path)."""
        return self._found(PREFIX)

    @property
    def sums(self) -> dict[str, tuple[float, str]]:
        """Bound of the partial sums of every product: tensor -> (bound, module path)."""
        return self._found(SUM)

    def _found(self, prefix: str) -> dict[str, tuple[float, str]]:
        return {
            name.removeprefix(prefix): (value, self._modules[name])
            for name, value in self._values.items()
            if name.startswith(prefix)
        }


def in_half(largest: Largest) -> dict[str, tuple[float, str]]:
    """Return the tensors that an FP16 graph has in FP16: all but those of modules that stay in FP32."""
    return {name: found for name, found in largest.items() if found[1].split(".")[0] not in KEEP_FP32}


def beyond_fp16(largest: Largest) -> dict[str, tuple[float, str]]:
    """Return the tensors that FP16 would turn into infinity."""
    return {name: found for name, found in in_half(largest).items() if not found[0] < FP16_MAX}


def require_fp16_range(largest: Largest) -> None:
    """Raise PrecisionError naming the tensors that FP16 would turn into infinity."""
    over = beyond_fp16(largest)
    if over:
        name, (value, module) = next(iter(over.items()))  # the first in the graph: the cause, or nearest to it
        raise PrecisionError(
            f"fp16 cannot hold {len(over)} tensor(s), first {name} (module {module or 'top'}) reaches {value:.6g}, "
            f"fp16 ends at {FP16_MAX:g}; then {', '.join(list(over)[1:6]) or 'none'}. "
            "Export with --precision bf16."
        )


def measure_ranges(
    bundle: Bundle, canonical: Mapping[str, ir.Model], parity_cases: ParityCases, *, sums: bool = False
) -> Ranges:
    """Measure the largest absolute value of every intermediate of the FP32 graphs over all cases.

    ``canonical`` are the graphs of ``bundle`` by name, whatever its own precision; they are consumed. With ``sums``
    also bounds of partial sums. Raises PrecisionError where a graph never ran.
    """
    graphs = [file.graph.with_state_dtype("float32") for file in bundle.manifest.graphs]
    backends = {graph.name: RangeBackend(canonical[graph.name], graph, sums=sums) for graph in graphs}
    with load_with_backends(bundle, backends) as measured:
        for _ in parity_cases.runs(measured, by_row=True):
            pass
    for name, backend in backends.items():
        backend.require_runs(name)
    return Ranges(
        {name: found for backend in backends.values() for name, found in backend.largest.items()},
        {name: found for backend in backends.values() for name, found in backend.sums.items()},
    )


def probe_ranges(model: ir.Model) -> dict[str, str]:
    """Add the probes of cases 1 and 2 to ``model``, in place; return probe's name -> path of the module it measures."""
    modules: dict[str, str] = {}
    probes = []
    for node in list(model.graph):
        measured = [output for output in node.outputs if output.dtype == ir.DataType.FLOAT and output.name]
        if node.op_type == "Attention":
            measured.append(expose_scores(node))
        for value in measured:
            probes.append(probe(model.graph, node, value))
            modules[str(probes[-1].name)] = node.metadata_props.get(MODULE, "")
    model.graph.outputs.extend(probes)
    return modules


def probe_sums(model: ir.Model) -> dict[str, str]:
    """Add the probes of cases 3 and 4 to ``model``, in place; return probe's name -> path of the module it measures."""
    modules: dict[str, str] = {}
    for node in list(model.graph):
        name = f"{SUM}{node.outputs[0].name}"
        if node.op_type in PRODUCTS and node.outputs[0].dtype == ir.DataType.FLOAT:
            builder = NodeBuilder(model.graph, node)
            inputs = [
                value and builder.add("Abs", [value], f"{name}.{place}") for place, value in enumerate(node.inputs)
            ]
            sums = builder.add(node.op_type, inputs, f"{name}.terms", dict(node.attributes))
        elif node.op_type == "Attention" and all(rank(value) == 4 for value in node.inputs[:2]):
            name += "_scores"
            builder = NodeBuilder(model.graph, node)
            query, key = (builder.add("Abs", [value], f"{name}.{place}") for place, value in enumerate(node.inputs[:2]))
            turned = builder.add("Transpose", [key], f"{name}.turned", {"perm": [0, 1, 3, 2]})
            sums = builder.add("MatMul", [query, turned], f"{name}.terms")
        else:
            continue
        bound = builder.add("ReduceMax", [sums], name, {"keepdims": 0})
        bound.shape = ir.Shape([])
        model.graph.outputs.append(bound)
        modules[name] = node.metadata_props.get(MODULE, "")
    return modules


def rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def probe(graph: ir.Graph, node: ir.Node, value: ir.Value) -> ir.Value:
    """Insert ``ReduceMax(Abs(value))`` behind ``node`` and return it: case 1."""
    absolute = ir.node("Abs", [value], name=f"abs_{value.name}")
    largest = ir.node("ReduceMax", [absolute.outputs[0]], {"keepdims": 0}, name=f"max_{value.name}")
    absolute.outputs[0].name, largest.outputs[0].name = f"abs:{value.name}", f"{PREFIX}{value.name}"
    largest.outputs[0].type, largest.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
    graph.insert_after(node, [absolute, largest])
    return largest.outputs[0]
