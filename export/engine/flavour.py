"""TensorRT's flavour of a bundle's graphs: standard operators, so that ONNX Runtime runs the very same file."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from transom.export.engine.profiles import cache_sizes
from transom.export.passes.decompose_attention import decompose_attention
from transom.export.passes.fixed_axes import fix_axes
from transom.export.quantization.stored import stored_graphs
from transom.runtime.bundle import Bundle
from transom.runtime.inputs import is_decoder


@dataclass(frozen=True)
class TensorRTGraph:
    """A graph for TensorRT's builder, and what its builder is to make of it."""

    model: ir.Model

    @property
    def operators(self) -> dict[str, str]:
        """The operator of each node, by its name."""
        return {str(node.name): node.op_type for node in self.model.graph}

    @property
    def integer_products(self) -> tuple[str, ...]:
        """The products of two dequantised tensors, by the name of the node: to be products of integers."""
        return tuple(
            str(node.name)
            for node in self.model.graph
            if node.op_type in ("MatMul", "Gemm") and all(is_dequantized(value) for value in node.inputs[:2])
        )

    def serialized(self) -> bytes:
        data: bytes = ir.to_proto(self.model).SerializeToString()
        return data


def is_dequantized(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == "DequantizeLinear"


def tensorrt_graphs(bundle: Bundle) -> dict[str, TensorRTGraph]:
    """The graphs of the file for TensorRT, by name, rewritten where its builder asks for it.

    A KV cache gets its greatest length, for TensorRT writes into no other; attention in FP32 is written out, for it has
    no kernel of it. Everything else stays as it ships.
    """
    models = stored_graphs(bundle, "default")
    for file in bundle.manifest.graphs:
        model = models[file.graph.name]
        if is_decoder(file.graph):
            fix_axes(model, cache_sizes(file.graph, bundle.manifest.axes))
        if in_fp32(model):
            decompose_attention(model)
    return {name: TensorRTGraph(model) for name, model in models.items()}


def in_fp32(model: ir.Model) -> bool:
    """Whether attention computes in FP32."""
    queries = [node.inputs[0] for node in model.graph if node.op_type == "Attention"]
    return any(query is not None and query.dtype == ir.DataType.FLOAT for query in queries)
