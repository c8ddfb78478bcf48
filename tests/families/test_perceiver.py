"""Perceiver: what every family shows, its inputs and settings, its answers, its engines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from command_line import document, transom
from conftest import Once, export_to
from edited_checkpoints import edit_config, edit_weights, read
from encoder_family import WORST, EncoderFamily
from image_cases import small_photo
from perceiver_cases import SIZES
from rtx import needs_rtx
from transom.export.engine.build import build
from transom.export.engine.targets import find_targets
from transom.export.engine.trt_graphs import tensorrt_graphs
from transom.export.onnx_export import onnx_from_module
from transom.export.quantization.options import QuantizeOptions
from transom.export.report.report import write_report
from transom.export.verification import verify
from transom.runtime import load
from transom.runtime.bundle import Bundle
from transom.runtime.errors import CheckpointError, InputError
from transom.runtime.selftest import selftest
from transom.runtime.tasks.perceiver import visible

LEARNED, FOURIER, CONV = (f"PerceiverForImageClassification{kind}" for kind in ("Learned", "Fourier", "ConvProcessing"))
MASKED, TEXTS = "PerceiverForMaskedLM", "PerceiverForSequenceClassification"


class TestPerceiver(EncoderFamily):
    family = "perceiver"
    config = ("PerceiverConfig", SIZES)
    heads: ClassVar = {
        MASKED: ("logits", "last_hidden_state"),
        TEXTS: ("logits", "last_hidden_state"),
        LEARNED: ("logits", "last_hidden_state"),
        FOURIER: ("logits", "last_hidden_state"),
        CONV: ("logits", "last_hidden_state"),
    }
    layers = 6  # the latents read the input, two layers twice, the output reads the latents
    linears = 35  # five and five of the cross-attentions, whose queries are constants, 24, and the logits
    wordpiece = False
    labels: ClassVar = {name: {"num_labels": 5} for name in (TEXTS, LEARNED, FOURIER, CONV)}

    def checkpoint(self, folder: Path, architecture: str, **config: Any) -> Path:
        """Write a checkpoint with what a batch normalisation has counted, and an image processor."""
        super().checkpoint(folder, architecture, **config)
        if architecture == CONV:
            edit_weights(folder, count_batches)
        if architecture in (FOURIER, CONV):
            size = {"height": 20, "width": 20}
            settings = {"image_processor_type": "PerceiverImageProcessor", "size": size, "crop_size": size}
            (folder / "preprocessor_config.json").write_text(json.dumps(settings))
        return folder

    def call_theirs(self, model: Any, feeds: Mapping[str, torch.Tensor]) -> Any:
        """Give the logits of the positions that there are, and the latents."""
        found = model(**feeds, output_hidden_states=True)
        logits = found.logits[:, : feeds["input_ids"].shape[1]] if found.logits.ndim == 3 else found.logits
        return {"logits": logits, "last_hidden_state": found.hidden_states[-1]}

    @pytest.mark.parametrize(
        ("head", "settings"),
        [
            (MASKED, {"qk_channels": 32}),  # with v_channels 64: of another size
            (MASKED, {"qk_channels": None, "v_channels": None, "num_cross_attention_heads": 1}),
            (CONV, {"qk_channels": None, "v_channels": None, "num_cross_attention_heads": 1}),
            (TEXTS, {"qk_channels": None, "cross_attention_shape_for_attention": "q"}),
            (MASKED, {"use_query_residual": False, "cross_attention_widening_factor": 2}),
            (FOURIER, {"hidden_act": "relu", "layer_norm_eps": 1e-3, "num_blocks": 1, "v_channels": None}),
        ],
        ids=str,
    )
    def test_every_setting_equals_transformers(self, settings: dict[str, Any], head: str, tmp_path: Path) -> None:
        class WithSettings(TestPerceiver):
            config = ("PerceiverConfig", {**SIZES, **settings})

        WithSettings().test_the_definition_equals_transformers(head, tmp_path)

    @pytest.mark.parametrize(
        ("head", "size"),
        [(LEARNED, (20, 20)), (LEARNED, (31, 18)), (FOURIER, (5, 6)), (CONV, (31, 18)), (CONV, (5, 6))],
        ids=str,
    )
    def test_image_sizes_equal_transformers(self, size: tuple[int, int], head: str, tmp_path: Path) -> None:
        """Learned positions are interpolated as transformers does on request; Fourier features are of any size."""
        folder = self.checkpoint(tmp_path, head)
        theirs = getattr(transformers, head).from_pretrained(folder).eval()
        more = {"interpolate_pos_encoding": True} if head == LEARNED else {}
        pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = theirs(pixel_values=pixels, **more).logits
            found = read(folder, image_size=size).module(pixels)[0]
        assert float((found - expected).abs().max()) <= WORST * float(expected.abs().max())

    @pytest.mark.parametrize("head", [TEXTS, CONV])
    def test_other_heads_in_int8(self, head: str, once: Once) -> None:
        folder = self.bundle(once, head, "int8")
        verify(folder, accuracy=False)
        report = selftest(folder)
        assert report.worst.error <= report.tolerance

    def bundle(self, once: Once, architecture: str, precision: str = "fp32") -> Path:
        """Calibrate heads of images with images."""
        if precision != "int8" or architecture in (MASKED, TEXTS):
            return super().bundle(once, architecture, precision)

        def make(folder: Path) -> None:
            source = self.checkpoint(folder / "checkpoint", architecture)
            pixels = np.random.default_rng(0).standard_normal((12, 3, 20, 20)).cumsum(3) / 2
            np.savez(folder / "pixels.npz", pixel_values=pixels.astype(np.float32))
            options = QuantizeOptions(calibration_data=(str(folder / "pixels.npz"),), gate=False)
            export_to(folder, source, max_sizes={"B": 3}, precision=precision, quantize=options)

        return once(f"{type(self).__name__}-{architecture}-{precision}", make) / "bundle"

    @pytest.mark.parametrize("head", [CONV])
    def test_the_report_draws_latents_over_images(self, head: str, once: Once, tmp_path: Path) -> None:
        page = tmp_path / "page.html"
        write_report(self.bundle(once, head), (), page, ())
        text = page.read_text("utf-8")
        assert text.count("what latent ") == 7 * 2  # seven latents over each of two photographs
        assert "What each latent reads" in text


SUITE = TestPerceiver()


def count_batches(tensors: dict[str, torch.Tensor]) -> None:
    """Put numbers into a batch normalisation's running mean and variance, which are no parameters."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if "running" in name:
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"v_channels": 32}, r"self-attention 32 wide, which are added to latents of d_latents 64\. Set v_channels"),
        ({"v_channels": None, "qk_channels": 32}, r"self-attention 32 wide.*Set v_channels to 64"),
        ({"qk_channels": 0}, r"qk_channels is 0, expected a positive integer or null"),
        ({"v_channels": "64"}, r"v_channels is '64', expected a positive integer or null"),
        ({"qk_channels": 33}, r"qk_channels of cross-attention is 33, no multiple of num_cross_attention_heads 2"),
        ({"num_cross_attention_heads": 3}, r"d_latents 64 is no multiple of num_cross_attention_heads 3"),
        ({"cross_attention_shape_for_attention": "v"}, r"is 'v', expected 'kv' or 'q'"),
        ({"num_blocks": 40, "num_self_attends_per_block": 40}, r"is 1600, expected 1000 layers at most"),
        ({"hidden_act": "mish"}, r"hidden_act is 'mish', expected one of gelu"),
        ({"use_query_residual": 1}, r"use_query_residual is 1, expected true or false"),
        ({"d_model": 250}, r"d_model is 250, expected a multiple of the decoder's 8 heads"),
        ({"d_model": 128}, r"embeddings.weight has shape \(262, 256\), config.json asks for \(262, 128\)"),
        ({"architectures": ["PerceiverForMultipleChoice"]}, r"'PerceiverForMultipleChoice'.*Choose a head with --task"),
    ],
    ids=str,
)
def test_settings_that_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = edit_config(SUITE.checkpoint(tmp_path, MASKED), **changes)
    with pytest.raises(CheckpointError, match=message):
        read(folder)


