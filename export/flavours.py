"""From the canonical graph to the files that ship: one per target, weights shared where they can be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from transom.export.external import EXTERNAL_ABOVE, externalize, weight_bytes
from transom.export.passes.emulate import emulate_half
from transom.export.passes.precision import convert_precision
from transom.runtime.bundle import GraphFile
from transom.runtime.spec import Graph


@dataclass(frozen=True)
class Flavours:
    """``graph`` and its ``files`` ship. ``emulated`` is the half-precision graph as a GPU would round it,

    for parity alone (BF16 ships it as the CPU's flavour); it reads from ``emulated_files``.
    """

    graph: GraphFile
    files: Mapping[str, bytes]
    emulated: GraphFile | None
    emulated_files: Mapping[str, bytes]


def make_flavours(canonical: ir.Model, graph: Graph, precision: str, external_above: int = EXTERNAL_ABOVE) -> Flavours:
    """Convert a copy of the canonical graph to ``precision`` and serialise what ships.

    Raises PrecisionError when a weight does not fit FP16.
    """
    model = canonical.clone()
    convert_precision(model, precision)
    models = {f"{graph.name}.onnx": model}
    targets = {"default": f"{graph.name}.onnx"}
    if precision != "fp32":
        rounding = model.clone()
        emulate_half(rounding)
        models[f"{graph.name}.cpu.onnx"] = rounding
    if precision == "bf16":  # ONNX Runtime's CPU has no BF16 kernels: it gets the emulation
        targets["cpu"] = f"{graph.name}.cpu.onnx"
    weights = None
    contents: dict[str, bytes] = {}
    if weight_bytes(model) > external_above or len(targets) > 1:
        weights = f"{graph.name}.weights"
        contents[weights] = externalize(list(models.values()), weights)
    contents |= {name: serialized(flavour) for name, flavour in models.items()}
    shipped = {*targets.values(), *([weights] if weights else [])}
    emulated = GraphFile(graph, {"default": f"{graph.name}.cpu.onnx"}, weights) if precision == "fp16" else None
    return Flavours(
        graph=GraphFile(graph, targets, weights),
        files={name: data for name, data in contents.items() if name in shipped},
        emulated=emulated,
        emulated_files=contents if emulated else {},
    )


def serialized(model: ir.Model) -> bytes:
    """The model as protobuf, checked against the operator specifications unless its weights lie outside."""
    proto = ir.to_proto(model)
    data: bytes = proto.SerializeToString()
    if not any(isinstance(w.const_value, ir.ExternalTensor) for w in model.graph.initializers.values()):
        onnx.checker.check_model(proto, full_check=True)
    return data
