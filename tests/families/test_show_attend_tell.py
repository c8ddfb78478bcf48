"""Show, Attend and Tell: what every recurrent family shows, and images that cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from command_line import error_line, transom
from conftest import Once
from recurrent_family import RecurrentFamily
from recurrent_models import CAPTIONER, write_captioner
from transom.runtime import load
from transom.runtime.errors import InputError

HEIGHT, WIDTH = CAPTIONER.image_size


def picture(row: int) -> Image.Image:
    """Return a smooth image of random colours: what is calibrated on must not look like noise."""
    small = np.random.default_rng(row).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((WIDTH + row % 5, HEIGHT), Image.Resampling.BICUBIC)


class TestShowAttendTell(RecurrentFamily):
    task = "image-to-text"
    linears = 11
    others: ClassVar = {"Conv": 3}
    loops = 0
    products = (3, 8)
    kernels: ClassVar = {"fp32": (18, 15), "fp16": (20, 15), "bf16": (20, 15), "int8": (21, 17)}

    def checkpoint(self, folder: Path) -> Path:
        return write_captioner(folder)

    def calibration_data(self, folder: Path) -> Path:
        images = folder / "images"
        images.mkdir()
        for row in range(12):
            picture(row).save(images / f"{row:02}.png")
        return images

    def inputs(self, folder: Path) -> list[Any]:
        paths = [folder / f"{row}.png" for row in range(3)]
        for row, path in enumerate(paths):
            picture(row).save(path)
        return [str(path) for path in paths]

    def prompts(self, count: int) -> list[Any]:
        pixels = np.random.default_rng(1).standard_normal((count, 3, HEIGHT, WIDTH), np.float32)
        return [row * np.float32(3**place) for place, row in enumerate(pixels)]  # so far apart that captions differ

    def test_images_of_any_kind_get_one_caption(self, once: Once, tmp_path: Path) -> None:
        image = picture(0)
        image.save(tmp_path / "0.png")
        with load(self.bundle(once)) as bundle:
            kinds = [image, np.asarray(image), str(tmp_path / "0.png"), (tmp_path / "0.png").read_bytes()]
            captions = [bundle.caption(kind, max_new_tokens=6) for kind in kinds]
            ids = bundle.generate(bundle.preprocess()([image])[0], max_new_tokens=6)
            assert captions == [captions[0]] * 4
            assert bundle.target_tokenizer().decode(ids) == captions[0]
            assert bundle.caption(kinds, max_new_tokens=6) == captions

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ([], "the list of images is empty"),
            (np.zeros((3, HEIGHT, WIDTH + 1), np.float32), r"image 0 has pixel_values .*; expected \(channels, height"),
            (np.zeros((1, HEIGHT, WIDTH), np.float32), r"image 0 has pixel_values \(1, 20, 12\); expected"),
            (np.full((3, HEIGHT, WIDTH), np.nan, np.float32), "image 0 has pixel_values that are NaN or infinite"),
            ("nowhere.png", "image 0 of 1: .*nowhere.png"),
            ([picture(0), b"no image"], "image 1 of 2: "),
            ([picture(0), np.zeros((3, HEIGHT, WIDTH), np.float32)], "images holds both images and pixel_values"),
        ],
    )
    def test_images_that_cannot_be_read(self, once: Once, given: Any, words: str) -> None:
        with load(self.bundle(once)) as bundle, pytest.raises(InputError, match=words):
            bundle.caption(given)

    def test_raw_pixels_of_another_size(self, once: Once) -> None:
        with load(self.bundle(once)) as bundle, pytest.raises(InputError, match="this axis is fixed at 20"):
            bundle.run({"pixel_values": np.zeros((1, 3, HEIGHT + 1, WIDTH), np.float32)})

    def test_images_for_ids_are_asked_for_by_name(self, once: Once) -> None:
        with (
            load(self.bundle(once)) as bundle,
            pytest.raises(InputError, match="reads images"),
        ):
            bundle.tokenizer()

    def test_the_command_line_names_a_missing_image(self, once: Once) -> None:
        assert "nowhere.png" in error_line(transom("run", self.bundle(once), "nowhere.png"))


def test_another_image_size_is_another_grid(tmp_path: Path) -> None:
    from transom.export.pipeline import export

    folder = write_captioner(tmp_path / "checkpoint")
    manifest = export(str(folder), tmp_path / "out", image_size=(8, 24), max_sizes={"B": 2})
    encoder = next(file.graph for file in manifest.graphs if file.graph.name == "encoder")
    assert encoder.inputs[0].shape == ("B", 3, 8, 24)
    assert encoder.outputs[0].shape == ("B", 4 * 12, CAPTIONER.attention_size)


def test_channels_that_are_no_colours_take_pixels_alone(tmp_path: Path) -> None:
    from transom.export.pipeline import export

    folder = write_captioner(tmp_path / "checkpoint", num_channels=1)
    (folder / "preprocessor_config.json").unlink()
    assert json.loads((folder / "config.json").read_text())["num_channels"] == 1
    export(str(folder), tmp_path / "out", max_sizes={"B": 2})
    with load(tmp_path / "out") as bundle:
        assert bundle.generate(np.zeros((1, HEIGHT, WIDTH), np.float32), max_new_tokens=3)
        with pytest.raises(InputError, match="channels are not red, green, blue"):
            bundle.caption(picture(0))
