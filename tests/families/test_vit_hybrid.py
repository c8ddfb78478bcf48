"""The hybrid ViT: what every family shows, its backbone, image sizes, settings, and convolutions of integers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from command_line import document, transom
from conftest import Once
from edited_checkpoints import read
from encoder_family import TEXTS, WORST, EncoderFamily
from row_independence import check_encoders
from tiny_graphs import operators
from transom.models.bit import Window, converted_weight
from transom.runtime import load
from transom.runtime.backends.ort import session_entries
from transom.runtime.bundle import Bundle
from transom.runtime.errors import CheckpointError
from vit_hybrid_models import SIZES, read_hybrid, save_hybrid

HEAD = "ViTHybridForImageClassification"


def smooth_images(folder: Path, count: int) -> Path:
    """Draw images that no check takes for noise: six by six squares, enlarged."""
    folder.mkdir()
    for index, squares in enumerate(np.random.default_rng(7).integers(0, 256, (count, 6, 6, 3), np.uint8)):
        Image.fromarray(squares).resize((60, 50), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    return folder


class TestViTHybrid(EncoderFamily):
    family = "vit_hybrid"
    config = ("ViTHybridConfig", SIZES)  # which transformers 5 does not define
    heads: ClassVar = {
        HEAD: ("logits",),
        "ViTHybridModel": ("last_hidden_state", "pooler_output"),
    }
    linears = 19  # six in each layer, and the classifier
    convolutions = 2  # the 3x3 of each stage; its 1x1, the stem and the projection do not gain

    def checkpoint(self, folder: Path, architecture: str, **config: Any) -> Path:
        return save_hybrid(folder, architecture, **config)

    def load_theirs(self, architecture: str, folder: Path) -> Any:
        """Return transformers' BiT and ViT, put together."""
        return read_hybrid(folder)

    def calibration_data(self, folder: Path) -> Path:
        return smooth_images(folder / "images", TEXTS)

    def test_its_convolutions_are_of_integers_where_the_cpu_executes_them(self, once: Once, tmp_path: Path) -> None:
        """Two QLinearConv; what is left as Conv: the stem, four 1x1 of the layers, two shortcuts, the projection."""
        bundle = Bundle(self.bundle(once, HEAD, "int8"))
        (file,) = bundle.manifest.graphs
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        for key, setting in session_entries(file, "cpu").items():
            options.add_session_config_entry(key, setting)
        path = bundle.folder / file.file_for("cpu")
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        counts = operators(tmp_path / "optimized.onnx")
        left = counts["Conv"] + counts["FusedConv"]
        assert (counts["QLinearConv"], left) == (2, 1 + 4 + 2 + 1)
        text = transom("inspect", bundle.folder).stdout
        assert "8 Conv: no linear layers, nor convolutions that gain" in text


def test_rows_of_integer_convolutions_do_not_depend_on_their_neighbours(once: Once) -> None:
    with load(TestViTHybrid().bundle(once, HEAD, "int8"), threads=2) as bundle:
        check_encoders(bundle, lambda output: 0.0)


def edit_config(folder: Path, **changes: Any) -> Path:
    """Change fields of config.json; those of a ``backbone_config`` one by one."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if isinstance(changes.get("backbone_config"), dict):
        changes["backbone_config"] = {**config["backbone_config"], **changes["backbone_config"]}
    path.write_text(json.dumps({**config, **changes}))
    return folder


def assert_equal(folder: Path, image_size: tuple[int, int] | None = None) -> None:
    """Compare the backbone with transformers' BitBackbone, and the whole with the two halves put together."""
    loaded, theirs = read(folder, image_size=image_size), read_hybrid(folder)
    graph = loaded.graphs[0]
    torch.manual_seed(1)
    pixels = torch.randn(2, *graph.inputs[0].shape[1:])
    with torch.no_grad():
        ours = dict(zip((tensor.name for tensor in graph.outputs), loaded.module(pixels), strict=True))
        expected = dict(theirs(pixels).items())
        pairs = {name: (ours[name], expected[name]) for name in ours if name in expected}
        backbone = loaded.module.embeddings.patch_embeddings["backbone"]
        pairs["feature map"] = (backbone(pixels), theirs.feature_map(pixels))
    assert len(pairs) >= 2
    for name, (found, reference) in pairs.items():
        assert found.shape == reference.shape
        error = float((found - reference).abs().max() / reference.abs().max())
        assert error <= WORST, f"{name}: {error:.1e}"


