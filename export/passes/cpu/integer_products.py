"""Make one integer product of each quantised linear layer, with its bias inside.

ONNX Runtime makes ``MatMulIntegerToFloat`` of ``DequantizeLinear -> MatMul <- DequantizeLinear`` when it loads a graph,
and leaves the bias an ``Add`` of its own. Written here, the operator adds the bias while it scales its sums: one pass
less over the result. And a ``Gelu`` behind it stays one: of Add and Gelu ONNX Runtime makes ``BiasGelu``, which takes
1.3 times as long as Gelu alone.

Cases:
1. ``x -> QuantizeLinear -> DequantizeLinear -> MatMul <- DequantizeLinear <- W`` becomes the operator: uint8 of one
   scale times int8 (K, N) of a scale per column, scales and zero points constant.
2. The ``Add`` of a constant (N,) that alone reads the product becomes the operator's bias. So does ``Sub``, as which
   the bias of a ``Gemm`` is written, negated. Where something else reads the product too, or the bias is computed or
   of another shape, the node stays.
3. Zero points of W that are all 0 become one scalar: a vector of them costs a product of one row 8 %. It is not left
   out: without one, ONNX Runtime does not make the weights unsigned where U8 x S8 saturates. Each layer has its own,
   as in ``qdq_static``.
4. In a decoder, the ``Mul`` behind a product of dynamic activations by its rows' scales (..., M, 1) becomes the
   operator's scale of x: one node less, which counts where there is one row. Many rows are multiplied faster by a
   ``Mul``, which has several threads, so graphs without a cache keep it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from transom.export.passes._builder import NodeBuilder
from transom.export.passes._match import is_standard, is_weight, made_by, only_reader, rank_of, size_along, weight_shape
from transom.export.passes.weight_only import DOMAIN
from transom.runtime.feeds import WRITE_INDICES

OPERATOR = "MatMulIntegerToFloat"
X_SCALE, WEIGHT_SCALE, WEIGHT_ZERO, BIAS = 2, 3, 5, 6  # indices of its inputs


def write_integer_products(model: ir.Model) -> int:
    """Apply the cases to ``model`` in place; return how many products were made."""
    found = [(node, operands(node)) for node in model.graph if is_standard(node, "MatMul")]
    products = [(node, inputs) for node, inputs in found if inputs is not None]
    decodes = any(value.name == WRITE_INDICES for value in model.graph.inputs)
    for node, inputs in products:
        scaled = scaled_rows(node, inputs[X_SCALE]) if decodes else None
        write_product(model.graph, node, inputs, scaled)
    return len(products)


def operands(matmul: ir.Node) -> list[ir.Value] | None:
    """Return the operator's inputs without the bias in case 1; None for any other product."""
    left, right = (dequantized(value) for value in matmul.inputs)
    if left is None or right is None:
        return None
    (x, x_scale, x_zero), (weight, scale, zero) = left, right
    if x.dtype != ir.DataType.UINT8 or weight.dtype != ir.DataType.INT8 or not is_weight(weight):
        return None
    columns = weight_shape(weight)[1:]
    if weight_shape(x_scale) or len(columns) != 1 or weight_shape(scale) != columns:
        return None
    return [x, weight, x_scale, scale, x_zero, zero]


def dequantized(value: ir.Value | None) -> list[ir.Value] | None:
    """Return the three inputs of the ``DequantizeLinear`` behind a value; None where its last two are not constant."""
    node = made_by(value, "DequantizeLinear")
    inputs = [] if node is None else [each for each in node.inputs if each is not None]
    return inputs if len(inputs) == 3 and is_weight(inputs[1]) and is_weight(inputs[2]) else None


def scaled_rows(matmul: ir.Node, unit: ir.Value) -> tuple[ir.Node, ir.Value] | None:
    """Return the ``Mul`` of case 4 and the scales; None for any other use of a product in steps of ``unit``."""
    result, reader = matmul.outputs[0], only_reader(matmul.outputs[0])
    if reader is None or not is_standard(reader, "Mul") or unit.const_value is None or unit.const_value.numpy() != 1:
        return None
    scale = next((value for value in reader.inputs if value is not None and value is not result), None)
    rank = rank_of(scale) or 0
    if scale is None or scale.dtype != ir.DataType.FLOAT or rank < 2 or size_along(scale, rank - 1) != 1:
        return None
    rows, known = ([size_along(value, axis) for axis in range(rank - 1)] for value in (scale, matmul.inputs[0]))
    return (reader, scale) if None not in rows and rows == known and rank_of(matmul.inputs[0]) == rank else None


def write_product(
    graph: ir.Graph, matmul: ir.Node, inputs: list[ir.Value], scaled: tuple[ir.Node, ir.Value] | None
) -> None:
    """Replace a product of case 1, with its zero points of case 3, and its bias of case 2 or ``scaled`` of case 4."""
    builder = NodeBuilder(graph, matmul)
    inputs[WEIGHT_ZERO] = scalar_zero(builder, inputs[WEIGHT_ZERO])
    result = matmul.outputs[0]
    if scaled is not None:
        multiply, inputs[X_SCALE] = scaled
        builder = NodeBuilder(graph, multiply)  # behind the scales
        builder.replace_node(builder.add(OPERATOR, inputs, f"{result.name}.integers", domain=DOMAIN))
        graph.remove(matmul, safe=True)
        return
    reader = only_reader(result)
    bias = None if reader is None else bias_of(builder, reader, result, weight_shape(inputs[WEIGHT_SCALE]))
    name = f"{result.name}.integers"
    if reader is None or bias is None:
        builder.replace_node(builder.add(OPERATOR, inputs, name, domain=DOMAIN))
        return
    product = builder.add(OPERATOR, [*inputs, bias], name, domain=DOMAIN)
    NodeBuilder(graph, reader).replace_node(product)
    graph.remove(matmul, safe=True)


def bias_of(builder: NodeBuilder, node: ir.Node, product: ir.Value, shape: tuple[int, ...]) -> ir.Value | None:
    """Return the bias, of ``shape``, that ``node`` adds to ``product`` in case 2; None for any other node."""
    if not is_standard(node, "Add", "Sub"):
        return None
    left, right = node.inputs
    bias = right if left is product else left
    if bias is None or not is_weight(bias) or bias.const_value is None:
        return None
    if bias.dtype != ir.DataType.FLOAT or weight_shape(bias) != shape:
        return None
    if node.op_type == "Add":
        return bias
    return builder.weight(f"{bias.name}.bias", -bias.const_value.numpy()) if left is product else None


def scalar_zero(builder: NodeBuilder, zero: ir.Value) -> ir.Value:
    """Return the zero points as case 3 has them, in an initializer of this layer alone."""
    assert zero.const_value is not None
    if zero.const_value.numpy().any():
        return zero
    own = builder.unused(str(zero.name), ".scalar")
    return builder.weight(f"{own}.scalar", np.array(0, np.int8))
