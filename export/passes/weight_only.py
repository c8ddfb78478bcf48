"""Store the weights of linear layers as integers of 8 or 4 bits in blocks, the activations in FP32 (weight-only).

A decode step reads every weight once for one row: its time is that of the memory, so smaller weights are faster
weights. ``com.microsoft.MatMulNBits`` reads them as they are; activations stay in FP32 at its edges.

Cases:
1. A linear layer becomes ``MatMulNBits``; layers that share a weight share its blocks.
2. The bias of a ``Gemm`` becomes its last input, that of a ``MatMul`` stays an Add.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from transom.calib.quantized_weights import QuantizedWeights
from transom.export.passes._builder import NodeBuilder, clean_up
from transom.export.passes.linear_layers import Linear
from transom.export.passes.qdq_static import name_of_product

DOMAIN = "com.microsoft"
INT8_PRODUCTS = 4  # accuracy_level: rows are rounded to 8 bits block by block inside the kernel, each by itself


def quantize_weights(
    model: ir.Model, linears: Sequence[Linear], weights: QuantizedWeights, bits: int, block_size: int
) -> bool:
    """Quantise the weights of ``linears`` of ``model`` in place; return whether anything changed."""
    for linear in linears:
        builder = NodeBuilder(model.graph, linear.node)
        blocks, scales = weights.blocks(linear, bits, block_size)
        name = linear.weight_name
        K, N = linear.kernel_shape
        inputs: list[ir.Value | None] = [
            linear.activation,
            builder.weight(f"{name}.int{bits}", blocks),
            builder.weight(f"{name}.scales", scales.reshape(-1)),
        ]
        if linear.bias is not None:
            inputs += [None, None, linear.bias]
        attributes = {"K": K, "N": N, "bits": bits, "block_size": block_size, "accuracy_level": INT8_PRODUCTS}
        product = builder.add("MatMulNBits", inputs, name_of_product(linear), attributes, domain=DOMAIN)
        builder.replace_node(product)
    if linears:
        model.graph.opset_imports[DOMAIN] = 1
    clean_up(model)
    return bool(linears)
