"""Quantise the activations of linear layers while a graph runs, token by token (per-token dynamic quantisation).

A row is one token's features. Its scale is its own largest absolute value over 127, so that no other row, no
neighbour in the batch and no padding can change its result. The product runs on uint8 (zero point 128)
times int8, and the row's scale multiplies the sums. ``DynamicQuantizeLinear`` would take one scale for the whole
tensor.

Cases:
1. A weight becomes int8 with a scale per output channel, as in the static pass for uint8.
2. An activation is quantised once for all layers that read it, each row in steps of its scale: one ``QuantizeLinear``
   whose blocks are the rows, instead of ``Div`` and one of the whole tensor. Zero points are one per row then, too,
   which activations of one shape share. What follows takes the integers in steps of 1.
3. ``Gemm`` becomes ``MatMul`` and its bias, as in the static pass.
4. What a ``Relu`` gave is its own magnitude.

A row of zeros has the scale 0. Its quotients are NaN, and which integers they become is not defined; whatever they are,
their sums times 0 are 0. A bound from below would cost a node for each activation, 0.2 ms of a decoder's step.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import onnx_ir as ir

from transom.calib.quantized_weights import QuantizedWeights
from transom.export.passes._builder import NodeBuilder, clean_up
from transom.export.passes._match import made_by, rank_of, size_along
from transom.export.passes.linear_layers import Linear
from transom.export.passes.qdq_static import dequantized_weight, name_of_product, replace_product

LEVELS = 127.0  # 1..255 around the zero point 128


def quantize_dynamic(model: ir.Model, linears: Sequence[Linear], weights: QuantizedWeights) -> bool:
    """Quantise ``linears`` of ``model`` in place; return whether anything changed."""
    rows: dict[str, tuple[ir.Value, ir.Value]] = {}
    zero_points: dict[Hashable, ir.Value] = {}
    for linear in linears:
        builder = NodeBuilder(model.graph, linear.node)
        value = linear.activation
        if value.name not in rows:
            rows[str(value.name)] = quantized_rows(builder, linear, zero_points)
        activation, scale = rows[str(value.name)]
        weight = dequantized_weight(builder, linear, weights, signed=False)
        product = builder.add("MatMul", [activation, weight], name_of_product(linear))
        replace_product(builder, linear, builder.add("Mul", [product, scale], f"{product.name}.scaled"))
    clean_up(model)
    return bool(linears)


def quantized_rows(
    builder: NodeBuilder, linear: Linear, zero_points: dict[Hashable, ir.Value]
) -> tuple[ir.Value, ir.Value]:
    """Return case 2: the rows in units of their scales, through uint8, and the scales (..., 1).

    ``zero_points`` has what was made so far, by the sizes of the axes in front of the features.
    """
    value, (features, _) = linear.activation, linear.kernel_shape
    name = value.name
    last = builder.weight("row_axis", np.array([-1], np.int64))
    levels = builder.weight("row_levels", np.array(1 / LEVELS, np.float32))
    one = builder.weight("row_unit", np.array(1, np.float32))
    zero = builder.weight("row_zero_point", np.array(128, np.uint8))
    positive = made_by(value, "Relu") is not None  # case 4
    magnitude = value if positive else builder.add("Abs", [value], f"{name}.abs")
    largest = builder.add("ReduceMax", [magnitude, last], f"{name}.row_max", {"keepdims": 1})
    scale = builder.add("Mul", [largest, levels], f"{name}.row_scale")
    if value.shape is not None:
        largest.shape = scale.shape = ir.Shape([*value.shape[:-1], 1])
    rows = row_sizes(value)
    if rows not in zero_points:
        shape = builder.add("Shape", [scale], f"{name}.rows", dtype=ir.DataType.INT64)
        zero_points[rows] = builder.add("Expand", [zero, shape], f"{name}.row_zero_points", dtype=ir.DataType.UINT8)
    quantized = builder.add(
        "QuantizeLinear",
        [value, scale, zero_points[rows]],
        f"{name}.quantized",
        {"axis": -1, "block_size": features},
        dtype=ir.DataType.UINT8,
    )
    units = builder.add("DequantizeLinear", [quantized, one, zero], f"{name}.dequantized")
    units.shape = quantized.shape = magnitude.shape = value.shape
    return units, scale


def row_sizes(value: ir.Value) -> Hashable:
    """Return the sizes of all axes but the last, numbers or names; ``value`` itself where one has neither."""
    sizes = tuple(size_along(value, axis) for axis in range(max(rank_of(value) or 0, 1) - 1))
    return sizes if rank_of(value) is not None and None not in sizes else value
