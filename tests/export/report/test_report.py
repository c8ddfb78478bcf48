"""The report as a page: it stands alone, tells what bundle.json tells, and is harmless whatever that holds."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from command_line import changed_bundle, error_line, transom
from report_pages import Page
from shipped_lists import if_lists_are_made
from transom.export.report import report as report_module
from transom.export.report.report import write_report
from transom.runtime.bundle import Bundle
from transom.runtime.errors import InputError
from transom.runtime.manifest import MANIFEST

Exported = Callable[..., tuple[Path, Path]]
Report = Callable[..., str]
EVIL = "<script>alert(1)</script>\"'>\x00\x1b[31m\u202e&amp;</title></style>"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timing is not the subject."""
    monkeypatch.setattr(report_module, "RUNS", 2)
    monkeypatch.setattr(report_module, "WARMUP", 0)


@pytest.fixture
def report(tmp_path: Path) -> Report:
    """``report(bundle, inputs, prompts)`` -> the page."""

    def make(bundle: Path, inputs: list[str] | None = None, prompts: list[str] | None = None) -> str:
        out = tmp_path / "report.html"
        write_report(bundle, inputs or [], out, prompts or [])
        return out.read_text(encoding="utf-8")

    return make


BUNDLES = ["bert_bundle", "vit_bundle", "gpt_bundle", "dates_bundle", "clip_bundle"]
BUNDLES += ["random_seq2seq_bundle", "random_fixed_bundle", "random_captioner_bundle", "captions_bundle"]


@pytest.mark.parametrize("name", BUNDLES)
def test_the_page_stands_alone_and_has_a_picture(name: str, report: Report, request: pytest.FixtureRequest) -> None:
    html = report(request.getfixturevalue(name))
    page = Page(html)
    assert "http" not in html
    assert "@import" not in html
    assert "url(" not in html
    assert html.count("<figure>") >= 1
    assert html.count("<figcaption>") == html.count("<figure>")
    assert html.count("<svg") == html.count("aria-label=")
    for heading in ("Against PyTorch", "Size", "Latency", "Operators", "Tensors and origin"):
        assert heading in page.headings
    assert all(head and all(head[1:]) for _, (head, *_) in page.tables if head[0] != "graph")


def fused(case: dict[str, Any]) -> str:
    return ", by fused operators" if case.get("native") else ""


def test_the_figures_are_those_of_the_bundle(vit_bundle: Path, report: Report) -> None:
    page = Page(report(vit_bundle))
    manifest = json.loads((vit_bundle / MANIFEST).read_text())
    parity, score = manifest["parity"], manifest["score"]
    text = "".join(page.text)
    assert f"worst error {parity['worst']['error']:.2e}; {parity['tolerance']:g} is allowed" in text
    assert page.table("The worst element of each", 1)[1:] == [
        [" ".join(f"{axis}={size}" for axis, size in case["sizes"].items()) + fused(case), output, f"{error:.2e}"]
        for case in parity["cases"]
        for output, error in case["errors"].items()
    ]
    worst = parity["outputs"]["logits"]["worst"]
    assert page.table("The worst element of each")[1] == [
        "logits",
        f"{worst['error']:.2e}",
        f"B={worst['sizes']['B']}",
        f"[{worst['index'][0]}, {worst['index'][1]}]",
        f"{worst['ours']:.9g}",
        f"{worst['theirs']:.9g}",
    ]
    low, high = score["bundle"]["interval"]
    assert f"this bundle {score['bundle']['value']:.4f}95 % {low:.4f} to {high:.4f}, 535 right" in text
    assert "n = 540; higher is better" in text
    sizes = {row[0] for row in page.table("Size")[1:]}
    assert sizes == set(manifest["files"])


def test_every_element_is_in_a_histogram(vit_bundle: Path, report: Report) -> None:
    page = Page(report(vit_bundle))
    outputs = json.loads((vit_bundle / MANIFEST).read_text())["parity"]["outputs"]
    drawn = sum(int(title.split(" ")[0].replace(",", "")) for title in page.titles if " elements of " in title)
    assert drawn == sum(sum(output["counts"]) for output in outputs.values()) > 20_000
    equal, count = outputs["logits"]["equal"], 220 * (1 + len(if_lists_are_made("native")))
    assert f"{count} elements, {equal / count:.0%} equal to the bit" in "".join(page.text)


