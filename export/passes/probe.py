"""A graph -> the same graph with one more output per tensor: its largest absolute value.

Cases:
1. A float32 result of any node gets ``ReduceMax(Abs(x))`` as a scalar output named ``max:<tensor>``.
2. The scores inside ``Attention`` (query times key, scaled) come out through its fourth output and are
   probed like any other tensor; FP16 kernels may hold them.
"""

from __future__ import annotations

import onnx_ir as ir

from transom.calib.identity import MODULE
from transom.export.passes.attention import expose_scores

PREFIX = "max:"


def probe_ranges(model: ir.Model) -> dict[str, str]:
    """Add the probes to the outputs of ``model``, in place; probe's name -> path of the module it measures."""
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


def probe(graph: ir.Graph, node: ir.Node, value: ir.Value) -> ir.Value:
    """Case 1."""
    absolute = ir.node("Abs", [value], name=f"abs_{value.name}")
    largest = ir.node("ReduceMax", [absolute.outputs[0]], {"keepdims": 0}, name=f"max_{value.name}")
    absolute.outputs[0].name, largest.outputs[0].name = f"abs:{value.name}", f"{PREFIX}{value.name}"
    largest.outputs[0].type, largest.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
    graph.insert_after(node, [absolute, largest])
    return largest.outputs[0]
