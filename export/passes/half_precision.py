"""Convert an FP32 graph to FP16 or BF16, its inputs and outputs still float32.

Cases:
1. A weight in FP32 becomes a weight in half precision.
2. A node computes in half precision; a ``Cast`` or ``ConstantOfShape`` that made float32 makes half.
3. A node of a module in KEEP_FP32 stays in FP32; casts are put where values enter and leave it.
4. A float32 input of the graph is cast on entry, an output on leaving, so that an app sees the same
   types whatever the precision of the bundle.
5. State (a KV cache, the encoder's keys and values) enters and leaves in half precision: it is large, is passed from
   call to call, and no app reads it in between.
6. A recurrence stays in FP32 in BF16: over hundreds of steps the rounding of its weights to 8 bits may lead the state
   elsewhere, and so may that of the embeddings it reads. FP16, with 11 bits, takes it.
"""

from __future__ import annotations

from collections.abc import Collection

import ml_dtypes
import numpy as np
import onnx_ir as ir

from transom.calib.graph_hash import MODULE
from transom.export.passes._builder import cast_of
from transom.runtime.errors import PrecisionError

HALF = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
NUMPY = {ir.DataType.FLOAT16: np.dtype(np.float16), ir.DataType.BFLOAT16: np.dtype(ml_dtypes.bfloat16)}
FP16_MAX = 65504.0  # IEEE 754 binary16
RECURRENCES = ("GRU", "LSTM", "RNN")
MOVES = ("Gather", "Transpose", "Reshape")  # from the embedding to a recurrence, and from one layer's to the next
KEEP_FP32 = {"sentence_pooling", "unit_length", "mean_pooling"}  # sums over hundreds of tokens or features


def convert_precision(model: ir.Model, precision: str, state: Collection[str] = ()) -> bool:
    """Convert ``model`` in place to "fp16" or "bf16"; return whether anything changed. ``state`` are names of case 5.

    Raises PrecisionError naming a weight that FP16 cannot hold.
    """
    if precision == "fp32":
        return False
    half = HALF[precision]
    for value in list(model.graph.initializers.values()):
        if value.dtype == ir.DataType.FLOAT and not all(keeps_fp32(node, half) for node in value.consumers()):
            convert_weight(value, half)
    for entering in model.graph.inputs:
        if entering.name in state:  # case 5
            entering.type = ir.TensorType(half)
    casts: dict[tuple[str | None, ir.DataType], ir.Value] = {}
    for node in list(model.graph):
        wanted = ir.DataType.FLOAT if keeps_fp32(node, half) else half
        convert_inputs(model.graph, node, wanted, casts)
        convert_node(node, half, wanted)
    for index, output in enumerate(list(model.graph.outputs)):
        if output.dtype == half and output.name not in state:
            model.graph.outputs[index] = cast_output(model.graph, output)
    return True


def keeps_fp32(node: ir.Node, half: ir.DataType) -> bool:
    """Return whether the node is of case 3, or a recurrence of case 6."""
    if half == ir.DataType.BFLOAT16 and feeds_recurrence(node):
        return True
    return not KEEP_FP32.isdisjoint(node.metadata_props.get(MODULE, "").split("."))


def feeds_recurrence(node: ir.Node) -> bool:
    """Return whether the node is a recurrence, or moves values that nothing else reads into one: an embedding's."""
    if node.op_type in RECURRENCES:
        return True
    readers = [reader for output in node.outputs for reader in output.consumers()]
    moves = node.op_type in MOVES and not any(output.is_graph_output() for output in node.outputs)
    return moves and bool(readers) and all(map(feeds_recurrence, readers))


def convert_weight(value: ir.Value, half: ir.DataType) -> None:
    """Apply case 1."""
    assert value.const_value is not None
    stored = value.const_value.numpy()
    largest = float(np.abs(stored).max(initial=0.0))
    if half == ir.DataType.FLOAT16 and largest > FP16_MAX:
        module = next(iter(value.consumers())).metadata_props.get(MODULE, "top")
        raise PrecisionError(
            f"the weight {value.name} (module {module}) reaches {largest:.6g}, fp16 ends at {FP16_MAX:g}; "
            "export with --precision bf16."
        )
    value.const_value = ir.Tensor(stored.astype(NUMPY[half]), dtype=half, name=value.name)
    value.type = ir.TensorType(half)


def convert_inputs(
    graph: ir.Graph, node: ir.Node, wanted: ir.DataType, casts: dict[tuple[str | None, ir.DataType], ir.Value]
) -> None:
    """Cast float inputs of another width to ``wanted``, each once for all its readers: cases 3 and 4."""
    for index, value in enumerate(node.inputs):
        if value is None or value.dtype not in (ir.DataType.FLOAT, *NUMPY) or value.dtype == wanted:
            continue
        if node.op_type == "Cast":  # a Cast takes either width
            continue
        key = (value.name, wanted)
        if key not in casts:
            cast = cast_of(value, wanted, f"{value.name}_{wanted.name.lower()}")
            cast.metadata_props.update(node.metadata_props)
            graph.insert_before(node, cast)
            casts[key] = cast.outputs[0]
        node.replace_input_with(index, casts[key])


def convert_node(node: ir.Node, half: ir.DataType, wanted: ir.DataType) -> None:
    """Apply case 2: change the dtype in a node's attributes, and those of its outputs."""
    if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT and wanted == half:
        node.attributes["to"] = ir.AttrInt64("to", int(half))
    if node.op_type == "ConstantOfShape" and wanted == half and "value" in node.attributes:
        filled = node.attributes["value"].as_tensor()
        if filled.dtype == ir.DataType.FLOAT:
            node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(filled.numpy().astype(NUMPY[half]), dtype=half))
    for output in node.outputs:
        if output.dtype == ir.DataType.FLOAT:
            output.type = ir.TensorType(wanted)


def cast_output(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """Cast an output of the graph to float32 under its own name: case 4."""
    name = str(value.name)
    value.name = f"{name}_half"
    cast = cast_of(value, ir.DataType.FLOAT, name)
    graph.append(cast)
    return cast.outputs[0]