def test_operators_before_and_after(vit_bundle: Path, report: Report) -> None:
    """Exported and shipped alike in FP32; ONNX Runtime fuses the bias into Gelu."""
    rows = {row[0]: row[1:] for row in Page(report(vit_bundle)).table("Operators")[1:]}
    assert rows["Attention"] == ["3", "3", "3"]
    assert rows["Gelu"] == ["3", "3", "·"]
    assert rows["BiasGelu com.microsoft"] == ["·", "·", "3"]
    assert "SkipLayerNormalization com.microsoft" not in rows  # a fusion that is slower than what it fuses
    recorded = Bundle(vit_bundle).manifest.operators["model"]
    assert next(counts for name, counts in rows.items() if name.startswith("all "))[0] == str(sum(recorded.values()))


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "names": lambda w: w.update(name=EVIL, task=EVIL, labels=[EVIL] * 10),
    "long names": lambda w: w.update(name="x" * 100_000, task="\U0001f600" * 100_000, labels=["<b>" * 30_000] * 10),
    "origin": lambda w: w.update(source={"checkpoint": EVIL, "sha256": {EVIL: [EVIL]}}, tools={EVIL: EVIL}),
    "no parity": lambda w: w.update(parity={"tolerance": 2e-5}),
    "a tolerance of nothing": lambda w: w["parity"].update(tolerance=0),
    "a negative tolerance": lambda w: w["parity"].update(tolerance=-1.5),
    "a tiny tolerance": lambda w: w["parity"].update(tolerance=5e-324),
    "a huge tolerance": lambda w: w["parity"].update(tolerance=1.7e308),
    "an error of next to nothing": lambda w: w["parity"]["worst"].update(error=5e-324),
    "odd cases": lambda w: w["parity"].update(
        cases=[
            1,
            None,
            {"sizes": EVIL, "errors": {EVIL: 1e-7, "a": EVIL, "b": 10**400, "c": -1, "d": 0, "e": 1e308, "f": 5e-324}},
        ],
        worst={"sizes": {EVIL: EVIL}, "error": "wide", "tensor": EVIL},
    ),
    "odd outputs": lambda w: w["parity"].update(
        outputs={
            EVIL: {"worst": {"index": EVIL, "ours": EVIL}, "equal": -1, "exponent": 10**9, "counts": [1]},
            "logits": {"worst": 1, "equal": 10**30, "exponent": -30, "counts": [EVIL, -1, 10**40, 3, None]},
            "x": {"exponent": 190, "counts": [1] * 10_000},
        },
        scales={"logits": 1e-320, "x": 0},
    ),
    "odd ends of FP16": lambda w: w["parity"].update(
        fp16_largest={"value": 1e308, "tensor": [EVIL] * 999, "module": 3},
        fp16_largest_sum={"value": 7e4, "tensor": EVIL, "module": EVIL * 99},
    ),
    "other odd ends of FP16": lambda w: w["parity"].update(fp16_largest=EVIL, fp16_largest_sum={"value": 10**400}),
    "an odd score": lambda w: w.update(
        score={"name": EVIL, "n": EVIL, "bundle": {"value": 1e308, "interval": [-1e308, 1e308], "correct": EVIL}}
    ),
    "another odd score": lambda w: w.update(
        score={"pytorch": {"value": 10**400}, "bundle": {"value": 0.0, "interval": [3, 2, 1]}}
    ),
    "odd lengths of a score": lambda w: w.update(
        score={
            "bundle": {
                "by_length": [
                    {"name": EVIL, "characters": [0, size, 0], "value": value, "n": 10**400, "interval": [0, 1e308]}
                    for size, value in ((1e308, 0.5), (-1e12, 1.0), (5e-324, 0.0), (1e12, 0.3))
                ]
                + [{"name": EVIL * 99, "characters": [0, size, 0], "value": 0.1, "n": 2**62} for size in (1e12, -1e12)]
            }
        }
    ),
    "no score at all": lambda w: w.update(score={}),
    "odd operators": lambda w: w.update(operators={"model": {EVIL: EVIL, "Add": -5, "Mul": 10**40, "a::b": 3}}),
    "other odd operators": lambda w: w.update(operators={"model": [EVIL]}),
    "no config": lambda w: w.update(config={}),
    "an odd config": lambda w: w.update(config={"patch_size": [EVIL, 0], "image_size": -1}),
    "another odd config": lambda w: w["config"].update(patch_size=[1, 1]),
    "no preprocessing": lambda w: w.pop("preprocess"),
    "a rescaling to nothing": lambda w: w["preprocess"].update(rescale=0.0),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_bundle_gives_a_harmless_page(
    change: Callable[[dict[str, Any]], object], vit_bundle: Path, tmp_path: Path, report: Report
) -> None:
    html = report(changed_bundle(vit_bundle, tmp_path, change))
    page = Page(html)
    assert "<script" not in html
    assert len(html) < 500_000
    assert not set("\x00\x1b\u202e") & set(html)
    assert max(map(len, page.text[1:])) < 20_000
    assert not {"nan", "inf", "None"} & set(re.findall(r"\w+", "".join(page.text[1:])))


