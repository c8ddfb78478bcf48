"""Scores: the interval against a textbook's, the counting against hand-made answers, MiniLM against its figure."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from transom.cli.describe import score_line, score_value
from transom.export.datasets import (
    heldout_compositions,
    heldout_date_lists,
    heldout_dates,
    heldout_digits,
    heldout_questions,
    heldout_text,
    masked_text,
    wordnet_pairs,
)
from transom.export.metrics import Accuracy, LengthAccuracy, Rate
from transom.export.reference_models import reference_folder, score_both
from transom.export.scores import (
    BLOCK_BYTES,
    bits_per_byte,
    blocks,
    captions_score,
    date_lists_score,
    date_lists_score_of,
    dates_score,
    digits_score,
    masked_score,
    questions_score,
    retrieval_score,
)
from transom.runtime.errors import ExportError


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [  # by hand, z = 1.96: 8/10 is the textbooks' (0.8 + 0.19208 -+ 0.31364) / 1.38416; 0/n is 0 to z2 / (n + z2)
        (8, 10, 0.4902, 0.9433),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (535, 540, 0.9785, 0.9960),
        (521, 1000, 0.4900, 0.5518),
    ],
)
def test_wilson_interval(correct: int, n: int, low: float, high: float) -> None:
    score = pencil(correct, n)
    assert score.interval == pytest.approx((low, high), abs=5e-5)


def pencil(correct: int, n: int) -> Accuracy:
    return Accuracy.of_each("top-1 accuracy", "pencil", [True] * correct + [False] * (n - correct))


def test_score_as_json() -> None:
    score = pencil(8, 10)
    words = json.loads(json.dumps({**score.shared_fields(), **score.side_fields()}))
    assert words.pop("interval") == pytest.approx([0.4902, 0.9433], abs=5e-5)
    assert words == {"name": "top-1 accuracy", "data": "pencil", "n": 10, "correct": 8, "value": 0.8}


def test_the_gaps_of_a_text_are_no_cases_of_their_own() -> None:
    """Ten texts of ten gaps, eight all right and two all wrong, are as good as 8 of 10; spread evenly, as 80 of 100."""
    alike = Accuracy("accuracy", "pencil", (10,) * 8 + (0,) * 2, (10,) * 10)
    assert alike.design_effect == pytest.approx(100 / 9)
    assert alike.interval == pytest.approx(pencil(8, 9 * 8 // 8 + 1).interval, abs=0.02)
    spread = Accuracy("accuracy", "pencil", (8,) * 10, (10,) * 10)
    assert spread.design_effect == 1
    assert spread.interval == pytest.approx(pencil(80, 100).interval)
    assert Accuracy("accuracy", "pencil", (4,), (8,)).interval == pytest.approx(pencil(1, 2).interval, abs=0.2)


def test_rate_and_its_interval() -> None:
    """8 + 16 bits for 4 + 4 bytes: 3 a byte; residuals -4 and 4, so s2 = 32, and 1.96 * sqrt(32 / 2) / 4 = 1.96."""
    rate = Rate("bits per byte", "pencil", (8.0, 16.0), (4, 4))
    assert (rate.n, rate.value) == (2, 3.0)
    assert rate.interval == pytest.approx((1.04, 4.96), abs=5e-5)
    assert rate.shared_fields() == {"name": "bits per byte", "data": "pencil", "n": 2, "lower_is_better": True}


def test_a_rate_weighs_blocks_by_their_size() -> None:
    """One bit a byte throughout, so blocks of different size do not vary: the interval is a point."""
    rate = Rate("bits per byte", "pencil", (1.0, 9.0, 90.0), (1, 9, 90))
    assert rate.value == 1.0
    assert rate.interval == pytest.approx((1.0, 1.0))


# ---- digits


def test_digits_are_handed_over_as_rgb_and_counted() -> None:
    _, labels = heldout_digits()

    def always_three_but_once(images: list[Any]) -> Any:
        assert [image.shape for image in images] == [(8, 8, 3)] * 540
        assert images[0].dtype == np.uint8
        assert (images[0][..., 0] == images[0][..., 2]).all()
        assert images[0].max() > 200  # 0..255, not the data's own 0..16
        logits = np.zeros((540, 10), np.float32)
        logits[:, 3] = 1
        wrong = int(np.flatnonzero(labels == 3)[0])
        logits[wrong, 4] = 2
        return logits

    score = digits_score(always_three_but_once)
    assert (score.n, score.correct) == (540, 53)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (np.zeros((540, 9)), r"shape \(540, 9\); expected \(540, 10\)"),
        (np.zeros((10, 540)), r"shape \(10, 540\)"),
        (np.zeros(540), r"shape \(540,\)"),
        (np.where(np.arange(5400).reshape(540, 10) == 70, np.nan, 1), r"\[7\] is not finite"),
    ],
)
def test_answers_that_cannot_be_scored(answer: Any, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        digits_score(lambda images: answer)


# ---- retrieval


def test_retrieval_counts_nearest_by_angle() -> None:
    definitions, words = wordnet_pairs()

    def clock(texts: list[str]) -> Any:
        """Case i points to minute i of a thousand, at a length of its own, which must not matter."""
        minutes = np.arange(1000.0)
        if texts == definitions:
            minutes[250] = 250.4  # still nearest to word 250, as it must be,
            minutes[0] = 250.1  # though definition 0 is nearer to that word: only its own case is lost
        else:
            assert texts == words
        angles = 2 * np.pi * minutes / 1000
        return np.stack([np.cos(angles), np.sin(angles)], 1) * (1 + np.arange(1000.0)[:, None] % 7)

    score = retrieval_score(clock)
    assert (score.name, score.n, score.correct) == ("top-1 retrieval", 1000, 999)


def test_one_vector_for_everything_scores_chance() -> None:
    assert retrieval_score(lambda texts: np.ones((len(texts), 4))).correct == 1


def test_a_vector_of_zeros_is_refused() -> None:
    with pytest.raises(ExportError, match=r"embed\(texts\)\[3\] is a vector of zeros"):
        retrieval_score(lambda texts: (np.arange(len(texts)) != 3)[:, None] * np.ones((1, 4)))


def test_minilm_gets_the_documented_score_in_sentence_transformers() -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(reference_folder("minilm")), device="cpu", local_files_only=True)
    score = retrieval_score(lambda texts: model.encode(texts, batch_size=32, show_progress_bar=False))
    assert (score.n, score.correct) == (1000, 521)


# ---- text


def test_blocks_are_the_text_in_whole_lines() -> None:
    text = heldout_text()
    found = blocks(text)
    assert "".join(found) == text
    assert all(block.endswith("\n") and len(block.encode()) >= BLOCK_BYTES for block in found)
    assert blocks("a short one\n") == ["a short one\n"]
    assert blocks("x" * BLOCK_BYTES + "\nrest\n") == ["x" * BLOCK_BYTES + "\nrest\n"]


def test_bits_per_byte_counts_every_byte_but_the_newline_before() -> None:
    """A model of letters that gives each one chance in two needs one bit a byte."""
    text = heldout_text()
    read = []

    def half(block: str) -> Any:
        read.append(block)
        return np.full(len(block) - 1, np.log(0.5))

    rate = bits_per_byte(half, text)
    assert "".join(block.removeprefix("\n") for block in read) == text
    assert all(block.startswith("\n") for block in read)
    assert rate.value == pytest.approx(len(text) / len(text.encode()))
    assert bits_per_byte(lambda block: half(block) * 3, text).value == pytest.approx(3 * rate.value)


@pytest.mark.parametrize("wrong", [np.array([-1.0, np.nan]), np.array([[-1.0]]), np.array([-np.inf])])
def test_log_probabilities_that_cannot_be_scored(wrong: Any) -> None:
    with pytest.raises(ExportError, match="log_probabilities of block 0"):
        bits_per_byte(lambda block: wrong, heldout_text())


def test_masked_words_are_counted_gap_by_gap() -> None:
    expected = dict(masked_text())
    first = next(iter(expected))
    n = sum(map(len, expected.values()))
    score = masked_score(lambda text: ["?", *expected[text][1:]] if text == first else expected[text])
    assert (score.n, score.correct) == (n, n - 1)
    assert n >= 1000
    with pytest.raises(ExportError, match="fill gave 0 words"):
        masked_score(lambda text: [])


def test_dates_must_match_letter_by_letter() -> None:
    texts, expected = heldout_dates()
    assert len(texts) == 1000

    def translate(asked: list[str]) -> list[str]:
        assert asked == texts
        return [expected[0].replace("-", "/"), *expected[1:]]

    assert dates_score(translate).correct == 999
    with pytest.raises(ExportError, match="translate gave 1 texts for 1000"):
        dates_score(lambda asked: expected[:1])


def test_a_list_must_match_in_every_date() -> None:
    _, expected = heldout_date_lists()
    last = expected[-1]
    assert date_lists_score(lambda asked: [*expected[:-1], last[:-1] + "x"]).right == (1,) * 899 + (0,)
    assert date_lists_score(lambda asked: [target.split(" ")[0] for target in expected]).correct == 150
    with pytest.raises(ExportError, match="translate gave 900 texts for 1000"):
        dates_score(lambda asked: expected)


def test_a_caption_must_match_in_every_word() -> None:
    scans, compositions = heldout_compositions()
    right = {composition.draw(scans).tobytes(): composition.caption for composition in compositions}

    def caption(images: list[Any]) -> list[str]:
        return [right[image.tobytes()] for image in images]

    assert (captions_score(caption).correct, captions_score(caption).n) == (500, 500)
    assert captions_score(lambda images: [text.replace("above", "below") for text in caption(images)]).correct == 300
    assert captions_score(lambda images: [f"{text} " for text in caption(images)]).correct == 0
    with pytest.raises(ExportError, match="caption gave 1 texts for 500 images; expected one each"):
        captions_score(lambda images: caption(images)[:1])


def test_lists_are_counted_by_their_number_of_dates() -> None:
    """A translator of at most 32 characters: three ISO dates and two spaces are right, longer lists are cut."""
    answers = dict(zip(*heldout_date_lists(), strict=True))

    def translate(asked: list[str], num_beams: int) -> list[str]:
        assert num_beams == 1
        return [answers[text][:32] for text in asked]

    side: Any = SimpleNamespace(translate=translate)
    score = date_lists_score_of(side)
    assert [(each.name, each.accuracy.correct, each.accuracy.n) for each in score.by_length] == [
        ("1 date", 150, 150), ("2 dates", 150, 150), ("3 dates", 150, 150),
        ("4 dates", 0, 150), ("5 dates", 0, 150), ("6 dates", 0, 150),
    ]  # fmt: skip
    assert (score.correct, score.n) == (450, 900)
    for separators, each in enumerate(score.by_length):
        sizes = sorted(len(text) for text in answers if text.count("; ") == separators)
        assert each.characters == (sizes[0], pytest.approx(sum(sizes) / 150), sizes[-1])
    assert score.by_length[5].characters[2] == 141


def test_a_score_is_recorded_by_length() -> None:
    """Nine of ten right, lists of one date and of two: 5 of 5 and 4 of 5."""
    parts = [Accuracy.of_each("exact match", "lists", [True] * 4 + [last]) for last in (True, False)]
    lengths = (LengthAccuracy("1 date", (8, 12.5, 20), parts[0]), LengthAccuracy("2 dates", (18, 27.0, 44), parts[1]))
    every = Accuracy.of_each("exact match", "lists", [True] * 9 + [False])
    fields = json.loads(json.dumps(replace(every, by_length=lengths).side_fields()))
    assert (fields["correct"], fields["value"]) == (9, 0.9)
    assert [
        (each["name"], each["characters"], each["n"], each["correct"], each["value"]) for each in fields["by_length"]
    ] == [("1 date", [8, 12.5, 20], 5, 5, 1.0), ("2 dates", [18, 27.0, 44], 5, 4, 0.8)]
    assert fields["by_length"][1]["interval"] == list(parts[1].interval)
    assert "by_length" not in every.side_fields()


# ---- both sides


class Answers:
    """Stands for a loaded bundle of the ViT: right, but for the first ``wrong`` scans."""

    def __init__(self, wrong: int, task: str = "image-classification") -> None:
        self.wrong, self.manifest = wrong, SimpleNamespace(task=task)

    def classify(self, images: list[Any], top_k: int) -> list[list[tuple[str, float]]]:
        assert top_k == 10
        _, labels = heldout_digits()
        answers = [(label + (i < self.wrong)) % 10 for i, label in enumerate(labels.astype(int))]
        return [[(str((answer + step) % 10), 0.5**step) for step in range(10)] for answer in answers]


def test_both_sides_are_scored_alike() -> None:
    found = score_both("vit", Answers(5), Answers(7))  # type: ignore[arg-type]
    assert found is not None
    assert {key: found[key] for key in ("name", "n")} == {"name": "top-1 accuracy", "n": 540}
    assert [found[side]["correct"] for side in ("pytorch", "bundle")] == [535, 533]
    assert found["pytorch"]["value"] == 535 / 540


def test_a_text_model_is_scored_by_its_embeddings() -> None:
    """Each text becomes a direction of its own, a word that of its definition, but for the first ``wrong``."""
    definitions, words = wordnet_pairs()
    row = {text: number for texts in (words, definitions) for number, text in enumerate(texts)}

    def side(wrong: int) -> Any:
        def embed(texts: list[str]) -> Any:
            shift = wrong if texts == words else 0
            angles = 2 * np.pi * np.array([row[text] - (row[text] < shift) for text in texts]) / 1000
            return np.stack([np.cos(angles), np.sin(angles)], 1)

        return SimpleNamespace(embed=embed, manifest=SimpleNamespace(task="feature-extraction"))

    found = score_both("minilm", side(0), side(3))
    assert found is not None
    assert (found["name"], found["n"]) == ("top-1 retrieval", 1000)
    assert [found[name]["correct"] for name in ("pytorch", "bundle")] == [1000, 997]


def test_a_language_model_is_scored_by_its_bits() -> None:
    def side(chance: float) -> Any:
        def log_probabilities(text: str) -> Any:
            return np.full(len(text) - 1, np.log(chance))

        return SimpleNamespace(log_probabilities=log_probabilities, manifest=SimpleNamespace(task="text-generation"))

    found = score_both("gpt", side(1 / 2), side(1 / 4))
    assert found is not None
    assert (found["name"], found["lower_is_better"]) == ("bits per byte", True)
    assert [score_value(found, name) for name in ("pytorch", "bundle")] == ["1.0000", "2.0000"]
    assert score_line(found) == (
        f"bits per byte (lower is better) on held-out chapters of Jane Austen, n = {found['n']}: "
        "2.0000 (2.0000 to 2.0000), in PyTorch 1.0000 (1.0000 to 1.0000)"
    )


def test_gaps_are_filled_by_the_bundles_first_choice() -> None:
    expected = dict(masked_text())

    def fill_mask(text: str, top_k: int) -> Any:
        ranked = [[(word, 0.5)][:top_k] for word in expected[text]]
        return ranked[0] if len(ranked) == 1 else ranked

    side: Any = SimpleNamespace(fill_mask=fill_mask, manifest=SimpleNamespace(task="fill-mask"))
    found = score_both("bert", side, side)
    assert found is not None
    assert found["bundle"]["value"] == 1.0
    assert score_line(found).endswith(f"1.0000 ({found['n']}), in PyTorch 1.0000 ({found['n']})")


def test_dates_are_translated_greedily() -> None:
    texts, expected = heldout_dates()
    answers = dict(zip(texts, expected, strict=True))

    def translate(asked: list[str], num_beams: int) -> list[str]:
        assert num_beams == 1
        return [answers[text] for text in asked]

    side: Any = SimpleNamespace(translate=translate, manifest=SimpleNamespace(task="translation"))
    found = score_both("transformer", side, side)
    assert found is not None
    assert (found["name"], found["pytorch"]["correct"]) == ("exact match", 1000)


def test_other_sources_and_tasks_have_no_score() -> None:
    assert score_both("bundles/vit", Answers(0), Answers(0)) is None  # type: ignore[arg-type]
    features = Answers(0, "feature-extraction")
    assert score_both("vit", features, features) is None  # type: ignore[arg-type]


def test_the_reference_bundle_scores_what_the_card_says(vit_bundle: Path) -> None:
    from transom.runtime.bundle import Bundle

    score = Bundle(vit_bundle).manifest.score
    assert score is not None
    assert (score["pytorch"]["correct"], score["bundle"]["correct"], score["n"]) == (535, 535, 540)


def test_an_answer_must_match_in_every_word() -> None:
    scans, questions = heldout_questions()
    right = {(each.draw(scans).tobytes(), each.question): each.answer for each in questions}

    def answer(prompts: list[list[Any]]) -> list[str]:
        return [right[image.tobytes(), question] for image, question in prompts]

    assert (questions_score(answer).correct, questions_score(answer).n) == (400, 400)
    assert questions_score(lambda prompts: ["nothing" for _ in prompts]).correct == 32
    assert questions_score(lambda prompts: [f"{text} " for text in answer(prompts)]).correct == 0
    with pytest.raises(ExportError, match="answer gave 1 texts for 400 questions; expected one each"):
        questions_score(lambda prompts: answer(prompts)[:1])
