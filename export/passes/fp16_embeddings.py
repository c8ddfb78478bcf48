"""Store embedding tables of an FP32 graph in FP16.

A row that was looked up is cast to FP32. Rounding to 11 bits moves an embedding by at most 2^-11 of itself, and
int8 graphs for TensorRT hold the same table in FP16 anyway: the two variants share its bytes.

Cases:
1. A ``Gather`` along axis 0 of a weight of rank 2 that only ``Gather`` reads.
2. A table with numbers that FP16 cannot hold stays in FP32.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from transom.export.passes._builder import cast_of
from transom.export.passes._match import integer_attribute, is_weight
from transom.export.passes.half_precision import FP16_MAX, HALF, convert_weight


def fp16_embeddings(model: ir.Model) -> bool:
    """Rewrite ``model`` in place; return whether anything changed."""
    tables = [value for value in model.graph.initializers.values() if is_table(value)]
    for table in tables:
        convert_weight(table, HALF["fp16"])
        for node, _ in list(table.uses()):
            rows = node.outputs[0]
            name = str(rows.name)
            rows.name, rows.type = f"{name}.half", ir.TensorType(HALF["fp16"])
            cast = cast_of(rows, ir.DataType.FLOAT, name)
            cast.metadata_props.update(node.metadata_props)
            ir.convenience.replace_all_uses_with(rows, cast.outputs[0], replace_graph_outputs=True)
            cast.replace_input_with(0, rows)
            model.graph.insert_after(node, cast)
    return bool(tables)


def is_table(value: ir.Value) -> bool:
    """Return whether an initializer is of case 1 and not of case 2."""
    if not is_weight(value) or value.dtype != ir.DataType.FLOAT or value.const_value is None:
        return False
    uses = list(value.uses())
    if len(value.const_value.shape) != 2 or not uses or value.is_graph_output():
        return False
    if not all(
        node.op_type == "Gather" and index == 0 and integer_attribute(node, "axis") == 0 for node, index in uses
    ):
        return False
    return bool(np.abs(value.const_value.numpy()).max(initial=0.0) <= FP16_MAX)
