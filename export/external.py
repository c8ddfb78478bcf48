"""Weights out of the ONNX file and into one file beside it, shared by the variants of a graph."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import onnx_ir as ir

EXTERNAL_ABOVE = 256 << 20  # bytes of weights; protobuf ends at 2 GiB and is parsed as a whole
SMALLEST = 1024  # bytes; scalars and shapes stay in the graph, where shape inference can see them
ALIGNMENT = 64  # bytes: a cache line


def weight_bytes(model: ir.Model) -> int:
    """Size of all weights in bytes."""
    return sum(w.const_value.nbytes for w in model.graph.initializers.values() if w.const_value is not None)


def externalize(models: Sequence[ir.Model], location: str) -> bytes:
    """Point the models' weights at ``location`` and return that file's bytes; equal weights are stored once."""
    blob = bytearray()
    places: dict[bytes, tuple[int, int]] = {}
    for model in models:
        for name, weight in model.graph.initializers.items():
            tensor = weight.const_value
            if tensor is None or tensor.nbytes < SMALLEST:
                continue
            data = tensor.tobytes()
            key = hashlib.sha256(data).digest()
            if key not in places:
                blob += bytes(-len(blob) % ALIGNMENT)
                places[key] = (len(blob), len(data))
                blob += data
            offset, length = places[key]
            weight.const_value = ir.ExternalTensor(
                location, offset, length, tensor.dtype, shape=ir.Shape(tensor.numpy().shape), name=name, base_dir=""
            )
    return bytes(blob)
