"""The native backend against an execution of its lists in numpy: values, bits, and what it refuses."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from native_graphs import libraries, native, reference, worst
from operator_lists import (
    DECODER,
    ENCODER,
    HEADS,
    HIDDEN,
    PLACES,
    SIZE,
    VISION,
    WORDS,
    decoder_list,
    encoder_list,
    vision_list,
)
from transom.runtime.errors import BundleError, InputError, ShapeError
from transom.runtime.graph_spec import shape_of
from transom.runtime.native.library import NativeLibrary

FLOAT_TOLERANCE = 1e-5  # of float32 beside float64, sums of at most 24 products
# One step of 255 where a value lies between two: later layers are one linear and a norm.
INT8_TOLERANCE = 0.02
ALL = pytest.mark.parametrize("library", libraries())


def encoder_feeds(lengths: list[int], seed: int = 0, padded: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    longest = max(*lengths, padded)
    mask = (np.arange(longest) < np.array(lengths)[:, None]).astype(np.int64)
    return {"input_ids": rng.integers(0, WORDS, (len(lengths), longest)), "attention_mask": mask}


def shapes(graph: Any, *names: str, **sizes: int) -> dict[str, tuple[int, ...]]:
    return {name: shape_of(graph.outputs_by_name[name], sizes) for name in names}


def run_encoder(backend: Any, feeds: dict[str, Any], *names: str) -> dict[str, Any]:
    B, S = feeds["input_ids"].shape
    return backend.run(feeds, shapes(ENCODER, *(names or ENCODER.outputs_by_name), B=B, S=S))


@ALL
@pytest.mark.parametrize("lengths", [[5], [3, 3], [1, 7, 4], [2, 0, 3], [19, 1, 1, 8, 2]])
def test_an_encoder_computes_what_its_list_says(library: NativeLibrary, lengths: list[int]) -> None:
    made, feeds = encoder_list(), encoder_feeds(lengths)
    masked = 0 in lengths  # its first token is chosen, though its mask is 0
    theirs = reference(made, feeds, compute_masked=masked)
    ours = run_encoder(native(ENCODER, made, library), feeds)
    assert max(worst(ours, {name: theirs[name] for name in ours}).values()) < INT8_TOLERANCE


@ALL
def test_a_sequence_has_the_same_bits_alone_among_others_and_by_more_threads(library: NativeLibrary) -> None:
    made, lengths = encoder_list(), [9, 1, 17, 4, 4, 30, 2]
    feeds = encoder_feeds(lengths)
    together = run_encoder(native(ENCODER, made, library, threads=1), feeds)
    by_two = run_encoder(native(ENCODER, made, library, threads=2), feeds)
    for name in together:
        np.testing.assert_array_equal(together[name], by_two[name])
    backend = native(ENCODER, made, library)
    for row, length in enumerate(lengths):
        alone = run_encoder(backend, {name: value[row : row + 1, :length] for name, value in feeds.items()})
        np.testing.assert_array_equal(alone["pooler_output"][0], together["pooler_output"][row])
        np.testing.assert_array_equal(alone["mean"][0], together["mean"][row])
        np.testing.assert_array_equal(alone["last_hidden_state"][0], together["last_hidden_state"][row, :length])
        assert not together["last_hidden_state"][row, length:].any()


@ALL
def test_wanted_outputs_alone_are_computed(library: NativeLibrary) -> None:
    backend, feeds = native(ENCODER, encoder_list(), library), encoder_feeds([4, 4])
    every = run_encoder(backend, feeds)
    for name in every:
        found = run_encoder(backend, feeds, name)
        assert found.keys() == {name}
        np.testing.assert_array_equal(found[name], every[name])
    hidden = backend.program.variant(frozenset({"last_hidden_state"}), padded=False)
    assert [type(part).__name__ for part in hidden.parts] == ["Embed", "Linear", "Attention", "Linear", "Linear"]
    assert hidden.direct == {"last": "last_hidden_state"}


@ALL
def test_outputs_are_fresh(library: NativeLibrary) -> None:
    backend, feeds = native(ENCODER, encoder_list(), library), encoder_feeds([4, 2])
    first = run_encoder(backend, feeds)
    kept = {name: array.copy() for name, array in first.items()}
    run_encoder(backend, encoder_feeds([4, 2], seed=1))
    for name, array in kept.items():
        np.testing.assert_array_equal(first[name], array)


@ALL
def test_any_number_of_threads_may_call(library: NativeLibrary) -> None:
    backend = native(ENCODER, encoder_list(), library, threads=2)
    many = [encoder_feeds([1 + seed % 11, 6, 2], seed) for seed in range(40)]
    alone = [run_encoder(backend, feeds) for feeds in many]
    with ThreadPoolExecutor(8) as pool:
        for found, expected in zip(pool.map(lambda feeds: run_encoder(backend, feeds), many), alone, strict=True):
            for name in expected:
                np.testing.assert_array_equal(found[name], expected[name])


@ALL
@pytest.mark.parametrize(
    ("name", "place", "value"), [("input_ids", (0, 1), WORDS), ("input_ids", (1, 0), -1), ("input_ids", (0, 0), 2**40)]
)
def test_ids_beyond_their_table_are_refused(library: NativeLibrary, name: str, place: Any, value: int) -> None:
    feeds = encoder_feeds([3, 2])
    feeds[name][place] = value
    with pytest.raises(InputError, match=rf"holds {value}; expected values in 0\.\.{WORDS - 1}"):
        run_encoder(native(ENCODER, encoder_list(), library), feeds)


@ALL
def test_rows_longer_than_the_table_of_positions_are_refused(library: NativeLibrary) -> None:
    with pytest.raises(ShapeError, match=f"stands at {PLACES}; the model has {PLACES} positions"):
        run_encoder(native(ENCODER, encoder_list(), library), encoder_feeds([PLACES + 1]))


@ALL
def test_arrays_that_do_not_fit_each_other_are_refused(library: NativeLibrary) -> None:
    backend, feeds = native(ENCODER, encoder_list(), library), encoder_feeds([3, 2])
    with pytest.raises(ShapeError, match="Give all inputs the same sizes"):
        run_encoder(backend, feeds | {"attention_mask": feeds["attention_mask"][:, :2]})
    with pytest.raises(InputError, match="expected int64"):
        run_encoder(backend, feeds | {"input_ids": feeds["input_ids"].astype(np.int32)})
    with pytest.raises(ShapeError, match="is to have shape"):
        backend.run(feeds, {"mean": (2, HIDDEN + 1)})


@ALL
@pytest.mark.parametrize("rows", [1, 3])
def test_images_need_no_mask(library: NativeLibrary, rows: int) -> None:
    made = vision_list()
    feeds = {"pixel_values": np.random.default_rng(1).standard_normal((rows, 3, 4, 6)).astype(np.float32)}
    ours = native(VISION, made, library).run(feeds, shapes(VISION, "last_hidden_state", "logits", B=rows))
    assert max(worst(ours, reference(made, feeds)).values()) < FLOAT_TOLERANCE


def decoder_feeds(tokens: Any, past: Any, capacity: int, **caches: Any) -> dict[str, Any]:
    tokens = np.array(tokens)
    shape = (len(tokens), HEADS, capacity, SIZE)
    return {
        "input_ids": tokens,
        "write_indices": np.array(past),
        "logits_positions": np.tile(np.arange(tokens.shape[1]), (len(tokens), 1)),
        **{name: caches.get(name, np.zeros(shape, np.float32)) for name in ("key_cache.0", "value_cache.0")},
    }


def logits(feeds: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {"logits": (*feeds["logits_positions"].shape, WORDS)}


@ALL
def test_a_decoder_writes_its_caches_and_reads_them(library: NativeLibrary) -> None:
    """Prompts of 5 and 3 tokens, the second padded, then a step of each: as numpy does, and as one pass over all."""
    made = decoder_list()
    backend = native(DECODER, made, library)
    feeds = decoder_feeds([[1, 2, 3, 4, 5], [6, 7, 8, 0, 0]], [0, 0], capacity=9)
    theirs = reference(made, feeds)
    ours = backend.run(feeds, logits(feeds))
    assert max(worst(ours, theirs).values()) < FLOAT_TOLERANCE
    np.testing.assert_allclose(feeds["key_cache.0"], theirs["key_cache.0"], atol=1e-5)
    np.testing.assert_allclose(feeds["value_cache.0"], theirs["value_cache.0"], atol=1e-5)
    step = decoder_feeds([[9], [10]], [5, 3], 9, **{name: feeds[name] for name in ("key_cache.0", "value_cache.0")})
    step_theirs = reference(made, step)
    step_ours = backend.run(step, logits(step))
    assert max(worst(step_ours, step_theirs).values()) < FLOAT_TOLERANCE
    whole = decoder_feeds([[6, 7, 8, 10]], [0], 9)
    np.testing.assert_array_equal(backend.run(whole, logits(whole))["logits"][0, -1], step_ours["logits"][1, 0])


@ALL
@pytest.mark.parametrize("rows", [1, 2, 20])
def test_bound_steps_are_those_of_run(library: NativeLibrary, rows: int) -> None:
    made, rng = decoder_list(), np.random.default_rng(0)
    backend = native(DECODER, made, library)
    feeds = decoder_feeds(rng.integers(0, WORDS, (rows, 1)), [0] * rows, 8)
    again = {name: value.copy() for name, value in feeds.items()}
    bound = backend.bound_run(feeds, logits(feeds))
    before = None
    for step in range(6):
        for each in (feeds, again):
            each["write_indices"][:] = step
            each["input_ids"][:] = (np.arange(rows)[:, None] * 7 + step) % WORDS
        found = bound.run(reused=step > 2)["logits"]
        assert step < 4 or found is before
        before = found
        np.testing.assert_array_equal(found, backend.run(again, logits(again))["logits"])
        np.testing.assert_array_equal(feeds["key_cache.0"], again["key_cache.0"])


@ALL
@pytest.mark.parametrize("rows", [1, 20])
def test_what_a_bound_run_is_given_is_checked_each_time(library: NativeLibrary, rows: int) -> None:
    feeds = decoder_feeds([[1]] * rows, [0] * rows, 8)
    bound = native(DECODER, decoder_list(), library).bound_run(feeds, logits(feeds))
    bound.run()
    for name, value, error in (
        ("input_ids", WORDS, InputError),
        ("write_indices", 8, ShapeError),
        ("write_indices", -1, ShapeError),
        ("logits_positions", 1, InputError),
    ):
        before = feeds[name].copy()
        feeds[name].flat[-1] = value
        with pytest.raises(error):
            bound.run()
        feeds[name][...] = before
    bound.run()


@ALL
@pytest.mark.parametrize(("past", "tokens"), [([4], 5), ([8], 1), ([-1], 1), ([2**40], 1)])
def test_a_length_beyond_the_caches_is_refused(library: NativeLibrary, past: list[int], tokens: int) -> None:
    feeds = decoder_feeds([[1] * tokens], past, capacity=8)
    with pytest.raises(ShapeError, match="the caches hold C=8"):
        native(DECODER, decoder_list(), library).run(feeds, logits(feeds))


@ALL
def test_caches_that_cannot_be_written_are_refused(library: NativeLibrary) -> None:
    backend = native(DECODER, decoder_list(), library)
    feeds = decoder_feeds([[1]], [0], 8)
    strided = np.zeros((1, HEADS, 8, 2 * SIZE), np.float32)[..., ::2]
    with pytest.raises(InputError, match="no contiguous block of memory"):
        backend.run(feeds | {"key_cache.0": strided}, logits(feeds))
    with pytest.raises(InputError, match="expected float32"):
        backend.run(feeds | {"key_cache.0": feeds["key_cache.0"].astype(np.float16)}, logits(feeds))


def test_a_list_of_other_weights_is_refused() -> None:
    from native_graphs import LIST, files_of
    from transom.runtime.manifest_graphs import GraphFile
    from transom.runtime.native.backend import NativeBackend

    file = GraphFile(ENCODER, {"native": LIST}, "other.weights")
    files = files_of(*encoder_list())
    files.files["other.weights"] = files.files["model.weights"]
    with pytest.raises(BundleError, match=r"reads 'model.weights', bundle.json has 'other.weights'"):
        NativeBackend(file, files, 1, None)  # type: ignore[arg-type] # refused before the library is used
