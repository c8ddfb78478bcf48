"""Write a small ONNX model whose integer sums are known: onnx itself is no library of the runtime.

``x -> QuantizeLinear -> DequantizeLinear -> MatMul <- DequantizeLinear <- w in int8``, as the INT8 graphs for the CPU
have it, so ONNX Runtime makes the same operator of it. All scales are 1 and all zero points 0, so the float32 result
is the integer sum. Field numbers are those of ``onnx/onnx.proto``, wire types those of Protocol Buffers' encoding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from transom.runtime.graph_spec import Graph, Tensor
from transom.runtime.manifest_graphs import GraphFile

IR_VERSION, OPSET = 10, 21
FLOAT, UINT8, INT8, INT_ATTRIBUTE = 1, 2, 3, 2  # TensorProto.DataType, AttributeProto.AttributeType
DTYPES = {np.dtype(np.float32): FLOAT, np.dtype(np.uint8): UINT8, np.dtype(np.int8): INT8}

K, N = 64, 32  # two full vectors of AVX2 along the sum, four across it
LARGEST_ACTIVATION, LARGEST_WEIGHT = 255, 127


def known_product() -> tuple[bytes, NDArray[np.float32], NDArray[np.float32]]:
    """Return a model ``y = x w``, an input x float32 (8, K), and what y must be, float32 (8, N).

    The first row is the extreme: every product is 255 x 127 or its negative, and two of them do not fit in 16 bits.
    The sums stay below 2^24, so float32 holds them exactly.
    """
    weights = np.full((K, N), LARGEST_WEIGHT, np.int8)
    weights[:, 1::2] = -LARGEST_WEIGHT
    rows = LARGEST_ACTIVATION - np.arange(8, dtype=np.int64)[:, None] * np.arange(K)  # 255, then falling ever steeper
    activations = np.maximum(rows, 0)
    return qdq_model(weights), activations.astype(np.float32), (activations @ weights).astype(np.float32)


def doubling() -> tuple[GraphFile, bytes]:
    """Return a graph ``y = x + x`` of one float32 vector and its ONNX file: what any device computes, to try one."""
    vectors = [Tensor(name, "float32", (4,)) for name in ("x", "y")]
    parts = (field(1, node("Add", ["x", "x"], "y")), field(2, "doubling"))
    model = onnx_model(b"".join((*parts, field(11, value("x", [4])), field(12, value("y", [4])))))
    return GraphFile(Graph("doubling", (vectors[0],), (vectors[1],)), {"default": "doubling.onnx"}, None), model


def qdq_model(weights: NDArray[np.int8]) -> bytes:
    """Serialise the model for ``weights``, int8 (K, N)."""
    k, n = weights.shape
    nodes = (
        node("QuantizeLinear", ["x", "one", "zero"], "q"),
        node("DequantizeLinear", ["q", "one", "zero"], "d"),
        node("DequantizeLinear", ["w", "ones"], "f", axis=1),
        node("MatMul", ["d", "f"], "y"),
    )
    initializers = (
        tensor("w", weights),
        tensor("ones", np.ones(n, np.float32)),
        tensor("one", np.array(1, np.float32)),
        tensor("zero", np.array(0, np.uint8)),
    )
    graph = b"".join(
        (
            *(field(1, each) for each in nodes),
            field(2, "known_sum"),
            *(field(5, each) for each in initializers),
            field(11, value("x", ["M", k])),
            field(12, value("y", ["M", n])),
        )
    )
    return onnx_model(graph)


def onnx_model(graph: bytes) -> bytes:
    """Serialise a ModelProto of a serialised GraphProto."""
    return field(1, IR_VERSION) + field(7, graph) + field(8, field(2, OPSET))


def node(operator: str, inputs: Sequence[str], output: str, **attributes: int) -> bytes:
    """Serialise a NodeProto with one output and integer attributes."""
    made = (field(1, name) + field(3, number) + field(20, INT_ATTRIBUTE) for name, number in attributes.items())
    return b"".join(
        (
            *(field(1, name) for name in inputs),
            field(2, output),
            field(4, operator),
            *(field(5, attribute) for attribute in made),
        )
    )


def tensor(name: str, array: NDArray[np.generic]) -> bytes:
    """Serialise a TensorProto."""
    little_endian = array.astype(array.dtype.newbyteorder("<")).tobytes()
    sizes = b"".join(field(1, size) for size in array.shape)
    return sizes + field(2, DTYPES[array.dtype]) + field(8, name) + field(9, little_endian)


def value(name: str, shape: Sequence[str | int]) -> bytes:
    """Serialise a ValueInfoProto of float32."""
    sizes = b"".join(field(1, field(2 if isinstance(size, str) else 1, size)) for size in shape)
    return field(1, name) + field(2, field(1, field(1, FLOAT) + field(2, sizes)))


def field(number: int, content: int | str | bytes) -> bytes:
    """Serialise one field: a number as a varint, text and messages with their length."""
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    data = content.encode() if isinstance(content, str) else content
    return varint(number << 3 | 2) + varint(len(data)) + data


def varint(number: int) -> bytes:
    """Serialise a number of at least 0, seven bits a byte, the lowest first."""
    low, rest = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])
