"""Swin: what every family shows, its windows at awkward sizes, what is refused, and answers equal to transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from command_line import document, transom
from conftest import Once
from edited_checkpoints import edit_config, read
from encoder_family import WORST, EncoderFamily
from swin_cases import SWIN, worst_error, write_pixels
from transom.models.windows import Windows, relative_index
from transom.runtime import load
from transom.runtime.errors import CheckpointError


class TestSwin(EncoderFamily):
    family = "swin"
    config = ("SwinConfig", SWIN)
    heads: ClassVar = {
        "SwinModel": ("pooler_output", "last_hidden_state"),
        "SwinForImageClassification": ("logits",),
    }
    linears = 25  # six in each layer, and the reduction of merged patches
    layers = 4
    wordpiece = False
    labels: ClassVar = {"SwinForImageClassification": {"num_labels": 5}}

    def calibration_data(self, folder: Path) -> Path:
        return write_pixels(folder)

    @pytest.mark.parametrize("rows", [1, 2, 3])
    @pytest.mark.parametrize("image_size", [(16, 16), (15, 33), (32, 24), (17, 64)], ids=str)
    def test_any_image_size_equals_transformers(self, image_size: tuple[int, int], rows: int, once: Once) -> None:
        """Whole windows and whole patches or not, square or not, and a last map of one window, which is not shifted."""
        folder = self.bundle(once, "SwinForImageClassification").parent / "checkpoint"
        theirs = transformers.SwinForImageClassification.from_pretrained(folder).eval()
        assert worst_error(read(folder, image_size=image_size), theirs, rows) <= WORST

    @pytest.mark.parametrize(
        "settings",
        [
            {"qkv_bias": False},
            {"window_size": 1},
            {"window_size": 5},  # the last map's rows are one window
            {"window_size": 3, "num_heads": [1, 1]},
            {"patch_size": 3, "window_size": 3},
            {"patch_size": [2, 3], "image_size": [20, 31]},
            {"depths": [1, 3, 1], "num_heads": [2, 4, 6], "window_size": 3},
            {"depths": [1], "num_heads": [2]},
            {"num_heads": [3, 6, 12, 24]},  # of four stages, where there are two
            {"num_channels": 1, "layer_norm_eps": 1e-3, "mlp_ratio": 4},
            {"use_absolute_embeddings": True, "image_size": [20, 28]},
            *({"hidden_act": name} for name in ("gelu_new", "quick_gelu", "relu", "silu")),
        ],
        ids=str,
    )
    def test_every_setting_equals_transformers(self, settings: dict[str, Any], tmp_path: Path) -> None:
        folder = self.checkpoint(tmp_path, "SwinModel", **settings)
        assert worst_error(read(folder), transformers.SwinModel.from_pretrained(folder).eval()) <= WORST


SUITE = TestSwin()


# Windows


def test_tokens_are_put_into_windows_and_back() -> None:
    """A map of 3 x 4 tokens in windows of 2, shifted by 1; 12 stands where padding is: figure 4 of the paper."""
    windows = Windows((3, 4), 2, 1)
    assert (windows.padded, windows.count) == ((4, 4), 4)
    assert windows.order().tolist() == [5, 6, 9, 10, 7, 4, 11, 8, 12, 12, 1, 2, 12, 12, 3, 0]
    assert windows.order()[windows.places()].tolist() == list(range(12))
    apart = windows.apart()
    assert not apart[0].any()
    assert apart[1].tolist() == [[False, True] * 2, [True, False] * 2] * 2  # columns 3 and 0 were no neighbours
    assert apart[3].sum() == 12  # each of the last window's tokens sees itself alone
    assert not Windows((4, 4), 4).apart().any()


def test_relative_positions_index_the_table() -> None:
    """Windows of 2: rows and columns of query minus key, from -1 to 1, in 9 rows: section 3.2."""
    assert relative_index(2).tolist() == [[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]]


# Position embeddings


def test_absolute_positions_are_resized_as_in_transformers(tmp_path: Path) -> None:
    folder = SUITE.checkpoint(tmp_path, "SwinModel", image_size=20, use_absolute_embeddings=True)
    theirs = transformers.SwinModel.from_pretrained(folder).eval()
    loaded = read(folder, image_size=(32, 24))
    assert worst_error(loaded, theirs, interpolate_pos_encoding=True) <= WORST
    with pytest.raises(RuntimeError):  # not without being asked
        worst_error(loaded, theirs)
    assert worst_error(read(folder), theirs) <= WORST


@pytest.mark.parametrize(("trained", "asked"), [([18, 24], (32, 24)), (20, (31, 24)), ([19, 19], None)])
def test_positions_of_another_grid_are_refused(trained: Any, asked: tuple[int, int] | None, tmp_path: Path) -> None:
    """From a grid that is no square, to patches that are not whole, or where transformers has one row too few."""
    folder = SUITE.checkpoint(tmp_path, "SwinModel", image_size=trained, use_absolute_embeddings=True)
    with pytest.raises(CheckpointError, match=r"absolute position embeddings are of \(.*multiple of the patch size"):
        read(folder, image_size=asked)


# What is refused


def test_an_image_smaller_than_a_window_is_refused(tmp_path: Path) -> None:
    """transformers shrinks the window, and then its table of biases fits nothing."""
    folder = SUITE.checkpoint(tmp_path, "SwinModel")
    message = r"image size \(12, 64\) gives stage 2 of swin \(3, 16\) tokens.*window of 4 x 4.*--image-size 16x16 fits"
    with pytest.raises(CheckpointError, match=message):
        read(folder, image_size=(12, 64))
    theirs = transformers.SwinModel.from_pretrained(folder).eval()
    with pytest.raises(RuntimeError, match="must match"):
        theirs(pixel_values=torch.zeros(1, 3, 12, 64))
    read(folder, image_size=(16, 16))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": [2, 2, 2]}, "depths are .* and num_heads .*one of each for every stage"),
        ({"depths": [2, 0]}, "depths is .*expected 1..16 integers of at least 1"),
        ({"num_heads": 3}, "num_heads is 3, expected"),
        ({"num_heads": [3, 5]}, "a stage of width 96 has 5 heads"),
        ({"window_size": 0}, "window_size is 0"),
        ({"image_size": 4096, "window_size": 1024}, "stage 1 masks of 13194139533312 numbers, expected at most"),
        ({"mlp_ratio": "4"}, "mlp_ratio is '4', expected a number"),
        ({"mlp_ratio": 0.01}, "mlp_ratio is 0.01, expected a number"),
        ({"hidden_act": "sinus"}, "hidden_act is 'sinus'"),
        (
            {"architectures": ["SwinForMaskedImageModeling"]},
            "pixels that were masked.*Choose a head with --task: .*feature-extraction",
        ),
        *(
            ({"architectures": ["SwinForImageClassification"], "id2label": value}, "id2label is .*expected an object")
            for value in (True, 2, ["0", "1"])
        ),
        ({"architectures": ["SwinBackbone"]}, "maps of several stages, each with a norm of its own"),
        ({"model_type": "swin2sr"}, "Swin2SR enlarges images"),
        ({"model_type": "maskformer-swin"}, "MaskFormer's Swin"),
        ({"model_type": "donut-swin"}, "Donut's Swin has no LayerNorm after its last stage"),
        ({"model_type": None, "architectures": None, "architecture": "swin_tiny_patch4_window7_224"}, "timm"),
    ],
    ids=str,
)
def test_settings_and_variants_that_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = edit_config(SUITE.checkpoint(tmp_path, "SwinModel"), **changes)
    with pytest.raises(CheckpointError, match=message):
        read(folder)


def test_weights_with_timms_names_are_refused(tmp_path: Path) -> None:
    folder = SUITE.checkpoint(tmp_path, "SwinModel")
    save_file({"layers.0.blocks.0.attn.qkv.weight": torch.ones(144, 48)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"packed projections \(attn.qkv.weight\).*convert_swin_timm_to_pytorch"):
        read(folder)


# Checkpoints


def test_names_of_other_versions_load(tmp_path: Path) -> None:
    """Those of transformers 5's modules, and the buffers that older versions stored."""
    folder = SUITE.checkpoint(tmp_path, "SwinModel")
    before = read(folder).module.state_dict()
    tensors = load_file(folder / "model.safetensors")
    theirs = transformers.SwinModel.from_pretrained(folder).state_dict()
    theirs = {name: value for name, value in theirs.items() if not name.endswith("index")}
    assert sum("q_proj" in name or "relative_position_bias." in name for name in theirs) == 12
    layer = "encoder.layers.0.blocks.1."
    buffers = {f"{layer}attention.self.relative_position_index": relative_index(4), f"{layer}attn_mask": torch.zeros(1)}
    for stored in (theirs, {**tensors, **buffers}):
        save_file({name: value.contiguous() for name, value in stored.items()}, folder / "model.safetensors")
        after = read(folder).module.state_dict()
        assert all(torch.equal(before[name], value) for name, value in after.items())
        assert after.keys() == before.keys()


