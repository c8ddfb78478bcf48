"""From the canonical graphs to the files that ship: one per target, weights shared where they can be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import onnx
import onnx_ir as ir

from transom.export.external import EXTERNAL_ABOVE, externalize, weight_bytes
from transom.export.passes.emulate import emulate_half
from transom.export.passes.precision import HALF, convert_precision
from transom.runtime.bundle import GraphFile
from transom.runtime.spec import Graph, Tensor

WEIGHTS = "model.weights"
STATE_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Flavours:
    """``graphs`` and their ``files`` ship. ``emulated`` are the half-precision graphs as a GPU would round them,

    for parity alone (BF16 ships them as the CPU's flavour); they read from ``emulated_files``.
    """

    graphs: tuple[GraphFile, ...]
    files: Mapping[str, bytes]
    emulated: tuple[GraphFile, ...]
    emulated_files: Mapping[str, bytes]


def make_flavours(
    canonical: Mapping[str, ir.Model], graphs: tuple[Graph, ...], precision: str, external_above: int = EXTERNAL_ABOVE
) -> Flavours:
    """Convert copies of the canonical graphs to ``precision`` and serialise what ships.

    Raises PrecisionError when a weight does not fit FP16.
    """
    shipped: dict[str, ir.Model] = {}
    emulated: dict[str, ir.Model] = {}
    for graph in graphs:
        model = canonical[graph.name].clone()
        convert_precision(model, precision, state_names(graph))
        shipped[f"{graph.name}.onnx"] = model
        if precision in HALF:
            emulated[f"{graph.name}.cpu.onnx"] = rounding = model.clone()
            emulate_half(rounding)
    if precision == "bf16":  # ONNX Runtime's CPU has no BF16 kernels: it gets the emulation
        shipped |= emulated
    files: dict[str, bytes] = {}
    weights = None
    if sum(weight_bytes(canonical[graph.name]) for graph in graphs) > external_above or precision == "bf16":
        weights = WEIGHTS
        files[weights] = externalize([*(shipped | emulated).values()], weights)
    files |= {name: serialized(model) for name, model in (shipped | emulated).items()}

    def graph_files(cpu: bool, default: str) -> tuple[GraphFile, ...]:
        targets = [{"default": default.format(g.name)} | ({"cpu": f"{g.name}.cpu.onnx"} if cpu else {}) for g in graphs]
        return tuple(
            GraphFile(with_state(graph, STATE_DTYPES[precision]), files, weights)
            for graph, files in zip(graphs, targets, strict=True)
        )

    return Flavours(
        graphs=graph_files(precision == "bf16", "{}.onnx"),
        files={name: data for name, data in files.items() if name in shipped or name == weights},
        emulated=graph_files(False, "{}.cpu.onnx") if precision == "fp16" else (),
        emulated_files=files if precision == "fp16" else {},
    )


def state_names(graph: Graph) -> frozenset[str]:
    return frozenset(tensor.name for tensor in (*graph.inputs, *graph.outputs) if tensor.state)


def with_state(graph: Graph, dtype: str) -> Graph:
    """The graph with its state in ``dtype``."""

    def converted(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(replace(tensor, dtype=dtype) if tensor.state else tensor for tensor in tensors)

    return replace(graph, inputs=converted(graph.inputs), outputs=converted(graph.outputs))


def serialized(model: ir.Model) -> bytes:
    """The model as protobuf, checked against the operator specifications unless its weights lie outside."""
    proto = ir.to_proto(model)
    data: bytes = proto.SerializeToString()
    if not any(isinstance(w.const_value, ir.ExternalTensor) for w in model.graph.initializers.values()):
        onnx.checker.check_model(proto, full_check=True)
    return data
