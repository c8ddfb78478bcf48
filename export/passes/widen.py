"""FP16 or BF16 graph -> the same graph computing in FP32, its weights still in half precision on disk.

For a CPU. ONNX Runtime sums products of float16 in float16 where the processor has such arithmetic (Arm's Cortex-A76):
three to eleven times the error of FP32 sums, and infinity where a sum passes 65504 on its way to a small
result. The weights are the bytes of the graph this is made from; ONNX Runtime folds their casts when it loads them.

Cases:
1. A weight in half precision is cast to FP32, once for all its readers.
2. An input in half precision (state) is read in FP32.
3. A result in half precision becomes FP32, and with it what a ``ConstantOfShape`` fills in.
4. A ``Cast`` to half precision gives FP32 instead.
5. A ``Cast`` that is left with FP32 to make of FP32 falls away, unless it gives an input the name of an output.
"""

from __future__ import annotations

import onnx_ir as ir

from transom.export.passes._builder import NodeBuilder
from transom.export.passes.casts import cast_of

HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def widen_half(model: ir.Model) -> bool:
    """Rewrite ``model`` in place; True if it had anything in half precision."""
    graph = model.graph
    nodes = list(graph)
    results = [output for node in nodes for output in node.outputs if output.dtype in HALVES]
    changed = any((widen_weights(graph), widen_inputs(graph), results))
    for output in results:  # cases 3 and 4
        output.type = ir.TensorType(ir.DataType.FLOAT)
    for node in nodes:
        if node.op_type == "ConstantOfShape":
            widen_filling(node)
        elif node.op_type == "Cast":
            widen_cast(graph, node)
    return changed


def widen_weights(graph: ir.Graph) -> bool:
    """Case 1: each weight's FP32 is called ``<weight>_wide``. True if there were any."""
    first = graph[0]
    weights = [weight for weight in graph.initializers.values() if weight.dtype in HALVES]
    for weight in weights:
        readers = list(weight.uses())
        wide = cast_of(weight, ir.DataType.FLOAT, f"{weight.name}_wide")
        graph.insert_before(first, wide)
        for reader, index in readers:
            reader.replace_input_with(index, wide.outputs[0])
    return bool(weights)


def widen_inputs(graph: ir.Graph) -> bool:
    """Case 2; True if there were any."""
    entering = [value for value in graph.inputs if value.dtype in HALVES]
    for value in entering:
        value.type = ir.TensorType(ir.DataType.FLOAT)
    return bool(entering)


def widen_filling(node: ir.Node) -> None:
    """Case 3: what a ``ConstantOfShape`` of half precision fills in."""
    filled = node.attributes["value"].as_tensor() if "value" in node.attributes else None
    if filled is not None and filled.dtype in HALVES:
        node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(filled.numpy().astype("float32")))


def widen_cast(graph: ir.Graph, node: ir.Node) -> None:
    """Cases 4 and 5."""
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
