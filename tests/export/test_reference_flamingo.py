"""The reference Flamingo: its images, questions and dialogues, its frozen parts, and how often it is right."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from paths import REPO
from transom.calib.builtin_sets import builtin_set, lines, scans
from transom.calib.digit_questions import DigitQuestion, read_questions
from transom.export.checkpoint import load_checkpoint
from transom.export.datasets import heldout_digits, heldout_questions, question_examples
from transom.export.reference_models import reference_folder
from transom.export.scores import DIGIT_NAMES

CARD = "models/reference/flamingo/README.md"


def imported(name: str) -> Iterator[ModuleType]:
    """Import an example; the scripts import one another by name, as they do when they are run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPO / "examples"))
        yield importlib.import_module(name)


@pytest.fixture(scope="module")
def asking() -> Iterator[ModuleType]:
    yield from imported("digit_questions")


@pytest.fixture(scope="module")
def dialogues() -> Iterator[ModuleType]:
    yield from imported("digit_dialogues")


@pytest.fixture(scope="module")
def checkpoint() -> Iterator[ModuleType]:
    yield from imported("flamingo_checkpoint")


@pytest.fixture(scope="module")
def answers() -> Iterator[ModuleType]:
    yield from imported("flamingo_answers")


@pytest.fixture(scope="module")
def model() -> Any:
    loaded = load_checkpoint("flamingo", task=None, max_sizes={}, image_size=None, ignore_unused=False)
    assert loaded.left_out == []
    return loaded.module


# ---- images and questions


def test_a_question_is_a_line_and_an_image() -> None:
    line = "how many ones?\tone\t1 0 3,0 24 20\t7 2"
    (found,) = read_questions(line + "\n")
    assert found == DigitQuestion("how many ones?", "one", ((1, 0, 3), (0, 24, 20)), (7, 2))
    assert found.line() == line
    without = DigitQuestion("how many ones?", "one", ((1, 0, 3), (0, 24, 20)))
    assert read_questions(without.line()) == [without]
    image = found.draw(np.stack([np.full((8, 8), 1, np.uint8), np.full((8, 8), 2, np.uint8)]))
    assert (image.shape, image.dtype) == ((32, 32), np.dtype("uint8"))
    assert (image[:8, 3:11] == 2).all()
    assert (image[24:, 20:28] == 1).all()
    assert image.sum() == 64 * 2 + 64 * 1