@pytest.mark.parametrize(
    "settings",
    [
        {"layer_type": "preactivation"},
        {"global_padding": None},
        {"global_padding": None, "layer_type": "preactivation"},
        {"embedding_dynamic_padding": False},
        {"embedding_dynamic_padding": False, "global_padding": None},
        {"hidden_act": "gelu", "width_factor": 2},
        {"output_stride": 8, "hidden_sizes": [96] * 4, "depths": [1, 2, 2, 2], "out_features": ["stage4"]},
        {"output_stride": 4, "layer_type": "preactivation"},
        {"out_features": ["stem"]},
        {"out_features": ["stem", "stage1"]},
        {"out_features": None, "out_indices": [1]},
        {"drop_path_rate": 0.1},
    ],
    ids=str,
)
def test_every_setting_of_the_backbone_equals_transformers(settings: dict[str, Any], tmp_path: Path) -> None:
    assert_equal(save_hybrid(tmp_path, HEAD, backbone_config=settings))


@pytest.mark.parametrize(
    "settings",
    [{"patch_size": 2, "image_size": [67, 50]}, {"qkv_bias": False, "hidden_act": "relu", "num_channels": 1}],
    ids=str,
)
def test_every_other_setting_equals_transformers(settings: dict[str, Any], tmp_path: Path) -> None:
    channels = settings.get("num_channels", 3)
    assert_equal(save_hybrid(tmp_path, "ViTHybridModel", backbone_config={"num_channels": channels}, **settings))


@pytest.mark.parametrize("size", [(33, 33), (47, 47), (64, 64)])
@pytest.mark.parametrize("padding", ["same", None])
def test_positions_are_interpolated_to_the_map(size: tuple[int, int], padding: str | None, tmp_path: Path) -> None:
    """transformers 4's code interpolates to the pixels, whose number does not fit; the reference is ViT's."""
    assert_equal(save_hybrid(tmp_path, HEAD, backbone_config={"global_padding": padding}), size)


def test_same_padding_by_pencil() -> None:
    """A window of 3 in steps of 2 needs 1 on both sides of 5, 0 and 1 of 6; one of 1 needs nothing."""
    same = Window(3, 2, same=True)
    assert [(same.padding(size), same.output(size)) for size in (5, 6)] == [((1, 1), 3), ((0, 1), 3)]
    assert Window(1, 2, same=True).padding(6) == (0, 0)
    assert [(Window(3, 2).padding(size), Window(3, 2).output(size)) for size in (5, 6)] == [((1, 1), 3), ((1, 1), 3)]
    assert Window(3, 1, 2, same=True).padding(5) == (2, 2)


def test_weights_are_standardised_by_pencil() -> None:
    """(1, 3) has mean 2 and deviation 1; a channel of equal weights becomes zeros."""
    stored = torch.tensor([[1.0, 3.0], [5.0, 5.0]]).view(2, 2, 1, 1)
    np.testing.assert_allclose(converted_weight(stored).flatten(1), [[-1, 1], [0, 0]], atol=1e-7)


def test_the_names_of_a_checkpoint_without_a_head_load(tmp_path: Path) -> None:
    """Without the prefix "vit."; a last normalisation and later stages are left out."""
    later = {"hidden_sizes": [128, 160, 160], "depths": [1, 1, 1], "layer_type": "preactivation"}
    folder = save_hybrid(tmp_path, "ViTHybridModel", backbone_config=later)
    loaded = read(folder)
    place = "embeddings.patch_embeddings.backbone.bit."
    assert f"{place}norm.weight" in loaded.left_out
    assert all(name.startswith((f"{place}norm.", f"{place}encoder.stages.2.")) for name in loaded.left_out)
    assert len(loaded.left_out) == 2 + 10  # a layer: four convolutions, three normalisations of two
    assert {name for name, _ in loaded.module.named_parameters()} >= {
        f"{place}embedder.convolution.weight",
        f"{place}encoder.stages.1.layers.0.norm2.weight",
        "embeddings.patch_embeddings.projection.weight",
        "encoder.layer.2.attention.attention.query.weight",
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone_config": {"model_type": "resnet"}}, r"model_type 'resnet'; a hybrid ViT is defined on 'bit' alone"),
        ({"backbone_config": ["bit"]}, r"backbone_config is \['bit'\], expected an object"),
        ({"backbone_config": {"global_padding": "valid"}}, r"global_padding is 'valid'; defined are null and 'same'"),
        ({"backbone_config": {"layer_type": "basic"}}, r"layer_type is 'basic', expected one of preactivation, bottle"),
        ({"backbone_config": {"num_groups": 5}}, r"num_groups 5 does not divide the width 24"),
        ({"backbone_config": {"num_channels": 1}}, r"num_channels 1, config.json has 3"),
        ({"backbone_config": {"hidden_act": "mish"}}, r"backbone_config cannot be used: hidden_act is 'mish'"),
        ({"backbone_config": {"depths": [2, 0]}}, r"depths is \[2, 0\], expected a list of positive integers"),
        ({"backbone_config": {"depths": [900, 101]}}, r"depths are 1001 layers, expected at most 1000"),
        ({"backbone_config": {"out_features": ["stage3"]}}, r"out_features is \['stage3'\], expected some of stem, st"),
        ({"backbone_config": {"out_features": None, "out_indices": [7]}}, r"out_features is \[7\], expected some of"),
        ({"backbone_featmap_shape": [1, 160, 7, 7]}, r"\(160, 7, 7\), but the backbone makes \(160, 6, 6\)"),
        ({"backbone_featmap_shape": [160, 6, 6]}, r"backbone_featmap_shape is \[160, 6, 6\], expected four positive"),
        ({"use_timm_backbone": True}, r"use_timm_backbone is True, a backbone that lies elsewhere"),
        ({"backbone": "resnet50"}, r"backbone is 'resnet50', a backbone that lies elsewhere"),
        ({"patch_size": 7}, r"feature map of image_size \(6, 6\) is smaller than one patch \(7, 7\)"),
        ({"num_attention_heads": 5}, r"hidden_size 74 is no multiple of num_attention_heads 5"),
        ({"architectures": ["ViTHybridForMaskedImageModeling"]}, r"defines ViTHybridModel, ViTHybridForImageClass"),
    ],
    ids=str,
)
def test_settings_that_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = edit_config(save_hybrid(tmp_path, HEAD), **changes)
    with pytest.raises(CheckpointError, match=message):
        read(folder)


