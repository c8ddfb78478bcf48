"""Flamingo's definition: beside GPT, ViT and CLIP, in chunks and steps, in ONNX, and what config.json may not say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, GPT2Config, GPT2LMHeadModel, ViTConfig, ViTModel

from flamingo_models import CLIP, TEXT, VIT, VOCABULARY, config_json, random_flamingo, read_config
from transom.models.flamingo import FAMILY, Flamingo, image_mask, latest_images, rows_of_images
from transom.models.weights import build_module

TASK = "image-text-to-text"
IMAGE = VOCABULARY["<image>"]
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
OTHER_BLOCKS = {"norm": "rms_norm", "mlp": "gated", "gate": "vector", "qk_layer_norms": True, "hidden_act": "silu"}
SETTINGS: dict[str, dict[str, Any]] = {  # every setting once, in front of every, every second and every third block
    "vit": {"cross_attention_every_n_layers": 1},
    "clip": {"vision_config": CLIP, "cross_attention_config": OTHER_BLOCKS, "cross_attention_every_n_layers": 2},
    "full": {
        "vision_feature_select_strategy": "full",
        "resampler_config": {"qk_layer_norms": True, "activation": "gelu"},
        "cross_attention_config": {"mlp": "gated", "gate": "vector"},
        "cross_attention_every_n_layers": 3,
    },
}
# Marks at the start, in the middle, at the end, side by side, and none at all: 0, 1 or 2 images a row
PROMPTS = torch.tensor(
    [
        [IMAGE, 3, 6, 7, 20, 4, 24, IMAGE, 9],
        [5, 33, 12, IMAGE, 3, 8, 9, 10, 4],
        [3, 6, 7, 18, 4, 25, 13, 14, 15],
        [3, IMAGE, IMAGE, 7, 18, 4, 25, 13, 11],
    ]
)
B, S = PROMPTS.shape
IMAGES = 2  # of the row that has most


def model_of(name: str, **options: Any) -> Flamingo:
    return random_flamingo(read_config(config_json(**SETTINGS[name])), **options)


@pytest.fixture(scope="module", params=SETTINGS)
def model(request: pytest.FixtureRequest) -> Flamingo:
    return model_of(request.param)


def pixels(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 20, 12, generator=torch.Generator().manual_seed(seed))


def images_of(model: Flamingo, rows: int = B, seed: int = 0) -> tuple[Tensor, ...]:
    """Return the keys and values of IMAGES random images of each row."""
    return rows_of_images(model.encode(pixels(rows * IMAGES, seed))[:-1], IMAGES)


def empty_caches(model: Flamingo, rows: int, capacity: int) -> list[Tensor]:
    text = model.config.text_config
    return [torch.zeros(rows, text.n_head, capacity, text.n_embd // text.n_head) for _ in range(2 * text.n_layer)]


def in_chunks(model: Flamingo, ids: Tensor, images: tuple[Tensor, ...], length: int) -> Tensor:
    """Return the logits of ``ids`` (B, S), read in chunks of ``length`` tokens over one cache."""
    rows, tokens = ids.shape
    seen, caches = latest_images(ids, IMAGE), empty_caches(model, rows, tokens + 2)
    logits = []
    for start in range(0, tokens, length):
        chunk = ids[:, start : start + length]
        places = torch.arange(chunk.shape[1]).expand(rows, -1)
        begin = torch.full((rows,), start)
        found, *caches = model.decode(chunk, begin, places, seen[:, start : start + length], *images, *caches)
        logits.append(found)
    return torch.cat(logits, dim=1)


# -------------------------------------------------------------------------------------------------- the two models


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("length", [S, 4, 1])
def test_with_closed_gates_the_logits_are_gpts(name: str, length: int) -> None:
    """Bit for bit, with images at the start, in the middle and none, in one piece, in chunks and in steps."""
    model = model_of(name, gates=0.0)
    ours = in_chunks(model, PROMPTS, images_of(model), length)
    caches = empty_caches(model, B, S + 2)
    theirs = []
    for start in range(0, S, length):
        chunk = PROMPTS[:, start : start + length]
        places = torch.arange(chunk.shape[1]).expand(B, -1)
        found, *caches = model.language_model(chunk, torch.full((B,), start), places, *caches)
        theirs.append(found)
    assert torch.equal(ours, torch.cat(theirs, dim=1))
    opened = model_of(name)
    assert (in_chunks(opened, PROMPTS, images_of(opened), length) - ours).abs().max() > 0.1


@pytest.mark.parametrize("tower", ["vit", "clip"])
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_the_two_models_are_transformers_own(tower: str, strategy: str, tmp_path: Path) -> None:
    """A checkpoint of transformers' weights, under its names: what the resampler reads, and the logits of texts."""
    torch.manual_seed(0)
    sizes = {name: value for name, value in VIT.items() if name != "model_type"} | {"image_size": [12, 12]}
    text = GPT2LMHeadModel(GPT2Config(**{**TEXT, "bos_token_id": 0, "eos_token_id": 0})).eval()
    theirs: Any = (
        ViTModel(ViTConfig(**sizes))
        if tower == "vit"
        else CLIPVisionModel(CLIPVisionConfig(**{**sizes, "image_size": 12}))
    )
    for parameter in (*text.parameters(), *theirs.parameters()):
        parameter.data.normal_(std=0.3)
    described = config_json(
        vision_config={
            **(VIT if tower == "vit" else CLIP),
            "image_size": [12, 12],
            "hidden_act": theirs.config.hidden_act,
            "layer_norm_eps": theirs.config.layer_norm_eps,
        },
        vision_feature_select_strategy=strategy,
    )
    config = read_config(described)
    joined = {
        name: tensor
        for name, tensor in random_flamingo(config, gates=0.0).state_dict().items()
        if not name.startswith(("language_model.", "vision_model."))
    }
    joined |= {f"language_model.{name}": tensor for name, tensor in text.state_dict().items()}
    joined |= {f"vision_model.{name}": tensor for name, tensor in theirs.state_dict().items()}
    path = tmp_path / "model.safetensors"
    save_file({name: tensor.clone().contiguous() for name, tensor in joined.items()}, path)
    ours, _ = build_module(FAMILY, config, TASK, [path])
    assert isinstance(ours, Flamingo)

    images = torch.randn(3, 3, 12, 12)
    with torch.no_grad():
        hidden = theirs.eval()(pixel_values=images).last_hidden_state
        logits = text(PROMPTS).logits
    torch.testing.assert_close(ours.features(images), hidden if strategy == "full" else hidden[:, 1:], **CLOSE)
    torch.testing.assert_close(
        ours(PROMPTS, *rows_of_images(ours.encode(torch.randn(B, 3, 12, 12))[:-1], 1)), logits, **CLOSE
    )


