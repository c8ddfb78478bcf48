"""FP32 graph -> the same graph with Q/DQ around its linear layers: scales fixed by calibration.

``x -> QuantizeLinear -> DequantizeLinear -> MatMul <- DequantizeLinear <- W in int8``, which ONNX Runtime and
TensorRT each fuse into one integer product. There is no Q/DQ behind a layer: its sums stay in full precision, and so
do the residual stream, LayerNormalization and Softmax. Wu et al. (2020, arXiv:2004.09602), section 3.

Cases:
1. A weight becomes int8 with a scale per output channel. For int8 activations, which TensorRT takes, layers that
   share one share its int8 form. For uint8, which the CPU takes, each layer has an initializer of its own, with zero
   points that are 0: ONNX Runtime makes both unsigned where U8 x S8 would saturate, initializer by initializer, and
   without zero points fails at a weight that no integer product took. Equal bytes lie once on disk.
2. An activation gets one Q/DQ pair, which all quantised layers behind it share. Layers that are kept, and
   everybody else, go on reading the FP32 value.
3. ``Gemm`` becomes ``MatMul`` and ``Sub`` of the negated bias: an integer Gemm would need a quantised result, and
   of two-dimensional ``MatMul`` and ``Add`` ONNX Runtime makes a Gemm in FP32, before it looks for integers.
4. Asked for, further activations get their pair where one reader takes them: the operands of attention, the
   two sides of a residual Add.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from transom.calib.scales import Scale
from transom.export.passes._builder import NodeBuilder, drop_unused
from transom.export.passes.linear_layers import Linear, is_weight
from transom.export.quantization.weights import QuantizedWeights

QdqSite = tuple[ir.Node, int]  # a node and the number of its input


def quantize_static(
    model: ir.Model,
    linears: Sequence[Linear],
    weights: QuantizedWeights,
    scales: Mapping[str, Scale],
    *,
    signed: bool,
    places: Collection[QdqSite] = (),
) -> bool:
    """Rewrite ``model`` in place; True if anything changed. ``linears`` are those to quantise.

    ``scales`` are by the activation's name, for int8 if ``signed``, else for uint8. ``places`` are of case 4.
    """
    pairs: dict[str, ir.Value] = {}
    for linear in linears:
        builder = NodeBuilder(model.graph, linear.node)
        activation = quantized_pair(builder, linear.activation, scales, pairs, signed=signed)
        weight = dequantized_weight(builder, linear, weights, signed=signed)
        replace_product(builder, linear, builder.add("MatMul", [activation, weight], f"{name_of_product(linear)}"))
    for node, index in places:
        value = node.inputs[index]
        assert value is not None
        node.replace_input_with(
            index, quantized_pair(NodeBuilder(model.graph, node), value, scales, pairs, signed=signed)
        )
    drop_unused(model)
    model.graph.sort()
    return bool(linears or places)


def dequantized_weight(builder: NodeBuilder, linear: Linear, weights: QuantizedWeights, *, signed: bool) -> ir.Value:
    """Case 1: the int8 weight behind its DQ, for products with int8 activations if ``signed``, else with uint8."""
    stored, scale = weights.int8(linear)
    name, result = linear.weight_name, f"{linear.node.outputs[0].name}.weight"
    if signed:
        inputs = [builder.weight(f"{name}.int8", stored), builder.weight(f"{name}.scale", scale)]
    else:
        own = builder.unused(name, ".int8")
        zeros = np.zeros(len(scale), np.int8)
        inputs = [
            builder.weight(f"{own}.int8", stored),
            builder.weight(f"{name}.scale", scale),
            builder.weight(f"{own}.int8_zero", zeros),
        ]
    return builder.add("DequantizeLinear", inputs, result, {"axis": 1})


def quantized_pair(
    builder: NodeBuilder, value: ir.Value, scales: Mapping[str, Scale], pairs: dict[str, ir.Value], *, signed: bool
) -> ir.Value:
    """Case 2: the value behind its Q/DQ pair."""
    name = str(value.name)
    if name not in pairs:
        found = scales[name]
        integer = np.int8 if signed else np.uint8
        scale = builder.weight(f"{name}.quantization_scale", np.array(found.scale, np.float32))
        zero = builder.weight(f"{name}.zero_point", np.array(found.zero_point, integer))
        dtype = ir.DataType.INT8 if signed else ir.DataType.UINT8
        quantized = builder.add("QuantizeLinear", [value, scale, zero], f"{name}.quantized", dtype=dtype)
        pairs[name] = builder.add("DequantizeLinear", [quantized, scale, zero], f"{name}.dequantized")
        quantized.shape = pairs[name].shape = value.shape
    return pairs[name]


def name_of_product(linear: Linear) -> str:
    return f"{linear.node.outputs[0].name}.product"


def replace_product(builder: NodeBuilder, linear: Linear, product: ir.Value) -> None:
    """``product`` in place of the layer's own; case 3 where it is a ``Gemm`` with a bias."""
    if linear.bias is not None:
        product.shape = linear.node.outputs[0].shape
        operator, bias = addend(builder, linear.bias)
        product = builder.add(operator, [product, bias], f"{product.name}.biased")
    builder.replace_node(product)


def addend(builder: NodeBuilder, bias: ir.Value) -> tuple[str, ir.Value]:
    """Case 3: what is done to the product, and with what."""
    if not is_weight(bias) or bias.const_value is None:
        return "Add", bias
    return "Sub", builder.weight(f"{bias.name}.negated", -bias.const_value.numpy())
