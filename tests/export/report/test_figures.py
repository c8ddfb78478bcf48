"""The pictures of a report: each is what the bundle's own graph computes, and what its paper means by it."""

from __future__ import annotations

import base64
import io
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from PIL import Image

from transom.export.bundle_graphs import graph_file, operator_counts
from transom.export.datasets import heldout_digits
from transom.export.parity.results import CaseResult, outputs_to_json
from transom.export.report.figures.attention import ExposedAttention
from transom.export.report.figures.bert import most_specific_head
from transom.export.report.figures.clip import draw_zero_shot_matrix
from transom.export.report.figures.gpt import token_surprisal
from transom.export.report.figures.transformer import CROSS, alignment
from transom.export.report.figures.vit import position_embeddings, rollout, similarities
from transom.export.report.images import data_uri, image_from_pixels
from transom.export.report.rendering import visible, visible_token
from transom.export.report.svg import LinearAxis, LogAxis, heatmap, thumbnail
from transom.runtime.bundle import Bundle
from transom.runtime.compare import compare
from transom.runtime.image_preprocess import ImagePreprocess
from transom.runtime.loading import load
from transom.runtime.tasks.gpt import GPT
from transom.runtime.tasks.transformer import Transformer


# By pencil.
def test_a_heatmap_by_pencil() -> None:
    """Opacity is the square root of the weight."""
    weights = np.array([[1.0, 0.0], [0.25, 0.64]], np.float32)
    svg = heatmap(weights, ["x", "y"], ["a", "<b>"], "label")
    assert re.findall(r'fill-opacity="([\d.]+)"><title>([^<]*)</title>', svg) == [
        ("1.000", "x looks at a: 1.000"),
        ("0.500", "y looks at a: 0.250"),
        ("0.800", "y looks at &lt;b&gt;: 0.640"),
    ]


def test_a_thumbnail_by_pencil() -> None:
    svg = thumbnail(np.array([[1.0, -0.25], [0.25, 0.0]], np.float32), "label")
    assert re.findall(r'<path class="(\w+)" fill-opacity="([\d.]+)" d="([^"]*)"/>', svg) == [
        ("mark", "0.50", "M0 1h1v1h-1z"),
        ("mark", "1.00", "M0 0h1v1h-1z"),
        ("warm", "0.50", "M1 0h1v1h-1z"),
    ]


def test_what_cannot_be_seen_is_named() -> None:
    assert (visible_token("▁a "), visible_token("\n"), visible_token("<&")) == ("␣a␣", "U+000A", "<&")
    assert visible("abcdef", 4) == "abc…"
    assert visible("\u202eabc") == "U+202Eabc"


def test_axes_by_pencil() -> None:
    axis = LogAxis(1e-8, 1e-4)
    assert [axis.at(value) for value in (0.0, 1e-9, 1e-8, 1e-6, 1e-4, 1.0)] == pytest.approx([0, 0, 0, 50, 100, 100])
    assert axis.decades() == pytest.approx([1e-4, 1e-5, 1e-6, 1e-7, 1e-8])
    assert LinearAxis(0.97, 1.01).ticks() == pytest.approx([0.97, 0.98, 0.99, 1.0, 1.01])


def test_the_histogram_of_a_comparison_by_pencil() -> None:
    """Differences 0, 2^-3, 2^-3 * 1.5, 2 and, of padding, 5: bins of 2^-3 (two) and 2^1 (one); padding is left out."""
    theirs = np.array([[1.0, 1.0, 1.0], [1.0, 4.0, 1.0]], np.float32)
    ours = np.array([[1.0, 1.125, 1.1875], [1.0, 6.0, 6.0]], np.float32)
    real = np.array([[True, True, True], [True, True, False]])
    comparison = compare("x", ours, theirs, real)
    assert dict(enumerate(comparison.histogram[comparison.histogram > 0])) == {0: 2, 1: 2, 2: 1}
    told = outputs_to_json(
        [CaseResult({"B": 2}, (comparison,)), CaseResult({"B": 1}, (compare("x", ours[:1], theirs[:1]),))]
    )
    assert (told["x"]["equal"], told["x"]["exponent"], told["x"]["counts"]) == (3, -3, [4, 0, 0, 0, 1])
    assert told["x"]["worst"]["index"] == (1, 1)
    same = outputs_to_json([CaseResult({"B": 2}, (compare("x", theirs, theirs),))])
    assert (same["x"]["equal"], same["x"]["counts"]) == (6, [])


