"""Graphs lowered to lists, and both sides' outputs: a list's in numpy, the graph's in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from operator_reference import run_operators
from transom.export.bundle_graphs import stored_graphs
from transom.export.native.lists import checked
from transom.export.native.lowering import Lowered, lower
from transom.runtime.bundle import Bundle
from transom.runtime.graph_spec import Axis, Graph, shape_of

BUNDLES = Path(__file__).parents[1] / "bundles" / "0.1.0"
Feeds = dict[str, NDArray[Any]]


def kept_graphs(name: str) -> dict[str, tuple[ir.Model, Graph]]:
    """Return the graphs of a kept bundle as the CPU gets them, and what they are, by name."""
    bundle = Bundle(str(BUNDLES / name))
    models = stored_graphs(bundle, "cpu")
    return {
        file.graph.name: (models[file.graph.name], file.graph.with_state_dtype("float32"))
        for file in bundle.manifest.graphs
    }


def axes_of(name: str) -> Mapping[str, Axis]:
    return Bundle(str(BUNDLES / name)).manifest.axes


def lowered(model: ir.Model, graph: Graph) -> Lowered:
    """Lower a graph to a list that its reader takes."""
    return checked(lower(model, graph), graph)


def random_feeds(graph: Graph, sizes: Mapping[str, int], seed: int = 0) -> Feeds:
    """Return random inputs: masks that keep the first tokens of each row, at least one, and caches that have room."""
    random = np.random.default_rng(seed)
    feeds: Feeds = {}
    new = sizes.get("T", sizes.get("S", 1))
    for tensor in graph.inputs:
        shape = shape_of(tensor, sizes)
        if tensor.dtype != "int64":
            feeds[tensor.name] = random.standard_normal(shape).astype(np.float32)
        elif tensor.name == "attention_mask":
            feeds[tensor.name] = (np.arange(shape[1]) < random.integers(1, shape[1] + 1, (shape[0], 1))).astype(
                np.int64
            )
        elif tensor.name == "write_indices":
            feeds[tensor.name] = random.integers(0, sizes["C"] - new + 1, shape)
        elif tensor.name == "logits_positions":
            feeds[tensor.name] = random.integers(0, new, shape)
        else:
            feeds[tensor.name] = random.integers(0, tensor.exclusive_max or 2, shape)
    return feeds


def weights_file(made: Lowered) -> tuple[dict[str, int], bytes]:
    """Lay the tensors of a list out as a file: their offsets and its bytes."""
    offsets, data = {}, bytearray()
    for name, weight in made.weights.items():
        data += bytes(-len(data) % 64)
        offsets[name] = len(data)
        data += weight.tensor.numpy().tobytes()
    return offsets, bytes(data)


def list_outputs(made: Lowered, feeds: Feeds) -> Feeds:
    offsets, data = weights_file(made)
    return run_operators(made.placed("model.weights", offsets), data, feeds)


def graph_outputs(model: ir.Model, feeds: Feeds) -> Feeds:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def worst_error(model: ir.Model, graph: Graph, made: Lowered, feeds: Feeds) -> float:
    """Return max|list - graph| / max|graph| over all outputs, masked tokens left out, which a list gives as zeros."""
    expected, found = graph_outputs(model, feeds), list_outputs(made, feeds)
    mask = made.operators.mask
    worst = 0.0
    for tensor in graph.outputs:
        theirs = expected[tensor.name]
        ours = found[tensor.aliases or tensor.name].reshape(theirs.shape)
        if mask is not None and (tokens := token_axis(tensor.shape, graph, mask)) is not None:
            valid = feeds[mask] != 0
            theirs, ours = (np.moveaxis(side, tokens, 1)[valid] for side in (theirs, ours))
        worst = max(worst, float(np.abs(ours - theirs).max() / np.abs(theirs).max()))
    return worst


def token_axis(shape: tuple[str | int, ...], graph: Graph, mask: str) -> int | None:
    """Return which axis of an output has tokens; None where none has."""
    tokens = graph.inputs_by_name[mask].shape[1]
    return shape.index(tokens) if tokens in shape else None
