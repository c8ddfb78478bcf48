"""Make an FP16 or BF16 graph compute in FP32, its weights still in half precision on disk.

For a CPU. ONNX Runtime sums products of float16 in float16 where the processor has such arithmetic (Arm's Cortex-A76):
three to eleven times the error of FP32 sums, and infinity where a sum passes 65504 on its way to a small
result. The weights are the bytes of the graph this is made from; ONNX Runtime folds their casts when it loads them.

Cases:
1. A weight in half precision is cast to FP32, once for all its readers.
2. An input in half precision (state) becomes FP32.
3. A result in half precision becomes FP32, and with it the value that a ``ConstantOfShape`` fills in.
4. A ``Cast`` to half precision becomes one to FP32.
5. A ``Cast`` from FP32 to FP32 is removed, unless it gives an input the name of an output.
"""

from __future__ import annotations

import onnx_ir as ir

from transom.export.passes._builder import NodeBuilder, cast_of

HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def compute_in_fp32(model: ir.Model) -> bool:
    """Rewrite ``model`` in place; return whether it had anything in half precision."""
    graph = model.graph
    nodes = list(graph)
    results = [output for node in nodes for output in node.outputs if output.dtype in HALVES]
    changed = any((cast_weights_to_fp32(graph), make_inputs_fp32(graph), results))
    for output in results:  # cases 3 and 4
        output.type = ir.TensorType(ir.DataType.FLOAT)
    for node in nodes:
        if node.op_type == "ConstantOfShape":
            make_constant_fp32(node)
        elif node.op_type == "Cast":
            make_cast_fp32(graph, node)
    return changed


def cast_weights_to_fp32(graph: ir.Graph) -> bool:
    """Insert the casts of case 1, each called ``<weight>_wide``; return whether there were any."""
    first = graph[0]
    weights = [weight for weight in graph.initializers.values() if weight.dtype in HALVES]
    for weight in weights:
        readers = list(weight.uses())
        wide = cast_of(weight, ir.DataType.FLOAT, f"{weight.name}_wide")
        graph.insert_before(first, wide)
        for reader, index in readers:
            reader.replace_input_with(index, wide.outputs[0])
    return bool(weights)


def make_inputs_fp32(graph: ir.Graph) -> bool:
    """Apply case 2; return whether there were any."""
    inputs = [value for value in graph.inputs if value.dtype in HALVES]
    for value in inputs:
        value.type = ir.TensorType(ir.DataType.FLOAT)
    return bool(inputs)


def make_constant_fp32(node: ir.Node) -> None:
    """Apply case 3 to the fill value of a ``ConstantOfShape``."""
    fill = node.attributes["value"].as_tensor() if "value" in node.attributes else None
    if fill is not None and fill.dtype in HALVES:
        node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(fill.numpy().astype("float32")))


def make_cast_fp32(graph: ir.Graph, node: ir.Node) -> None:
    """Apply cases 4 and 5 to a ``Cast``."""
    if node.attributes["to"].as_int() in HALVES:
        node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
    value, result = node.inputs[0], node.outputs[0]
    assert value is not None
    if value.dtype != ir.DataType.FLOAT or result.dtype != ir.DataType.FLOAT:
        return
    if not result.is_graph_output():
        ir.convenience.replace_all_uses_with(result, value)
        graph.remove(node, safe=True)
    elif value.producer() is not None and not value.is_graph_output():
        NodeBuilder(graph, node).replace_node(value)
