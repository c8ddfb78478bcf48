"""Make a half-precision graph run on any CPU, with the rounding of half precision ("fake half precision").

ONNX Runtime's CPU computes an FP16 graph in FP32 or in half precision, as the processor has it, and has no
kernels for BF16 at all. Here every node computes in FP32 and its result is rounded to half precision and
back, which is what a GPU that accumulates in FP32 does (but for the inside of fused attention). Weights and
inputs are handled as in export/passes/compute_in_fp32.py.

Cases:
1. A half-precision weight is cast to FP32 where it is read: case 1 there.
2. A node's half-precision result is computed in FP32 and rounded: Cast to half, Cast to FP32.
3. A node that only moves values (MOVES) needs no rounding: its inputs were rounded.
4. An input in half precision (state) becomes FP32, case 2 there; its values were rounded where they were computed.
5. A Cast to half keeps rounding and is cast back; a Cast from half reads the rounded FP32.
6. In the body of a ``Scan`` likewise, whose inputs in half precision become FP32 as those of the graph.
"""

from __future__ import annotations

import onnx_ir as ir

from transom.export.passes._builder import cast_of
from transom.export.passes._match import body_of
from transom.export.passes.compute_in_fp32 import HALVES, cast_weights_to_fp32, make_constant_fp32, make_inputs_fp32

MOVES = {"Reshape", "Transpose", "Gather", "Slice", "Concat", "Expand", "Squeeze", "Unsqueeze", "Split", "Flatten"}
MOVES |= {"Identity", "ConstantOfShape", "TensorScatter", "GatherND"}


def fake_half(model: ir.Model) -> bool:
    """Rewrite ``model`` in place; return whether it had anything in half precision."""
    graphs = [model.graph, *filter(None, map(body_of, model.graph))]
    results = [(graph, node, o) for graph in graphs for node in graph for o in node.outputs if o.dtype in HALVES]
    changed = any((cast_weights_to_fp32(model.graph), *map(make_inputs_fp32, graphs), results))  # cases 1, 4 and 6
    for graph, node, output in results:
        round_output(graph, node, output)
    return changed


def round_output(graph: ir.Graph, node: ir.Node, output: ir.Value) -> None:
    """Apply case 2, 3 or 5 to one result."""
    half = output.dtype
    assert half is not None
    if not output.name:  # of several outputs, one that is left out
        output.type = ir.TensorType(ir.DataType.FLOAT)
        return
    readers = list(output.uses())
    if node.op_type == "Cast":  # case 5: the node itself rounds
        back = cast_of(output, ir.DataType.FLOAT, f"{output.name}_wide")
        graph.insert_after(node, back)
    else:
        output.type = ir.TensorType(ir.DataType.FLOAT)
        if node.op_type in MOVES:  # case 3
            if node.op_type == "ConstantOfShape":
                make_constant_fp32(node)
            return
        rounded = cast_of(output, half, f"{output.name}_rounded")
        back = cast_of(rounded.outputs[0], ir.DataType.FLOAT, f"{output.name}_wide")
        graph.insert_after(node, [rounded, back])
    for reader, index in readers:
        reader.replace_input_with(index, back.outputs[0])
