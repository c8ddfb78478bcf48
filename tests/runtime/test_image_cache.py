"""The cache of images by pencil: windows of what is seen, groups of rows that share, and nothing copied twice."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from transom.runtime.errors import BackendError, InputError
from transom.runtime.graph_spec import Graph, Tensor
from transom.runtime.image_cache import ImageCache, image_inputs

KEY = Tensor("image_key.0", "float32", ("G", 1, "I", 2, 1), default=0, state=True)
VALUE = Tensor("image_value.0", "float16", ("G", 1, "I", 2, 1), default=0, state=True)


def image(number: int) -> dict[str, Any]:
    """Keys all ``number``, values all its negative: (H, 1, N, D) each."""
    return {
        "image_key.0": np.full((1, 1, 2, 1), number, np.float32),
        "image_value.0": np.full((1, 1, 2, 1), -number, np.float16),
    }


def cache(*rows: list[int], limit: int = 4) -> ImageCache:
    made = ImageCache([KEY, VALUE], len(rows), limit)
    made.append([[image(number) for number in row] for row in rows])
    return made


def shown(arrays: Any) -> Any:
    """The number of each image that is fed: (G, I); values must be those of the keys."""
    key, value = arrays["image_key.0"], arrays["image_value.0"]
    assert (key.dtype, value.dtype) == (np.float32, np.float16)
    np.testing.assert_array_equal(key, -value.astype(np.float32))
    assert (key == key[..., :1, :1]).all()
    return key[:, 0, :, 0, 0].astype(int).tolist()


def seen(*rows: Any) -> Any:
    return np.array(rows, np.int64)


def test_a_step_gets_the_latest_image_of_each_row_alone() -> None:
    arrays, places = cache([11, 12, 13], [21], []).window(seen([3], [1], [0]))
    assert shown(arrays) == [[13], [21], [0]]
    assert places.tolist() == [[1], [1], [0]]
    assert arrays["image_key.0"].shape == (3, 1, 1, 2, 1)


def test_a_prompt_gets_all_that_its_tokens_see_and_other_rows_are_filled_with_zeros() -> None:
    arrays, places = cache([11, 12, 13], [21]).window(seen([1, 1, 3, 3], [0, 0, 1, 1]))
    assert shown(arrays) == [[11, 13], [21, 0]]
    assert places.tolist() == [[1, 1, 2, 2], [0, 0, 1, 1]]


def test_without_an_image_one_of_zeros_is_fed() -> None:
    arrays, places = cache([], []).window(seen([0, 0], [0, 0]))
    assert shown(arrays) == [[0], [0]]
    assert not places.any()


def test_the_arrays_are_the_same_until_another_image_is_seen() -> None:
    images = cache([11, 12])
    first, _ = images.window(seen([1]))
    assert images.window(seen([1]))[0] is first
    second, _ = images.window(seen([2]))
    assert second is not first
    images.append([[image(13)]])
    assert shown(images.window(seen([2]))[0]) == [[12]]
    assert shown(images.window(seen([2, 3]))[0]) == [[12, 13]]


def test_beams_share_the_images_of_their_prompt() -> None:
    images = cache([11], [21])
    before, _ = images.window(seen([1], [1]))
    images.reorder(np.array([0, 0, 0, 1, 1, 1]))  # three beams of each prompt
    arrays, places = images.window(seen(*[[1]] * 6))
    assert arrays is before  # neither copied nor joined again
    assert places.tolist() == [[1]] * 6
    images.reorder(np.array([2, 0, 0, 5, 5, 3]))  # beams change places
    assert images.window(seen(*[[1]] * 6))[0] is before
    images.reorder(np.array([3, 4, 5]))  # the first prompt is done
    assert shown(images.window(seen([1], [1], [1]))[0]) == [[21]]


@pytest.mark.parametrize(
    ("rows", "groups"),
    [
        ([0, 0, 1], [[11], [11], [21]]),  # one copy of the second prompt has ended
        ([0, 0, 0, 0, 1, 1], [[11], [11], [21]]),  # groups of two
        ([0, 1, 0, 1], [[11], [21], [11], [21]]),
        ([1, 1, 1, 1], [[21]]),
    ],
)
def test_rows_that_are_not_as_many_of_each_prompt(rows: list[int], groups: list[list[int]]) -> None:
    images = cache([11], [21])
    images.reorder(np.array(rows))
    arrays, places = images.window(seen(*[[1]] * len(rows)))
    assert shown(arrays) == groups
    assert places.tolist() == [[1]] * len(rows)


def test_rows_of_a_group_that_see_different_images_are_fed_both() -> None:
    images = cache([11, 12])
    images.reorder(np.array([0, 0]))
    arrays, places = images.window(seen([0, 2], [1, 1]))
    assert shown(arrays) == [[11, 12]]
    assert places.tolist() == [[0, 2], [1, 1]]


def test_images_that_are_appended_to_forked_rows_are_their_own() -> None:
    images = cache([11])
    images.reorder(np.array([0, 0]))
    images.append([[image(12)], []])
    assert images.counts().tolist() == [2, 1]
    assert shown(images.window(seen([2], [1]))[0]) == [[12], [11]]
    images.truncate(1)
    assert images.counts().tolist() == [1, 1]


def test_more_marks_than_images() -> None:
    with pytest.raises(InputError) as caught:
        cache([11], []).window(seen([1], [2]))
    assert str(caught.value) == (
        "row 1 has 2 image marks and 0 images; expected as many. Append the images of the marks first."
    )


def test_more_images_than_the_cache_holds() -> None:
    images = cache([11, 12])
    with pytest.raises(InputError) as caught:
        images.append([[image(13), image(14), image(15)]])
    assert str(caught.value) == "row 0 has 5 images; the cache holds 4."
    assert images.counts().tolist() == [2]  # as it was


def test_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def zeros(*_: Any, **__: Any) -> Any:
        raise MemoryError

    images = cache([11])
    monkeypatch.setattr(np, "zeros", zeros)
    with pytest.raises(BackendError, match=r"there is no memory for images of \(1, 1, 1, 2, 1\)\. Give fewer prompts"):
        images.window(np.array([[1]]))


def test_the_inputs_of_images_are_those_that_the_graph_reads_and_does_not_write() -> None:
    cached = Tensor("key_cache.0", "float32", ("B", 1, "C", 2), default=0, state=True)
    written = Tensor("key_cache.0.written", "float32", ("B", 1, "C", 2), state=True, aliases="key_cache.0")
    graph = Graph("decoder", (Tensor("input_ids", "int64", ("B", "S")), KEY, VALUE, cached), (written,))
    assert image_inputs(graph) == [KEY, VALUE]
