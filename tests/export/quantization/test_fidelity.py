"""How far a bundle is from FP32: against itself, against outputs that are wrong by a known amount, and by pencil."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import inf, log
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transom.calib.samples import Sample
from transom.export.families.bert import text_row
from transom.export.families.evaluation import MAX_SAMPLES, Outputs, drawn
from transom.export.metrics import Accuracy
from transom.export.quantization import fidelity as agreement_module
from transom.export.quantization.fidelity import Fidelity, Fp32Outputs, RelativeError, nearest_others
from transom.export.reference_models import REFERENCE_MODELS
from transom.export.scores import DIGIT_NAMES, heldout_images
from transom.runtime.backends import open_backend
from transom.runtime.backends.base import Array, Backend
from transom.runtime.bundle import Bundle
from transom.runtime.errors import CalibrationError, ExportError
from transom.runtime.graph_spec import Graph
from transom.runtime.loading import load_with_backends
from transom.runtime.session import LoadedBundle

Change = Callable[[Mapping[str, Array], dict[str, Array]], dict[str, Array]]
TEXTS = [
    "what can you do with this water",
    "the capital of france is paris",
    "so many people",
    "his first day was long",
]
Exported = Callable[..., tuple[Path, Path]]


class Changed:
    """A backend whose outputs are changed on the way out."""

    def __init__(self, inner: Backend, change: Change) -> None:
        self.device = inner.device
        self.graph: Graph = inner.graph
        self._inner, self._change = inner, change

    def run(self, feeds: Mapping[str, Array], shapes: Mapping[str, Sequence[int]]) -> dict[str, Array]:
        return self._change(feeds, self._inner.run(feeds, shapes))


def opened(folder: Path, change: Change | None = None) -> LoadedBundle:
    bundle = Bundle(folder)

    backends = {file.graph.name: open_backend(file, bundle.read, "cpu", 1) for file in bundle.manifest.graphs}
    if change is None:
        return load_with_backends(bundle, backends)
    return load_with_backends(bundle, {name: Changed(backend, change) for name, backend in backends.items()})


def scaled(feeds: Mapping[str, Array], found: dict[str, Array]) -> dict[str, Array]:
    return {name: array * np.float32(1.02) for name, array in found.items()}


def broken(feeds: Mapping[str, Array], found: dict[str, Array]) -> dict[str, Array]:
    return {name: np.full_like(array, np.nan) for name, array in found.items()}


def texts(*given: str) -> list[Sample]:
    return [Sample(f"line {index}", text=text) for index, text in enumerate(given)]


def ids(rows: Sequence[Sequence[int]]) -> list[Sample]:
    return [Sample(f"row {index}", feeds={"input_ids": np.array([row])}) for index, row in enumerate(rows)]


def compared(folder: Path, samples: Sequence[Sample], change: Change | None) -> Fidelity:
    with opened(folder) as fp32, opened(folder, change) as other:
        return Fp32Outputs(fp32, samples, "some data").compare(other)


def counts(found: Fidelity) -> tuple[int, int]:
    assert found.top1 is not None
    return found.top1.n, found.top1.correct


@pytest.fixture
def families(
    bert_bundle: Path, vit_bundle: Path, clip_bundle: Path, exported: Exported
) -> dict[str, tuple[Path, list[Sample], int]]:
    """Bundle, held-out samples and how many cases they are."""
    rows = [[5, 3, 9, 7, 2], [8, 1], [4, 4, 6]]
    digits = REFERENCE_MODELS["clip"].held_out()
    return {
        "bert": (bert_bundle, texts(*TEXTS), 4),
        "vit": (vit_bundle, digits[:20], 20),
        "clip": (clip_bundle, digits[:20] + digits[-10:], 20),
        "gpt": (exported("GPT2LMHeadModel")[1], ids(rows), 7),  # a row's first token has nothing before it
        "tags": (exported("BertForTokenClassification")[1], texts("the water", "to be in paris"), 6),
        "spans": (
            exported("BertForQuestionAnswering")[1],
            [Sample("pair", text="what can you do", text_pair="with this water"), *texts("so many people")],
            2,
        ),
    }


@pytest.mark.parametrize("family", ["bert", "vit", "clip", "gpt", "tags", "spans"])
def test_a_bundle_against_itself_and_against_two_percent_more(family: str, families: dict[str, Any]) -> None:
    """Outputs all 2 % too large choose the same and are wrong by 0.02 of their norm; a cosine is wrong twice."""
    folder, samples, cases = families[family]
    same = compared(folder, samples, None)
    assert (same.error.value, same.error.interval) == (0.0, (0.0, 0.0))
    assert counts(same) == (cases, cases)
    more = compared(folder, samples, scaled)
    assert counts(more) == (cases, cases)
    assert more.error.value == pytest.approx(1.02**2 - 1 if family == "clip" else 0.02, rel=1e-3)


@pytest.mark.parametrize("family", ["bert", "vit", "clip", "gpt", "tags"])
def test_values_that_are_not_finite_agree_with_nothing(family: str, families: dict[str, Any]) -> None:
    folder, samples, cases = families[family]
    found = compared(folder, samples, broken)
    assert found.error.value == inf
    assert counts(found) == (cases, 0)


def test_fp32_that_is_not_finite_is_refused(vit_bundle: Path) -> None:
    def third(feeds: Mapping[str, Array], found: dict[str, Array]) -> dict[str, Array]:
        found["logits"][2, 4] = np.inf
        return found

    with (
        opened(vit_bundle, third) as fp32,
        pytest.raises(CalibrationError, match=r"held-out sample scan \d+ gives values in FP32 that are not finite"),
    ):
        Fp32Outputs(fp32, REFERENCE_MODELS["vit"].held_out()[:5], "scans")


def test_another_task_is_refused(vit_bundle: Path, bert_bundle: Path) -> None:
    with opened(vit_bundle) as vit, opened(bert_bundle) as bert:
        reference = Fp32Outputs(vit, REFERENCE_MODELS["vit"].held_out()[:2], "scans")
        with pytest.raises(ExportError, match=r"bert for feature-extraction is compared with .* vit for image-class"):
            reference.compare(bert)


def test_fp32_runs_once_for_many(vit_bundle: Path) -> None:
    runs = []

    def counted(feeds: Mapping[str, Array], found: dict[str, Array]) -> dict[str, Array]:
        runs.append(len(feeds["pixel_values"]))
        return found

    with opened(vit_bundle, counted) as fp32, opened(vit_bundle) as other:
        reference = Fp32Outputs(fp32, REFERENCE_MODELS["vit"].held_out()[:40], "scans")
        assert runs == [16, 16, 8]
        assert reference.compare(other) == reference.compare(other)
        assert len(runs) == 3


def test_flipped_answers_are_counted(vit_bundle: Path) -> None:
    """Of 40 images in batches of 16, 16 and 8 the first of each gets its least probable digit."""

    def first_of_each(feeds: Mapping[str, Array], found: dict[str, Array]) -> dict[str, Array]:
        found["logits"][0] *= -1
        return found

    found = compared(vit_bundle, REFERENCE_MODELS["vit"].held_out()[:40], first_of_each)
    same = [index not in (0, 16, 32) for index in range(40)]
    assert found.top1 == Accuracy.of_each("same top-1 as FP32, images", "some data", same)
    assert found.error.n == 40


def test_padding_and_special_tokens_are_not_counted(exported: Exported) -> None:
    """Everything that is computed for them is changed, and nothing is found; one token in, something is."""
    _, folder = exported("BertForTokenClassification")
    samples = texts("the", "to be in paris", "what can you do")

    def spoiled(where: slice) -> Change:
        def change(feeds: Mapping[str, Array], found: dict[str, Array]) -> dict[str, Array]:
            for row, length in enumerate(feeds["attention_mask"].sum(1)):
                found["logits"][row, length - 1 :] = 1e6  # [SEP], then padding
                found["logits"][row, where] = 1e6
            return found

        return change

    assert compared(folder, samples, spoiled(slice(0, 1))).error.value == 0
    assert compared(folder, samples, spoiled(slice(1, 2))).error.value > 1


def test_gaps_are_where_masks_are_or_where_calibration_puts_them(exported: Exported) -> None:
    with opened(exported("BertForMaskedLM")[1]) as bert:
        asked: Any = bert
        given, whole = texts("the [MASK] of france [MASK]", "a b c d e f g h i j k l m n o")
        assert np.flatnonzero(text_row(asked, given).counted).tolist() == [2, 5]
        row = text_row(asked, whole)
        assert np.flatnonzero(row.counted).tolist() == [4, 11]
        assert set(row.feeds["input_ids"][[4, 11]].tolist()) == {asked.tokenizer().spec.mask_id}
        assert counts(Fp32Outputs(bert, [given, whole], "text").compare(bert)) == (4, 4)


def test_raw_inputs_are_asked_where_the_mask_says(bert_bundle: Path) -> None:
    """The same three tokens, bare and under padding: a raw sample is what ``run`` takes."""
    padded = {"input_ids": np.array([[2, 9, 3, 7, 7]]), "attention_mask": np.array([[1, 1, 1, 0, 0]])}
    samples = [Sample("padded", feeds=padded), *ids([[2, 9, 3], [2, 8, 3]])]
    with opened(bert_bundle) as bert:
        reference = Fp32Outputs(bert, samples, "arrays")
        found = {answers.sample: answers.vector for answers in reference._kept}
        assert found["padded"] == pytest.approx(found["row 0"], abs=1e-5)
        assert found["padded"] != pytest.approx(found["row 1"], abs=1e-2)


def test_perplexity_of_a_text(gpt_bundle: Path) -> None:
    """FP32's is that of ``score``; of equal logits it is the vocabulary's size."""

    def uniform(feeds: Mapping[str, Array], found: dict[str, Array]) -> dict[str, Array]:
        return {name: np.zeros_like(array) for name, array in found.items()}

    text = REFERENCE_MODELS["gpt"].held_out()[0].text
    assert text is not None
    found = compared(gpt_bundle, texts(text[:400]), uniform)
    assert found.nats is not None
    fp32, other = found.nats
    with opened(gpt_bundle) as gpt:
        loaded: Any = gpt
        assert fp32.value == pytest.approx(log(loaded.score(text[:400])), rel=1e-6)
        assert fp32.units == (len(loaded.tokenizer().encode([text[:400]], truncate=False).rows[0]) - 1,)
    assert other.value == pytest.approx(log(1024))
    assert found.error.value == 1.0  # zeros for logits are wrong by all of them


def test_a_long_text_is_read_in_windows_up_to_the_most(exported: Exported) -> None:
    """A context of 67: 134 tokens are two windows of 66 predictions; of 4 times 25, the second is cut to 34."""
    samples = ids([[index % 97 for index in range(134)]])
    with opened(exported("GPT2LMHeadModel")[1]) as gpt:
        assert counts(Fp32Outputs(gpt, samples, "numbers").compare(gpt)) == (132, 132)
        found = Fp32Outputs(gpt, samples, "numbers", most=25).compare(gpt)
    assert counts(found) == (100, 100)
    assert found.nats is not None
    assert found.nats[0].units == (66, 34)


def test_few_samples_of_clip_are_as_many_images_and_texts(clip_bundle: Path) -> None:
    with opened(clip_bundle) as clip:
        found = Fp32Outputs(clip, REFERENCE_MODELS["clip"].held_out(), "scans", most=8).compare(clip)
    assert found.top1 == Accuracy.of_each("same top-1 as FP32, images among 8 texts", "scans", [True] * 8)
    assert found.right is None  # none of the texts came with an image


def test_of_pairs_the_text_that_came_with_the_image_is_right(clip_bundle: Path) -> None:
    """Scans of zero to nine, each beside its name; then with the names of one and two exchanged."""
    images, labels = heldout_images()
    firsts = [int((labels == digit).argmax()) for digit in range(10)]
    names = [f"a scan of a {name}" for name in DIGIT_NAMES]
    pairs = [Sample(str(digit), text=names[digit], image=images[firsts[digit]]) for digit in range(10)]
    wrong = [replace(pair, text=names[{1: 2, 2: 1}.get(digit, digit)]) for digit, pair in enumerate(pairs)]
    with opened(clip_bundle) as clip:
        whole, exchanged = (Fp32Outputs(clip, samples, "pairs").compare(clip).right for samples in (pairs, wrong))
    assert whole is not None
    assert exchanged is not None
    assert whole[0].name == "accuracy of images among 10 texts"
    assert [score.correct for score in (*whole, *exchanged)] == [10, 10, 8, 8]


def test_a_model_of_one_output_for_all_samples_cannot_be_compared(vit_bundle: Path, gpt_bundle: Path) -> None:
    def alike(feeds: Mapping[str, Array], found: dict[str, Array]) -> dict[str, Array]:
        return {name: np.ones_like(array) for name, array in found.items()}

    for folder, samples in (
        (vit_bundle, REFERENCE_MODELS["vit"].held_out()[:20]),
        (gpt_bundle, texts("the people", "to be")),
    ):
        with opened(folder, alike) as dull, pytest.raises(CalibrationError, match="one and the same output for all"):
            Fp32Outputs(dull, samples, "some data")


def test_translations_follow_fp32s_own_greedy_output(dates_bundle: Path) -> None:
    """FP32 chooses its own tokens along them. One wrong token per sentence, the first, costs one case each: what
    follows is fed as FP32 has it.
    """
    samples = REFERENCE_MODELS["transformer"].held_out()[:20]

    def first(feeds: Mapping[str, Array], found: dict[str, Array]) -> dict[str, Array]:
        if "logits" in found and not feeds["write_indices"].any():
            found["logits"] = -found["logits"]
        return found

    with opened(dates_bundle) as fp32, opened(dates_bundle, first) as other:
        dates: Any = fp32
        rows = {s.name: dates.tokenizer().encode([s.text], truncate=False).rows[0].ids for s in samples}
        expected = {name: dates.generate(list(row), num_beams=1) for name, row in rows.items()}
        reference = Fp32Outputs(fp32, samples, "dates")
        assert {kept.sample: kept.chosen[:, 0].tolist() for kept in reference._kept} == expected
        tokens = sum(map(len, expected.values()))
        assert counts(reference.compare(fp32)) == (tokens, tokens)
        assert counts(reference.compare(other)) == (tokens, tokens - 20)


def test_outputs_are_kept_while_there_is_room(vit_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement_module, "KEEP_BYTES", 12 * 10 * 4)  # twelve images' logits
    found = compared(vit_bundle, REFERENCE_MODELS["vit"].held_out()[:40], scaled)
    assert (found.error.n, counts(found)) == (12, (40, 40))
    assert found.error.value == pytest.approx(0.02, rel=1e-3)
    assert (
        compared(vit_bundle, REFERENCE_MODELS["vit"].held_out()[:40], broken).error.n == 40
    )  # seen without anything kept


def test_relative_error_by_pencil() -> None:
    """Squares 1 + 3 over 4 + 12: a quarter, so 0.5. Residuals 0 and 0: the interval is a point."""
    assert RelativeError((1.0, 3.0), (4.0, 12.0)).value == 0.5
    assert RelativeError((1.0, 3.0), (4.0, 12.0)).interval == pytest.approx((0.5, 0.5))
    # 0 + 4 over 8 + 8: residuals -2 and 2, variance 8, so 1.96 * sqrt(8 / 2) / 8 = 0.49 on either side of 0.25
    assert RelativeError((0.0, 4.0), (8.0, 8.0)).interval == pytest.approx((0.0, 0.8602), abs=1e-4)
    assert RelativeError((0.0,), (0.0,)).value == 0
    assert RelativeError((1.0,), (0.0,)).value == inf
    assert RelativeError((1.0,), (4.0,)).interval is None


def test_nearest_others_by_pencil() -> None:
    """By angle, whatever the length; never itself; the first of two that are as near; nothing near a broken one."""

    def nearest(*rows: Sequence[float]) -> list[int]:
        vectors = [np.array(row, np.float32) for row in rows]
        none = np.empty((0, 1), np.int64)
        return nearest_others([Outputs("row", vector, none, vector) for vector in vectors]).tolist()

    assert nearest([1, 0], [100, 1], [0, 1], [0, -1], [1, 0]) == [4, 0, 1, 0, 0]
    assert nearest([1, 0], [-1, 0], [np.nan, 0]) == [1, 0, -1]


def test_drawn_samples() -> None:
    """A fixed draw of both kinds; a text counts once, though it is there as often as it likes."""
    many = texts(*(str(index % 1200) for index in range(3000)))
    pictures = [Sample(f"image {index}", image=np.zeros((2, 2), np.uint8)) for index in range(1001)]
    found = drawn([*many, *pictures])
    assert found == drawn([*many, *pictures])
    assert sum(sample.image is not None for sample in found) == MAX_SAMPLES
    assert len({sample.text for sample in found if sample.image is None}) == MAX_SAMPLES
    assert len(drawn(texts("a", "b", "a"))) == 2
    parts = [Sample("c", parts=("a", "b")), Sample("d", parts=("b", "a")), Sample("e", parts=("a", "b"))]
    shown = [Sample("f", parts=("a", np.zeros((2, 2), np.uint8)))] * 2
    assert sorted(sample.name for sample in drawn([*parts, *shown])) in (["c", "d", "f", "f"], ["d", "e", "f", "f"])
    with pytest.raises(CalibrationError, match="no held-out samples"):
        drawn([])


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Sample("a.npz:3", feeds={"input_ids": np.array([[5, 101]])}), r"a\.npz:3 has the token 101; .* 0\.\.100"),
        (Sample("x.txt:1", text="no tokenizer here"), r"x\.txt:1 does not fit the model: .*tokenizer"),
        (Sample("cat.png", image=np.zeros((2, 2), np.uint8)), r"cat\.png has no text"),
        (Sample("b.npz:0", feeds={"input_ids": np.array([[5]])}), "no held-out sample that this model answers"),
    ],
)
def test_samples_that_do_not_fit_are_named(exported: Exported, sample: Sample, message: str) -> None:
    with opened(exported("GPT2LMHeadModel")[1]) as gpt, pytest.raises(CalibrationError, match=message):
        Fp32Outputs(gpt, [sample], "data")


@pytest.mark.parametrize("source", REFERENCE_MODELS)
def test_every_scored_model_has_held_out_samples(source: str) -> None:
    samples = REFERENCE_MODELS[source].held_out()
    assert len(samples) >= 40
    assert all(sample.kinds for sample in samples)
