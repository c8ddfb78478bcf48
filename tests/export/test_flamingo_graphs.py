"""Flamingo's two graphs in ONNX Runtime beside PyTorch: every axis open, one Attention for each attention."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from flamingo_models import CLIP, config_json, random_flamingo, read_config
from transom.export.checkpoint import with_bounds
from transom.export.onnx_export import example_sizes, onnx_from_module
from transom.models.flamingo import FAMILY
from transom.runtime.errors import ExportError
from transom.runtime.graph_spec import Axis, Graph, Tensor

TASK = "image-text-to-text"
SETTINGS: dict[str, dict[str, Any]] = {
    "vit": {"text_config": {"n_layer": 2}, "vision_config": {"num_hidden_layers": 1}},  # one block for two layers
    "clip": {
        "text_config": {"n_layer": 1},
        "cross_attention_every_n_layers": 1,
        "vision_config": CLIP,
        "vision_feature_select_strategy": "full",
        "cross_attention_config": {"norm": "rms_norm", "mlp": "gated", "gate": "vector", "qk_layer_norms": True},
    },
}
SIZES = [  # G groups of K rows, I images, S new tokens, C of the cache, P logits
    {"G": 1, "K": 1, "I": 1, "S": 1, "C": 1, "P": 1},
    {"G": 1, "K": 4, "I": 1, "S": 1, "C": 9, "P": 1},
    {"G": 2, "K": 2, "I": 3, "S": 5, "C": 11, "P": 5},
    {"G": 16, "K": 1, "I": 6, "S": 2, "C": 7, "P": 1},
    {"G": 3, "K": 5, "I": 2, "S": 7, "C": 80, "P": 3},
    {"G": 1, "K": 1, "I": 6, "S": 80, "C": 80, "P": 80},
]
Arrays = dict[str, NDArray[Any]]


class Graphs:
    """A random model's two graphs, in PyTorch and in ONNX Runtime."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        config = read_config(config_json(**settings))
        model, axes = random_flamingo(config), FAMILY.axes(config)
        self.layers, self.blocks = config.text_config.n_layer, len(config.cross_attention_layers)
        self.vision_layers = config.vision_config.num_hidden_layers
        self.modules = FAMILY.parts(model)
        self.specs = {graph.name: graph for graph in FAMILY.graphs(config, TASK)}
        self.models = {name: onnx_from_module(self.modules[name], spec, axes) for name, spec in self.specs.items()}
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # of caches that are copied
        self.sessions = {
            name: onnxruntime.InferenceSession(ir.to_proto(found).SerializeToString(), options)
            for name, found in self.models.items()
        }

    def in_torch(self, name: str, feeds: Arrays) -> list[NDArray[Any]]:
        outputs = self.modules[name](*(torch.from_numpy(array.copy()) for array in feeds.values()))
        return [output.numpy() for output in outputs]

    def in_onnx(self, name: str, feeds: Arrays) -> list[NDArray[Any]]:
        return self.sessions[name].run(None, feeds)  # type: ignore[no-any-return]


@pytest.fixture(scope="module", params=SETTINGS)
def graphs(request: pytest.FixtureRequest) -> Graphs:
    return Graphs(SETTINGS[request.param])


def decoder_feeds(graph: Graph, sizes: Mapping[str, int], seed: int = 0) -> Arrays:
    """Return random tokens over random caches; each token sees one of the images or none."""
    random = np.random.default_rng(seed)
    named = {**sizes, "B": sizes["G"] * sizes["K"]}
    bounds = {
        "write_indices": sizes["C"] - sizes["S"] + 1,
        "logits_positions": sizes["S"],
        "image_indices": sizes["I"] + 1,
    }
    feeds: Arrays = {}
    for tensor in graph.inputs:
        shape = tuple(named[size] if isinstance(size, str) else size for size in tensor.shape)
        below = bounds.get(tensor.name, tensor.exclusive_max)
        floats = tensor.dtype == "float32"
        feeds[tensor.name] = (
            random.standard_normal(shape).astype(np.float32) if floats else random.integers(0, below, shape)
        )
    return feeds


def pixels(count: int) -> Arrays:
    return {"pixel_values": np.random.default_rng(count).standard_normal((count, 3, 20, 12)).astype(np.float32)}


def require_close(ours: list[NDArray[Any]], theirs: list[NDArray[Any]]) -> None:
    for found, expected in zip(ours, theirs, strict=True):
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("count", [1, 3, 16])
def test_the_encoder_computes_what_pytorch_does(graphs: Graphs, count: int) -> None:
    feeds = pixels(count)
    require_close(graphs.in_onnx("encoder", feeds), graphs.in_torch("encoder", feeds))


@pytest.mark.parametrize("sizes", SIZES)
def test_the_decoder_computes_what_pytorch_does(graphs: Graphs, sizes: dict[str, int]) -> None:
    feeds = decoder_feeds(graphs.specs["decoder"], sizes)
    require_close(graphs.in_onnx("decoder", feeds), graphs.in_torch("decoder", feeds))


def test_an_image_has_the_same_bits_beside_others(graphs: Graphs) -> None:
    feeds = pixels(5)
    together = graphs.in_onnx("encoder", feeds)
    for row in range(5):
        alone = graphs.in_onnx("encoder", {name: array[row : row + 1] for name, array in feeds.items()})
        for found, expected in zip(alone, together, strict=True):
            np.testing.assert_array_equal(found[0], expected[row])


