"""An integer product that is cut into parts -> a product for each part: TensorRT makes no integers of the one.

``Split(MatMul(x, W) + b)``, query, key and value in one product, is what GPT-2 has. TensorRT cuts such a product
into three itself, and dequantises the weight on the way. Cut here, every part is a product of integers, and each
channel keeps the integers and the scale that it had.

Cases:
1. ``MatMul`` of a dequantised activation and a dequantised int8 weight (K, N), its scale and zero point one per
   channel or one for all, and behind it nothing but a ``Split`` of the last axis, by ``num_outputs`` or by sizes
   that are a weight.
2. A bias of N elements between the two, in an ``Add`` or a ``Sub``, is cut as well.
3. A part that nobody reads is not computed.

Everything else stays as it is: a product that somebody reads whole, one in floating point, a cut along another axis
or of computed sizes, a weight quantised in blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import onnx_ir as ir

from transom.export.passes._builder import NodeBuilder, drop_unused, is_unused
from transom.export.passes.linear_layers import is_weight

OPERANDS = 3  # of DequantizeLinear: weight, scale, and a zero point or none


@dataclass(frozen=True, eq=False)
class CutProduct:
    """A product of case 1, the ``DequantizeLinear`` of its weight, the node of case 2 if there is one, and the cut.

    The parts lie between neighbours of ``bounds``: 0, ..., N.
    """

    product: ir.Node
    weight: ir.Node
    bias: ir.Node | None
    split: ir.Node
    bounds: tuple[int, ...]


def split_fused_matmul(model: ir.Model) -> int:
    """Rewrite every such product of ``model`` in place; how many there were."""
    found = [cut for cut in map(cut_product, model.graph) if cut is not None]
    for cut in found:
        for index, part in enumerate(cut.split.outputs):
            if not is_unused(part):  # case 3
                write_part(model.graph, cut, index)
        for node in (cut.split, cut.bias, cut.product):
            if node is not None:
                model.graph.remove(node, safe=True)
    for weight in {cut.weight for cut in found}:
        if is_unused(weight.outputs[0]):
            model.graph.remove(weight, safe=True)
    if found:
        drop_unused(model)
    return len(found)


def cut_product(node: ir.Node) -> CutProduct | None:
    """Case 1, found by its ``MatMul``."""
    if node.domain or node.op_type != "MatMul":
        return None
    activation, weight = (dequantize_of(value) for value in node.inputs)
    columns = columns_of(weight) if weight is not None else None
    if activation is None or weight is None or columns is None:
        return None
    reader, bias = only_reader(node.outputs[0]), None
    if reader is not None and bias_of(reader, node.outputs[0], columns) is not None:
        bias, reader = reader, only_reader(reader.outputs[0])
    if reader is None or reader.domain or reader.op_type != "Split":
        return None
    sizes = sizes_of(reader, columns)
    return None if sizes is None else CutProduct(node, weight, bias, reader, (0, *accumulate(sizes)))


def columns_of(dequantize: ir.Node) -> int | None:
    """N of an int8 weight (K, N) whose scale and zero point can be cut with it."""
    stored, *rest = operands(dequantize)
    if stored is None or any(value is not None and not is_weight(value) for value in (stored, *rest)):
        return None
    if stored.dtype != ir.DataType.INT8 or len(shape_of(stored)) != 2:
        return None
    columns = shape_of(stored)[1]
    allowed = [(), (columns,)] if number(dequantize, "axis", 1) in (1, -1) else [()]
    return columns if all(value is None or shape_of(value) in allowed for value in rest) else None


def bias_of(node: ir.Node, product: ir.Value, columns: int) -> ir.Value | None:
    """Case 2: what the node adds to the product, or takes from it."""
    if node.domain or node.op_type not in ("Add", "Sub"):
        return None
    first, second = node.inputs
    bias = first if second is product and node.op_type == "Add" else second
    return bias if bias is not None and is_weight(bias) and shape_of(bias) == (columns,) else None


def sizes_of(split: ir.Node, columns: int) -> list[int] | None:
    """How many channels each part has; None where that is computed, or another axis is cut."""
    whole, given = [*split.inputs, None][:2]
    axes = len(whole.shape) if whole is not None and whole.shape is not None else 0
    if number(split, "axis") not in (-1, axes - 1):
        return None
    if given is None:
        parts = number(split, "num_outputs", 1)
        each = -(-columns // parts)  # rounded up: the last part has what is left
        sizes = [each] * (parts - 1) + [columns - each * (parts - 1)]
    elif is_weight(given) and given.const_value is not None:
        sizes = [int(size) for size in given.const_value.numpy()]
    else:
        return None
    sound = len(sizes) == len(split.outputs) and sum(sizes) == columns and min(sizes) > 0
    return sizes if sound else None


def write_part(graph: ir.Graph, cut: CutProduct, index: int) -> None:
    """The product of one part's channels, in its place and under its name."""
    part, whole, (start, stop) = cut.split.outputs[index], cut.product.outputs[0], cut.bounds[index : index + 2]
    builder, name, dtype = NodeBuilder(graph, cut.product), f"{whole.name}.part_{index}", whole.dtype
    assert dtype is not None
    attributes = {key: attribute.value for key, attribute in cut.weight.attributes.items()}
    cuts = [sliced(builder, value, start, stop) for value in operands(cut.weight) if value is not None]
    weight = builder.add("DequantizeLinear", cuts, f"{name}.weight", attributes, dtype=dtype)
    made = builder.add("MatMul", [cut.product.inputs[0], weight], f"{name}.product", dtype=dtype)
    made.shape = part.shape
    if cut.bias is not None:
        bias = bias_of(cut.bias, whole, cut.bounds[-1])
        assert bias is not None
        made = builder.add(cut.bias.op_type, [made, sliced(builder, bias, start, stop)], f"{name}.biased", dtype=dtype)
    part.name, made.name, made.shape = f"{name}.replaced", part.name, part.shape
    ir.convenience.replace_all_uses_with(part, made, replace_graph_outputs=True)


def sliced(builder: NodeBuilder, value: ir.Value, start: int, stop: int) -> ir.Value:
    """The channels of a weight from ``start`` to ``stop``; a number for all of them stays what it is."""
    assert value.const_value is not None
    if not shape_of(value):
        return value
    return builder.weight(f"{value.name}[{start}:{stop}]", value.const_value.numpy()[..., start:stop])


def only_reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads the value, once, where the value does not leave the graph besides."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def dequantize_of(value: ir.Value | None) -> ir.Node | None:
    """The ``DequantizeLinear`` that made the value."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == "DequantizeLinear" and not node.domain else None


def operands(dequantize: ir.Node) -> Sequence[ir.Value | None]:
    return [*dequantize.inputs, None][:OPERANDS]


def shape_of(weight: ir.Value) -> tuple[int, ...]:
    assert weight.const_value is not None
    return tuple(int(size) for size in weight.const_value.shape.numpy())


def number(node: ir.Node, name: str, default: int = 0) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()
