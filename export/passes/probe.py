"""A graph -> the same graph with one more output per tensor: its largest absolute value; and one per sum of products.

Cases:
1. A float32 result of any node gets ``ReduceMax(Abs(x))`` as a scalar output named ``max:<tensor>``.
2. The scores inside ``Attention`` (query times key, scaled) come out through its fourth output and are
   probed like any other tensor; FP16 kernels may hold them.
3. A ``MatMul``, ``Gemm`` or ``Conv`` gets the ``ReduceMax`` of the same operator over ``Abs`` of its inputs as
   ``sum:<tensor>``: no partial sum of its terms, in whatever order, is larger.
4. The scores of an ``Attention`` of heads (B, H, S, D) get the same, before they are scaled, for kernels scale them
   before or after. Its other product needs none: weights that add up to 1 make no sum larger than the largest value.
"""

from __future__ import annotations

import onnx_ir as ir

from transom.calib.graph_hash import MODULE
from transom.export.passes._builder import NodeBuilder
from transom.export.passes.expose_attention import expose_scores

PREFIX, SUM = "max:", "sum:"
PRODUCTS = ("MatMul", "Gemm", "Conv")


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


def probe_sums(model: ir.Model) -> dict[str, str]:
    """Add the bounds of partial sums to the outputs of ``model``, in place; their names -> paths of their modules."""
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
    """Case 1."""
    absolute = ir.node("Abs", [value], name=f"abs_{value.name}")
    largest = ir.node("ReduceMax", [absolute.outputs[0]], {"keepdims": 0}, name=f"max_{value.name}")
    absolute.outputs[0].name, largest.outputs[0].name = f"abs:{value.name}", f"{PREFIX}{value.name}"
    largest.outputs[0].type, largest.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([])
    graph.insert_after(node, [absolute, largest])
    return largest.outputs[0]
