"""What reads the KV cache: written in place, rows that do not touch each other, memory that stays flat."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

from tiny_models import Counted, assert_close, logits_of, random_ids
from transom.runtime import load
from transom.runtime.decoder import CHUNK, Decoder
from transom.runtime.errors import InputError, ShapeError

Exported = Callable[..., tuple[Path, Path]]
MakeCheckpoint = Callable[..., Path]
HEADS, SIZE = 2, 80  # of the tiny GPT-2


# ------------------------------------------------------------------------------------------- raw runs


@pytest.fixture(scope="module")
def gpt(exported: Exported) -> Iterator[Any]:
    with load(exported("GPT2LMHeadModel")[1], threads=1) as bundle:
        yield bundle


@pytest.fixture(scope="module")
def gpt_theirs(exported: Exported) -> Any:
    return transformers.GPT2LMHeadModel.from_pretrained(exported("GPT2LMHeadModel")[0])


@pytest.fixture(scope="module")
def marian(exported: Exported) -> Iterator[Any]:
    with load(exported("MarianMTModel")[1], threads=1) as bundle:
        yield bundle


def caches(bundle: Any, B: int, C: int) -> dict[str, NDArray[Any]]:
    graph = bundle.backend("decoder").graph
    return {
        tensor.name: np.zeros((B, tensor.shape[1], C, tensor.shape[3]), tensor.dtype)
        for tensor in graph.inputs
        if "_cache." in tensor.name
    }


def test_a_run_without_caches_gives_every_logit(gpt: Any, gpt_theirs: Any) -> None:
    ids = random_ids((3, 67))
    found = gpt.run({"input_ids": ids}, ["logits"])
    assert list(found) == ["logits"]
    assert_close(found["logits"], logits_of(gpt_theirs, ids))


def test_a_run_writes_into_the_callers_own_buffers(gpt: Any, gpt_theirs: Any) -> None:
    """Five tokens, then two more: the second call sees the first through the buffers alone."""
    ids, own = random_ids((2, 7)), caches(gpt, 2, 11)
    before = {name: array.ctypes.data for name, array in own.items()}
    first = gpt.run({"input_ids": ids[:, :5], **own})
    assert set(first) == {"logits", *own}
    for name, array in own.items():
        assert first[name] is array
        assert array.ctypes.data == before[name]
        assert np.abs(array[:, :, :5]).min(axis=(1, 3)).all()  # written
        assert not array[:, :, 5:].any()  # and nothing else
    kept = {name: array[:, :, :5].copy() for name, array in own.items()}
    second = gpt.run({"input_ids": ids[:, 5:], "write_indices": np.array([5, 5]), **own}, ["logits"])
    expected = logits_of(gpt_theirs, ids)
    assert_close(first["logits"], expected[:, :5])
    assert_close(second["logits"], expected[:, 5:])
    for name, array in own.items():
        np.testing.assert_array_equal(array[:, :, :5], kept[name])
        assert not array[:, :, 7:].any()


def test_a_run_chooses_the_positions_of_its_logits(gpt: Any, gpt_theirs: Any) -> None:
    ids, wanted = random_ids((2, 9)), np.array([[8, 0], [3, 3]])
    found = gpt.run({"input_ids": ids, "logits_positions": wanted}, ["logits"])["logits"]
    expected = logits_of(gpt_theirs, ids)
    assert_close(found, np.stack([expected[row, wanted[row]] for row in range(2)]))


def test_rows_at_positions_of_their_own(gpt: Any, gpt_theirs: Any) -> None:
    """One row at 6, the other at 2 in front of what padding left there: it is overwritten before it is seen."""
    ids, own = random_ids((2, 10)), caches(gpt, 2, 10)
    gpt.run({"input_ids": ids[:, :6], **own}, [])
    new = np.stack([ids[0, 6:9], ids[1, 2:5]])
    found = gpt.run({"input_ids": new, "write_indices": np.array([6, 2]), **own}, ["logits"])["logits"]
    assert_close(found[0], logits_of(gpt_theirs, ids[:1, :9])[0, 6:])
    assert_close(found[1], logits_of(gpt_theirs, ids[1:, :5])[0, 2:])


def test_garbage_past_a_rows_end_is_never_seen(gpt: Any, gpt_theirs: Any) -> None:
    ids, own = random_ids((1, 6)), caches(gpt, 1, 20)
    for number, array in enumerate(own.values()):
        array[...] = np.random.default_rng(number).normal(0, 1e4, array.shape)
    found = gpt.run({"input_ids": ids[:, :4], **own}, ["logits"])["logits"]
    last = gpt.run({"input_ids": ids[:, 4:], "write_indices": np.array([4]), **own}, ["logits"])["logits"]
    assert_close(np.concatenate([found, last], axis=1), logits_of(gpt_theirs, ids))


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_nan_in_one_row_stays_there(gpt: Any, gpt_theirs: Any, poison: float) -> None:
    ids, own = random_ids((3, 6)), caches(gpt, 3, 9)
    gpt.run({"input_ids": ids[:, :5], **own}, [])
    for array in own.values():
        array[1, :, 2] = poison
    found = gpt.run({"input_ids": ids[:, 5:], "write_indices": np.full(3, 5), **own}, ["logits"])["logits"]
    assert not np.isfinite(found[1]).any()
    assert_close(found[[0, 2]], logits_of(gpt_theirs, ids[[0, 2]])[:, 5:])
    for array in own.values():
        assert np.isfinite(array[[0, 2]]).all()
    again = gpt.run({"input_ids": ids}, ["logits"])["logits"]  # a later request
    assert_close(again, logits_of(gpt_theirs, ids))


def of_buffer(change: Callable[[NDArray[Any]], Any]) -> Callable[[dict[str, Any]], object]:
    return lambda feeds: feeds.update({"value_cache.1": change(feeds["value_cache.1"])})


def read_only(array: NDArray[Any]) -> NDArray[Any]:
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (of_buffer(read_only), InputError, r"'value_cache\.1' is read-only or no contiguous.*written in place"),
        (of_buffer(lambda a: np.asfortranarray(a)), InputError, "no contiguous block of memory"),
        (of_buffer(lambda a: np.repeat(a, 2, axis=2)[:, :, ::2]), InputError, "no contiguous block of memory"),
        (of_buffer(lambda a: a.astype(np.float64)), InputError, r"dtype float64; expected float32"),
        (of_buffer(lambda a: a.astype(np.float16)), InputError, r"dtype float16; expected float32"),
        (of_buffer(lambda a: a.tolist()), InputError, "is a list; expected a numpy array of float32"),
        (of_buffer(lambda a: a[:, :, :5].copy()), ShapeError, r"C=\d+\. Give all inputs the same C"),
        (of_buffer(lambda a: a[:1].copy()), ShapeError, "another input has B=2"),
        (of_buffer(lambda a: a[:, :1].copy()), ShapeError, "this axis is fixed at 2"),
        (of_buffer(lambda a: np.zeros((2, 2, 68, 80), np.float32)), ShapeError, r"axis C allows 1\.\.67"),
        (lambda f: f.update({"key_cache.0": f["value_cache.1"]}), InputError, "share memory, and both are written"),
        (lambda f: (f.pop("key_cache.2"), f.update(write_indices=np.array([0, 3]))), InputError, "2' is missing"),
        (lambda f: f.update(write_indices=np.array([3, 4])), ShapeError, "5 tokens at .* up to 4 end at 9; .*C=8"),
        (lambda f: f.update(write_indices=np.array([0, -1])), InputError, "'write_indices' holds -1"),
        (lambda f: f.update(write_indices=np.array([0, 67])), InputError, r"holds 67; expected values in 0\.\.66"),
        (lambda f: f.update(write_indices=np.array([0])), ShapeError, "another input has B=2"),
        (lambda f: f.update(logits_positions=np.array([[0], [5]])), InputError, r"expected positions.*0\.\.4"),
        (lambda f: f.update(logits_positions=np.array([[0], [-1]])), InputError, r"holds -1\.\.0"),
        (lambda f: f.update(input_ids=np.full((2, 5), 101)), InputError, r"holds 101; expected values in 0\.\.100"),
        (lambda f: f.update(input_ids=random_ids((2, 9))), ShapeError, "end at 9; the caches hold C=8"),
    ],
)  # fmt: skip
def test_buffers_and_positions_that_cannot_be(gpt: Any, change: Any, error: type[Exception], message: str) -> None:
    feeds = {"input_ids": random_ids((2, 5)), **caches(gpt, 2, 8)}
    kept = {name: array.copy() for name, array in feeds.items()}
    given = dict(feeds)
    change(given)
    with pytest.raises(error, match=message):
        gpt.run(given)
    for name, array in feeds.items():
        np.testing.assert_array_equal(array, kept[name])  # nothing ran


def test_some_caches_but_not_all(gpt: Any) -> None:
    """Those left out begin as zeros, as long as those that are given."""
    ids, own = random_ids((1, 5)), caches(gpt, 1, 9)
    expected = gpt.run({"input_ids": ids}, ["logits"])["logits"]
    some = {name: array for name, array in own.items() if name.startswith("key")}
    found = gpt.run({"input_ids": ids, **some})
    assert found["value_cache.0"].shape == (1, HEADS, 9, SIZE)
    assert_close(found["logits"], expected)


def test_the_decoder_of_an_encoder_decoder_runs_raw(marian: Any, exported: Exported) -> None:
    theirs = transformers.MarianMTModel.from_pretrained(exported("MarianMTModel")[0])
    ids, target = random_ids((2, 7)), random_ids((2, 5), seed=1)
    mask = np.ones((2, 7), np.int64)
    mask[1, 4:] = 0
    encoded = marian.run({"input_ids": ids, "attention_mask": mask})
    cross = {name: array for name, array in encoded.items() if name.startswith("cross_")}
    assert len(cross) == 4
    found = marian.run({"decoder_input_ids": target, "attention_mask": mask, **cross}, ["logits"])["logits"]
    with torch.no_grad():
        inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": target}
        expected = theirs(**{name: torch.from_numpy(array) for name, array in inputs.items()}).logits.numpy()
    assert_close(found, expected)


# --------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("lengths", [[67], [5, 2, 31], [1, 1], [64, 3]])
def test_prompts_read_at_once_in_chunks_or_one_by_one(
    gpt: Any, gpt_theirs: Any, monkeypatch: pytest.MonkeyPatch, lengths: list[int]
) -> None:
    ids, R, S = random_ids((len(lengths), max(lengths))), len(lengths), max(lengths)
    expected = np.stack([logits_of(gpt_theirs, ids[r : r + 1, :n])[0, -1] for r, n in enumerate(lengths)])
    whole = Decoder(gpt.backend("decoder"), R, 67)
    assert_close(whole.prefill(ids, np.array(lengths)), expected)
    for size in (1, 3, 16):
        monkeypatch.setattr("transom.runtime.decoder.CHUNK", size)
        backend = Counted(gpt.backend("decoder"))
        assert_close(Decoder(backend, R, 67).prefill(ids, np.array(lengths)), expected)
        assert len(backend.fed) == -(-S // size)
        assert max(feeds["input_ids"].shape[1] for feeds in backend.fed) <= size
    if len(set(lengths)) == 1:
        one = Decoder(gpt.backend("decoder"), R, 67)
        for column in range(S):
            last = one.decode_step(ids[:, column])
        assert_close(last, expected)
    assert CHUNK == 256  # larger than this model's context: the first read was one


def test_rows_go_on_from_their_own_ends(gpt: Any, gpt_theirs: Any) -> None:
    ids, lengths = random_ids((3, 20)), np.array([9, 1, 4])
    decoder = Decoder(gpt.backend("decoder"), 3, 67)
    decoder.prefill(ids[:, :9], lengths)
    new = random_ids((3, 6), seed=1)
    fed = np.stack([decoder.decode_step(new[:, step]) for step in range(2)], axis=1)
    all_of = decoder.forward_logits(new[:, 2:5])
    decoder.reorder(np.array([2, 0]))
    last = decoder.decode_step(new[[2, 0], 5])
    for row in range(3):
        alone = logits_of(gpt_theirs, np.concatenate([ids[row, : lengths[row]], new[row]])[None])[0, lengths[row] :]
        assert_close(fed[row], alone[:2])
        assert_close(all_of[row], alone[2:5])
        if row != 1:
            assert_close(last[[2, 0].index(row)], alone[5])


def test_a_step_feeds_the_same_memory_again(gpt: Any) -> None:
    """No step copies a cache: each is fed the buffer of the one before, and gives no cache back."""
    backend = Counted(gpt.backend("decoder"))
    decoder = Decoder(backend, 2, 67)
    decoder.prefill(random_ids((2, 5)))
    for step in range(10):
        decoder.decode_step(random_ids(2, seed=step))
    names = [name for name in backend.fed[0] if "_cache." in name]
    assert len(names) == 6
    for name in names:
        assert {feeds[name].ctypes.data for feeds in backend.fed} == {backend.fed[0][name].ctypes.data}


def test_the_limit_is_checked_before_the_graph_runs(gpt: Any) -> None:
    backend = Counted(gpt.backend("decoder"))
    decoder = Decoder(backend, 2, 9)
    decoder.prefill(random_ids((2, 8)), np.array([3, 8]))
    decoder.decode_step(np.array([1, 1]))
    calls = len(backend.fed)
    with pytest.raises(InputError, match="row 1 has 10 tokens; the context holds 9"):
        decoder.decode_step(np.array([1, 1]))
    assert len(backend.fed) == calls
    decoder.reorder(np.array([0]))
    assert decoder.decode_step(np.array([1])).shape == (1, 101)  # the other row has room


def test_beams_of_sources_read_their_own_source(marian: Any) -> None:
    """Rows of two sources are forked, crossed and dropped: each goes on as a fresh one of its source would."""
    ids = random_ids((2, 9))
    prefilled = marian.prefill([ids[0, :4].tolist(), ids[1].tolist()])
    prefilled.decoder.reorder(np.array([0, 0, 1, 1]))
    tokens = np.array([[3, 4, 5, 6], [7, 8, 9, 10]])
    prefilled.decoder.decode_step(tokens[0])
    prefilled.decoder.reorder(np.array([3, 1, 0]))
    found = prefilled.decoder.decode_step(tokens[1, :3])
    for row, (source, fed) in enumerate([(1, (6, 7)), (0, (4, 8)), (0, (3, 9))]):
        alone = marian.prefill([ids[source, :4].tolist() if source == 0 else ids[source].tolist()])
        alone.decoder.decode_step(np.array(fed[:1]))
        assert_close(found[row], alone.decoder.decode_step(np.array(fed[1:]))[0])
