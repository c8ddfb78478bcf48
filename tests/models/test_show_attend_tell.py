"""Show, Attend and Tell's definition beside the paper's equations, written out in numpy and torch.nn."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from decoder_definitions import assert_close
from transom.export.onnx_export import onnx_from_module
from transom.models.family import Source
from transom.models.show_attend_tell import (
    FAMILY,
    Convolutions,
    ShowAttendTell,
    ShowAttendTellConfig,
    config_from_source,
    doubly_stochastic_penalty,
)
from transom.models.weights import build_module
from transom.runtime.errors import CheckpointError

SMALL = ShowAttendTellConfig(
    image_size=(20, 28),
    depths=(1, 2, 1),
    hidden_sizes=(5, 6, 7),
    decoder_vocab_size=11,
    embedding_size=9,
    decoder_hidden_size=13,
    attention_size=8,
    max_target_positions=17,
)
B, L, D, A, H, V = 3, 5 * 7, 7, 8, 13, 11


def config_of(asked: tuple[int, int] | None = None, **fields: Any) -> ShowAttendTellConfig:
    return config_from_source(Source(fields, frozenset(), "image-to-text", {}, asked))


@pytest.fixture(scope="module")
def model() -> ShowAttendTell:
    torch.manual_seed(0)
    made = ShowAttendTell(SMALL, "image-to-text").eval().requires_grad_(False)
    for parameter in made.parameters():
        parameter.normal_(std=0.4)
    return made


def inputs_of(graph: Any, seed: int) -> list[torch.Tensor]:
    """Random inputs of a graph for B rows."""
    torch.manual_seed(seed)
    shapes = [[{"B": B, "T": 1}.get(size, size) for size in tensor.shape] for tensor in graph.inputs]
    return [
        torch.randint(0, V, shape) if tensor.dtype == "int64" else torch.randn(shape)
        for tensor, shape in zip(graph.inputs, shapes, strict=True)
    ]


# ------------------------------------------------------------------------------------------------ the encoder


def test_the_default_is_vgg_with_14x14_annotations_of_512() -> None:
    config = config_of()
    assert config == ShowAttendTellConfig()
    assert config.grid == (14, 14)
    with torch.device("meta"):
        convolutions = Convolutions(config)
        assert convolutions(torch.empty(2, 3, 224, 224)).shape == (2, 512, 14, 14)
    assert sum(isinstance(module, nn.Conv2d) for module in convolutions.modules()) == 16  # VGG-19 without its 3 dense
    encoder, decoder = FAMILY.graphs(config, "image-to-text")
    assert {tensor.name: tensor.shape for tensor in encoder.outputs} == {
        "cross_key": ("B", 196, 512),
        "cross_value": ("B", 196, 512),
        "hidden_state.0": ("B", 1800),
        "cell_state.0": ("B", 1800),
    }
    assert decoder.outputs[1].shape == ("B", "T", 196)


def test_the_encoder_equals_torch_nn(model: ShowAttendTell) -> None:
    """Annotations are the cells of the last feature map, row by row; the states come from their mean."""
    stages = model.encoder.convolutions.stages
    relu, pool = nn.ReLU(), nn.MaxPool2d(2)
    net = nn.Sequential(
        stages[0][0], relu, pool, stages[1][0], relu, stages[1][1], relu, pool, stages[2][0], relu
    )  # fmt: skip
    (pixels,) = inputs_of(FAMILY.graphs(SMALL, "")[0], seed=1)
    keys, values, hidden, cell = model.encode(pixels)
    assert (keys.shape, values.shape, hidden.shape, cell.shape) == ((B, L, A), (B, L, D), (B, H), (B, H))
    features = net(pixels)
    assert features.shape == (B, D, 5, 7)
    for row, column in ((0, 0), (0, 6), (3, 2), (4, 6)):
        assert_close(values[:, row * 7 + column], features[:, :, row, column])
    mean = features.mean((2, 3))
    assert_close(hidden, torch.tanh(mean @ model.encoder.hidden_state.weight.T + model.encoder.hidden_state.bias))
    assert_close(cell, torch.tanh(mean @ model.encoder.cell_state.weight.T + model.encoder.cell_state.bias))
    assert_close(keys, values @ model.decoder.attention.key.weight.T + model.decoder.attention.key.bias)


# ------------------------------------------------------------------------------------------------ a step


def a_step(w: dict[str, np.ndarray], token: int, keys: Any, values: Any, hidden: Any, cell: Any) -> tuple[Any, ...]:
    """Compute a step for one row by the paper's equations, in FP64: logits, weights, next state and cell."""
    scores = np.array(
        [w["attention.score.weight"][0] @ np.tanh(w["attention.query.weight"] @ hidden + key) for key in keys]
    )
    weights = np.exp(scores) / np.exp(scores).sum()
    beta = 1 / (1 + math.exp(-(w["gate.weight"][0] @ hidden + w["gate.bias"][0])))  # section 4.2.1
    context = beta * sum(weight * value for weight, value in zip(weights, values, strict=True))
    embedded = w["embed_tokens.weight"][token]
    lstm = nn.LSTMCell(9 + D, H, dtype=torch.float64)
    lstm.weight_ih.data, lstm.bias_ih.data = (torch.tensor(w[f"cell.input.{part}"]) for part in ("weight", "bias"))
    lstm.weight_hh.data, lstm.bias_hh.data = (torch.tensor(w[f"cell.hidden.{part}"]) for part in ("weight", "bias"))
    given = torch.tensor(np.concatenate((embedded, context)))
    with torch.no_grad():
        moved, kept = (state.numpy() for state in lstm(given, (torch.tensor(hidden), torch.tensor(cell))))
    read = embedded + w["hidden_readout.weight"] @ moved + w["hidden_readout.bias"]
    logits = w["lm_head.weight"] @ (read + w["context_readout.weight"] @ context) + w["lm_head.bias"]  # equation 7
    return logits, weights, moved, kept