@pytest.mark.parametrize("tokens", [1, 4])
def test_a_row_has_the_same_bits_beside_others(graphs: Graphs, tokens: int) -> None:
    sizes = {"G": 5, "K": 1, "I": 3, "S": tokens, "C": 12, "P": tokens}
    feeds = decoder_feeds(graphs.specs["decoder"], sizes)
    together = graphs.in_onnx("decoder", feeds)
    for row in range(5):
        alone = graphs.in_onnx("decoder", {name: array[row : row + 1] for name, array in feeds.items()})
        for found, expected in zip(alone, together, strict=True):
            np.testing.assert_array_equal(found[0], expected[row])


def test_every_attention_is_one_node(graphs: Graphs) -> None:
    """Those of the vision model, two of the resampler; the language model's and each cross-attention."""
    counts = {name: Counter(node.op_type for node in model.graph) for name, model in graphs.models.items()}
    assert counts["encoder"]["Attention"] == graphs.vision_layers + 2
    assert counts["decoder"]["Attention"] == graphs.layers + graphs.blocks
    assert counts["decoder"]["TensorScatter"] == 2 * graphs.layers  # caches of text; those of images are read only
    assert not {"Softmax", "IsNaN", "Loop", "If"} & {*counts["encoder"], *counts["decoder"]}


def test_the_states_between_the_graphs(graphs: Graphs) -> None:
    """An image's keys and values leave the encoder with an axis along which the decoder's are joined."""
    encoder, decoder = graphs.specs["encoder"], graphs.specs["decoder"]
    names = [f"image_{kind}.{j}" for j in range(graphs.blocks) for kind in ("key", "value")]
    assert [tensor.name for tensor in encoder.outputs] == [*names, "image_hidden_states"]
    made = {tensor.name: tensor for tensor in encoder.outputs if tensor.state}
    read = {tensor.name: tensor for tensor in decoder.inputs if "I" in tensor.shape}
    assert list(made) == list(read) == names
    for name in names:
        assert made[name] == Tensor(name, "float32", ("B", 4, 1, 5, 8), state=True)
        assert read[name] == Tensor(name, "float32", ("G", 4, "I", 5, 8), default=0, state=True)
    assert [tensor.name for tensor in decoder.inputs[:4]] == [
        "input_ids",
        "write_indices",
        "logits_positions",
        "image_indices",
    ]
    assert decoder.inputs[3] == Tensor("image_indices", "int64", ("B", "S"), default=0)
    assert not {output.aliases for output in decoder.outputs} & set(names)


# ------------------------------------------------------------------------------------------------------- its axes


def graph_of(*shapes: tuple[str, ...]) -> Graph:
    return Graph("decoder", tuple(Tensor(f"x{i}", "float32", shape) for i, shape in enumerate(shapes)), ())


def test_the_batch_is_traced_as_a_multiple_of_the_groups() -> None:
    groups = Axis(1, 1, 16, same_as="B", divides="B")
    axes = {"B": Axis(1, 1, 16), "S": Axis(1, 8, 64), "I": Axis(1, 1, 8), "G": groups}
    assert example_sizes(graph_of(("B", "S"), ("G", "I")), axes) == {"I": 2, "G": 3, "B": 6, "S": 4}
    assert example_sizes(graph_of(("B", "S")), axes) == {"B": 2, "S": 3}
    single = {**axes, "B": Axis(1, 1, 1), "G": Axis(1, 1, 1, same_as="B", divides="B")}
    assert example_sizes(graph_of(("B", "S"), ("G", "I")), single) == {"B": 1, "G": 1, "I": 2, "S": 3}


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({}, {"B": 16, "G": 16, "I": 6}),
        ({"B": 4}, {"B": 4, "G": 4, "I": 6}),
        ({"B": 100, "I": 50}, {"B": 100, "G": 100, "I": 50}),
        ({"B": 8, "G": 2}, {"B": 8, "G": 2, "I": 6}),
        ({"B": 4, "G": 16, "I": 1}, {"B": 4, "G": 4, "I": 1}),
    ],
)
def test_groups_follow_the_rows(asked: dict[str, int], found: dict[str, int]) -> None:
    """Of images memory alone sets a bound, as of rows; there are no more groups than rows."""
    axes = with_bounds(FAMILY.axes(read_config(config_json())), asked)
    assert {name: axes[name].max for name in ("B", "G", "I")} == found
    with pytest.raises(ExportError, match=r"--max I=0 is out of range; this model allows 1..65536"):
        with_bounds(axes, {"I": 0})


def test_one_row_of_one_image_at_most_is_traced() -> None:
    """--max B=1: rows and groups are constants of the graph."""
    config = read_config(config_json(text_config={"n_layer": 1}, cross_attention_every_n_layers=1))
    axes = with_bounds(FAMILY.axes(config), {"B": 1, "I": 1})
    _, spec = FAMILY.graphs(config, TASK)
    model = onnx_from_module(FAMILY.parts(random_flamingo(config))["decoder"], spec, axes)
    shapes = {value.name: tuple(value.shape or ()) for value in model.graph.inputs}
    assert shapes["image_key.0"] == (1, 4, 1, 5, 8)
