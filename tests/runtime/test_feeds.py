"""Inputs of a decoder that sees images: sizes that are left out, groups of rows, and indices of images."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from transom.runtime.errors import InputError, ShapeError
from transom.runtime.feeds import ARANGE, checked_feeds
from transom.runtime.graph_spec import Axis, Graph, Tensor
from transom.runtime.manifest_graphs import axis_from_json, axis_to_json, shared_state_problems

AXES = {
    "B": Axis(1, 1, 6),
    "S": Axis(1, 4, 9),
    "C": Axis(1, 9, 9, same_as="S"),
    "P": Axis(1, 1, 9, same_as="S"),
    "I": Axis(1, 1, 3),
    "G": Axis(1, 1, 6, same_as="B", divides="B"),
}
KEY = Tensor("image_key.0", "float32", ("G", 2, "I", 4, 5), default=0, state=True)
CACHE = Tensor("key_cache.0", "float32", ("B", 2, "C", 5), default=0, state=True)
DECODER = Graph(
    "decoder",
    (
        Tensor("input_ids", "int64", ("B", "S"), exclusive_max=20),
        Tensor("write_indices", "int64", ("B",), default=0, exclusive_max=9),
        Tensor("logits_positions", "int64", ("B", "P"), default=ARANGE),
        Tensor("image_indices", "int64", ("B", "S"), default=0),
        KEY,
        CACHE,
    ),
    (
        Tensor("logits", "float32", ("B", "P", 20)),
        Tensor("key_cache.0.written", "float32", ("B", 2, "C", 5), state=True, aliases="key_cache.0"),
    ),
)
ENCODER = Graph(
    "encoder",
    (Tensor("pixel_values", "float32", ("B", 3, 8, 8)),),
    (Tensor("image_key.0", "float32", ("B", 2, 1, 4, 5), state=True),),
)


def feeds(**given: Any) -> dict[str, Any]:
    return {"input_ids": np.zeros((6, 4), np.int64), **given}


def keys(groups: int, images: int) -> np.ndarray[Any, Any]:
    return np.ones((groups, 2, images, 4, 5), np.float32)


def test_images_that_are_left_out_are_one_of_zeros_for_each_row() -> None:
    found, sizes = checked_feeds(DECODER, AXES, feeds())
    assert sizes == {"B": 6, "S": 4, "C": 4, "P": 4, "I": 1, "G": 6}
    assert found["image_key.0"].shape == (6, 2, 1, 4, 5)
    assert not found["image_key.0"].any()
    assert not found["image_indices"].any()


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
def test_groups_of_as_many_rows_each_share_their_images(groups: int) -> None:
    found, sizes = checked_feeds(DECODER, AXES, feeds(**{"image_key.0": keys(groups, 3)}))
    assert (sizes["G"], sizes["I"]) == (groups, 3)
    assert found["image_indices"].shape == (6, 4)


def test_groups_of_other_numbers_of_rows() -> None:
    with pytest.raises(ShapeError) as caught:
        checked_feeds(DECODER, AXES, feeds(**{"image_key.0": keys(4, 1)}))
    assert str(caught.value) == (
        "axis G is 4 and axis B is 6, which is no multiple of it. Give each of the G groups as many rows, or G=6."
    )


@pytest.mark.parametrize(("index", "images", "least"), [(3, 2, 0), (2, None, 0), (-1, 2, -1)])
def test_an_index_of_an_image_that_is_not_there(index: int, images: int | None, least: int) -> None:
    given = {} if images is None else {"image_key.0": keys(2, images)}
    indices = np.zeros((6, 4), np.int64)
    indices[5, 3] = index
    with pytest.raises(InputError) as caught:
        checked_feeds(DECODER, AXES, feeds(image_indices=indices, **given))
    assert str(caught.value) == (
        f"input 'image_indices' holds {index}; expected 0 for no image, or 1..{images or 1}, the images of this call "
        "(axis I). Give the keys and values of as many images."
    )


def test_every_index_up_to_the_number_of_images_is_fine() -> None:
    indices = np.tile(np.arange(4), (6, 1))
    found, _ = checked_feeds(DECODER, AXES, feeds(image_indices=indices, **{"image_key.0": keys(2, 3)}))
    assert found["image_indices"] is indices


def test_an_axis_that_divides_another_is_kept_in_bundle_json() -> None:
    problems: list[str] = []
    assert axis_from_json("G", axis_to_json(AXES["G"]), problems) == AXES["G"]
    assert problems == []


@pytest.mark.parametrize(
    ("shape", "dtype", "fits"),
    [
        (("B", 2, 1, 4, 5), "float32", True),
        (("B", 2, 1, 4, 5), "float16", False),
        (("B", 3, 1, 4, 5), "float32", False),  # heads
        (("B", 2, 1, 3, 5), "float32", False),  # latents
        (("B", 2, 1, 4, 6), "float32", False),  # the size of a head
        (("B", 2, 2, 4, 5), "float32", False),
        (("S", 2, 1, 4, 5), "float32", False),
        (("B", 2, 4, 5), "float32", False),
    ],
)
def test_an_encoder_gives_images_one_by_one_and_a_decoder_takes_several(shape: Any, dtype: str, fits: bool) -> None:
    given = Tensor("image_key.0", dtype, shape, state=True)
    found = shared_state_problems([Graph("encoder", ENCODER.inputs, (given,)), DECODER], AXES)
    assert found == (
        []
        if fits
        else [
            f"two graphs have other shapes or dtypes of 'image_key.0': {dtype} ({', '.join(map(str, shape))}) and "
            "float32 (G, 2, I, 4, 5)"
        ]
    )
