"""The reference CLIP: its captions, what its card says, and how it is scored."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from paths import REPO
from transom.export.datasets import digit_prompts, heldout_digits
from transom.export.reference_models import reference_folder
from transom.export.scores import DIGIT_NAMES, zero_shot_score, zero_shot_score_of
from transom.runtime import load
from transom.runtime.errors import ExportError

RIGHT, CASES = 537, 540  # with each of the five unseen prompts


@pytest.fixture(scope="module")
def captions() -> Iterator[ModuleType]:
    """The scripts import one another by name, as they do when they are run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPO / "examples"))
        yield importlib.import_module("digit_captions")


def test_no_unseen_prompt_trains(captions: ModuleType) -> None:
    trained = captions.templates()
    assert len(trained) == len({*trained}) == 72_600
    assert tuple(digit_prompts()) == captions.UNSEEN
    for prompt in digit_prompts():
        assert prompt.count("{}") == 1
        assert prompt not in trained
        assert captions.words([prompt]) - captions.words(trained)  # some of its words are in no template


def test_the_card_names_the_words_that_no_template_has(captions: ModuleType) -> None:
    card = (reference_folder("clip") / "README.md").read_text(encoding="utf-8")
    trained = captions.words(captions.templates())
    for prompt in digit_prompts():
        (row,) = re.findall(rf"^\| `{re.escape(prompt)}` \| ([^|]*) \| (\d+) = ", card, re.MULTILINE)
        named = captions.words([row[0]])
        assert named == captions.words([prompt]) - trained
        assert int(row[1]) == RIGHT


def test_a_caption_names_one_digit(captions: ModuleType) -> None:
    rng = np.random.RandomState(5)
    for _ in range(300):
        digit = rng.randint(10)
        found = re.findall("[a-z]+|[0-9]", captions.caption(digit, rng).lower())
        names = [word for word in found if word in DIGIT_NAMES or word.isdigit()]
        assert names in ([DIGIT_NAMES[digit]], [str(digit)])


def test_the_script_would_train_this_model(captions: ModuleType) -> None:
    training = importlib.import_module("train_clip_digits")
    stored = json.loads((reference_folder("clip") / "config.json").read_text())
    theirs = json.loads(json.dumps(training.CONFIG.to_dict()))
    for tower in ("text_config", "vision_config"):
        assert {key: stored[tower][key] for key in theirs[tower] if key in stored[tower] and key != "dtype"} == {
            key: value for key, value in theirs[tower].items() if key in stored[tower] and key != "dtype"
        }
    assert json.loads((reference_folder("clip") / "preprocessor_config.json").read_text()) == training.PREPROCESSOR


def test_transformers_scores_what_the_card_says() -> None:
    import torch
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    folder = reference_folder("clip")
    model, report = CLIPModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer, processor = (kind.from_pretrained(folder) for kind in (CLIPTokenizer, CLIPImageProcessorPil))

    def choose(images: list[Any], texts: list[str]) -> Any:
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        with torch.inference_mode():
            return model.eval()(**inputs, **processor(images, return_tensors="pt")).logits_per_image.numpy()

    score = zero_shot_score(choose)
    assert (score.correct, score.n) == (RIGHT, CASES)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert (
        f"**{RIGHT} = 99.44 %** (95 % interval, Wilson: {score.interval[0]:.2%} to {score.interval[1]:.2%})".replace(
            "%)", " %)"
        ).replace("% to", " % to")
        in card
    )
    assert f"{model.num_parameters():,} parameters" in card


def test_the_bundle_scores_the_same(clip_bundle: Path) -> None:
    with load(clip_bundle) as clip:
        score = zero_shot_score_of(clip)
        images, labels = heldout_digits()
        scans = [np.repeat(scan[:, :, None], 3, axis=2) for scan in images]
        ensemble = clip.zero_shot(scans, DIGIT_NAMES, templates=digit_prompts(), top_k=1)
    assert (score.correct, score.n) == (RIGHT, CASES)
    assert sum(DIGIT_NAMES.index(row[0][0]) == label for row, label in zip(ensemble, labels, strict=True)) == RIGHT


def test_the_worst_prompt_is_the_score() -> None:
    _, labels = heldout_digits()
    perfect = np.eye(10)[labels]
    asked: list[str] = []

    def choose(images: list[Any], texts: list[str]) -> Any:
        assert images[0].shape == (8, 8, 3)
        asked.append(texts[7])
        return np.roll(perfect, 1, axis=1) if "pencil" in texts[0] else perfect

    score = zero_shot_score(choose)
    assert (score.correct, score.n) == (0, 540)
    assert asked == [prompt.replace("{}", "seven") for prompt in digit_prompts()]
    with pytest.raises(ExportError, match=r"shape \(540, 9\); expected \(540, 10\)"):
        zero_shot_score(lambda images, texts: perfect[:, :9])
