"""Put Q/DQ around the linear layers and convolutions of an FP32 graph, with scales fixed by calibration.

``x -> QuantizeLinear -> DequantizeLinear -> MatMul <- DequantizeLinear <- W in int8``, which ONNX Runtime and
TensorRT each fuse into one integer product. There is no Q/DQ behind a layer: its sums stay in full precision, and so
do the residual stream, LayerNormalization and Softmax. Wu et al. (2020, arXiv:2004.09602), section 3.

Cases:
1. A weight becomes int8 with a scale per output channel. For int8 activations, which TensorRT takes, layers that
   share one share its int8 form. For uint8, which the CPU takes, each layer has an initializer of its own, with zero
   points that are 0: ONNX Runtime makes both unsigned where U8 x S8 would saturate, initializer by initializer, and
   without zero points fails at a weight that no integer product took. Equal bytes lie once on disk.
2. An activation gets one Q/DQ pair, which all quantised layers behind it share. High-precision layers and all other
   nodes go on reading the FP32 value.
3. ``Gemm`` becomes ``MatMul`` and ``Sub`` of the negated bias: an integer Gemm would need a quantised result, and
   of two-dimensional ``MatMul`` and ``Add`` ONNX Runtime makes a Gemm in FP32, before it looks for integers.

4. ``Conv`` keeps its attributes and its bias. For uint8 its result goes through a Q/DQ pair of its own, without which
   ONNX Runtime computes it in FP32; TensorRT needs none, and has none. ONNX Runtime makes the bias int32 in steps of
   activation scale times weight scale, and what is beyond int32 becomes any number: in a channel of small weights, as
   batch normalisation leaves dead ones. Such a channel has a weight scale in which its bias takes at most 30 bits.

Optional sites, not quantised by default:
5. "attention": query, key and value of each ``Attention``. The probabilities inside stay in full precision.
6. "residual": the two sides of each residual Add: an Add of two activations of one shape whose sum, or what a
   LayerNormalization makes of it, goes on to further layers. On Transformers this is what costs the accuracy:
   the residual stream carries outliers that int8 cannot.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from transom.calib.quantized_weights import QuantizedWeights
from transom.calib.scales import Scale
from transom.export.passes._builder import NodeBuilder, clean_up
from transom.export.passes._match import ATTENTION_INPUTS, is_weight, rank_of
from transom.export.passes.convolutions import Convolution, QuantizableLayer
from transom.export.passes.linear_layers import Linear

QdqSite = tuple[ir.Node, int]  # a node and the index of its input
OPTIONAL_SITES = ("attention", "residual")  # cases 5 and 6
LARGEST_BIAS = 2.0**30  # steps of a convolution's bias: the other half of int32 is for the products


def quantize_static(
    model: ir.Model,
    layers: Sequence[QuantizableLayer],
    weights: QuantizedWeights,
    scales: Mapping[str, Scale],
    *,
    signed: bool,
    sites: Collection[QdqSite] = (),
) -> bool:
    """Quantise ``layers`` and the optional ``sites`` of ``model`` in place; return whether anything changed.

    ``scales`` are by the name of an activation, or of the result of case 4; for int8 if ``signed``, else for uint8.
    """
    pairs: dict[str, ir.Value] = {}
    for layer in layers:
        builder = NodeBuilder(model.graph, layer.node)
        activation = qdq_pair(builder, layer.activation, scales, pairs, signed=signed)
        least = None if signed or isinstance(layer, Linear) else least_scales(layer, scales)
        weight = dequantized_weight(builder, layer, weights, least, signed=signed)
        if isinstance(layer, Convolution):
            replace_convolution(builder, layer, activation, weight, scales, signed=signed)
        else:
            replace_product(builder, layer, builder.add("MatMul", [activation, weight], name_of_product(layer)))
    for node, index in sites:
        value = node.inputs[index]
        assert value is not None
        node.replace_input_with(index, qdq_pair(NodeBuilder(model.graph, node), value, scales, pairs, signed=signed))
    clean_up(model)
    return bool(layers or sites)


def dequantized_weight(
    builder: NodeBuilder,
    layer: QuantizableLayer,
    weights: QuantizedWeights,
    least: NDArray[np.float32] | None = None,
    *,
    signed: bool,
) -> ir.Value:
    """Return the int8 weight of case 1 behind its DQ, for int8 activations if ``signed``, else for uint8.

    No scale is below those of ``least`` (N,).
    """
    stored, scale = weights.int8(layer, least)
    axis = 1  # of the output channels
    if isinstance(layer, Convolution):
        stored, axis = layer.stored_form(stored), 0
    name, result = layer.weight_name, f"{layer.node.outputs[0].name}.weight"
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
    return builder.add("DequantizeLinear", inputs, result, {"axis": axis})


def least_scales(layer: Convolution, scales: Mapping[str, Scale]) -> NDArray[np.float32] | None:
    """Return the weight scales (O,) in which the bias of case 4 fits; None without one that ONNX Runtime quantises."""
    if layer.bias is None or not is_weight(layer.bias) or layer.bias.const_value is None:
        return None
    step = scales[str(layer.activation.name)].scale
    return np.asarray(np.abs(layer.bias.const_value.numpy()) / (step * LARGEST_BIAS), np.float32)


def qdq_pair(
    builder: NodeBuilder, value: ir.Value, scales: Mapping[str, Scale], pairs: dict[str, ir.Value], *, signed: bool
) -> ir.Value:
    """Return ``value`` behind its Q/DQ pair of case 2, made once and kept in ``pairs`` by the value's name."""
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


