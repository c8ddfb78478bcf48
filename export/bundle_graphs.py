"""Read the ONNX graphs of a bundle: with their weights in memory, or without, for counting."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir

from transom.runtime.bundle import Bundle
from transom.runtime.errors import BundleError, one_line
from transom.runtime.manifest_graphs import NATIVE, GraphFile


def canonical_graphs(bundle: Bundle) -> dict[str, ir.Model]:
    """Return the graphs of an FP32 bundle by name, their weights in memory."""
    return stored_graphs(bundle, "default")


def stored_graphs(bundle: Bundle, variant: str) -> dict[str, ir.Model]:
    """Return the graphs of a variant by name, their weights in memory.

    Raises BundleError for a file that is no ONNX model, and for a weight that lies outside of the weights' file.
    """
    models: dict[str, ir.Model] = {}
    for file in bundle.manifest.graphs:
        name = file.file_for(variant)
        models[file.graph.name] = model = parse_graph(bundle.read(name), name)
        weights = bundle.read(file.weights) if file.weights else b""
        for weight in model.graph.initializers.values():
            if isinstance(weight.const_value, ir.ExternalTensor):
                try:
                    weight.const_value = load_external(weight.const_value, weights)
                except BundleError:
                    raise
                except Exception as error:  # numpy and onnx-ir raise what they like
                    raise no_model(name, error) from None
    return models


def open_graphs(bundle: Bundle) -> dict[str, ir.Model]:
    """Return every ONNX file of the bundle by its name; weights that lie outside of it are not read.

    Raises BundleError for a file that is no ONNX model.
    """
    names = dict.fromkeys(name for file in bundle.manifest.graphs for name in onnx_files(file))
    return {name: parse_graph(bundle.read(name), name) for name in names}


def onnx_files(file: GraphFile) -> list[str]:
    """Return the names of a graph's ONNX files: all but its list of fused operators."""
    return [name for variant, name in file.files.items() if variant != NATIVE]


def parse_graph(data: bytes, name: str) -> ir.Model:
    """Parse the ONNX file ``name``. Raises BundleError for a file that is no ONNX model."""
    try:
        return ir.from_proto(onnx.load_from_string(data))
    except Exception as error:  # protobuf and onnx-ir raise what they like
        raise no_model(name, error) from None


def no_model(name: str, error: Exception) -> BundleError:
    return BundleError(f"{name} is no ONNX model ({one_line(error)}); export the bundle again.")


def graph_file(bundle: Bundle, name: str) -> GraphFile:
    """Return the graph of that name; BundleError where the bundle has none."""
    for file in bundle.manifest.graphs:
        if file.graph.name == name:
            return file
    raise BundleError(f"bundle.json has no graph {name!r}; export the bundle again.")


def load_external(tensor: ir.ExternalTensor, weights: bytes) -> ir.TensorProtocol:
    """Return an external weight from the bytes of the bundle's weights; the path it names is not followed."""
    start, length = tensor.offset or 0, tensor.length or 0
    if start < 0 or start + length > len(weights):
        raise BundleError(f"the weight {tensor.name} lies beyond the end of the weights; export the bundle again.")
    array = np.frombuffer(weights, tensor.dtype.numpy(), tensor.size, start)
    return ir.Tensor(array.reshape(tensor.shape.numpy()), name=tensor.name)


def operator_counts(model: ir.Model) -> dict[str, int]:
    """Count the nodes of each operator, those of subgraphs too, the most frequent first.

    An operator that is not ONNX's own carries its domain: ``com.microsoft::FusedMatMul``.
    """
    names = (f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph.all_nodes())
    return dict(sorted(Counter(names).items(), key=lambda item: (-item[1], item[0])))
