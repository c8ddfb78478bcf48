"""Split an integer product whose result is cut into parts into one product per part.

``Split(MatMul(x, W) + b)``, query, key and value in one product, is what GPT-2 has. TensorRT cuts such a product
into three itself, and dequantises the weight on the way: no integers are left. Split here, every part is a product of
integers, and each channel keeps the integers and the scale that it had.

Cases:
1. ``MatMul`` of a dequantised activation and a dequantised int8 weight (K, N), its scale and zero point one per
   channel or one for all, and behind it nothing but a ``Split`` of the last axis, by ``num_outputs`` or by sizes
   that are a weight.
2. A bias of N elements between the two, in an ``Add`` or a ``Sub``, is split as well.
3. A part that no node reads is not computed.

Left as it is: a product that is read whole, one in floating point, a split along another axis or of computed sizes, a
weight quantised in blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from transom.export.passes._builder import NodeBuilder
from transom.export.passes._match import (
    inputs_of,
    integer_attribute,
    is_standard,
    is_unused,
    is_weight,
    made_by,
    only_reader,
    rank_of,
    weight_shape,
)


@dataclass(frozen=True, eq=False)
class FusedMatMul:
    """A product of case 1, the ``DequantizeLinear`` of its weight, the node of case 2 if there is one, and the split.

    The parts lie between neighbours of ``bounds``: 0, ..., N.
    """

    product: ir.Node
    weight: ir.Node
    bias: ir.Node | None
    split: ir.Node
    bounds: tuple[int, ...]


def split_fused_matmul(model: ir.Model) -> int:
    """Split every such product of ``model`` in place; return how many there were."""
    found = [fused for fused in map(match_fused_matmul, model.graph) if fused is not None]
    for fused in found:
        for index, part in enumerate(fused.split.outputs):
            if not is_unused(part):  # case 3
                replace_part(model.graph, fused, index)
    if found:
        RemoveUnusedNodesPass()(model)
    return len(found)


def match_fused_matmul(node: ir.Node) -> FusedMatMul | None:
    """Return the match of case 1 whose ``MatMul`` is ``node``; None if there is none."""
    if not is_standard(node, "MatMul"):
        return None
    activation, weight = (made_by(value, "DequantizeLinear") for value in node.inputs)
    columns = columns_of(weight) if weight is not None else None
    if activation is None or weight is None or columns is None:
        return None
    reader, bias = only_reader(node.outputs[0]), None
    if reader is not None and bias_of(reader, node.outputs[0], columns) is not None:
        bias, reader = reader, only_reader(reader.outputs[0])
    if reader is None or not is_standard(reader, "Split"):
        return None
    sizes = sizes_of(reader, columns)
    return None if sizes is None else FusedMatMul(node, weight, bias, reader, (0, *accumulate(sizes)))


def columns_of(dequantize: ir.Node) -> int | None:
    """Return N of an int8 weight (K, N) whose scale and zero point can be split with it; else None."""
    stored, *rest = dequantize_inputs(dequantize)
    if stored is None or any(value is not None and not is_weight(value) for value in (stored, *rest)):
        return None
    if stored.dtype != ir.DataType.INT8 or len(weight_shape(stored)) != 2:
        return None
    columns = weight_shape(stored)[1]
    allowed = [(), (columns,)] if integer_attribute(dequantize, "axis", 1) in (1, -1) else [()]
    return columns if all(value is None or weight_shape(value) in allowed for value in rest) else None


def bias_of(node: ir.Node, product: ir.Value, columns: int) -> ir.Value | None:
    """Return the bias that the node adds to the product or subtracts from it: case 2. None if it does neither."""
    if not is_standard(node, "Add", "Sub"):
        return None
    first, second = node.inputs
    bias = first if second is product and node.op_type == "Add" else second
    return bias if bias is not None and is_weight(bias) and weight_shape(bias) == (columns,) else None


def sizes_of(split: ir.Node, columns: int) -> list[int] | None:
    """Return how many channels each part has; None where that is computed, or another axis is split."""
    whole, given = inputs_of(split, 2)
    if integer_attribute(split, "axis") not in (-1, (rank_of(whole) or 0) - 1):
        return None
    if given is None:
        parts = integer_attribute(split, "num_outputs", 1)
        each = -(-columns // parts)  # rounded up: the last part has what is left
        sizes = [each] * (parts - 1) + [columns - each * (parts - 1)]
    elif is_weight(given) and given.const_value is not None:
        sizes = [int(size) for size in given.const_value.numpy()]
    else:
        return None
    sound = len(sizes) == len(split.outputs) and sum(sizes) == columns and min(sizes) > 0
    return sizes if sound else None


def replace_part(graph: ir.Graph, fused: FusedMatMul, index: int) -> None:
    """Replace one output of the split by the product of its channels, under its name."""
    part, whole, (start, stop) = fused.split.outputs[index], fused.product.outputs[0], fused.bounds[index : index + 2]
    builder, name, dtype = NodeBuilder(graph, fused.product), f"{whole.name}.part_{index}", whole.dtype
    assert dtype is not None
    attributes = {key: attribute.value for key, attribute in fused.weight.attributes.items()}
    inputs = [sliced(builder, value, start, stop) for value in dequantize_inputs(fused.weight) if value is not None]
    weight = builder.add("DequantizeLinear", inputs, f"{name}.weight", attributes, dtype=dtype)
    made = builder.add("MatMul", [fused.product.inputs[0], weight], f"{name}.product", dtype=dtype)
    made.shape = part.shape
    if fused.bias is not None:
        bias = bias_of(fused.bias, whole, fused.bounds[-1])
        assert bias is not None
        bias = sliced(builder, bias, start, stop)
        made = builder.add(fused.bias.op_type, [made, bias], f"{name}.biased", dtype=dtype)
    part.name, made.name, made.shape = f"{name}.replaced", part.name, part.shape
    ir.convenience.replace_all_uses_with(part, made, replace_graph_outputs=True)


def sliced(builder: NodeBuilder, value: ir.Value, start: int, stop: int) -> ir.Value:
    """Return the channels of a weight from ``start`` to ``stop``; one number for all channels stays what it is."""
    assert value.const_value is not None
    if not weight_shape(value):
        return value
    return builder.weight(f"{value.name}[{start}:{stop}]", value.const_value.numpy()[..., start:stop])


def dequantize_inputs(dequantize: ir.Node) -> Sequence[ir.Value | None]:
    """Return the weight, the scale and the zero point or None of a ``DequantizeLinear``."""
    return inputs_of(dequantize, 3)