def test_operators_are_counted_with_their_domain() -> None:
    a = ir.Value(name="a")
    nodes = [ir.node("Relu", [a]), ir.node("Gelu", [a], domain="com.microsoft"), ir.node("Relu", [a])]
    model = ir.Model(ir.Graph([a], [], nodes=nodes), ir_version=10)
    assert operator_counts(model) == {"Relu": 2, "com.microsoft::Gelu": 1}


def test_rollout_by_pencil() -> None:
    """One layer of one head in which each of two tokens looks at the other alone: half of each stays."""
    swap = np.array([[[[0.0, 1.0], [1.0, 0.0]]]], np.float32)
    np.testing.assert_allclose(rollout(swap), [[0.5, 0.5], [0.5, 0.5]])
    first = np.array([[[[1.0, 0.0], [1.0, 0.0]]]], np.float32)  # all look at token 0
    np.testing.assert_allclose(rollout(np.concatenate([first, first])), [[1, 0], [0.75, 0.25]])
    two_heads = np.concatenate([swap, np.eye(2, dtype=np.float32)[None, None]], axis=1)
    np.testing.assert_allclose(rollout(two_heads), [[0.75, 0.25], [0.25, 0.75]])


def test_similarities_by_pencil() -> None:
    positions = np.array([[3.0, 0.0], [0.0, 2.0], [-1.0, 0.0]], np.float32)
    np.testing.assert_allclose(similarities(positions), [[1, 0, -1], [0, 1, 0], [-1, 0, 1]])


def test_the_head_that_distance_and_common_words_do_not_explain_is_chosen() -> None:
    special = np.array([True, *[False] * 8, True])
    weights = np.zeros((3, 2, 10, 10), np.float32)
    weights[0, 0] = np.eye(10)  # at itself
    weights[0, 1, :, 0] = 1  # at the first special token
    weights[1, 0] = np.eye(10, k=1)  # at the next
    weights[1, 1, :, 2] = 1  # all at one word
    weights[2, 0] = 1 / 10
    weights[2, 1, np.arange(1, 9), [3, 6, 1, 8, 2, 7, 4, 5]] = 0.6  # each at one of its own
    assert most_specific_head(weights, special) == (2, 1)


def test_what_a_model_sees_turned_back() -> None:
    words = {"resize": {"height": 2, "width": 2}, "resample": "nearest", "crop": None, "rescale": 1 / 255}
    words |= {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "channels": 3, "height": 2, "width": 2}
    preprocess = ImagePreprocess.from_json({**words, "transparent_to_white": False})
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3) * 20
    image = image_from_pixels(preprocess([pixels])[0], preprocess)
    np.testing.assert_array_equal(np.asarray(image), pixels)
    kind, data = data_uri(image).split(";base64,")
    assert kind == "data:image/png"
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), pixels)


# Out of the graph.
def test_cross_attention_is_that_of_the_definition(exported: Any) -> None:
    """softmax(q k^T / sqrt(D)) of the first layer's cross-attention, computed by hand from the module."""
    from transom.export.checkpoint import load_checkpoint

    checkpoint, folder = exported("MarianMTModel")
    loaded = load_checkpoint(str(checkpoint), task=None, max_sizes={}, image_size=None, ignore_unused=False)
    bundle = Bundle(folder)
    source, target = [5, 6, 7, 0], [100, 9, 8]
    with Transformer(bundle) as model:
        encoded = model.run({"input_ids": np.array([source])})
        decoder = graph_file(bundle, "decoder")
        feeds = {
            "decoder_input_ids": np.array([target]),
            "attention_mask": np.ones((1, 4), np.int64),
            "write_indices": np.zeros(1, np.int64),
            "logits_positions": np.arange(3)[None],
        }
        for tensor in decoder.graph.inputs:
            if tensor.name.startswith("cross_"):
                feeds[tensor.name] = encoded[tensor.name]
            elif tensor.state:
                feeds[tensor.name] = np.zeros((1, tensor.shape[1], 3, tensor.shape[3]), np.float32)
        weights = ExposedAttention(bundle, decoder, CROSS).weights(feeds)
    assert weights.shape == (2, 4, 3, 4)  # layers, heads, target, source

    queries: list[torch.Tensor] = []
    attention = loaded.module.decoder.layers[0].encoder_attn
    attention.q_proj.register_forward_hook(lambda module, given, found: queries.append(found))
    with torch.no_grad():
        loaded.module.decode(*(torch.from_numpy(feeds[tensor.name]) for tensor in decoder.graph.inputs))
    q = queries[0].view(1, 3, 4, 40).transpose(1, 2)
    expected = (q @ torch.from_numpy(encoded["cross_key.0"]).transpose(2, 3) / 40**0.5).softmax(-1)
    np.testing.assert_allclose(weights[0], expected[0].numpy(), atol=1e-6)


