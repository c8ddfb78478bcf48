"""Perceiver's image processor: pixels equal transformers', whose crop comes before the resize."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from image_cases import PHOTOS, small_photo, their_pixels
from transom.export.processors.image import image_preprocess_from_checkpoint
from transom.runtime.errors import CheckpointError, InputError
from transom.runtime.image_preprocess import ImagePreprocess


@pytest.mark.parametrize(
    "words",
    [
        {},
        {"size": {"height": 20, "width": 20}, "crop_size": {"height": 20, "width": 20}},
        {"size": {"height": 21, "width": 34}, "crop_size": {"height": 30, "width": 40}},
        {"size": 20, "crop_size": 16},  # zeros around the image
        {"do_center_crop": False, "size": 24, "resample": 2},
        {"do_rescale": False, "do_normalize": False, "size": [11, 20], "crop_size": [13, 40]},
    ],
    ids=str,
)
def test_pixels_equal_transformers(words: dict[str, Any], tmp_path: Path) -> None:
    """The crop comes before the resize, in proportion to the image's shorter side; bit for bit."""
    theirs = transformers.PerceiverImageProcessorPil(**words)
    settings = {"image_processor_type": "PerceiverImageProcessor", **words}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    ours = image_preprocess_from_checkpoint(tmp_path, theirs.size["height"], theirs.size["width"])
    assert ImagePreprocess.from_json(json.loads(json.dumps(ours.to_json()))) == ours
    for image in (
        small_photo(),
        small_photo().rotate(90, expand=True),
        small_photo().convert("L"),
        PHOTOS / "flower.jpg",
    ):
        assert np.array_equal(ours([image]), their_pixels(theirs, image))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"size": {"shortest_edge": 20}}, "size is {'shortest_edge': 20}, expected an integer or height and width"),
        ({"do_resize": False}, "without a resize or crop behind it gives images of any size"),
        ({"size": 2000, "crop_size": 1}, "crop_first is .*each a number in 0..16"),
    ],
    ids=str,
)
def test_crops_that_are_refused(words: dict[str, Any], message: str, tmp_path: Path) -> None:
    settings = {"image_processor_type": "PerceiverImageProcessor", **words}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=message):
        image_preprocess_from_checkpoint(tmp_path, 20, 20)


def test_an_image_of_which_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "PerceiverImageProcessor"}')
    ours = image_preprocess_from_checkpoint(tmp_path, 20, 20)
    with pytest.raises(InputError, match=r"it is 9x1 pixels \(width x height\), of which the middle 0x0 is used"):
        ours([np.zeros((1, 9, 3), np.uint8)])
