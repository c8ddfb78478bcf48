"""The report of a quantised bundle: gate, curve and layers as bundle.json tells them, harmless whatever that holds."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from command_line import QUANTIZATION, as_quantized, changed_bundle
from json_mutations import mutated
from report_pages import Page
from transom.export.report import report as report_module
from transom.export.report.accuracy import gate_records, quantization_section
from transom.export.report.report import write_report

EVIL = "<script>alert(1)</script>\"'>\x00\x1b[31m\u202e&amp;</title></style>"
Words = dict[str, Any]


def drawn(change: Callable[[Words], object] = lambda fields: None) -> str:
    """The section alone; ``change`` is done to ``quantization``."""
    fields = copy.deepcopy(QUANTIZATION)
    change(fields)
    manifest: Any = SimpleNamespace(quantization=fields, operators={})
    return quantization_section(manifest)


def test_the_section_tells_what_was_done_and_found() -> None:
    page = Page(drawn())
    text = "".join(page.text)
    assert "Weights of 7 bits, activations static in model; ranges by mse from 400 samples of digits." in text
    assert "Measured with avx512_vnni." in text
    head, cpu, default = page.table("Quantisation")
    assert cpu[0] == "cpu"  # first, wherever bundle.json has it
    assert default[0] == "default"
    assert dict(zip(head[1:], cpu[1:], strict=True)) == {
        "gate": "holds", "judged by": "top-1 accuracy", "found": "0.005", "allowed": "0.013", "n": "540",
        "score / FP32": "0.985 / 0.99", "same top-1": "0.9963", "error": "0.02", "calibrations": "–",
    }  # fmt: skip
    recorded = {"calibrations": 2, "found": 0.006, "n": 540, "interval": None, "relative_error": 0.02}
    repeated = Page(drawn(lambda fields: fields["gate"]["cpu"].update(repeated=recorded)))
    assert repeated.table("Quantisation")[1][-1] == "0.006 over 2, n = 540"


def test_the_curve_has_every_point_the_bound_and_fp32() -> None:
    html = drawn()
    page = Page(html)
    points = [title for title in page.titles if " layers: " in title]
    assert points == [
        "0 of 4 layers: 0.99", "2 of 4 layers: 0.985", "4 of 4 layers: 0.97",
        "0 of 4 layers: 0", "2 of 4 layers: 0.01", "4 of 4 layers: 0.04",
    ]  # fmt: skip
    assert "allowed 0.977" in html  # 0.99 - 0.013
    assert "FP32 0.99" in html
    heights = [float(y) for y in re.findall(r'<circle cx="[\d.]+%" cy="([\d.]+)"', html)]
    assert heights[0] < heights[1] < heights[2]  # the score falls
    assert heights[3] > heights[4] > heights[5]  # the error rises
    sites = [float(x) for x in re.findall(r'<circle cx="([\d.]+)%"', html)[:3]]
    assert sites[1] - sites[0] == pytest.approx(sites[2] - sites[1])


def test_perplexity_is_bounded_by_a_share() -> None:
    """Scores of texts are nats per token: e^2 = 7.389, and 3 % more is 7.611."""

    def text(fields: Words) -> None:
        score = {"lower_is_better": True, "fp32": {"value": 2.0}, "int8": {"value": 2.01}}
        gate = {"measure": "perplexity", "found": 0.01005, "allowed": 0.03, "score": score, "holds": True}
        fields.update(curve=[{"quantized": 4, "layers": 4, "score": 7.463}], gate={"cpu": gate})

    html = drawn(text)
    assert "allowed 7.611" in html
    assert "FP32 7.389" in html
    assert "7.463 / 7.389" in html


@pytest.mark.parametrize(
    ("measure", "recorded", "bound"),
    [
        ("agreement", {"found": 0.25, "allowed": 0.125, "agreement": {"value": 0.75}}, 0.875),
        ("relative_error", {"found": 0.02, "allowed": 0.1, "relative_error": {"value": 0.02}}, 0.1),
        ("agreement", {"found": 0.02, "allowed": 0.1, "agreement": {"value": 0.75}}, None),  # judged by another
        ("relative_error", {"found": 0.3, "allowed": 0.1, "relative_error": {"value": 0.02}}, None),
        ("score", {"found": 0.3, "allowed": 0.1}, None),
        ("score", {"found": None, "allowed": 0.1}, None),
    ],
)
def test_the_bound_is_of_the_measure_that_is_judged(measure: str, recorded: Words, bound: float | None) -> None:
    (result,) = gate_records({"gate": {"cpu": recorded}})
    assert result.bound(measure) == bound


def test_layers_stand_by_sensitivity_and_kept_ones_are_marked() -> None:
    html = drawn()
    bars = re.findall(r'<rect x="0.00%" width="([\d.]+)%" [^>]*class="(\w+)"><title>(layer\.\d): ([\d.]+)', html)
    assert bars == [
        ("100.00", "warm", "layer.3", "0.03"), ("66.67", "mark", "layer.2", "0.02"),
        ("33.33", "mark", "layer.1", "0.01"), ("0.00", "mark", "layer.0", "0"),
    ]  # fmt: skip
    assert "0.03, graph model, kept: 0.02 lost" in html
    assert "The most sensitive of 4 layers, 1 of them kept" in html


def test_a_kept_layer_is_shown_however_insensitive() -> None:
    def many(fields: Words) -> None:
        fields["layers"] = [
            {"name": f"layer.{i}", "graph": "g", "sensitivity": 1 / (1 + i), "kept": i == 90, "why": None}
            for i in range(100)
        ]

    html = drawn(many)
    assert html.count("<rect") == 25
    assert "graph g, kept<" in html
    assert "The 75 others are less sensitive" in html


def test_a_gate_that_fails_and_none_at_all() -> None:
    assert '<b class="limit">fails</b>' in drawn(lambda fields: fields["gate"]["default"].update(holds=False))
    assert "No accuracy gate was recorded" in drawn(lambda fields: fields.update(gate={}))
    manifest: Any = SimpleNamespace(quantization=None)
    assert quantization_section(manifest) == ""


HOSTILE: dict[str, Callable[[Words], object]] = {
    "names": lambda w: w.update(method=EVIL, instruction_set=EVIL, data={"name": EVIL, "samples": EVIL}),
    "words for objects": lambda w: w.update(gate=EVIL, layers=EVIL, curve=EVIL, data=EVIL, block_size=EVIL),
    "a gate of nonsense": lambda w: w.update(
        gate={EVIL: EVIL, "cpu": {"measure": EVIL, "found": 1e308, "allowed": -1, "holds": EVIL, "n": EVIL, "score": 1}}
    ),
    "a vast perplexity": lambda w: w["gate"]["cpu"]["score"].update(
        lower_is_better=True, fp32={"value": 1e6}, int8={"value": -1e6}
    ),
    "odd points": lambda w: w.update(
        curve=[
            *(1, None, {EVIL: EVIL}, {"quantized": -1, "layers": 10**30, "score": 1}),
            {"quantized": 1, "layers": 2**62, "score": 1e308, "relative_error": 5e-324, "agreement": EVIL},
        ]
    ),
    "more quantised than there are": lambda w: w.update(curve=[{"quantized": 9, "layers": 2, "score": 0.5}]),
    "one point": lambda w: w.update(curve=[{"quantized": 0, "layers": 0, "score": 0.5}]),
    "very many": lambda w: w.update(
        curve=w["curve"] * 5000, layers=w["layers"] * 5000, gate={str(number): 1 for number in range(999)}
    ),
    "odd layers": lambda w: w.update(
        layers=[1, None, EVIL, {}, {"name": EVIL, "graph": EVIL, "sensitivity": EVIL, "kept": EVIL, "why": EVIL}]
        + [{"name": "x" * 10**5, "sensitivity": x, "kept": True, "why": EVIL} for x in (1e308, -1e308, 5e-324, 10**400)]
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_figures_give_harmless_markup(change: Callable[[Words], object]) -> None:
    html = drawn(change)
    page = Page(html)
    assert "<script" not in html
    assert len(html) < 300_000
    assert not set("\x00\x1b\u202e") & set(html)
    assert not {"nan", "inf", "None"} & set(re.findall(r"\w+", "".join(page.text)))
    assert not re.search(r'"-?(nan|inf)', html)


def test_damaged_figures_give_harmless_markup() -> None:
    rng = Random(0)
    for _ in range(300):
        fields = mutated(QUANTIZATION, rng)
        if isinstance(fields, dict):
            manifest: Any = SimpleNamespace(quantization=fields, operators={})
            assert not re.search(r'"-?(nan|inf)', Page(quantization_section(manifest)).html)


def test_the_page_of_a_quantised_bundle(vit_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_module, "RUNS", 2)
    monkeypatch.setattr(report_module, "WARMUP", 0)
    out = tmp_path / "report.html"
    bundle = changed_bundle(vit_bundle, tmp_path, as_quantized)
    write_report(bundle, [], out)
    page = Page(out.read_text(encoding="utf-8"))
    text = "".join(page.text)
    assert "As accurate as its gate asks: 0.005 of 0.013 allowed, judged by top-1 accuracy, n = 540 (cpu)." in text
    assert "its accuracy is judged by the gate" in text
    assert page.headings.index("Score") < page.headings.index("Quantisation") < page.headings.index("Size")
