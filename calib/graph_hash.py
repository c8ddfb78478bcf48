"""Identify a graph by a hash over what it computes, to which ranges are bound, and a node by its module's path."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

MODULE = "module"  # node metadata: the path of the PyTorch module a node comes from


def graph_sha256(model: ir.Model) -> str:
    """Hash what a graph computes: SHA-256 in hex, the same in memory and loaded, weights inside or outside the file.

    Over opsets, inputs, outputs, nodes in order (operator, attributes, names of inputs and outputs) and initializers
    (name, dtype, shape, bytes). Not over annotations: module paths, documentation, names of nodes, the producer,
    inferred shapes.
    """
    digest = hashlib.sha256()
    opsets = sorted((canonical_domain(domain), version) for domain, version in model.opset_imports.items())
    for part in (repr(opsets).encode(), *graph_parts(model.graph)):
        hash_part(digest, part)
    for function in sorted(model.functions.values(), key=lambda function: str(function.identifier())):
        for part in (repr(function.identifier()).encode(), *names_and_nodes(function)):
            hash_part(digest, part)
    return digest.hexdigest()


def hash_part(digest: Any, part: bytes | memoryview) -> None:
    """Hash a part with its length in front, so that two parts cannot pass for two others that are cut elsewhere."""
    digest.update(len(part).to_bytes(8, "little"))
    digest.update(part)


def graph_parts(graph: ir.Graph) -> Iterator[bytes | memoryview]:
    yield from names_and_nodes(graph)
    for name, initializer in sorted(graph.initializers.items()):
        yield name.encode()
        if initializer.const_value is not None:
            yield from tensor_parts(initializer.const_value)


def names_and_nodes(graph: ir.Graph | ir.Function) -> Iterator[bytes | memoryview]:
    yield repr((names(graph.inputs), names(graph.outputs))).encode()
    for node in graph:
        operator = (canonical_domain(node.domain), node.op_type, node.overload)
        yield repr((operator, names(node.inputs), names(node.outputs), sorted(node.attributes))).encode()
        for _, attribute in sorted(node.attributes.items()):
            yield from attribute_parts(attribute)


def attribute_parts(attribute: ir.Attr) -> Iterator[bytes | memoryview]:
    """Yield the attribute's type and value. A float is a float32, as in the file, and text is bytes."""
    kind, value = attribute.type, attribute.value
    yield repr((kind.name, attribute.ref_attr_name)).encode()
    if kind in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        for graph in [value] if kind == ir.AttributeType.GRAPH else value:
            yield from graph_parts(graph)
    elif kind in (ir.AttributeType.TENSOR, ir.AttributeType.TENSORS):
        for tensor in [value] if kind == ir.AttributeType.TENSOR else value:
            yield from tensor_parts(tensor)
    elif kind in (ir.AttributeType.FLOAT, ir.AttributeType.FLOATS):
        yield np.array(value, "<f4").tobytes()
    elif kind in (ir.AttributeType.STRING, ir.AttributeType.STRINGS):
        for text in [value] if isinstance(value, (str, bytes)) else value:
            yield text.encode() if isinstance(text, str) else text
    else:
        yield repr(list(value) if isinstance(value, (list, tuple)) else value).encode()


def tensor_parts(tensor: ir.TensorProtocol) -> Iterator[bytes | memoryview]:
    shape = [size if isinstance(size, int) else str(size) for size in tensor.shape]
    yield repr((tensor.dtype.name, shape)).encode()
    yield tensor.tobytes()


def names(values: Iterable[ir.Value | None]) -> list[str]:
    """Return the names; an input that is left out has the empty name, as in the file."""
    return [str(value.name or "") if value is not None else "" for value in values]


def canonical_domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain
