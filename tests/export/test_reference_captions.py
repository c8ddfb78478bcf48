"""The reference Show, Attend and Tell: the images that it sees, their captions, and how it is scored."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from paths import REPO
from transom.calib.builtin_sets import DATA, builtin_set, scans
from transom.calib.digit_compositions import Composition, read_compositions
from transom.export.checkpoint import load_checkpoint
from transom.export.datasets import heldout_compositions, heldout_digits
from transom.export.metrics import Accuracy
from transom.export.reference_models import reference_folder
from transom.export.scores import DIGIT_NAMES, captions_score_of
from transom.runtime import load


@pytest.fixture(scope="module")
def compositions() -> Iterator[ModuleType]:
    """The scripts import one another by name, as they do when they are run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPO / "examples"))
        yield importlib.import_module("digit_compositions")


def calibration() -> list[Composition]:
    return read_compositions(DATA.joinpath("digit_compositions.tsv").read_text(encoding="ascii"))


# ---- images and captions


def test_a_composition_is_a_line_and_an_image() -> None:
    line = "a two above a nine\t1 0 3\t0 24 5"
    (found,) = read_compositions(line + "\n")
    assert found == Composition("a two above a nine", ((1, 0, 3), (0, 24, 5)))
    assert found.line() == line
    of_ones, of_twos = np.full((8, 8), 1, np.uint8), np.full((8, 8), 2, np.uint8)
    image = found.draw(np.stack([of_ones, of_twos]))
    assert (image.shape, image.dtype) == ((32, 32), np.dtype("uint8"))
    assert (image[:8, 3:11] == 2).all()
    assert (image[24:, 5:13] == 1).all()
    assert image.sum() == 64 * 1 + 64 * 2  # and black elsewhere


def captions_by_geometry(composition: Composition, labels: np.ndarray) -> list[str]:
    """Every caption that the rules of digit_compositions.py allow, found from the labels and places alone."""
    digits = [DIGIT_NAMES[labels[number]] for number, _, _ in composition.places]
    if len(digits) == 1:
        return [f"a single {digits[0]}"]
    named = [f"an {digit}" if digit == "eight" else f"a {digit}" for digit in digits]
    found = []
    for one, other in ((0, 1), (1, 0)):
        (_, row, column), (_, below, right) = composition.places[one], composition.places[other]
        if row + 8 < below and abs(column - right) <= 3:
            found.append(f"{named[one]} above {named[other]}")
        if column + 8 < right and abs(row - below) <= 3:
            found.append(f"{named[one]} to the left of {named[other]}")
    return found


def test_every_image_has_exactly_one_caption(compositions: ModuleType) -> None:
    _, labels = heldout_digits()
    of_training = np.arange(40) % 10
    drawn = list(islice(compositions.training(of_training, np.random.RandomState(3)), 2000))
    for found, digits in ((heldout_compositions()[1], labels), (drawn, of_training)):
        for each in found:
            assert captions_by_geometry(each, digits) == [each.caption]
            assert all(0 <= row <= 24 and 0 <= column <= 24 for _, row, column in each.places)
    corners = {place[1:] for each in drawn for place in each.places}
    assert {(0, 0), (0, 24), (24, 0), (24, 24)} <= corners  # the whole canvas is used
    assert len(corners) > 500


def test_captions_that_never_train(compositions: ModuleType) -> None:
    """20 of 210: each digit is once in each place of both relations, so that all of their words train."""
    assert len(compositions.CAPTIONS) == len(set(compositions.CAPTIONS)) == 210
    assert len(compositions.UNSEEN) == 20
    assert set(compositions.CAPTIONS) > compositions.UNSEEN
    words = Counter(word for caption in compositions.UNSEEN for word in caption.split())
    assert {words[name] for name in DIGIT_NAMES} == {4}
    labels = np.arange(20) % 10
    rng = np.random.RandomState(1)
    seen = {each.caption for each in islice(compositions.training(labels, rng), 5000)}
    assert seen == set(compositions.CAPTIONS) - compositions.UNSEEN
    never = {each.caption for each in islice(compositions.training(labels, rng, unseen=True), 300)}
    assert never == compositions.UNSEEN


def test_the_compositions_that_score_are_of_held_out_scans(compositions: ModuleType) -> None:
    images, labels = heldout_digits()
    found_scans, found = heldout_compositions()
    np.testing.assert_array_equal(found_scans, images)
    assert found == compositions.held_out(labels)
    by_caption = Counter(each.caption for each in found)
    assert by_caption == {caption: 10 if "single" in caption else 2 for caption in compositions.CAPTIONS}
    assert len(found) == 500
    used = Counter(number for each in found for number, _, _ in each.places)
    assert set(used) == set(range(540))
    assert set(used.values()) == {1, 2}