def test_a_step_equals_the_papers_equations(model: ShowAttendTell) -> None:
    weights = {name: tensor.double().numpy() for name, tensor in model.decoder.state_dict().items()}
    tokens, *state = inputs_of(FAMILY.graphs(SMALL, "")[1], seed=2)
    found = model.decode(tokens, *state)
    assert [tensor.shape for tensor in found] == [(B, 1, V), (B, 1, L), (B, H), (B, H)]
    rows = [
        a_step(weights, int(token), *(tensor[row].double().numpy() for tensor in state))
        for row, token in enumerate(tokens)
    ]
    for ours, theirs in zip(found, map(np.stack, zip(*rows, strict=True)), strict=True):
        assert_close(ours.reshape(theirs.shape), torch.from_numpy(theirs).float())


def test_the_penalty_by_hand() -> None:
    """The first place is seen 0.75 + 0.5 times, the second 0.25 + 0.5 times: 0.25^2 + 0.25^2."""
    weights = torch.tensor([[[0.75, 0.25], [0.5, 0.5]]]).repeat(3, 1, 1)
    words = torch.tensor([[True, True], [True, False], [False, False]])
    # With one word: (1 - 0.75)^2 + (1 - 0.25)^2. With none, every place is unseen.
    assert doubly_stochastic_penalty(weights, words).tolist() == [0.125, 0.625, 2.0]


# ------------------------------------------------------------------------------------------------ the graphs


@pytest.mark.parametrize("number", [0, 1], ids=["encoder", "decoder"])
def test_onnx_equals_pytorch(model: ShowAttendTell, number: int) -> None:
    graph = FAMILY.graphs(SMALL, "image-to-text")[number]
    module = FAMILY.parts(model)[graph.name]
    traced = onnx_from_module(module, graph, FAMILY.axes(SMALL))
    session = onnxruntime.InferenceSession(ir.to_proto(traced).SerializeToString())
    given = inputs_of(graph, seed=3)
    feeds = {tensor.name: value.numpy() for tensor, value in zip(graph.inputs, given, strict=True)}
    found = session.run([tensor.name for tensor in graph.outputs], feeds)
    for ours, theirs in zip(found, module(*given), strict=True):
        assert ours.shape == theirs.shape
        assert_close(torch.from_numpy(ours), theirs)