def name_of_product(layer: QuantizableLayer) -> str:
    return f"{layer.node.outputs[0].name}.product"


def replace_product(builder: NodeBuilder, linear: Linear, product: ir.Value) -> None:
    """Replace the layer's node by ``product``, with the bias of a ``Gemm`` as in case 3."""
    if linear.bias is not None:
        product.shape = linear.node.outputs[0].shape
        operator, bias = bias_operation(builder, linear.bias)
        product = builder.add(operator, [product, bias], f"{product.name}.biased")
    builder.replace_node(product)


def replace_convolution(
    builder: NodeBuilder,
    layer: Convolution,
    activation: ir.Value,
    weight: ir.Value,
    scales: Mapping[str, Scale],
    *,
    signed: bool,
) -> None:
    """Replace the layer's node as in case 4."""
    inputs = [activation, weight, *([] if layer.bias is None else [layer.bias])]
    result = builder.add("Conv", inputs, name_of_product(layer), layer.node.attributes)
    result.shape = layer.result.shape
    if not signed:
        scale = scales[str(layer.result.name)]
        result = qdq_pair(builder, result, {str(result.name): scale}, {}, signed=False)
    builder.replace_node(result)


def bias_operation(builder: NodeBuilder, bias: ir.Value) -> tuple[str, ir.Value]:
    """Return the operator that applies a bias to a product, and its second input: case 3."""
    if not is_weight(bias) or bias.const_value is None:
        return "Add", bias
    return "Sub", builder.weight(f"{bias.name}.negated", -bias.const_value.numpy())


def optional_sites(model: ir.Model, names: Collection[str]) -> list[QdqSite]:
    """Return the float32 inputs of cases 5 and 6 that ``names``, some of OPTIONAL_SITES, ask for."""
    sites: list[QdqSite] = []
    for node in model.graph:
        if "attention" in names and node.op_type == "Attention":
            sites += [(node, index) for index in range(ATTENTION_INPUTS.index("mask"))]
        if "residual" in names and is_residual(node):
            sites += [(node, 0), (node, 1)]
    return [(node, index) for node, index in sites if is_float32(node.inputs[index])]


def is_float32(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.FLOAT


def is_residual(node: ir.Node) -> bool:
    """Return whether the node is of case 6: neither side is a weight or a position table, both have three axes."""
    if node.op_type != "Add":
        return False
    sides = [value for value in node.inputs if value is not None]
    return (
        len(sides) == 2
        and all(not is_weight(side) and side.producer() is not None and rank_of(side) == 3 for side in sides)
        and sides[0].shape == sides[1].shape
    )
