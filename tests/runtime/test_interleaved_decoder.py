"""A decoder of text and images: what each step is fed, against one run of the graph over everything at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tiny_models import Counted
from transom.runtime import load
from transom.runtime.errors import BackendError, InputError
from transom.runtime.interleaved_decoder import InterleavedDecoder

MARK = 1  # the token of <image>
SHAPE = (3, 20, 12)
ROWS = ([5, 6, MARK, 7, 8, MARK, 9, 10, 11], [MARK, 5, MARK, 6, MARK, 7], [5, 6, 7], [MARK, 12])


@pytest.fixture(scope="module")
def flamingo(random_flamingo_bundle: Path) -> Iterator[Any]:
    with load(random_flamingo_bundle, threads=1) as bundle:
        yield bundle


def pixels(count: int, seed: int = 0) -> list[NDArray[np.float32]]:
    return list(np.random.default_rng(seed).standard_normal((count, *SHAPE), np.float32))


def images_of(bundle: Any, rows: Any) -> list[Any]:
    """Encoded images for the marks of each row."""
    return [bundle.encode(pixels(row.count(MARK), seed)) for seed, row in enumerate(rows)]


def at_once(bundle: Any, row: list[int], images: Any) -> NDArray[np.float32]:
    """The logits (S, V) of all tokens of one row by one raw run, which is fed all of its images."""
    feeds: dict[str, Any] = {"input_ids": np.array([row])}
    if images:
        feeds["image_indices"] = np.cumsum(feeds["input_ids"] == MARK, axis=1)
        for name in images[0]:
            feeds[name] = np.concatenate([image[name] for image in images], axis=1)[None]
    found: NDArray[np.float32] = bundle.run(feeds, ["logits"])["logits"][0]
    return found


def decoder_of(bundle: Any, rows: int) -> tuple[InterleavedDecoder, Counted]:
    backend = Counted(bundle.backend("decoder"))
    return InterleavedDecoder(backend, rows, 80, MARK, 6), backend


def prefilled(bundle: Any, rows: Any) -> tuple[InterleavedDecoder, Counted, NDArray[np.float32]]:
    decoder, backend = decoder_of(bundle, len(rows))
    decoder.append_images(images_of(bundle, rows))
    longest = max(map(len, rows))
    tokens = np.array([[*row, *row[-1:] * (longest - len(row))] for row in rows])
    return decoder, backend, decoder.prefill(tokens, np.array([len(row) for row in rows]))


def assert_near(found: Any, expected: Any) -> None:
    assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


def test_rows_with_other_numbers_of_images_and_none(flamingo: Any) -> None:
    """A prompt, then five steps: each row as one run over all of its tokens and images gives it."""
    decoder, backend, logits = prefilled(flamingo, ROWS)
    images, rows = images_of(flamingo, ROWS), [list(row) for row in ROWS]
    for row, own, found in zip(rows, images, logits, strict=True):
        assert_near(found, at_once(flamingo, row, own)[-1])
    for step in range(5):
        new = np.array([20 + step, 21, 22, 23 + step])
        found = decoder.decode_step(new)
        for place, row in enumerate(rows):
            row.append(int(new[place]))
            assert_near(found[place], at_once(flamingo, row, images[place])[-1])
    assert backend.fed[0]["image_key.0"].shape == (4, 4, 3, 5, 8)  # the prompts see up to three images
    for feeds in backend.fed[1:]:  # a step the latest of each row, whatever came before
        assert feeds["image_key.0"].shape == feeds["image_value.1"].shape == (4, 4, 1, 5, 8)
        assert feeds["image_indices"].tolist() == [[1], [1], [0], [1]]


def test_tokens_depend_on_the_images_before_them_and_on_no_later_one(flamingo: Any) -> None:
    row = [5, MARK, 6, MARK, 7]
    own = flamingo.encode(pixels(3))
    first, other = at_once(flamingo, row, own[:2]), at_once(flamingo, row, [own[0], own[2]])
    np.testing.assert_array_equal(first[:3], other[:3])
    assert np.abs(first[3:] - other[3:]).max(axis=1).min() > 0.01 * np.abs(first).max()


def test_no_step_makes_the_arrays_again(flamingo: Any) -> None:
    decoder, backend, _ = prefilled(flamingo, ROWS[:2])
    for token in range(5, 10):
        decoder.decode_step(np.array([token, token]))
    names = [name for name in backend.fed[0] if name.startswith("image_") and name != "image_indices"]
    assert len(names) == 4
    for name in names:
        assert len({feeds[name].ctypes.data for feeds in backend.fed[1:]}) == 1


def test_beams_share_their_images_in_memory_and_go_on_as_rows_of_their_own(flamingo: Any) -> None:
    decoder, backend, _ = prefilled(flamingo, ROWS[:2])
    decoder.decode_step(np.array([5, 6]))
    decoder.reorder(np.array([0, 0, 1, 1]))
    new = np.array([7, 8, 9, 10])
    found = decoder.decode_step(new)
    assert backend.fed[-1]["image_key.0"].shape == (2, 4, 1, 5, 8)  # two groups of two rows
    assert np.shares_memory(backend.fed[-1]["image_key.0"], backend.fed[-2]["image_key.0"])
    decoder.reorder(np.array([1, 0, 3, 3]))
    last = decoder.decode_step(np.array([11, 12, 13, 14]))
    assert np.shares_memory(backend.fed[-1]["image_value.1"], backend.fed[-3]["image_value.1"])
    images = images_of(flamingo, ROWS[:2])
    for beam, prompt in enumerate([0, 0, 1, 1]):
        row = [*ROWS[prompt], 5 + prompt, int(new[beam])]
        assert_near(found[beam], at_once(flamingo, row, images[prompt])[-1])
    for beam, (prompt, token) in enumerate([(0, 8), (0, 7), (1, 10), (1, 10)]):
        row = [*ROWS[prompt], 5 + prompt, token, 11 + beam]
        assert_near(last[beam], at_once(flamingo, row, images[prompt])[-1])


def test_copies_of_a_prompt_that_end_at_other_times(flamingo: Any) -> None:
    decoder, backend, _ = prefilled(flamingo, ROWS[:2])
    decoder.reorder(np.array([0, 0, 1, 1]))
    decoder.decode_step(np.array([5, 6, 7, 8]))
    decoder.reorder(np.array([0, 2, 3]))  # a copy of the first prompt has ended
    found = decoder.decode_step(np.array([9, 10, 11]))
    assert backend.fed[-1]["image_key.0"].shape[0] == 3
    images = images_of(flamingo, ROWS[:2])
    for place, (prompt, tokens) in enumerate([(0, [5, 9]), (1, [7, 10]), (1, [8, 11])]):
        assert_near(found[place], at_once(flamingo, [*ROWS[prompt], *tokens], images[prompt])[-1])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_prompt_in_chunks_with_an_image_in_each(flamingo: Any, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr("transom.runtime.decoder.CHUNK", size)
    _, backend, logits = prefilled(flamingo, ROWS)
    for row, own, found in zip(ROWS, images_of(flamingo, ROWS), logits, strict=True):
        assert_near(found, at_once(flamingo, row, own)[-1])
    assert len(backend.fed) == -(-9 // size)
    if size == 1:
        assert {feeds["image_key.0"].shape[2] for feeds in backend.fed} == {1}


def test_every_logit_of_text_behind_an_image_that_comes_later(flamingo: Any) -> None:
    """A prompt without an image, then tokens with two, as a dialogue appends them."""
    decoder, _ = decoder_of(flamingo, 1)
    own = flamingo.encode(pixels(2))
    decoder.prefill(np.array([[5, 6, 7]]))
    decoder.append_images([own])
    assert decoder.images.tolist() == [2]
    found = decoder.forward_logits(np.array([[MARK, 8, MARK, 9]]))
    assert_near(found[0], at_once(flamingo, [5, 6, 7, MARK, 8, MARK, 9], own)[3:])


def test_marks_without_images_run_nothing_and_the_rows_stay_as_they_were(flamingo: Any) -> None:
    decoder, backend, _ = prefilled(flamingo, [[5, 6]])
    with pytest.raises(InputError) as caught:
        decoder.prefill(np.array([[MARK, 7]]))
    assert str(caught.value) == (
        "row 0 has 1 image marks and 0 images; expected as many. Append the images of the marks first."
    )
    assert len(backend.fed) == 1
    assert_near(decoder.decode_step(np.array([7]))[0], at_once(flamingo, [5, 6, 7], [])[-1])


def test_a_prompt_that_failed_half_way_can_be_read_again(flamingo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transom.runtime.decoder.CHUNK", 2)
    decoder, backend = decoder_of(flamingo, 1)
    row = [MARK, 5, MARK, 6, 7]
    own = flamingo.encode(pixels(2))
    decoder.append_images([own])
    run, calls = backend.run, []

    def failing(feeds: Any, shapes: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise BackendError("no memory")
        return run(feeds, shapes)

    monkeypatch.setattr(backend, "run", failing)
    with pytest.raises(BackendError):
        decoder.prefill(np.array([row]))
    assert_near(decoder.prefill(np.array([row]))[0], at_once(flamingo, row, own)[-1])


@pytest.mark.parametrize("rows", [1, 3])
def test_rewound_to_where_it_was(flamingo: Any, rows: int) -> None:
    decoder, _, _ = prefilled(flamingo, [ROWS[0]])
    decoder.reorder(np.zeros(rows, np.intp))
    decoder.append_images([flamingo.encode(pixels(1, 9)) for _ in range(rows)])
    decoder.prefill(np.tile([MARK, 5, 6], (rows, 1)))
    decoder.rewind(7, 2)
    assert (decoder.rows, decoder.images.tolist()) == (1, [2])
    own = images_of(flamingo, ROWS)[0]
    found = decoder.prefill(np.array([[20, 21]]))
    assert_near(found[0], at_once(flamingo, [*ROWS[0][:7], 20, 21], own)[-1])


def test_marks_in_the_padding_are_none(flamingo: Any) -> None:
    decoder, _ = decoder_of(flamingo, 2)
    own = flamingo.encode(pixels(2))
    decoder.append_images([own, []])
    decoder.prefill(np.array([[MARK, 5, MARK], [6, MARK, MARK]]), np.array([3, 1]))
    found = decoder.decode_step(np.array([7, 8]))
    assert_near(found[0], at_once(flamingo, [MARK, 5, MARK, 7], own)[-1])
    assert_near(found[1], at_once(flamingo, [6, 8], [])[-1])