def test_features_are_read_from_other_checkpoints(tmp_path: Path) -> None:
    for architecture in ("SwinForImageClassification", "SwinForMaskedImageModeling"):
        folder = SUITE.checkpoint(tmp_path / architecture, architecture, image_size=20, encoder_stride=4)
        loaded = read(folder, task="feature-extraction")
        assert [tensor.name for tensor in loaded.graphs[0].outputs] == ["pooler_output", "last_hidden_state"]
        assert any(name.startswith(("classifier.", "decoder.")) for name in loaded.left_out)


# Answers


def photo(folder: Path) -> Path:
    path = folder / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)).save(path)
    return path


def test_images_are_labelled_as_in_transformers(once: Once, tmp_path: Path) -> None:
    bundle = SUITE.bundle(once, "SwinForImageClassification")
    path = photo(tmp_path)
    found = document(transom("run", bundle, path, "--json"))["results"][0]["labels"]
    with load(bundle) as model:
        pixels = torch.from_numpy(model.preprocess()([str(path)]))
    theirs = transformers.SwinForImageClassification.from_pretrained(bundle.parent / "checkpoint").eval()
    with torch.no_grad():
        scores, labels = theirs(pixel_values=pixels).logits[0].softmax(-1).sort(descending=True)
    assert [answer["label"] for answer in found] == [f"LABEL_{label}" for label in labels]
    np.testing.assert_allclose([answer["probability"] for answer in found], scores, rtol=1e-4)


@pytest.mark.parametrize("architecture", SUITE.heads)
def test_features_are_the_mean_of_the_tokens(architecture: str, once: Once, tmp_path: Path) -> None:
    """There is no class token."""
    with load(SUITE.bundle(once, architecture)) as model:
        features = model.features([str(photo(tmp_path))] * 4)  # more than the bundle's rows
        pixels = model.preprocess()([str(tmp_path / "photo.png")])
        hidden = model.run({"pixel_values": pixels}, ["last_hidden_state"])["last_hidden_state"]
    assert features.shape == (4, 96)
    np.testing.assert_allclose(features, np.repeat(hidden.mean(1), 4, 0), atol=1e-5)