# Odd, but sound.
@pytest.mark.parametrize("name", ["bert_bundle", "gpt_bundle", "dates_bundle", "random_seq2seq_bundle"])
def test_without_a_tokenizer_there_is_no_picture(
    name: str, report: Report, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    bundle = changed_bundle(request.getfixturevalue(name), tmp_path, lambda fields: fields.pop("tokenizer"))
    assert Page(report(bundle)).headings[0] == "Against PyTorch"
    with pytest.raises(InputError, match="nothing to draw of them: this bundle has no tokenizer"):
        report(bundle, ["a text"])


def test_one_layer_other_channels_other_sizes(exported: Exported, report: Report) -> None:
    _, one = exported("BertModel", num_hidden_layers=1, num_attention_heads=1)
    assert "All 1 layers of 1 heads" in report(one)
    _, odd = exported("ViTForImageClassification", num_channels=2, image_size=[20, 36], num_hidden_layers=1)
    html = report(odd)
    assert "5 by 9 patches" in html
    assert "Where the answer comes from" not in html
    with pytest.raises(InputError, match="nothing to draw of them: this bundle has no preprocessing"):
        report(odd, ["image.png"])


def test_the_command(vit_bundle: Path, tmp_path: Path) -> None:
    out, image = tmp_path / "a <page>.html", tmp_path / "image.png"
    Image.fromarray(np.full((8, 8, 3), 200, np.uint8)).save(image)
    done = transom("report", vit_bundle, image, "--out", out)
    assert (done.exit_code, done.stdout) == (0, f"written to {out}\n")
    before = out.read_bytes()
    assert before.count(b"data:image/png") == 2
    assert f"--out {out} exists; give another file, or --force to replace it." in error_line(
        transom("report", vit_bundle, "--out", out)
    )
    refused = transom("report", vit_bundle, tmp_path / "none.png", "--out", out, "--force")
    assert "is not a file that is there" in error_line(refused)
    assert out.read_bytes() == before
    assert transom("report", vit_bundle, "--out", out, "--force").exit_code == 0
    assert out.read_bytes() != before


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("vit_bundle", ["--prompt", "a dog"], "--prompt is for CLIP"),
        ("vit_bundle", ["a text"], "'a text' is not a file that is there"),
        ("bert_bundle", ["word " * 70], "tokens"),
        ("bert_bundle", ["word " * 63], "attention over at most 64 is drawn"),
        ("bert_bundle", [""], "has no tokens"),
        ("gpt_bundle", ["word " * 300], "2 to 256 can be drawn"),
        ("gpt_bundle", ["\n"], "has 1 tokens"),
        ("clip_bundle", ["no such file.png"], "is not a file that is there"),
        ("clip_bundle", ["--prompt", "word " * 100], "tokens"),
        ("clip_bundle", ["--prompt", ""], "has no tokens"),
        ("random_seq2seq_bundle", ["water " * 64], "has 65 tokens; attention over at most 64 is drawn"),
        ("random_seq2seq_bundle", [""], "has no tokens"),
        ("random_fixed_bundle", ["water " * 80], "a source is 81 tokens"),
        ("random_captioner_bundle", ["no such file.png"], "is not a file that is there"),
    ],
)
def test_what_does_not_fit_leaves_no_file(
    name: str, arguments: list[str], message: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    out = tmp_path / "out.html"
    line = error_line(transom("report", request.getfixturevalue(name), *arguments, "--out", out))
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_cannot_be_written(vit_bundle: Path, tmp_path: Path) -> None:
    for target, message in (
        (tmp_path, "is a folder; give the name of a file"),
        (tmp_path / ("x" * 300), "File name too long"),
        (tmp_path / "none" / "out.html", "No such file or directory"),
    ):
        assert message in error_line(transom("report", vit_bundle, "--out", target, "--force"))
    assert list(tmp_path.iterdir()) == []


def test_a_link_or_a_device_is_not_replaced(vit_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "kept.html").write_text("kept")
    (tmp_path / "link.html").symlink_to("kept.html")
    os.mkfifo(tmp_path / "pipe.html")
    for name in ("link.html", "pipe.html"):
        line = error_line(transom("report", vit_bundle, "--out", tmp_path / name, "--force"))
        assert f"{name} is a link or no regular file" in line
    assert (tmp_path / "link.html").is_symlink()
    assert (tmp_path / "kept.html").read_text() == "kept"
