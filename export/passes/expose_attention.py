"""Add what ``Attention`` computes inside as outputs of a graph.

Cases:
1. ``expose_scores``: query times key, scaled, before mask and softmax.
2. ``expose_weights``: the probabilities after the softmax, of the nodes whose module matches.
"""

from __future__ import annotations

import onnx_ir as ir

from transom.calib.graph_hash import MODULE

SCORES, WEIGHTS = 0, 3  # Attention's qk_matmul_output_mode in the operator specification, opset 23
WEIGHTS_NAME = ".weights"  # of the outputs of case 2, after the path of the module


def expose_scores(node: ir.Node) -> ir.Value:
    """Return the scores of case 1, which are no output of the graph yet."""
    return fourth_output(node, SCORES, f"{node.outputs[0].name}_scores")


def expose_weights(model: ir.Model, module: str) -> list[str]:
    """Add the outputs of case 2 of nodes whose module path ends with ``module``; return their names, (B, H, S, C) each.

    ``model`` is rewritten in place.
    """
    names = []
    for node in model.graph:
        if node.op_type == "Attention" and node.metadata_props.get(MODULE, "").endswith(module):
            weights = fourth_output(node, WEIGHTS, node.metadata_props[MODULE] + WEIGHTS_NAME)
            model.graph.outputs.append(weights)
            names.append(str(weights.name))
    return names


def fourth_output(node: ir.Node, mode: int, name: str) -> ir.Value:
    """Give an ``Attention`` node its fourth output, of qk_matmul_output_mode ``mode``, called ``name``."""
    node.resize_outputs(4)
    for omitted in node.outputs[1:3]:  # the present key and value: an empty name leaves an output out
        omitted.name = ""
    value = node.outputs[3]
    value.name, value.type = name, ir.TensorType(node.outputs[0].dtype or ir.DataType.FLOAT)
    node.attributes["qk_matmul_output_mode"] = ir.AttrInt64("qk_matmul_output_mode", mode)
    return value
