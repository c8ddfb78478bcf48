"""How images are prepared, as bundle.json says it and as a checkpoint's files do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    DeiTImageProcessorPil,
    ViTImageProcessorPil,
)

from image_cases import PHOTOS, settings_of, their_pixels
from transom.export.processors.image import image_preprocess_from_checkpoint
from transom.runtime.errors import BundleError, CheckpointError
from transom.runtime.image_preprocess import ExactSize, ImagePreprocess, ShortestEdge

# ---- the JSON object


PLAIN: dict[str, Any] = {
    "resize": {"shortest_edge": 8, "longest_edge": 16},
    "resample": "bicubic",
    "crop": {"height": 4, "width": 5},
    "rescale": 1 / 255,
    "mean": [0.5, 0.25, 0],
    "std": [0.5, 0.5, 1],
    "channels": 3,
    "height": 4,
    "width": 5,
    "transparent_to_white": True,
}


def test_json_round_trip() -> None:
    made = ImagePreprocess.from_json(PLAIN)
    assert made.to_json() == PLAIN
    assert ImagePreprocess.from_json(made.to_json()) == made
    bare = settings_of()
    assert ImagePreprocess.from_json(json.loads(json.dumps(bare.to_json()))) == bare


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"resize": 8},
            "resize is 8, expected {height, width}, {shortest_edge} or {shortest_edge, longest_edge}",
        ),
        ({"resize": {"longest_edge": 8}}, "resize is"),
        ({"resize": {"height": 0, "width": 4}}, "resize is"),
        ({"resize": {"height": 10**6, "width": 4}}, "each in 1..8192, or null"),
        ({"resize": {"height": True, "width": 4}}, "resize is"),
        ({"crop": {"height": 4.0, "width": 5}}, "crop is"),
        ({"crop": {"shortest_edge": 4}}, "crop is"),
        ({"crop": None}, "a shortest edge without a crop gives another size for every image"),
        ({"crop": {"height": 9, "width": 5}}, "images end at 9x5, the model takes 4x5"),
        ({"crop": None, "resize": {"height": 3, "width": 3}}, "images end at 3x3, the model takes 4x5"),
        ({"resample": 3}, "resample is 3, expected one of nearest, lanczos, bilinear, bicubic, box, hamming"),
        ({"resample": []}, "resample is []"),
        ({"rescale": float("nan")}, "rescale is nan, expected a number, or null"),
        ({"rescale": 10**400}, "rescale is 1000"),
        ({"rescale": "1"}, "rescale is '1'"),
        ({"mean": [0, 0, float("inf")]}, "mean is [0, 0, inf], expected a list of finite numbers, or null"),
        ({"mean": 0.5}, "mean is 0.5"),
        ({"mean": None}, "one of mean and std is null, expected both or neither"),
        ({"mean": [0.5]}, "need one number for each of 3 channels"),
        ({"std": [1, 0, 1]}, "std is 0, or rescale, mean and std leave the range of float32"),
        ({"std": [1, 1e-60, 1]}, "std is 0"),
        ({"channels": 4}, "channels is 4, expected 3 (RGB) or 1 (grey)"),
        ({"channels": True}, "channels is True"),
        ({"height": -1}, "height is -1, expected 1..8192"),
        ({"width": "5"}, "width is '5'"),
        ({"transparent_to_white": 1}, "transparent_to_white is 1, expected true or false"),
        ({"gamma": 2}, "preprocess has the unknown key 'gamma'"),
    ],
    ids=repr,
)
def test_json_that_is_wrong(change: dict[str, Any], said: str) -> None:
    with pytest.raises(BundleError) as caught:
        ImagePreprocess.from_json({**PLAIN, **change})
    assert said in str(caught.value)


def test_all_problems_are_listed_at_once() -> None:
    with pytest.raises(BundleError, match=r"crop is missing; .*height is 0, .*; preprocess.width is None"):
        ImagePreprocess.from_json({"height": 0, "width": None, "resize": None, "mean": None, "std": None})
    with pytest.raises(BundleError, match="preprocess is a list, expected an object"):
        ImagePreprocess.from_json([])


# ---- from the checkpoint's file


def from_words(folder: Path, words: object, height: int = 224, width: int = 224, channels: int = 3) -> ImagePreprocess:
    (folder / "preprocessor_config.json").write_text(json.dumps(words))
    return image_preprocess_from_checkpoint(folder, height, width, channels)


@pytest.mark.parametrize("stem", ["ViT", "DeiT", "CLIP", "Bit"])
@pytest.mark.parametrize(
    "words",
    [
        {},
        {"size": 240},
        {"size": [230, 250]},
        {"do_resize": None, "size": None, "do_center_crop": None, "do_rescale": None, "do_convert_rgb": None},
        {"do_center_crop": True, "crop_size": 224},
        {"do_center_crop": True, "crop_size": [224, 224], "size": {"shortest_edge": 230}},
        {"do_normalize": False, "do_convert_rgb": False},
        {"rescale_factor": 0.01, "image_mean": 0.25, "image_std": [1, 2, 3], "do_convert_rgb": True},
    ],
    ids=json.dumps,
)
def test_legacy_and_partial_files_mean_what_they_mean_in_transformers(
    words: dict[str, Any], stem: str, tmp_path: Path
) -> None:
    cls = {
        p.__name__: p
        for p in (ViTImageProcessorPil, DeiTImageProcessorPil, CLIPImageProcessorPil, BitImageProcessorPil)
    }
    processor = cls[f"{stem}ImageProcessorPil"](**words)
    transparent = tmp_path / "key.png"
    with PIL.Image.open(PHOTOS / "flower.jpg") as image:
        image.resize((300, 260)).quantize(8).save(transparent, transparency=2)
    theirs = their_pixels(processor, transparent)
    words = {**words, "feature_extractor_type": f"{stem}FeatureExtractor"}
    ours = from_words(tmp_path, words, *theirs.shape[2:])
    np.testing.assert_array_equal(ours([transparent]), theirs.astype(np.float32))


def test_without_a_file_it_is_vits_default_at_the_models_size(tmp_path: Path) -> None:
    half = (0.5, 0.5, 0.5)
    made = image_preprocess_from_checkpoint(tmp_path, 32, 48)
    assert made == ImagePreprocess(ExactSize(32, 48), "bilinear", None, 1 / 255, half, half, 3, 32, 48)
    grey = image_preprocess_from_checkpoint(tmp_path, 8, 8, channels=1)
    assert (grey.channels, grey.mean, grey.std) == (1, (0.5,), (0.5,))


@pytest.mark.parametrize("ending", ["", "Fast", "Pil"])
@pytest.mark.parametrize(("stem", "resample"), [("ViT", "bilinear"), ("CLIP", "bicubic")])
def test_every_spelling_of_the_class(stem: str, resample: str, ending: str, tmp_path: Path) -> None:
    words = {"image_processor_type": f"{stem}ImageProcessor{ending}"}
    assert from_words(tmp_path, words).resample == resample


def test_the_nested_file_wins(tmp_path: Path) -> None:
    nested = {"image_processor": {"image_processor_type": "ViTImageProcessor", "resample": 0}}
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    assert from_words(tmp_path, {"image_processor_type": "ViTImageProcessor", "resample": 1}).resample == "nearest"
    (tmp_path / "processor_config.json").write_text("{}")
    assert from_words(tmp_path, {"image_processor_type": "ViTImageProcessor", "resample": 1}).resample == "lanczos"


def test_another_size_scales_resize_and_crop(tmp_path: Path) -> None:
    deit = from_words(tmp_path, {"image_processor_type": "DeiTImageProcessor"}, 448, 336)
    assert (deit.resize, deit.crop) == (ExactSize(512, 384), ExactSize(448, 336))
    clip = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 256, "longest_edge": 512}}
    made = from_words(tmp_path, clip, 112, 112)
    assert (made.resize, made.crop) == (ShortestEdge(128, 256), ExactSize(112, 112))
    vit = from_words(tmp_path, {"image_processor_type": "ViTImageProcessor", "size": 384}, 32, 64)
    assert (vit.resize, vit.crop) == (ExactSize(32, 64), None)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            {"image_processor_type": "ConvNextImageProcessor"},
            "'ConvNextImageProcessor'; defined are ViTImageProcessor, ",
        ),
        ({"feature_extractor_type": "BeitFeatureExtractor"}, "'BeitImageProcessor'; defined are"),
        ({"image_processor_type": 7}, "the image processor is 7"),
        ({"size": "large"}, "size is 'large', expected a positive integer"),
        ({"size": {"longest_edge": 224}}, "size is {'longest_edge': 224}"),
        ({"size": -1}, "size is -1"),
        (
            {"size": {"shortest_edge": 224}},
            "a shortest edge without a crop gives another size for every image",
        ),
        ({"size": None}, "size is null and the step that needs it is on"),
        ({"resample": None}, "resample is null and the step that needs it is on"),
        ({"image_mean": None}, "image_mean is null and the step that needs it is on"),
        ({"do_center_crop": True}, "crop_size is missing and the step that needs it is on"),
        ({"do_center_crop": True, "crop_size": {"shortest_edge": 3}}, "crop_size is {'shortest_edge': 3}"),
        ({"do_resize": "yes"}, "do_resize is 'yes', expected true or false"),
        ({"do_pad": True}, "do_pad is true, which Transom does not define"),
        ({"resample": 9}, "resample is 9, expected PIL's number of a filter: 0 nearest, 1 lanczos"),
        ({"resample": "bicubic"}, "resample is 'bicubic'"),
        ({"image_mean": [0.5, 0.5]}, "need one number for each of 3 channels"),
        ({"image_mean": "grey"}, "mean is ['grey', 'grey', 'grey']"),
        ({"image_std": [0, 1, 1]}, "std is 0"),
        ({"rescale_factor": float("nan")}, "rescale is nan"),
        ([], "holds a JSON list, expected an object"),
    ],
    ids=repr,
)
def test_a_file_that_cannot_be_followed(words: object, said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        from_words(tmp_path, words)
    assert said in str(caught.value)
    assert "preprocessor_config.json" in str(caught.value)


def test_contradictions_with_the_model(tmp_path: Path) -> None:
    clip = {"image_processor_type": "CLIPImageProcessor"}
    with pytest.raises(CheckpointError, match="cannot be scaled to a model of other proportions, 224x448"):
        from_words(tmp_path, clip, 224, 448)
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "config.json").write_text('{"model_type": "vit-hybrid"}')
    with pytest.raises(CheckpointError, match=r"has no preprocessor_config.json; its model type's default resizes"):
        image_preprocess_from_checkpoint(tmp_path, 224, 448)
    with pytest.raises(CheckpointError, match=r"mean .* need one number for each of 1 channels"):
        from_words(tmp_path, {"image_mean": [0.5, 0.5, 0.5]}, channels=1)


@pytest.mark.parametrize("text", ["{", "", '{"size": ', "[" * 100_000, "\xff"])
def test_bad_json(text: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json is not valid JSON"):
        image_preprocess_from_checkpoint(tmp_path, 224, 224)


def test_importing_preprocess_loads_no_pil() -> None:
    code = "import sys, transom.runtime.image_preprocess; sys.exit('PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