def answer_by_geometry(each: DigitQuestion, labels: np.ndarray) -> str:
    """Answer a question from the labels and places alone, by the rules that digit_questions.py states."""
    found = [(DIGIT_NAMES[labels[number]], row // 16, column // 16) for number, row, column in each.places]
    names = [name for name, _, _ in found]
    words = each.question.rstrip("?").split(" ")
    if each.question == "which digits are there?":
        return " ".join(names)
    if each.question == "how many digits?":
        return DIGIT_NAMES[len(names)]
    if words[:2] == ["how", "many"]:
        return DIGIT_NAMES[sum(words[2] in (f"{name}s", f"{name}es") for name in names)]
    if words[0] == "which":
        return DIGIT_NAMES[(max if words[3] == "largest" else min)(map(DIGIT_NAMES.index, names))]
    ((_, row, column),) = [place for place in found if place[0] == words[-1]]
    down, right = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}[words[2]]
    beside = [name for name, *place in found if place == [row + down, column + right]]
    return beside[0] if beside else "nothing"


def test_every_question_has_one_answer(asking: ModuleType) -> None:
    labels = np.arange(40) % 10
    rng = np.random.RandomState(3)
    pick = asking.training_scans(labels, rng)
    drawn = [each for kind in asking.KINDS for each in islice(asking.questions(kind, pick, rng), 300)]
    for found, digits in ((heldout_questions()[1], heldout_digits()[1]), (drawn, labels)):
        for each in found:
            assert answer_by_geometry(each, digits) == each.answer, each
            assert len({(row // 16, column // 16) for _, row, column in each.places}) == len(each.places)
            assert all(row % 16 <= 7 and column % 16 <= 7 for _, row, column in each.places)
    counts = Counter(each.answer for each in drawn if asking.kind_of(each.question) == asking.COUNT)
    assert counts.keys() == {"zero", "one", "two", "three", "four"}
    assert Counter(len(each.places) for each in drawn).keys() == {1, 2, 3, 4}


def test_the_questions_that_score_are_of_held_out_scans(asking: ModuleType) -> None:
    images, labels = heldout_digits()
    found_scans, found = heldout_questions()
    np.testing.assert_array_equal(found_scans, images)
    examples = question_examples()
    assert found == asking.held_out(labels, [question for _, question, _ in examples])
    assert Counter(asking.kind_of(each.question) for each in found) == asking.CASES
    assert len(found) == 400
    used = Counter(number for each in found for number, _, _ in each.places)
    assert set(used) == set(range(540))
    assert set(used.values()) <= {1, 2, 3}
    for each in found:
        assert len(set(each.examples)) == 4
        assert {asking.kind_of(examples[number][1]) for number in each.examples} == {asking.kind_of(each.question)}


def test_the_questions_that_calibrate_are_of_scans_that_train(asking: ModuleType) -> None:
    """And their samples hold the examples, an image each, before the image and the question."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPO / "examples"))
        making = importlib.import_module("make_calibration_sets")
    assert lines("digit_questions.tsv") == making.questions(making.training_scans()["labels"])
    found = read_questions("\n".join(lines("digit_questions.tsv")))
    samples = builtin_set("digit-questions").samples
    assert len(found) == len(samples) == 420
    assert Counter(len(each.examples) for each in found) == {0: 84, 1: 84, 2: 84, 3: 84, 4: 84}
    for sample, each in zip(samples, found, strict=True):
        *before, image, question = sample.parts or ()
        np.testing.assert_array_equal(image, each.draw(scans()))
        assert (question, sample.answer) == (each.question, each.answer)
        shown = [found[number] for number in each.examples]
        assert before[1::2] == [(other.question, other.answer) for other in shown]
        for part, other in zip(before[::2], shown, strict=True):
            np.testing.assert_array_equal(part, other.draw(scans()))


# ---- dialogues


def test_dialogues_are_of_three_shapes(dialogues: ModuleType) -> None:
    rng = np.random.RandomState(4)
    drawn = [dialogues.dialogue(dialogues.unseen, rng, 0.3) for _ in range(2000)]
    prompts = [[turn.prompt for turn in each] for each in drawn]
    unsaid = [each for each in prompts if each[0] == "Answer:"]
    talks = [each for each in drawn if any(turn.image is None for turn in each) or each[0].prompt == "Caption:"]
    assert 0.2 < len(unsaid) / len(drawn) < 0.3
    assert {len(each) for each in unsaid} == {1, 2, 3, 4, 5}
    assert all(set(each) == {"Answer:"} for each in unsaid)  # no question is said in between
    assert 0.2 < len(talks) / len(drawn) < 0.35
    assert all(each[0].image is not None for each in drawn)
    two = [dialogues.Turn((), "Answer:", "four"), dialogues.Turn(None, "Caption:", "top one two, bottom nothing six")]
    assert dialogues.text(two) == (
        "<image>Answer: four<|endofchunk|>Caption: top one two, bottom nothing six<|endofchunk|>"
    )


def test_batches_weigh_answers(dialogues: ModuleType) -> None:
    tokenizer = dialogues.make_tokenizer()
    batches = dialogues.Batches(tokenizer, dialogues.unseen, np.random.RandomState(5), 8, 0.3)
    batch = batches.batch(
        [
            [dialogues.Turn((), "Question: how many sevens? Answer:", "two")],
            [dialogues.Turn((), "Answer:", "one"), dialogues.Turn((), "Answer:", "two")],
        ]
    )
    assert [tokenizer.decode([token]) for token in batch.tokens[0][1:10].tolist()] == [
        *["Question", ":", " how", " many", " sevens", "?", " Answer", ":", " two"]
    ]
    assert batch.tokens[:, 0].tolist() == [dialogues.IMAGE_ID] * 2
    assert batch.tokens[0, 10] == dialogues.END_ID
    np.testing.assert_allclose(batch.weights[0], [0.1] * 9 + [1, 1], rtol=1e-6)
    np.testing.assert_allclose(batch.weights[1], [0.1, 0.1, 0.1, 1, 1] * 2 + [0], rtol=1e-6)
    assert [len(images) for images in batch.images] == [1, 2]


def test_long_rows_hold_several_dialogues(dialogues: ModuleType) -> None:
    """So that every position of the context and every number of images trains."""
    batches = dialogues.Batches(dialogues.make_tokenizer(), dialogues.unseen, np.random.RandomState(5), 8, 0.3)
    rows = [batches.joined() for _ in range(60)]
    assert 230 < max(map(batches.length, rows)) <= 256
    assert {sum(turn.image is not None for turn in row) for row in rows} >= {5, 6, 7, 8}
    assert max(sum(turn.image is not None for turn in row) for row in rows) == 8


# ---- the model


def test_the_script_would_save_this_checkpoint(
    checkpoint: ModuleType, dialogues: ModuleType, model: Any, tmp_path: Any
) -> None:
    """The frozen models are those that stages 1 and 2 ended with: their digests were taken before stage 3."""
    folder = reference_folder("flamingo")
    tokenizer = dialogues.make_tokenizer()
    assert model.config == checkpoint.flamingo_config(tokenizer.get_vocab_size())
    frozen = json.loads((folder / "frozen.json").read_text())
    assert frozen == {name: checkpoint.digest(getattr(model, name)) for name in ("vision_model", "language_model")}
    checkpoint.save(model, model.config, tokenizer, tmp_path, frozen)
    for path in folder.iterdir():
        if path.name != "README.md":
            assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_few_questions_of_each_kind(
    answers: ModuleType, asking: ModuleType, dialogues: ModuleType, model: Any
) -> None:
    """Every tenth of the held-out questions: FIGURES are what PyTorch gave when the card was written."""
    found_scans, found = heldout_questions()
    tokenizer, examples = dialogues.make_tokenizer(), question_examples()
    for (said, shots), right in FIGURES.items():
        by_kind = answers.right_by_kind(model, tokenizer, found_scans, found[::10], examples, shots, said=said)
        assert by_kind.keys() == set(asking.KINDS if said else asking.WHOLE)
        every = [each for kind in by_kind.values() for each in kind]
        assert len(every) == (40 if said else 24)
        assert abs(sum(every) - right) <= 1, (said, shots)


FIGURES = {(True, 0): 38, (True, 4): 36, (False, 0): 12, (False, 4): 24}  # right of 40 and of 24, by (said, examples)


def test_the_card_says_what_the_model_is(model: Any) -> None:
    card = (REPO / CARD).read_text(encoding="utf-8")
    assert f"{sum(weight.numel() for weight in model.parameters()):,} parameters" in card
    for number, block in enumerate(model.cross_attention):
        attention, mlp = (float(gate.detach().tanh()) for gate in (block.attention_gate, block.mlp_gate))
        assert f"| {number} | {attention:.2f} | {mlp:.2f} |" in card
    assert "**371 of 400 = 92.8 %**" in card
    page = (REPO / "docs" / "results" / "flamingo_few_shot.md").read_text(encoding="utf-8")
    totals = [line for line in page.splitlines() if line.startswith("| all |")]
    said, unsaid = (line.removeprefix("| all | | ").removesuffix(" |").split(" | ") for line in totals)
    for shots, (first, second) in zip((0, 1, 2, 4), zip(said, unsaid, strict=True), strict=True):
        (of_said, _, said_n), (of_unsaid, _, unsaid_n) = (cell.split(" ")[:3] for cell in (first, second))
        assert (said_n, unsaid_n) == ("400", "240")
        row = f"| {shots} | {of_said} = {first.split(' ')[4]} % | {of_unsaid} = {second.split(' ')[4]} % |"
        assert row in card


# ---- the table of the number of examples


@pytest.fixture(scope="module")
def few_shot() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPO / "benchmarks"))
        yield importlib.import_module("flamingo_few_shot")


def test_prompts_with_examples(few_shot: ModuleType) -> None:
    found_scans, found = heldout_questions()
    examples, each = question_examples(), found[170]
    first, question, answer = examples[each.examples[0]]
    image, pair, *_, last, asked = few_shot.said(each, found_scans, 2, examples)
    np.testing.assert_array_equal(image, first)
    assert (pair, asked) == ((question, answer), each.question)
    np.testing.assert_array_equal(last, each.draw(found_scans))
    _, shown, *_, asked = few_shot.unsaid(each, found_scans, 2, examples)
    assert (shown, asked) == (f"Answer: {answer}<|endofchunk|>", "Answer:")
    assert len(few_shot.unsaid(each, found_scans, 4, examples)) == 10


def test_a_table_of_answers(few_shot: ModuleType, asking: ModuleType) -> None:
    """One who answers every prompt with the most frequent answer is right as often as the table's column says."""
    kinds = ["how many digits?", few_shot.NEIGHBOUR]
    answers = few_shot.right(
        lambda prompts: ["four" if prompt[-1] == kinds[0] else "nothing" for prompt in prompts],
        few_shot.said,
        1,
        kinds,
    )
    assert {kind: (sum(right), len(right)) for kind, right in answers.items()} == {
        kinds[0]: (23, 60),
        kinds[1]: (32, 80),
    }
    assert few_shot.table({1: answers}) == [
        "| question | most frequent answer | 1 example |",
        "| --- | --- | --- |",
        "| how many digits? | 38.3 % | 23 of 60 = 38.3 % |",
        "| what is left of the three? | 40.0 % | 32 of 80 = 40.0 % |",
        "| all | | 55 of 140 = 39.3 % (31.6 to 47.6) |",
    ]
    of_both = {few_shot.kind_of(each.question) for each in heldout_questions()[1]}
    assert len(of_both) == len(asking.KINDS)