def test_what_converts_pickled_weights_is_named(tmp_path: Path) -> None:
    """transformers 5 has no class of these checkpoints."""
    folder = save_hybrid(tmp_path, HEAD)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*of transformers that has it: 4 for vit-hybrid"):
        read(folder)


def test_an_image_too_small_for_the_backbone_is_refused(tmp_path: Path) -> None:
    """8 pixels are 4, 2 and 1 behind the stem's two halvings and the second stage's."""
    folder = save_hybrid(tmp_path, HEAD, patch_size=2)
    with pytest.raises(
        CheckpointError, match=r"feature map of image size \(8, 8\) \(1, 1\) is smaller.*for a larger one"
    ):
        read(folder, image_size=(8, 8))


def test_positions_of_another_grid_are_reported(tmp_path: Path) -> None:
    folder = save_hybrid(tmp_path, HEAD)
    weights = load_file(folder / "model.safetensors")
    name = "vit.embeddings.position_embeddings"
    weights[name] = weights[name][:, :-1].contiguous()
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"position_embeddings has shape \(1, 36, 74\), config.json asks"):
        read(folder)


def test_a_config_without_a_backbone_is_the_published_one(tmp_path: Path) -> None:
    """R50 up to its third stage, as transformers' ViTHybridConfig fills it in: 1024 channels of 24x24 at 384."""
    from transom.models.family import Source
    from transom.models.vit_hybrid import config_from_source

    config = config_from_source(Source({"image_size": 384}, frozenset(), "image-classification", {}))
    assert (config.backbone.depths, config.backbone.layer_type, config.backbone.stages) == ((3, 4, 9), "bottleneck", 3)
    assert (config.feature_map, config.grid, config.backbone.hidden_sizes[2]) == ((24, 24), (24, 24), 1024)


def test_images_are_classified_as_by_transformers_halves(once: Once, tmp_path: Path) -> None:
    """Prepared by transformers' processor of BiT, whose steps and defaults are those of the hybrid's."""
    from transformers import BitImageProcessorPil

    bundle = TestViTHybrid().bundle(once, HEAD)
    checkpoint = bundle.parent / "checkpoint"
    paths = sorted(smooth_images(tmp_path / "images", 3).iterdir())
    settings = json.loads((checkpoint / "preprocessor_config.json").read_text())
    del settings["image_processor_type"]
    pixels = BitImageProcessorPil(**settings)([Image.open(path) for path in paths], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = read_hybrid(checkpoint)(pixels).logits.softmax(-1)
    results = document(transom("run", bundle, *paths, "--json"))["results"]
    for result, probabilities in zip(results, expected, strict=True):
        best = [answer["label"] for answer in result["labels"]]
        assert best == [f"LABEL_{index}" for index in probabilities.argsort(descending=True)]
        found = [answer["probability"] for answer in result["labels"]]
        np.testing.assert_allclose(found, probabilities.sort(descending=True).values, rtol=1e-3)