@pytest.mark.parametrize("task", [None, "image-classification"])
@pytest.mark.parametrize(
    ("architecture", "differs"),
    [
        ("PerceiverModel", "has latents alone"),
        ("PerceiverForOpticalFlow", "reads patches of two frames and decodes a flow"),
        ("PerceiverForMultimodalAutoencoding", "reads video, audio and a label"),
    ],
)
def test_variants_that_are_not_defined(architecture: str, differs: str, task: str | None, tmp_path: Path) -> None:
    """The message says what differs, whether or not a task is asked for."""
    transformers.PerceiverConfig(**SIZES, architectures=[architecture]).save_pretrained(tmp_path)
    save_file({"perceiver.embeddings.latents": torch.zeros(7, 64)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"'{architecture}', which {differs}.*Transom defines {LEARNED}"):
        read(tmp_path, task=task)


def test_heads_that_read_something_else(tmp_path: Path) -> None:
    images, texts = (SUITE.checkpoint(tmp_path / name, name) for name in (FOURIER, MASKED))
    with pytest.raises(CheckpointError, match=r"reads images, which fill-mask does not. Choose another --task"):
        read(images, task="fill-mask")
    with pytest.raises(CheckpointError, match=r"reads bytes, which image-classification does not"):
        read(texts, task="image-classification")
    with pytest.raises(CheckpointError, match=r"missing: .*decoder.*Choose|missing: .*choose another --task"):
        read(texts, task="text-classification")


@pytest.mark.parametrize("size", [(4, 20), (20, 4)], ids=str)
def test_an_image_that_the_convolution_leaves_nothing_of(size: tuple[int, int], tmp_path: Path) -> None:
    folder = SUITE.checkpoint(tmp_path, CONV)
    with pytest.raises(CheckpointError, match=r"leaves nothing behind the convolution.*at least 5 pixels"):
        read(folder, image_size=size)


def test_learned_positions_are_of_a_square_image(tmp_path: Path) -> None:
    """transformers squares image_size, and would interpolate from a square grid."""
    folder = SUITE.checkpoint(tmp_path, LEARNED)
    with pytest.raises(CheckpointError, match=r"image_size is \[20, 20\], expected one integer"):
        read(edit_config(folder, image_size=[20, 20]))
    with pytest.raises(CheckpointError, match=r"position_embeddings has shape \(400, 256\), config.json asks for"):
        read(edit_config(folder, image_size=19))
    with pytest.raises(CheckpointError, match=r"position_embeddings has shape \(400, 256\)"):
        read(folder, image_size=(30, 20))  # from 19, which the positions are not


def test_the_image_size_is_the_processors(tmp_path: Path) -> None:
    """config.json of a Perceiver with Fourier features has an image_size that nothing reads."""
    folder = SUITE.checkpoint(tmp_path, FOURIER)
    assert read(folder).graphs[0].inputs[0].shape == ("B", 3, 20, 20)
    (folder / "preprocessor_config.json").write_text('{"size": 12}')
    assert read(folder).graphs[0].inputs[0].shape == ("B", 3, 12, 12)
    (folder / "preprocessor_config.json").unlink()
    assert read(folder).graphs[0].inputs[0].shape == ("B", 3, 224, 224)


# ---- the graph


def test_blocks_share_their_weights(tmp_path: Path) -> None:
    """Twice the same block: as many initializers as one has, each layer's own."""
    counts = {}
    for blocks in (1, 2):
        loaded = read(SUITE.checkpoint(tmp_path / str(blocks), FOURIER, num_blocks=blocks))
        model = onnx_from_module(loaded.parts()["model"], loaded.graphs[0], loaded.axes)
        matrices = [value for value in model.graph.initializers.values() if len(value.shape or ()) == 2]
        counts[blocks] = (len(matrices), sum(node.op_type == "MatMul" for node in model.graph))
    assert counts[1][0] == counts[2][0]
    assert counts[2][1] == counts[1][1] + 12  # one more block of two layers of six


def test_masked_positions_do_not_matter(tmp_path: Path) -> None:
    module = read(SUITE.checkpoint(tmp_path, MASKED)).module
    ids = torch.arange(6, 18)[None]
    mask = (torch.arange(12) < 8).long()[None]
    changed = torch.where(mask == 1, ids, 100)
    first, second = (module(each, mask)[1] for each in (ids, changed))
    assert torch.equal(first, second)
    assert not torch.equal(first, module(changed, torch.ones_like(mask))[1])


def test_a_single_query_of_few_heads_has_its_reason(once: Once) -> None:
    """As a classifier's output asks."""
    classifier = tensorrt_graphs(Bundle(SUITE.bundle(once, TEXTS, "fp16")))["model"]
    assert list(classifier.decomposed.values()) == ["of fewer than 4 heads for a single query"]


@needs_rtx
def test_heads_of_two_widths_are_one_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries and keys of 16 beside values of 32, as the published language model has 32 beside 160."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = SUITE.checkpoint(tmp_path / "checkpoint", MASKED, qk_channels=32)
    export_to(tmp_path, folder, max_sizes={"B": 2}, precision="fp16")
    bundle = Bundle(tmp_path / "bundle")
    (engine,) = build(bundle, find_targets(["rtx-sm86"]), allow_unfused=False, tell=lambda line: None)
    (fusion,) = engine.fusions
    assert (fusion.attention, fusion.attentions) == (6, 6)
    for plugins in (False, True):
        graph = tensorrt_graphs(bundle, plugins=plugins)["model"]
        assert not graph.decomposed
        assert list(graph.operators.values()).count("Pad") == 5 * 2  # queries and keys


# ---- what a bundle answers


def test_bytes_beyond_the_vocabulary(once: Once, tmp_path: Path) -> None:
    with (
        load(SUITE.bundle(once, MASKED)) as bundle,
        pytest.raises(InputError, match=r"'input_ids' holds 262; expected values in 0\.\.261"),
    ):
        bundle.run({"input_ids": np.array([[4, 262, 5]])})
    folder = SUITE.checkpoint(tmp_path, MASKED, vocab_size=200)
    with pytest.raises(CheckpointError, match=r"vocabulary of 200, and the bytes from 0xC2 on have ids beyond it"):
        read(folder)
    assert read(SUITE.checkpoint(tmp_path / "more", MASKED, vocab_size=300)).graphs[0].inputs[0].exclusive_max == 300


def test_gaps_are_filled_as_by_transformers_logits(once: Once) -> None:
    """Bytes of characters beyond ASCII are given by their number, for alone they are no text."""
    folder = SUITE.bundle(once, MASKED)
    checkpoint = folder.parent / "checkpoint"
    model = transformers.PerceiverForMaskedLM.from_pretrained(checkpoint).eval()
    tokenizer = transformers.PerceiverTokenizer()
    for text in ("one byte is missi[MASK]g", "caf[MASK][MASK] au lait"):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            rows = model(ids).logits[0, : ids.shape[1]][ids[0] == 3].softmax(-1)
        (result,) = document(transom("run", folder, text, "--json", "--top-k", "262"))["results"]
        for gap, theirs in zip(result["masks"], rows, strict=True):
            order = theirs.argsort(descending=True, stable=True).tolist()
            expected = [f"<0x{token - 6:02X}>" if token >= 6 + 0x80 else tokenizer.decode([token]) for token in order]
            assert [answer["token"] for answer in gap] == expected
            np.testing.assert_allclose([answer["probability"] for answer in gap], theirs[order], rtol=1e-3)
    lines = transom("run", folder, "missi[MASK]g", "--top-k", "262").stdout.splitlines()
    assert len(lines) == 1 + 262
    assert sum(line.endswith("  ' '") for line in lines) == sum(line.endswith(r"  '\n'") for line in lines) == 1


def test_what_prints_as_nothing_is_quoted() -> None:
    assert [visible(text) for text in (" ", "\n", "a", "<0xE2>", "")] == ["' '", r"'\n'", "a", "<0xE2>", "''"]


def test_latents_are_features(once: Once) -> None:
    with load(SUITE.bundle(once, MASKED)) as bundle:
        assert bundle.features("a text").shape == (7, 64)
        both = bundle.features(["a text", "longer than that"])
        np.testing.assert_allclose(both[0], bundle.features("a text"), atol=1e-5)
    with load(SUITE.bundle(once, FOURIER)) as bundle:
        assert bundle.features([small_photo()]).shape == (1, 7, 64)


def test_another_size_keeps_the_part_of_the_image(tmp_path: Path) -> None:
    folder = SUITE.checkpoint(tmp_path, FOURIER)
    words = {"image_processor_type": "PerceiverImageProcessor", "size": 20, "crop_size": 25}
    (folder / "preprocessor_config.json").write_text(json.dumps(words))
    made = read(folder, image_size=(10, 12)).preprocess
    assert made is not None
    assert (made.height, made.width) == (10, 12)
    assert made.crop_first is not None
    assert (made.crop_first.height, made.crop_first.width) == (0.8, 0.8)
