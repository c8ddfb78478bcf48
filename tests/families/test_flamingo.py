"""Flamingo's export: every precision beside PyTorch, calibration, answers that are judged, and what it looks at."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command_line import document, transom
from conftest import Once
from flamingo_bundles import QUESTIONS, bundle_of, picture, pixels, words
from flamingo_models import VOCABULARY
from transom.calib.data import Sample
from transom.export.families.base import export_family
from transom.export.parity.compare import TOLERANCES
from transom.export.quantization.gate import Gate
from transom.export.report.figures.flamingo import Looks, draw_answers
from transom.export.verification import verify
from transom.runtime import load
from transom.runtime.bundle import Bundle
from transom.runtime.selftest import selftest
from transom.runtime.tasks.flamingo import Flamingo
from transom.runtime.tasks.interleaved_prompts import InterleavedPrompt

# ---- precisions


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_every_precision_exports_verifies_and_passes_its_selftest(precision: str, once: Once) -> None:
    folder = bundle_of(once, precision)
    manifest = Bundle(folder).manifest
    cases = manifest.parity["cases"]
    assert max(case["sizes"].get("chunk", 0) for case in cases) == 64  # token by token
    assert {case["sizes"]["B"] for case in cases if "chunk" in case["sizes"]} == {1, 2, 3}
    assert 0 < manifest.parity["worst"]["error"] <= TOLERANCES[precision]
    if precision == "fp32":  # the others' export has just compared the same files
        assert len(verify(folder, accuracy=False).cases) == len(cases)
    report = selftest(folder)
    assert report.worst.error <= report.tolerance
    assert [case.name for case in report.cases] == ["B=1", "B=2", "B=3", "generation"]


def test_every_linear_layer_of_both_graphs_becomes_integers(once: Once) -> None:
    """6 of the ViT, 6 of each of two resampler blocks, 6 of each cross-attention, 4 of each GPT block, and the head."""
    manifest = Bundle(bundle_of(once, "int8")).manifest
    assert manifest.quantization is not None
    layers = manifest.quantization["layers"]
    assert [layer["name"] for layer in layers if layer["kept"]] == []
    counts = {graph: sum(layer["graph"] == graph for layer in layers) for graph in ("encoder", "decoder")}
    projections = [
        layer["graph"] for layer in layers if re.search(r"cross_attention\.\d\..*\.[kv]_proj$", layer["name"])
    ]
    assert counts == {"encoder": 6 + 2 * 6 + 4, "decoder": 2 * 4 + 2 * 4 + 1}
    assert projections == ["encoder"] * 4
    assert manifest.quantization["activations"] == {"encoder": "static", "decoder": "dynamic"}


# ---- calibration and the gate


def test_every_kind_of_sample_is_read_as_the_bundle_reads_it(once: Once) -> None:
    family = export_family("flamingo")
    image = np.asarray(picture(3))
    raw = {"input_ids": np.array([[1, 5, 6, 1, 7]]), "pixel_values": pixels(2)[None]}
    samples = {
        "a question": Sample("a", text=QUESTIONS[0], image=image),
        "a dialogue": Sample("b", parts=(image, (QUESTIONS[0], "two"), np.asarray(picture(4)), QUESTIONS[1])),
        "a caption": Sample("c", image=image),
        "a text": Sample("d", text=QUESTIONS[0]),
        "raw": Sample("e", feeds=raw),
        "raw with one image": Sample("f", feeds={"input_ids": raw["input_ids"][:, :3], "pixel_values": pixels(1)}),
        "raw pixels": Sample("g", feeds={"pixel_values": pixels(1)}),
        "raw ids": Sample("h", feeds={"input_ids": np.array([[5, 6]])}),
    }
    runs: list[list[InterleavedPrompt]] = []
    with load(bundle_of(once)) as bundle:
        assert isinstance(bundle, Flamingo)
        generate = bundle.generate

        def noted(prompts: Any, **keywords: Any) -> Any:
            runs.append(prompts)
            return generate(prompts, **keywords)

        bundle.generate = noted  # type: ignore[method-assign]
        for sample in samples.values():
            family.samples.run(bundle, sample) if sample.feeds is None else family.samples.run_raw(bundle, sample.feeds)
        expected = bundle.prompt_of([image, QUESTIONS[0]])
        text = bundle.tokenizer().decode(runs[1][0].ids, skip_special_tokens=False)
    read = dict(zip(samples, (prompts[0] for prompts in runs), strict=True))
    assert {name: (len(prompt.ids), len(prompt.pixels)) for name, prompt in read.items()} == {
        "a question": (6, 1),
        "a dialogue": (16, 2),
        "a caption": (2, 1),
        "a text": (5, 0),
        "raw": (5, 2),
        "raw with one image": (3, 1),
        "raw pixels": (2, 1),
        "raw ids": (2, 0),
    }
    assert read["a question"].ids == expected.ids
    np.testing.assert_array_equal(read["a question"].pixels[0], expected.pixels[0])
    assert re.sub(r"\s+", " ", text) == (
        "<image> Question: how many sevens? Answer: two <image> Question: what is left of the three? Answer:"
    )


def samples_of(answer: str | None) -> list[Sample]:
    return [
        Sample(f"row {row}", text=QUESTIONS[row % 3], image=np.asarray(picture(row)), answer=answer) for row in range(4)
    ]


def test_the_gate_counts_answers_equal_to_fp32s_or_right_ones(once: Once) -> None:
    with load(bundle_of(once)) as fp32, load(bundle_of(once, "int8")) as ours:
        assert isinstance(fp32, Flamingo)
        said = fp32.answer([np.asarray(picture(0)), QUESTIONS[0]], num_beams=1, do_sample=False, max_new_tokens=64)
        found = Gate(fp32, samples_of(None), "four images").evaluate(ours, "dynamic")
        judged = Gate(fp32, [replace(sample, answer=said) for sample in samples_of(None)], "four").evaluate(
            fp32, "dynamic"
        )
    assert found.agreement is not None
    assert (found.measure, found.allowed, found.n) == ("same top-1 as FP32", 0.010, 4)
    assert found.agreement.name == "same top-1 as FP32, answers"
    assert 0 < found.error.value < 0.2
    assert judged.score_int8 is not None
    assert (judged.measure, judged.found, judged.n) == ("accuracy of answers", 0.0, 4)
    assert judged.score_int8.value >= 0.25  # the first answer is the true one


# ---- the command line and the report


def test_the_command_line_answers_as_the_bundle_does(once: Once, tmp_path: Path) -> None:
    folder = bundle_of(once)
    picture(0).save(tmp_path / "0.png")
    with load(folder) as bundle:
        assert isinstance(bundle, Flamingo)
        said = bundle.answer([tmp_path / "0.png", QUESTIONS[0]], max_new_tokens=5)
        told = bundle.caption(tmp_path / "0.png", max_new_tokens=5)
    options = ("--max-new-tokens", "5", "--json")
    asked = document(transom("run", folder, QUESTIONS[0], "--image", tmp_path / "0.png", *options))
    shown = document(transom("run", folder, tmp_path / "0.png", *options))
    assert [found["results"][0]["text"] for found in (asked, shown)] == [said, told]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8"])
def test_the_report_shows_where_each_word_looks_and_how_far_gates_opened(
    once: Once, tmp_path: Path, precision: str
) -> None:
    for row in range(2):
        picture(row).save(tmp_path / f"{row}.png")
    images = [str(tmp_path / f"{row}.png") for row in range(2)]
    bundle = Bundle(bundle_of(once, precision))
    drawn = draw_answers(bundle, images, [f"<image> {QUESTIONS[0]} <image> {QUESTIONS[1]}"])
    assert drawn.count("<figure>") == 2  # one for each image of the one answer
    assert "Image 2 of 2. Answer: <b>" in drawn
    assert drawn.count('aria-label="attention at how"') == 1  # "what" sees the other image
    assert drawn.count('aria-label="attention at what"') == 1
    assert re.findall(r'<td class="n">([\d.]+)</td>', drawn) == ["0.762"] * 4  # tanh(1)
    assert draw_answers(bundle, images, []).count("<figure>") == 2
    assert draw_answers(bundle, [], []).count("<figure>") == 2  # captions of two photographs


def test_what_a_word_looks_at_is_what_both_attentions_say(once: Once) -> None:
    """Each word has weights over the patches of the one image that it sees; they add up to 1 and change with it."""
    first, second = pixels(2)
    mark = VOCABULARY["<image>"]
    with load(bundle_of(once)) as model:
        assert isinstance(model, Flamingo)
        looks = Looks(Bundle(bundle_of(once)), model)
        prompt = InterleavedPrompt([*words("a"), mark, *words("how", "many"), mark, *words("twos?")], [first, second])
        found = looks.words(prompt, words("one", "two"))
        swapped = looks.words(replace(prompt, pixels=[first, first]), words("one", "two"))
    assert [(word.token, word.image, word.written) for word in found] == [
        ("how", 1, False), ("many", 1, False), ("twos?", 2, False), ("one", 2, True), ("two", 2, True),
    ]  # fmt: skip
    for word in found:
        assert word.weights.shape == (15,)
        assert word.weights.min() >= 0
        assert float(word.weights.sum()) == pytest.approx(1, abs=1e-4)
    np.testing.assert_array_equal(found[2].weights, found[3].weights)  # chosen where the token before it looked
    same = [np.allclose(one.weights, two.weights, atol=1e-6) for one, two in zip(found, swapped, strict=True)]
    assert same == [True, True, False, False, False]
