"""CLIP's definition against transformers': same weights, same inputs, FP32, awkward sizes; and its graphs."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from transom.export.checkpoint import load_checkpoint
from transom.export.onnx_export import onnx_from_module
from transom.export.variants import make_variants
from transom.models.clip import TEXT_SIZES, tower
from transom.runtime.errors import CheckpointError

WORST = 1e-5  # max|ours - theirs| / max|theirs|
EOS = 517
MakeCheckpoint = Callable[..., Path]


def load(folder: Path, image_size: tuple[int, int] | None = None) -> Any:
    return load_checkpoint(str(folder), task=None, max_sizes={}, image_size=image_size, ignore_unused=False)


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """The folder with its config.json edited."""
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def texts(B: int, S: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids that end at different places, the rest padding; the last row is full and has no end."""
    torch.manual_seed(S)
    ids, mask = torch.randint(2, 516, (B, S)), torch.ones(B, S, dtype=torch.long)
    for row in range(B - 1):
        end = min(row * 3, S - 1)
        ids[row, end:], mask[row, end + 1 :] = EOS, 0
    return ids, mask


def worst_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def compare_with_transformers(folder: Path, image_size: tuple[int, int] | None = None, S: int = 13) -> None:
    """Vectors of both towers, and the logits between them."""
    theirs, loaded = transformers.CLIPModel.from_pretrained(folder), load(folder, image_size)
    ids, mask = texts(5, S)
    pixels = torch.randn(3, 3, *(image_size or (20, 20)))
    with torch.no_grad():
        expected = theirs(
            input_ids=ids, attention_mask=mask, pixel_values=pixels, interpolate_pos_encoding=image_size is not None
        )
        parts = loaded.parts()
        (image,), (text,) = parts["image"](pixels), parts["text"](ids, mask)
    assert worst_error(image, expected.image_embeds) <= WORST
    assert worst_error(text, expected.text_embeds) <= WORST
    assert worst_error(loaded.options["logit_scale"] * image @ text.T, expected.logits_per_image) <= WORST
    assert torch.allclose(text.norm(dim=1), torch.ones(5))


@pytest.mark.parametrize("S", [1, 13, 23])
@pytest.mark.parametrize("eos", [EOS, 2], ids=["by-token", "by-largest-id"])
def test_equals_transformers_in_both_conventions_of_pooling(make_checkpoint: MakeCheckpoint, eos: int, S: int) -> None:
    def edit(config: dict[str, Any]) -> None:
        config["text_config"]["eos_token_id"] = eos

    compare_with_transformers(change(make_checkpoint("CLIPModel"), edit), S=S)


def test_where_a_text_ends(make_checkpoint: MakeCheckpoint) -> None:
    ids = torch.tensor([[516, 5, 517, 517], [516, 517, 7, 517], [516, 5, 6, 7], [4, 4, 3, 3]])
    ends = load(make_checkpoint("CLIPModel")).module.text_model.ends(ids)
    assert ends.flatten().tolist() == [2, 1, 0, 0]  # the first end-of-text token, else position 0
    old = change(make_checkpoint("CLIPModel"), lambda config: config["text_config"].update(eos_token_id=2))
    assert load(old).module.text_model.ends(ids).flatten().tolist() == [2, 1, 0, 0]  # the first of the largest id


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_activations(make_checkpoint: MakeCheckpoint, activation: str) -> None:
    def edit(config: dict[str, Any]) -> None:
        config["text_config"]["hidden_act"] = config["vision_config"]["hidden_act"] = activation

    compare_with_transformers(change(make_checkpoint("CLIPModel"), edit))