def test_the_last_digits_of_a_date_look_at_its_day(dates_bundle: Path) -> None:
    """What the picture shows: the day is written while the day is read."""
    bundle = Bundle(dates_bundle)
    with Transformer(bundle) as model:
        exposed = ExposedAttention(bundle, graph_file(bundle, "decoder"), CROSS)
        found = alignment(model, exposed, "27 May 1979", {"num_beams": 1})
    assert "".join(found.target[:10]) == found.answer == "1979-05-27"
    assert found.source[:2] == ["2", "7"]
    mean = found.weights[-1].mean(0)  # (T, S)
    assert mean[8:10, :2].sum(1).min() > 0.5
    assert mean[2:4, :2].sum(1).max() < 0.1
    np.testing.assert_allclose(found.weights.sum(-1), 1, atol=1e-5)


def test_self_attention_is_that_of_transformers(exported: Any) -> None:
    from transformers import BertModel

    checkpoint, folder = exported("BertModel")
    bundle = Bundle(folder)
    ids = np.array([[2, 40, 41, 42, 3]])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    weights = ExposedAttention(bundle, graph_file(bundle, "model")).weights(feeds)
    model = BertModel.from_pretrained(checkpoint, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = model(torch.from_numpy(ids), output_attentions=True).attentions
    np.testing.assert_allclose(weights, np.stack([layer[0].numpy() for layer in expected]), atol=2e-6)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_shows_the_same(precision: str, vit_bundle: Path, once: Any, traced_once: None) -> None:
    """Positions are found inside the graph and outside of it, attention comes out of either CPU variant."""
    from transom.export.pipeline import export

    half = once(f"report-vit-{precision}", lambda folder: export("vit", folder / "bundle", precision=precision))
    bundles = [Bundle(vit_bundle), Bundle(half / "bundle")]
    files = [graph_file(bundle, "model") for bundle in bundles]
    ours, theirs = (position_embeddings(*pair, (4, 4)) for pair in zip(bundles, files, strict=True))
    assert ours is not None
    assert theirs is not None
    np.testing.assert_allclose(similarities(ours), similarities(theirs), atol=2e-2)
    pixels = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
    full, rounded = (
        ExposedAttention(*pair).weights({"pixel_values": pixels}) for pair in zip(bundles, files, strict=True)
    )
    assert full.shape == (3, 4, 17, 17)
    np.testing.assert_allclose(full, rounded, atol=3e-2)
    np.testing.assert_allclose(rounded.sum(-1), 1, atol=2e-2)


def test_positions_are_those_of_the_checkpoint(vit_bundle: Path) -> None:
    from safetensors.numpy import load_file

    from conftest import reference

    bundle = Bundle(vit_bundle)
    stored = load_file(reference("vit") / "model.safetensors")
    (name,) = (name for name in stored if name.endswith("position_embeddings"))
    found = position_embeddings(bundle, graph_file(bundle, "model"), (4, 4))
    np.testing.assert_array_equal(found, stored[name][0, 1:])
    assert position_embeddings(bundle, graph_file(bundle, "model"), (4, 5)) is None


def test_surprise_is_the_models_own_score(gpt_bundle: Path) -> None:
    text = "It is a truth universally acknowledged"
    with GPT(Bundle(gpt_bundle)) as model:
        tokens = token_surprisal(model, text)
        expected = -model.log_probabilities(text) / math.log(2)
    assert "".join(token.text for token in tokens) == text
    assert tokens[0].bits is None
    np.testing.assert_allclose([token.bits for token in tokens[1:]], expected, atol=1e-4)
    for token in tokens[1:]:
        probabilities = [probability for _, probability in token.likeliest]
        assert probabilities == sorted(probabilities, reverse=True)
        assert token.bits is not None
        assert 2**-token.bits <= probabilities[0] + 1e-9


def test_the_matrix_is_what_zero_shot_answers(clip_bundle: Path, tmp_path: Path) -> None:
    scans, labels = heldout_digits()
    prompts = ["a photo of a three", "a photo of a seven"]
    path = tmp_path / "three.png"
    Image.fromarray(scans[int(np.flatnonzero(labels == 3)[0])]).save(path)
    with load(clip_bundle) as clip:
        expected = dict(clip.zero_shot(str(path), prompts))
    html = draw_zero_shot_matrix(Bundle(clip_bundle), [str(path)], prompts)
    shown = [float(number) for number in re.findall(r"<td[^>]*>([\d.]+)</td>", html)]
    assert shown == [round(expected[prompt], 2) for prompt in prompts]
    assert max(expected, key=expected.__getitem__) == "a photo of a three"
    assert html.index("top") < html.index(f"{shown[1]:.2f}</td>")
