"""Graphs of a few nodes for the tests of the passes: written out, run, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from transom.calib.histogram import Histogram
from transom.runtime.backends.ort import session_entries
from transom.runtime.graph_spec import Graph
from transom.runtime.manifest_graphs import PRODUCTS, GraphFile

Float = NDArray[np.float32]


def graph_of(text: str, weights: Mapping[str, Any] | None = None, paths: Sequence[str] = ()) -> ir.Model:
    """A graph in ONNX's own textual form, with ``weights`` by name; its nodes in order come from modules ``paths``."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23]>\n{text}')
    for name, array in (weights or {}).items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array, np.float32), name))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    for node, path in zip(model.graph, paths, strict=False):
        node.metadata_props["module"] = path
    return model


def normal(*shape: int, seed: int = 0) -> Float:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def run(
    model: ir.Model, optimized: Path | None = None, *, integers: str = PRODUCTS, **feeds: Any
) -> dict[str, NDArray[Any]]:
    """Its outputs by ONNX Runtime on the CPU, which may write down what it made of the graph.

    ``integers`` is the runtime's word for what a session makes of Q/DQ pairs: SIMULATED for int8 activations.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    for key, setting in session_entries(GraphFile(Graph("g", (), ()), {}, None, integers=integers), "cpu").items():
        options.add_session_config_entry(key, setting)
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found = session.run(names, {name: np.asarray(feed, np.float32) for name, feed in feeds.items()})
    return dict(zip(names, found, strict=True))


def operators(model: ir.Model | Path) -> Counter[str]:
    """How many nodes there are of each operator."""
    if isinstance(model, Path):
        return Counter(node.op_type for node in onnx.load(str(model), load_external_data=False).graph.node)
    return Counter(node.op_type for node in model.graph)


def weights_of(model: ir.Model) -> dict[str, NDArray[Any]]:
    return {
        name: value.const_value.numpy()
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }


def histogram_of(*arrays: Any) -> Histogram:
    found = Histogram()
    for array in arrays:
        found.update(np.asarray(array, np.float32))
    return found


def relative_error(ours: NDArray[Any], exact: NDArray[Any]) -> float:
    """||ours - exact|| / ||exact||."""
    return float(np.linalg.norm(ours - exact) / np.linalg.norm(exact))