def test_the_compositions_that_calibrate_train() -> None:
    """Of the scans that ship for calibration, none of which is held out, in captions that train."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPO / "examples"))
        making = importlib.import_module("make_calibration_sets")
        unseen = importlib.import_module("digit_compositions").UNSEEN
    found = calibration()
    assert [each.line() for each in found] == making.compositions(making.training_scans()["labels"])
    assert len(found) == 400
    assert not {each.caption for each in found} & unseen
    samples = builtin_set("digit-compositions").samples
    for sample, each in zip(samples, found, strict=True):
        assert isinstance(sample.image, np.ndarray)
        np.testing.assert_array_equal(sample.image, each.draw(scans()))
        assert sample.text is None


# ---- the model


RIGHT, CASES = 494, 500
CARD = "models/reference/show_attend_tell/README.md"


@pytest.fixture(scope="module")
def training(compositions: ModuleType) -> ModuleType:
    return importlib.import_module("train_caption_digits")


@pytest.fixture(scope="module")
def model() -> Any:
    loaded = load_checkpoint("show_attend_tell", task=None, max_sizes={}, image_size=None, ignore_unused=False)
    assert loaded.left_out == []
    return loaded.module


def card() -> str:
    return (REPO / CARD).read_text(encoding="utf-8")


def test_the_script_would_train_this_model(training: ModuleType, model: Any, tmp_path: Path) -> None:
    folder = reference_folder("show_attend_tell")
    assert model.config == training.CONFIG
    training.save(model, training.make_tokenizer(), tmp_path)
    for path in folder.iterdir():
        if path.name != "README.md":
            assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_pytorch_scores_what_the_card_says(training: ModuleType, compositions: ModuleType, model: Any) -> None:
    images, cases = heldout_compositions()
    pixels = training.drawn(cases, torch.from_numpy(images))
    found = training.captions(model, training.make_tokenizer(), pixels)
    right = [text == each.caption for text, each in zip(found, cases, strict=True)]
    never = [ok for ok, each in zip(right, cases, strict=True) if each.caption in compositions.UNSEEN]
    score = Accuracy.of_each("", "", right)
    low, high = (f"{bound:.2%}".replace("%", " %") for bound in score.interval)
    assert (score.correct, score.n, sum(never), len(never)) == (RIGHT, CASES, 39, 40)
    assert f"**{RIGHT} of {CASES} = {RIGHT / CASES:.1%}**".replace("%**", " %**") in card()
    assert f"| 95 % interval (Wilson) | {low} to {high} |" in card()
    assert f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters" in card()


def test_attention_lies_on_the_digit_that_is_named(training: ModuleType, model: Any) -> None:
    """Four fifths of the weights, where an even spread would give a ninth."""
    images, cases = heldout_compositions()
    pixels = training.drawn(cases, torch.from_numpy(images))
    share, even, largest = training.attention_on_digits(model, training.make_tokenizer(), pixels, cases)
    assert share > 0.75
    assert even < 0.12
    for number in (share, even, largest):
        assert f"{number:.1%}".replace("%", " %") in card()


def test_the_measure_of_attention_sees_where_it_lies(training: ModuleType, model: Any) -> None:
    """Measured where the digit is, and in the opposite corner."""
    images, cases = heldout_compositions()
    corner = [Composition(each.caption, ((each.places[0][0], 24, 24),)) for each in cases if len(each.places) == 1]
    moved = [Composition(each.caption, ((each.places[0][0], 0, 0),)) for each in corner]
    pixels = training.drawn(corner, torch.from_numpy(images))
    tokenizer = training.make_tokenizer()
    assert training.attention_on_digits(model, tokenizer, pixels, corner)[0] > 0.6
    assert training.attention_on_digits(model, tokenizer, pixels, moved)[0] < 0.05


def test_the_bundle_scores_the_same(captions_bundle: Path) -> None:
    scans_held_out, cases = heldout_compositions()
    with load(captions_bundle) as bundle:
        score = captions_score_of(bundle)
        grey = cases[246].draw(scans_held_out)
        colours = np.repeat(grey[:, :, None], 3, axis=2)
        assert bundle.caption(grey) == bundle.caption(colours) == "a seven above a three"
        assert bundle.caption([grey, grey], num_beams=3) == ["a seven above a three"] * 2
    assert (score.correct, score.n) == (RIGHT, CASES)