@pytest.mark.parametrize(("every", "layers"), [(1, (0, 1, 2)), (2, (0, 2)), (3, (0,))])
def test_blocks_stand_in_front_of_every_nth_layer(every: int, layers: tuple[int, ...]) -> None:
    config = read_config(config_json(cross_attention_every_n_layers=every))
    assert config.cross_attention_layers == layers
    model = random_flamingo(config)
    order: list[str] = []
    for name, module in model.named_modules():
        if re.fullmatch(r"(language_model\.h|cross_attention)\.\d", name):
            module.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    model(PROMPTS, *images_of(model))
    expected = []
    for layer in range(3):
        expected += [f"cross_attention.{layers.index(layer)}"] if layer in layers else []
        expected += [f"language_model.h.{layer}"]
    assert order == expected


# ----------------------------------------------------------------------------------------------------------- images


def test_the_latest_image_is_seen() -> None:
    """The mark itself sees its image; a token before all images sees none."""
    assert latest_images(PROMPTS, IMAGE).tolist() == [
        [1, 1, 1, 1, 1, 1, 1, 2, 2],
        [0, 0, 0, 1, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 0, 0, 0, 0, 0],
        [0, 1, 2, 2, 2, 2, 2, 2, 2],
    ]


def test_the_mask_of_two_images_of_two_latents() -> None:
    """Two rows in one group; a token without an image sees every column: softmax over none would be no number."""
    mask = image_mask(torch.tensor([[0, 1], [2, 1]]), torch.empty(1, 3, 2, 2, 8))
    assert mask.shape == (1, 1, 4, 4)
    assert mask[0, 0].int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 0, 0]]


