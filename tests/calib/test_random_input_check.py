"""Random inputs are distinguished from pictures and language by the inputs of a graph."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from transom.calib.data import open_calibration_data
from transom.calib.random_input_check import LEAST_CORRELATION, RandomInputCheck
from transom.export.datasets import DATA
from transom.runtime.errors import CalibrationError


def seen(*pixels: NDArray[np.generic]) -> RandomInputCheck:
    check = RandomInputCheck()
    for image in pixels:
        check.update({"pixel_values": np.asarray(image, np.float32)})
    return check


def read(*rows: NDArray[np.int64]) -> RandomInputCheck:
    check = RandomInputCheck()
    for row in rows:
        check.update({"input_ids": row.reshape(1, -1)})
    return check


def draws(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def words(name: str, ids: int) -> list[NDArray[np.int64]]:
    """A shipped set as ids: each word the number of its first occurrence, between two marks."""
    known: dict[str, int] = {}
    rows = []
    for sample in open_calibration_data([name]).samples[:ids]:
        rows.append(np.array([0, *(known.setdefault(word, len(known) + 1) for word in str(sample.text).split()), 0]))
    return rows


def test_the_correlation_of_neighbours_by_pencil() -> None:
    """Stripes of 1, -1, 1, -1 downwards: neighbours beside are alike, those below opposite; the larger counts."""
    stripes = np.tile(np.array([[1.0], [-1.0]]), (20, 40))[None, None]
    assert seen(stripes).correlation == pytest.approx(1.0)
    board = stripes * np.tile([1.0, -1.0], 20)
    assert seen(board).correlation == pytest.approx(-1.0)
    assert seen(np.ones((1, 3, 40, 40))).correlation is None  # plain: nothing to tell
    assert seen(stripes[..., :3, :3]).correlation is None  # too little


@pytest.mark.parametrize("kind", ["standard_normal", "random"])
@pytest.mark.parametrize("size", [8, 32])
def test_independent_pixels_are_noise(kind: str, size: int) -> None:
    check = seen(*(getattr(draws(seed), kind)((1, 3, size, size)) for seed in range(8)))
    assert abs(check.correlation or 1) < 0.05
    with pytest.raises(CalibrationError, match=r"looks random to the graph 'image': neighbouring pixels have a corr"):
        check.check("image")


def test_noise_as_a_picture_of_twice_the_size_is_noise() -> None:
    large = draws().integers(0, 256, (448, 448, 3), dtype=np.uint8)
    half = np.asarray(Image.fromarray(large).resize((224, 224), Image.Resampling.BICUBIC))
    with pytest.raises(CalibrationError, match="looks random"):
        seen(half.transpose(2, 0, 1)[None]).check("model")


def test_scans_and_photographs_are_no_noise() -> None:
    scans = [np.asarray(sample.image)[None, None] for sample in open_calibration_data(["digits"]).samples]
    check = seen(*scans)
    assert (check.correlation or 0) > 2 * LEAST_CORRELATION
    check.check("model")
    with DATA.joinpath("photo_china.jpg").open("rb") as file:
        photo = np.asarray(Image.open(file)).transpose(2, 0, 1)[None]
    check = seen(photo)
    assert (check.correlation or 0) > 0.9
    check.check("model")


@pytest.mark.parametrize("vocabulary", [300, 1000, 30522, 250_000])
@pytest.mark.parametrize("rows", [8, 64])
def test_uniform_ids_are_noise(vocabulary: int, rows: int) -> None:
    with pytest.raises(CalibrationError, match=r"token ids are as even as dice: chi-square [01]\.\d+ per kind"):
        read(*draws(5).integers(0, vocabulary, (rows, 32))).check("model")


def test_chi_square_by_pencil() -> None:
    """300 kinds, 597 times the first and 3 times the last: (595^2 + 298 * 4 + 1) / 2 / 299."""
    rows = np.concatenate([[7], np.zeros(597, np.int64), np.full(3, 299), [7]])
    assert read(rows).unevenness == pytest.approx((595**2 + 298 * 4 + 1) / 2 / 299)


def test_a_list_of_different_words_is_no_noise() -> None:
    """Each once, as draws would have it; but frequent tokens have low ids: half of these 621 are below 1452."""
    ids = np.unique((30_000 ** draws().random(1000)).astype(np.int64))
    check = read(np.concatenate([[0], draws().permutation(ids), [0]]))
    assert (check.unevenness or 2) < check.chance  # id by id it is what draws are
    assert check.grouped > 10
    check.check("model")


def test_uniform_ids_that_leave_out_the_special_tokens_are_noise() -> None:
    """100,000 ids tell draws from 1000 on from draws from 0 on: the first thousand is never drawn."""
    with pytest.raises(CalibrationError, match="token ids are as even as dice"):
        read(*draws().integers(1000, 30_522, (800, 128))).check("model")


@pytest.mark.parametrize("name", ["austen", "wordnet", "digit-captions"])
def test_language_is_no_noise(name: str) -> None:
    check = read(*words(name, 200))
    if name != "digit-captions":  # of two dozen words
        assert (check.unevenness or 0) > check.chance + 1
    check.check("model")


def test_what_is_not_checked() -> None:
    """Few tokens, small vocabularies, generated tokens one by one, what a mask hides, ids that no vocabulary has."""
    read(draws().integers(0, 30000, 90)).check("model")
    read(draws().integers(0, 250, 5000)).check("model")
    read(*draws().integers(0, 30000, (500, 1))).check("decoder")
    check = RandomInputCheck()
    ids = draws().integers(0, 30000, (4, 1000))
    check.update({"input_ids": ids, "attention_mask": (np.arange(1000) < 20).astype(np.int64)[None].repeat(4, 0)})
    check.update({"input_ids": np.array([[-1, -5, 1 << 60, -1]])})
    assert check.unevenness is None
    check.update({"attention_mask": ids, "pixel_values": np.zeros((2, 3))})
    seen(np.full((1, 1, 40, 40), np.nan)).check("model")  # NaN is named elsewhere
    check.check("model")
