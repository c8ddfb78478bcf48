"""Flamingo's checkpoints: which weights are read, what the bundle is told, and what config.json may not say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flamingo_models import CLIP, TEXT, VIT, VOCABULARY, config_json, random_flamingo, read_config, write_flamingo
from transom.models.flamingo import FAMILY, Flamingo
from transom.models.weights import build_module
from transom.runtime.errors import CheckpointError

TASK = "image-text-to-text"
IMAGE = VOCABULARY["<image>"]


def test_a_written_checkpoint_is_read(tmp_path: Path) -> None:
    folder = write_flamingo(tmp_path, gates=0.5)
    found, left_out = build_module(FAMILY, read_config(config_json()), TASK, [folder / "model.safetensors"])
    assert left_out == []
    stored = load_file(folder / "model.safetensors")
    assert stored.keys() == dict(found.named_parameters()).keys()
    tanh = float(np.float32(np.tanh(0.5)))
    options = FAMILY.options(found)
    assert options["gates"] == [[pytest.approx(tanh)] * 2] * 2
    assert {name: value for name, value in options.items() if name != "gates"} == {
        "image_token_id": IMAGE,
        "question_template": "Question: {} Answer:",
        "caption_template": "Caption:",
        "example_template": "Question: {} Answer: {}\n",
    }


def test_a_vector_of_gates_is_told_by_its_mean() -> None:
    model = random_flamingo(read_config(config_json(cross_attention_config={"gate": "vector"})))
    gate = next(model.blocks()).attention_gate
    gate.copy_(torch.linspace(-1, 1, len(gate)))
    assert FAMILY.options(model)["gates"][0][0] == pytest.approx(float(torch.tanh(gate).abs().mean()))
    assert FAMILY.options(model)["gates"][0][0] > 0.1


def test_weights_that_nothing_reads_are_left_out(tmp_path: Path) -> None:
    """A pooler and a classifier of the vision encoder, causal masks and a tied head of the language model."""
    folder = write_flamingo(tmp_path)
    path = folder / "model.safetensors"
    stored = load_file(path)
    extra = {
        "vision_model.pooler.dense.weight": torch.ones(2, 2),
        "vision_model.classifier.bias": torch.ones(2),
        "language_model.h.0.attn.bias": torch.ones(1, 1, 80, 80),
        "language_model.lm_head.weight": stored["language_model.wte.weight"].clone(),
    }
    save_file({**stored, **extra}, path)
    assert sorted(build_module(FAMILY, read_config(config_json()), TASK, [path])[1]) == sorted(extra)
    save_file({**stored, **extra, "language_model.lm_head.weight": torch.ones(35, 24)}, path)
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from language_model.wte.weight"):
        build_module(FAMILY, read_config(config_json()), TASK, [path])


@pytest.mark.parametrize("vision", [VIT, CLIP])
def test_another_image_size_resizes_the_positions(vision: dict[str, Any], tmp_path: Path) -> None:
    folder = write_flamingo(tmp_path, vision_config=vision)
    config = read_config(config_json(vision_config=vision), (28, 16))
    found, _ = build_module(FAMILY, config, TASK, [folder / "model.safetensors"])
    assert isinstance(found, Flamingo)
    assert found.features(torch.randn(1, 3, 28, 16)).shape == (1, 7 * 4, 18)
    encoder, _ = FAMILY.graphs(config, TASK)
    assert encoder.inputs[0].shape == ("B", 3, 28, 16)


@pytest.mark.parametrize(
    ("part", "settings", "weights"),
    [
        ("vision_config", {"hidden_size": 24}, ["resampler.latents", "cross_attention.0.attention.k_proj.weight"]),
        (
            "text_config",
            {"n_embd": 26},
            ["cross_attention.0.attention.q_proj.weight", "cross_attention.1.mlp_norm.bias"],
        ),
    ],
)
def test_parts_that_disagree_about_width(
    part: str, settings: dict[str, Any], weights: list[str], tmp_path: Path
) -> None:
    """One model is of another width than what was trained beside it: each weight that does not fit is named."""
    folder = write_flamingo(tmp_path)
    path = folder / "model.safetensors"
    prefix = {"vision_config": "vision_model.", "text_config": "language_model."}[part]
    config = read_config(config_json(**{part: settings}))
    other = random_flamingo(config).state_dict()
    save_file(
        {name: other[name] if name.startswith(prefix) else tensor for name, tensor in load_file(path).items()}, path
    )
    with pytest.raises(CheckpointError) as caught:
        build_module(FAMILY, config, TASK, [path])
    for name in weights:
        assert f"{name} has shape" in str(caught.value)
    assert f"{prefix}" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text_config": {"model_type": "llama"}}, "text_config has model_type 'llama', expected 'gpt2'"),
        ({"text_config": None}, "text_config is None, expected an object"),
        (
            {"text_config": {"n_head": 5}},
            "text_config of config.json cannot be used: n_embd 24 is no multiple of n_head",
        ),
        ({"vision_config": {"model_type": "siglip"}}, "model_type 'siglip', expected 'vit' or 'clip_vision_model'"),
        ({"vision_config": "vit"}, "vision_config is 'vit', expected an object"),
        ({"vision_config": {"hidden_size": 19}}, "vision_config of config.json cannot be used: hidden_size 19 is no"),
        ({"vision_config": {**CLIP, "hidden_size": 19}}, "config.json: vision_config cannot be used: hidden_size 19"),
        ({"resampler_config": []}, "resampler_config is [], expected an object"),
        ({"resampler_config": {"depth": 0}}, "resampler_config cannot be used: depth is 0, expected an integer in 1"),
        ({"resampler_config": {"activation": "softplus"}}, "activation is 'softplus', expected one of gelu,"),
        ({"cross_attention_config": {"head_dim": -8}}, "cross_attention_config cannot be used: head_dim is -8"),
        (
            {"cross_attention_config": {"norm": "batch_norm"}},
            "norm is 'batch_norm', expected 'layer_norm' or 'rms_norm'",
        ),
        ({"cross_attention_config": {"mlp": "moe"}}, "mlp is 'moe', expected 'dense' or 'gated'"),
        ({"cross_attention_config": {"gate": ["float"]}}, "gate is ['float'], expected 'float' or 'vector'"),
        ({"vision_feature_select_strategy": "cls"}, "strategy is 'cls', expected 'default' or 'full'"),
        ({"image_token_id": 35}, "image_token_id is 35, expected a token in 0..34, text_config's"),
        ({"image_token_id": -1}, "image_token_id is -1, expected a token in 0..34"),
        ({"image_token_id": None}, "image_token_id is None, expected a token in 0..34"),
        ({"max_images": 0}, "max_images is 0, expected an integer in 1.."),
        ({"cross_attention_every_n_layers": 4}, "every_n_layers is 4, but text_config has n_layer 3; expected at most"),
        ({"cross_attention_every_n_layers": 0}, "every_n_layers is 0, expected an integer in 1..1000"),
        ({"question_template": "Question:"}, "question_template is 'Question:', expected a text with one {}"),
        ({"question_template": "{} {}"}, "question_template is '{} {}', expected a text with one {}"),
        ({"question_template": "{} {0}"}, "question_template is '{} {0}', expected a text with one {}"),
        ({"question_template": None}, "question_template is None, expected a text with one {}"),
        ({"caption_template": "Caption {}:"}, "caption_template is 'Caption {}:', expected a text without braces"),
        ({"caption_template": 7}, "caption_template is 7, expected a text without braces"),
        ({"caption_template": ""}, "caption_template is '', expected a text without braces"),
        ({"caption_template": "\ud800"}, "caption_template is '\\ud800', expected a text without braces"),
        ({"resampler_config": {"depth": 1001}}, "depth is 1001, expected an integer in 1..1000"),
        ({"example_separator": "}"}, "example_separator is '}', expected a text without braces"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_config(config_json(**settings))
    assert message in str(caught.value)


def test_heads_whose_product_no_memory_holds() -> None:
    config = read_config(config_json(cross_attention_config={"num_heads": 2**31 - 1, "head_dim": 2**31 - 1}))
    with pytest.raises(CheckpointError, match=r"config.json asks for a weight that no memory holds \(Storage size"):
        build_module(FAMILY, config, TASK, [])


def test_sizes_that_are_left_out() -> None:
    """MLPs are four times as wide as what they work on, the rest as documented."""
    config = read_config(
        {
            "text_config": TEXT,
            "vision_config": VIT,
            "resampler_config": {},
            "cross_attention_config": {},
            "image_token_id": 0,
        }
    )
    assert config.resampler_config.intermediate_size == 4 * 18
    assert config.cross_attention_config.intermediate_size == 4 * 24
    assert (config.resampler_config.num_latents, config.cross_attention_config.num_heads) == (64, 8)
    assert (config.max_images, config.cross_attention_every_n_layers) == (8, 1)
    assert config.question_template.format("how many?") == "Question: how many? Answer:"
    axes = FAMILY.axes(config)
    assert (axes["I"].min, axes["I"].max) == (1, 8)
    assert (axes["G"].same_as, axes["G"].divides) == ("B", "B")
    json.dumps(FAMILY.options(random_flamingo(config)))
