"""The report: attention that is attention, and a page that any browser opens."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import torch

from command_line import transom
from transom.export.report.alignment import Exposed, alignment
from transom.export.report.heatmap import heatmap, shown
from transom.runtime.bundle import Bundle
from transom.runtime.tasks.transformer import Transformer


def test_a_picture_by_pencil() -> None:
    weights = np.array([[1.0, 0.0], [0.25, 0.75]], np.float32)
    svg = heatmap(weights, ["x", "y"], ["a", "<b>"])
    marks = re.findall(r'fill-opacity="([\d.]+)"><title>([^<]*)</title>', svg)
    assert marks == [
        ("1.000", "x looks at a: 1.000"),
        ("0.250", "y looks at a: 0.250"),
        ("0.750", "y looks at &lt;b&gt;: 0.750"),
    ]


def test_what_cannot_be_seen_is_named() -> None:
    assert (shown("▁a "), shown("\n"), shown("<&")) == ("␣a␣", "U+000A", "&lt;&amp;")


def test_the_weights_are_those_of_the_definition(exported: Any) -> None:
    """softmax(q k^T / sqrt(D)) of the first layer's cross-attention, computed by hand from the module."""
    from transom.export.source import load_source

    checkpoint, folder = exported("MarianMTModel")
    loaded = load_source(str(checkpoint), task=None, max_sizes={}, image_size=None, ignore_unused=False)
    bundle = Bundle(folder)
    source, target = [5, 6, 7, 0], [100, 9, 8]
    with Transformer(bundle) as model:
        encoded = model.run({"input_ids": np.array([source])})
        decoder = next(file for file in bundle.manifest.graphs if file.graph.name == "decoder")
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
        weights = Exposed(bundle, decoder).weights(feeds)
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
        decoder = next(file for file in bundle.manifest.graphs if file.graph.name == "decoder")
        found = alignment(model, Exposed(bundle, decoder), "27 May 1979", {"num_beams": 1})
    assert "".join(found.target[:10]) == "1979-05-27"
    assert found.source[:2] == ["2", "7"]
    mean = found.weights[-1].mean(0)  # (T, S)
    assert mean[8:10, :2].sum(1).min() > 0.5
    assert mean[2:4, :2].sum(1).max() < 0.1
    np.testing.assert_allclose(found.weights.sum(-1), 1, atol=1e-5)


class Outside(HTMLParser):
    """Collects what a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [tag for name, _ in attrs if name in ("src", "href")]
        self.found += [tag] if tag in ("script", "link", "iframe") else []


def test_the_page_stands_alone(dates_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "dates.html"
    assert transom("report", dates_bundle, "3 May <1979>", "--out", out).exit_code == 0
    page = out.read_text(encoding="utf-8")
    outside = Outside()
    outside.feed(page)
    assert outside.found == []
    assert "url(" not in page
    assert page.count("<figure>") == 1
    assert "&lt;" in page
    again = transom("report", dates_bundle, "--out", out)
    assert (again.exit_code, out.read_text(encoding="utf-8")) == (1, page)
    assert "exists; give another file, or --force to replace it." in again.stderr


def test_texts_where_there_is_nothing_to_draw(vit_bundle: Path, tmp_path: Path) -> None:
    refused = transom("report", vit_bundle, "a text", "--out", tmp_path / "vit.html")
    assert refused.exit_code == 1
    assert "texts are drawn for translations with a tokenizer; this is a vit bundle." in refused.stderr
    assert transom("report", vit_bundle, "--out", tmp_path / "vit.html").exit_code == 0
    assert "Against PyTorch" in (tmp_path / "vit.html").read_text(encoding="utf-8")