def test_another_image_size(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("CLIPModel")
    compare_with_transformers(folder, (28, 28))
    exact = {"do_center_crop": False, "size": {"height": 20, "width": 20}}  # a crop has no other proportions
    (folder / "preprocessor_config.json").write_text(json.dumps(exact))
    compare_with_transformers(folder, (12, 24))


def test_what_older_files_store(make_checkpoint: MakeCheckpoint) -> None:
    """Position ids among the weights, and a scale of shape (1,)."""
    folder = make_checkpoint("CLIPModel")
    weights = load_file(folder / "model.safetensors")
    expected = math.exp(float(weights["logit_scale"]))
    weights["logit_scale"] = weights["logit_scale"].reshape(1)
    for name, count in (("text_model", 23), ("vision_model", 26)):
        weights[f"{name}.embeddings.position_ids"] = torch.arange(count)[None]
    save_file(weights, folder / "model.safetensors")
    loaded = load(folder)
    assert loaded.options == {"logit_scale": pytest.approx(expected)}
    assert sorted(loaded.left_out) == [f"{name}.embeddings.position_ids" for name in ("text_model", "vision_model")]


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"text_config": {"hidden_size": 64, "eos_token_id": 2}},
        {"text_config": {"hidden_size": 64, "eos_token_id": 2}, "text_config_dict": {"hidden_size": 96}},
        {"text_config": None, "text_config_dict": {"vocab_size": 7}},
    ],
)
def test_a_towers_config_is_merged_as_in_transformers(raw: dict[str, Any]) -> None:
    theirs = transformers.CLIPConfig(**json.loads(json.dumps(raw))).text_config
    defaults = {**TEXT_SIZES, "eos_token_id": 49407}
    assert {**defaults, **tower(raw, "text_config", defaults)} == {name: getattr(theirs, name) for name in defaults}


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (
            lambda c: c["text_config"].update(hidden_size=121),
            r"text_config cannot be used: hidden_size 121 is no multi",
        ),
        (
            lambda c: c["vision_config"].update(hidden_act="maxout"),
            r"vision_config cannot be used: hidden_act is 'maxo",
        ),
        (lambda c: c["vision_config"].update(patch_size=[4]), r"patch_size is \[4\], expected one or two integers"),
        (lambda c: c["vision_config"].update(patch_size=21), r"image_size \(20, 20\) is smaller than one patch"),
        (
            lambda c: c["text_config"].update(eos_token_id=[517]),
            r"eos_token_id is \[517\], expected a token in 0\.\.517",
        ),
        (lambda c: c["text_config"].update(eos_token_id=518), r"eos_token_id is 518, expected a token in 0\.\.517"),
        (lambda c: c.update(text_config="large"), r"text_config is 'large', expected an object"),
        (lambda c: c.update(projection_dim=0), r"projection_dim is 0, expected an integer"),
        (lambda c: c.update(architectures=["CLIPForImageClassification"]), r"'CLIPForImageClassification'.*CLIPModel"),
        (lambda c: c.update(model_type="clip_text_model"), r"text tower on its own .*CLIPModel"),
        (lambda c: c.update(model_type="siglip"), r"SigLIP pools its images by attention"),
        (
            lambda c: c["text_config"].update(max_position_embeddings=22),
            r"position_embedding.weight has shape \(23, 120",
        ),
    ],
)
def test_bad_configs(make_checkpoint: MakeCheckpoint, edit: Callable[[dict[str, Any]], object], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        load(change(make_checkpoint("CLIPModel"), edit))


@pytest.mark.parametrize("stored", [81.0, -100.0])
def test_a_scale_that_no_float_holds(make_checkpoint: MakeCheckpoint, stored: float) -> None:
    folder = make_checkpoint("CLIPModel")
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "logit_scale": torch.tensor(stored)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"logit_scale is .* expected within -80\.\.80"):
        load(folder)


PINNED = {  # a layer has one attention, two norms and one sigmoid of quick-GELU
    "image": {"Attention": 3, "LayerNormalization": 8, "Sigmoid": 3, "Conv": 1, "ReduceL2": 1, "Softmax": 0},
    "text": {"Attention": 2, "LayerNormalization": 5, "Sigmoid": 2, "ArgMax": 1, "ReduceL2": 1, "Softmax": 0},
}


def test_operator_counts_and_what_stays_in_fp32(make_checkpoint: MakeCheckpoint) -> None:
    loaded = load(make_checkpoint("CLIPModel"))
    canonical = {
        graph.name: onnx_from_module(loaded.parts()[graph.name], graph, loaded.axes) for graph in loaded.graphs
    }
    for name, model in canonical.items():
        counts = Counter(node.op_type for node in model.graph)
        assert {op: counts[op] for op in PINNED[name]} == PINNED[name]
        assert {node.domain for node in model.graph} == {""}
    variants = make_variants(canonical, loaded.graphs, "fp16")
    assert sorted(variants.files) == ["image.cpu.onnx", "image.onnx", "model.weights", "text.cpu.onnx", "text.onnx"]
    assert sum(map(len, variants.files.values())) < 0.6 * sum(
        sum(weight.const_value.nbytes for weight in model.graph.initializers.values()) for model in canonical.values()
    )
