"""A graph -> the same graph with the inside of its ``Attention`` nodes as outputs.

Cases:
1. ``expose_scores``: query times key, scaled, before mask and softmax.
2. ``expose_weights``: the probabilities after the softmax, of the nodes whose module matches.
"""

from __future__ import annotations

import onnx_ir as ir

from transom.calib.graph_hash import MODULE

SCORES, WEIGHTS = 0, 3  # Attention's qk_matmul_output_mode in the operator specification, opset 23


def expose_scores(node: ir.Node) -> ir.Value:
    """Case 1; the value is no graph output yet."""
    return inside(node, SCORES, f"{node.outputs[0].name}_scores")


def expose_weights(model: ir.Model, module: str) -> list[str]:
    """Case 2: names of the new outputs, (B, H, S, C) each, of nodes whose module path ends with ``module``."""
    found = []
    for node in model.graph:
        if node.op_type == "Attention" and node.metadata_props.get(MODULE, "").endswith(module):
            weights = inside(node, WEIGHTS, f"{node.metadata_props[MODULE]}.weights")
            model.graph.outputs.append(weights)
            found.append(str(weights.name))
    return found


def inside(node: ir.Node, mode: int, name: str) -> ir.Value:
    """The fourth output of an ``Attention`` node, named."""
    node.resize_outputs(4)
    for omitted in node.outputs[1:3]:  # the present key and value: an empty name leaves an output out
        omitted.name = ""
    value = node.outputs[3]
    value.name, value.type = name, ir.TensorType(node.outputs[0].dtype or ir.DataType.FLOAT)
    node.attributes["qk_matmul_output_mode"] = ir.AttrInt64("qk_matmul_output_mode", mode)
    return value