def test_a_token_sees_its_image_alone(model: Flamingo) -> None:
    """What the first block adds changes for the tokens of an image that changes, and for no other, bit for bit.

    In later blocks a token knows of earlier images through the tokens behind them, by the language model's attention.
    """
    added: list[Tensor] = []
    handle = model.cross_attention[0].register_forward_hook(lambda module, inputs, output: added.append(output))
    images = images_of(model)
    model(PROMPTS, *images)
    for changed in range(IMAGES):
        others = [tensor.clone() for tensor in images]
        for tensor in others:
            tensor[:, :, changed] += 1
        model(PROMPTS, *others)
        differs = (added[-1] != added[0]).any(-1)
        assert torch.equal(differs, latest_images(PROMPTS, IMAGE) == changed + 1)
    handle.remove()


def test_tokens_before_an_image_do_not_know_of_it(model: Flamingo) -> None:
    images, others = images_of(model), images_of(model, seed=1)
    differs = (model(PROMPTS, *images) != model(PROMPTS, *others)).any(-1)
    assert torch.equal(differs, latest_images(PROMPTS, IMAGE) > 0)


def test_no_value_of_an_image_that_is_not_seen_matters(model: Flamingo) -> None:
    """Rows with fewer images than I may hold anything in the rest, and the graph is fed zeros where there is none."""
    images = images_of(model)
    none = [torch.zeros_like(tensor) for tensor in images]
    text = PROMPTS[2:3]
    alone = [tensor[2:3] for tensor in images]
    assert torch.equal(model(text, *alone), model(text, *[tensor[2:3] for tensor in none]))
    one = [tensor[1:2] for tensor in images]
    padded = [torch.cat((tensor[:, :, :1], 1e4 * tensor[:, :, 1:]), dim=2) for tensor in one]
    assert torch.equal(model(PROMPTS[1:2], *one), model(PROMPTS[1:2], *padded))
    torch.testing.assert_close(
        model(PROMPTS[1:2], *[tensor[:, :, :1] for tensor in one]), model(PROMPTS[1:2], *one), **CLOSE
    )


@pytest.mark.parametrize("length", [4, 1])
def test_chunks_and_steps_give_the_same_as_the_whole(model: Flamingo, length: int) -> None:
    images = images_of(model)
    torch.testing.assert_close(in_chunks(model, PROMPTS, images, length), model(PROMPTS, *images), **CLOSE)


def test_a_step_needs_its_latest_image_alone(model: Flamingo) -> None:
    """An image that comes later is appended; a step may be fed the latest image as its only one, counted anew."""
    images = images_of(model)
    whole = model(PROMPTS[:1], *[tensor[:1] for tensor in images])
    caches = empty_caches(model, 1, S)
    for place in range(S):
        image = 1 if place >= 7 else 0
        fed = [tensor[:1, :, image : image + 1] for tensor in images]
        step = torch.tensor([[0]])
        logits, *caches = model.decode(
            PROMPTS[:1, place : place + 1], torch.tensor([place]), step, step + 1, *fed, *caches
        )
        torch.testing.assert_close(logits[:, 0], whole[:, place], **CLOSE)


@pytest.mark.parametrize("rows", [2, 4])
def test_rows_of_a_group_share_their_images(model: Flamingo, rows: int) -> None:
    """G = B / K: row b reads the images of group b // K."""
    shared = images_of(model, B // rows)
    alone = [tensor.repeat_interleave(rows, dim=0) for tensor in shared]
    torch.testing.assert_close(model(PROMPTS, *shared), model(PROMPTS, *alone), **CLOSE)


# --------------------------------------------------------------------------------------------------------- training


def test_gradients_flow_through_whole_sequences() -> None:
    """Of the parts that learn, with the two models frozen; a closed gate lets one through to itself alone."""
    model = model_of("vit").requires_grad_(True)
    for part in (model.vision_model, model.language_model):
        part.requires_grad_(False)
    features = model.features(pixels(B * IMAGES))
    assert not features.requires_grad

    def gradients() -> dict[str, float]:
        model.zero_grad()
        states = rows_of_images(model.keys_values(model.resampler(features)), IMAGES)
        logits = model(PROMPTS, *states)
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), PROMPTS[:, 1:].flatten()).backward()
        return {
            name: 0.0 if parameter.grad is None else float(parameter.grad.abs().max())
            for name, parameter in model.named_parameters()
        }

    for name, size in gradients().items():
        assert (size > 0) == name.startswith(("resampler.", "cross_attention.")), name
    for block in model.blocks():
        block.attention_gate.data.zero_()
        block.mlp_gate.data.zero_()
    assert {name for name, size in gradients().items() if size > 0} == {
        f"cross_attention.{j}.{gate}" for j in range(3) for gate in ("attention_gate", "mlp_gate")
    }
