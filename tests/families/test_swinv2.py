"""Swin v2: what every family shows, its biases and windows, what is refused, and padded keys in half precision."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers

from conftest import Once
from edited_checkpoints import edit_config, read
from encoder_family import WORST, EncoderFamily
from swin_cases import SWIN, worst_error, write_pixels
from transom.export.bundle_graphs import canonical_graphs
from transom.export.passes.half_precision import convert_precision
from transom.runtime import load
from transom.runtime.bundle import Bundle
from transom.runtime.errors import CheckpointError


class TestSwinv2(EncoderFamily):
    family = "swinv2"
    config = ("Swinv2Config", {**SWIN, "pretrained_window_sizes": [6, 0]})
    heads: ClassVar = {
        "Swinv2Model": ("pooler_output", "last_hidden_state"),
        "Swinv2ForImageClassification": ("logits",),
    }
    linears = 25  # the MLP of the biases is none of them: it is folded
    layers = 4
    wordpiece = False
    labels: ClassVar = {"Swinv2ForImageClassification": {"num_labels": 5}}

    def calibration_data(self, folder: Path) -> Path:
        return write_pixels(folder)

    @pytest.mark.parametrize("rows", [1, 2, 3])
    @pytest.mark.parametrize("image_size", [(16, 16), (15, 33), (32, 24), (4, 6)], ids=str)
    def test_any_image_size_equals_transformers(self, image_size: tuple[int, int], rows: int, once: Once) -> None:
        """Windows stay those of the trained size; a map smaller than one is padded."""
        folder = self.bundle(once, "Swinv2ForImageClassification").parent / "checkpoint"
        theirs = transformers.Swinv2ForImageClassification.from_pretrained(folder).eval()
        assert worst_error(read(folder, image_size=image_size), theirs, rows) <= WORST

    @pytest.mark.parametrize(
        "settings",
        [
            {"qkv_bias": False},
            {"window_size": 1},
            {"window_size": 16},  # larger than any map
            {"window_size": 5, "pretrained_window_sizes": [0, 2]},
            {"image_size": [10, 40]},  # windows of 4 and of 2
            {"image_size": [40, 6]},  # maps of 3 columns and of 2 in windows of 4
            {"window_size": 3, "num_heads": [1, 1]},
            {"patch_size": [2, 3], "image_size": [20, 31]},
            {"depths": [1, 3, 1], "num_heads": [2, 4, 6], "pretrained_window_sizes": [0, 0, 0]},
            {"num_heads": [3, 6, 12, 24], "pretrained_window_sizes": [0] * 4},  # of four stages, where there are two
            {"hidden_act": "relu", "layer_norm_eps": 1e-3, "mlp_ratio": 4.0},
        ],
        ids=str,
    )
    def test_every_setting_equals_transformers(self, settings: dict[str, Any], tmp_path: Path) -> None:
        folder = self.checkpoint(tmp_path, "Swinv2Model", **settings)
        assert worst_error(read(folder), transformers.Swinv2Model.from_pretrained(folder).eval()) <= WORST

    def test_scales_are_clamped_as_in_transformers(self, tmp_path: Path) -> None:
        """At 100, above which these are: cosines of a large scale let masked tokens count, at -200 and not at -100."""
        folder = self.checkpoint(tmp_path, "Swinv2Model")
        theirs = transformers.Swinv2Model.from_pretrained(folder).eval()
        for name, parameter in theirs.named_parameters():
            if name.endswith("logit_scale"):
                parameter.data.fill_(math.log(1000))
        theirs.save_pretrained(folder)
        loaded = read(folder)
        scales = [value for name, value in loaded.module.named_buffers() if name.endswith("head_scale")]
        assert {round(float(scale), 3) for each in scales for scale in each.flatten()} == {100.0}
        assert worst_error(loaded, theirs) <= WORST


SUITE = TestSwinv2()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_padded_keys_of_length_0_are_finite(precision: str, once: Once) -> None:
    """Keys have no bias: those of padding are zeros, whose length no epsilon of FP16 can keep from being 0."""
    with load(SUITE.bundle(once, "Swinv2Model", precision)) as model:
        for pixels in (np.zeros((1, 3, 18, 25), np.float32), np.full((1, 3, 18, 25), 1e3, np.float32)):
            outputs = model.run({"pixel_values": pixels})
            assert all(np.isfinite(output).all() for output in outputs.values())


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_lengths_are_computed_in_fp32(precision: str, once: Once) -> None:
    """In each layer: FP16 has no 1e-12, and squares pass its end from 256 on."""
    model = canonical_graphs(Bundle(SUITE.bundle(once, "Swinv2Model")))["model"]
    convert_precision(model, precision)
    nodes = list(model.graph)
    lengths = [node for node in nodes if node.op_type in ("ReduceL2", "Clip")]
    assert len(lengths) == 2 * 2 * SUITE.layers  # of queries and of keys
    assert {node.outputs[0].dtype for node in lengths} == {ir.DataType.FLOAT}
    halves = {node.inputs[0].dtype for node in nodes if node.op_type == "Attention" and node.inputs[0] is not None}
    assert halves == {ir.DataType.FLOAT16 if precision == "fp16" else ir.DataType.BFLOAT16}


def test_the_largest_bias_of_each_query_is_0(tmp_path: Path) -> None:
    """A softmax does not see it, and BF16, whose steps are of 1/16 where biases are about 8, keeps those that count."""
    module = read(SUITE.checkpoint(tmp_path, "Swinv2Model")).module
    attention = module.encoder["layers"][0].blocks[0].attention.self
    bias = attention.bias()
    assert 7 < float(bias.mean()) < 9
    assert not attention.mask.amax(-1).any()
    torch.testing.assert_close(attention.mask[0], bias - bias.max(-1, keepdim=True).values)


def test_the_biases_are_constants_of_the_graph(once: Once) -> None:
    """The MLP that makes them is in no graph, and so in no list of layers to quantise."""
    import onnx

    graph = onnx.load(SUITE.bundle(once, "Swinv2Model") / "model.onnx").graph
    shapes = {tuple(weight.dims) for weight in graph.initializer}
    assert not any(512 in shape for shape in shapes)
    # windows as rows of the batch, as heads where they are shifted, 12 windows of 3 heads; then 3 heads twice
    masks = [node.input[3] for node in graph.node if node.op_type == "Attention"]
    sizes = {weight.name: tuple(weight.dims) for weight in graph.initializer}
    assert [sizes[mask] for mask in masks] == [(1, 3, 16, 16), (1, 36, 16, 16), (1, 3, 16, 16), (1, 3, 16, 16)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_absolute_embeddings": True}, "use_absolute_embeddings is set.*one position more than there are patches"),
        ({"pretrained_window_sizes": [6]}, "pretrained_window_sizes are .*one for each of the 2 stages"),
        ({"pretrained_window_sizes": [6, 1]}, "pretrained_window_sizes are .*0, or 2 or more"),
        ({"pretrained_window_sizes": 6}, "pretrained_window_sizes is 6, expected"),
        ({"image_size": [3, 40]}, "leaves no row of tokens to stage 2"),
        ({"image_size": 4096, "window_size": 1024}, "stage 1 masks of 13194139533312 numbers, expected at most"),
        (
            {"architectures": ["Swinv2ForMaskedImageModeling"]},
            "pixels that were masked.*Choose a head with --task: .*feature-extraction",
        ),
        ({"architectures": ["Swinv2Backbone"]}, "maps of several stages"),
    ],
    ids=str,
)
def test_settings_and_variants_that_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = edit_config(SUITE.checkpoint(tmp_path, "Swinv2Model"), **changes)
    with pytest.raises(CheckpointError, match=message):
        read(folder)


def test_transformers_cannot_add_absolute_positions_either(tmp_path: Path) -> None:
    """What the refusal says of it; where this changes, the definition can follow."""
    folder = SUITE.checkpoint(tmp_path, "Swinv2Model", image_size=20, use_absolute_embeddings=True)
    theirs = transformers.Swinv2Model.from_pretrained(folder).eval()
    for size, interpolate in ((20, False), (20, True), (24, True)):
        with pytest.raises(RuntimeError):
            theirs(pixel_values=torch.zeros(1, 3, size, size), interpolate_pos_encoding=interpolate)