def test_every_product_of_a_step_can_be_integers(model: ShowAttendTell) -> None:
    """Query, gate, both of the cell, both read-outs, the head; the score of each place; the weighted sum."""
    decoder = FAMILY.graphs(SMALL, "image-to-text")[1]
    traced = onnx_from_module(FAMILY.parts(model)["decoder"], decoder, FAMILY.axes(SMALL))
    kinds = [node.op_type for node in traced.graph]
    assert (kinds.count("Gemm"), kinds.count("MatMul")) == (7, 2)
    assert not {"LSTM", "GRU", "RNN", "Einsum"} & set(kinds)


# ------------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_checkpoint_is_read_back(model: ShowAttendTell, tmp_path: Path, prefix: str) -> None:
    stored = {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}
    save_file(stored, tmp_path / "model.safetensors")
    built, left_out = build_module(FAMILY, SMALL, "image-to-text", [tmp_path / "model.safetensors"])
    assert left_out == []
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in built.state_dict().items())
    assert FAMILY.options(built) == {"max_target_positions": 17}


def test_sizes_are_read_from_config_json() -> None:
    config = config_of(image_size=[20, 28], depths=[1, 2, 1], hidden_sizes=[5, 6, 7], decoder_vocab_size=11)
    assert (config.image_size, config.depths, config.hidden_sizes) == ((20, 28), (1, 2, 1), (5, 6, 7))
    assert (config.decoder_vocab_size, config.embedding_size) == (11, 512)
    assert config_of(image_size=48).image_size == (48, 48)


def test_an_image_size_that_is_asked_for(model: ShowAttendTell) -> None:
    """No weight depends on it; there are as many annotations as cells."""
    config = config_of((8, 36), depths=[1, 2, 1], hidden_sizes=[5, 6, 7])
    assert (config.image_size, config.grid) == ((8, 36), (2, 9))
    assert FAMILY.graphs(config, "image-to-text")[0].outputs[1].shape == ("B", 18, 7)
    assert model.encode(torch.zeros(1, 3, 8, 36))[1].shape == (1, 18, 7)


STAGES = "expected a list of integers in 1.."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": 3}, f"depths is 3, {STAGES}1000, one for each stage"),
        ({"depths": []}, f"depths is [], {STAGES}1000"),
        ({"depths": None}, f"depths is None, {STAGES}1000"),
        ({"depths": [2, 0]}, f"depths is [2, 0], {STAGES}1000"),
        ({"depths": [2, 1001]}, f"depths is [2, 1001], {STAGES}1000"),
        ({"depths": [True, 2]}, f"depths is [True, 2], {STAGES}1000"),
        ({"hidden_sizes": [64, 1.5]}, f"hidden_sizes is [64, 1.5], {STAGES}2147483647"),
        ({"hidden_sizes": "64"}, f"hidden_sizes is '64', {STAGES}2147483647"),
        ({"hidden_sizes": [64, -1]}, f"hidden_sizes is [64, -1], {STAGES}2147483647"),
        ({"depths": [1, 1]}, "depths has 2 stages and hidden_sizes 5; expected a number for each stage in both"),
        ({"depths": [999, 1, 1, 1, 1]}, "depths has 1003 convolutions, expected at most 1000"),
        ({"image_size": 100}, "image_size is 100x100; 5 stages need a multiple of 16"),
        ({"image_size": [224, 8]}, "image_size is 224x8; 5 stages need a multiple of 16"),
        ({"image_size": [224]}, "image_size is [224], expected one or two integers"),
        ({"decoder_vocab_size": 0}, "decoder_vocab_size is 0, expected an integer in 1.."),
        ({"decoder_hidden_size": "13"}, "decoder_hidden_size is '13'"),
        ({"attention_size": 8.0}, "attention_size is 8.0"),
        ({"max_target_positions": 1_000_001}, "max_target_positions is 1000001, expected 2..1000000"),
    ],
    ids=str,
)
def test_configs_that_cannot_be_used(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        config_of(**changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_image_size_that_cannot_be_halved() -> None:
    with pytest.raises(CheckpointError, match="the image size asked for is 230x224; 5 stages need a multiple of 16"):
        config_of((230, 224))
