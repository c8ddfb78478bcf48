"""A decoder's recurrent state, by pencil: what it begins as, and its rows that change places."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from transom.runtime.backends.ort_cache import OrtDecoderState
from transom.runtime.backends.ort_library import onnxruntime
from transom.runtime.decoder import Decoder, context_length
from transom.runtime.decoder_state import HostDecoderState, new_decoder_state
from transom.runtime.errors import BundleError, InputError
from transom.runtime.graph_spec import Axis, Graph, Tensor, cache_inputs, recurrent_inputs

IDS = Tensor("ids", "int64", ("B", "T"), exclusive_max=100)
SUM = Tensor("sum", "float32", ("B", 1), state=True)
STEPS = Graph(
    "decoder",
    (IDS, Tensor("factor", "float32", ("B", 1), state=True), SUM),
    (
        Tensor("logits", "float32", ("B", "T", 1)),
        Tensor("sum.next", "float32", ("B", 1), state=True, aliases="sum"),
    ),
)


class Summing:
    """Adds factor * token to the state of each row, and gives the new state as its logits."""

    device = "cpu"
    graph = STEPS

    def __init__(self) -> None:
        self.calls = 0

    def run(self, feeds: Any, shapes: Any) -> Any:
        self.calls += 1
        assert feeds.keys() == {"ids", "factor", "sum"}
        assert feeds["ids"].shape[1] == 1
        feeds["sum"][...] = feeds["sum"] + feeds["factor"] * feeds["ids"]
        return {"logits": feeds["sum"][:, None].copy()}


def decoder(limit: int = 9) -> tuple[Decoder, Summing]:
    backend = Summing()
    given = {"factor": np.array([[1.0], [10.0]], np.float32), "sum": np.array([[5.0], [7.0]], np.float32)}
    return Decoder(backend, 2, limit, given), backend


def test_the_state_begins_as_the_encoders_output_and_goes_on_from_there() -> None:
    steps, backend = decoder()
    assert steps.prefill(np.array([[1], [1]]))[:, 0].tolist() == [6.0, 17.0]
    assert steps.decode_step(np.array([2, 3]))[:, 0].tolist() == [8.0, 47.0]
    assert steps.forward_logits(np.array([[1, 1], [0, 2]]))[:, :, 0].tolist() == [[9.0, 10.0], [47.0, 67.0]]
    assert backend.calls == 4  # a token of each row at a time
    assert steps.capacity == 9


def test_what_was_given_is_not_written() -> None:
    given = {"factor": np.ones((1, 1), np.float32), "sum": np.zeros((1, 1), np.float32)}
    steps = Decoder(Summing(), 1, 9, given)
    steps.decode_step(np.array([4]))
    assert given["sum"][0, 0] == 0.0


def test_rows_change_places_fork_and_end() -> None:
    steps, _ = decoder()
    steps.decode_step(np.array([1, 1]))  # 6 and 17
    steps.reorder(np.array([1, 1, 0]))
    assert steps.decode_step(np.array([0, 1, 1]))[:, 0].tolist() == [17.0, 27.0, 7.0]
    steps.reorder(np.array([2]))
    assert steps.decode_step(np.array([1]))[:, 0].tolist() == [8.0]


def test_rows_that_change_places_read_their_own_encoder_outputs() -> None:
    steps, _ = decoder()
    steps.decode_step(np.array([1, 1]))  # 6 and 17
    steps.reorder(np.array([1, 0]))
    assert steps.decode_step(np.array([1, 1]))[:, 0].tolist() == [27.0, 7.0]


def test_as_many_rows_stay_in_the_arrays_that_are_bound() -> None:
    state = new_decoder_state(Summing(), 2, 9, {"factor": np.ones((2, 1), np.float32)})
    before, revision = state.feeds["sum"], state.revision
    before[:] = [[3], [4]]
    state.reorder(np.array([1, 0]))
    assert state.feeds["sum"] is before
    assert (before.tolist(), state.feeds["factor"].tolist()) == ([[4.0], [3.0]], [[1.0], [1.0]])
    state.reorder(np.array([1]))
    assert state.revision != revision


def test_a_state_that_no_encoder_gives_is_zeros() -> None:
    state = new_decoder_state(Summing(), 3, 9, {})
    assert state.feeds["sum"].tolist() == [[0.0]] * 3
    assert (state.feeds["sum"].dtype, state.capacity) == (np.float32, 9)


def test_rows_of_different_lengths_cannot_go_into_one_recurrent_state() -> None:
    steps, backend = decoder()
    with pytest.raises(InputError, match="rows of 1 and 2 tokens are to go into one recurrent state"):
        steps.prefill(np.array([[1, 1], [1, 1]]), np.array([2, 1]))
    assert backend.calls == 0


def test_no_more_tokens_than_the_limit() -> None:
    steps, _ = decoder(limit=2)
    steps.prefill(np.array([[1, 1], [1, 1]]))
    with pytest.raises(InputError, match="row 0 has 3 tokens; the context holds 2"):
        steps.decode_step(np.array([1, 1]))


def test_the_context_of_a_recurrent_graph_is_an_option_of_the_bundle() -> None:
    axes = {"B": Axis(1, 1, 2), "T": Axis(1, 1, 1)}
    assert (cache_inputs(STEPS), recurrent_inputs(STEPS)) == ([], [SUM])
    assert context_length(STEPS, axes, {"max_target_positions": 80}) == 80
    for wrong in ({}, {"max_target_positions": 0}, {"max_target_positions": True}, {"max_target_positions": "9"}):
        with pytest.raises(BundleError, match=r"options.max_target_positions is .*, expected a positive integer"):
            context_length(STEPS, axes, wrong)


@pytest.mark.parametrize("device", ["host", "onnxruntime"])
def test_constants_are_read_by_every_step_and_no_reordering_touches_them(device: str) -> None:
    caches = [Tensor("key_cache.0", "float32", ("B", 1, "C", 2), default=0, state=True)]
    state: Any = (
        HostDecoderState(caches, 2, 9, {})
        if device == "host"
        else OrtDecoderState(onnxruntime(), "cpu", caches, 2, 9, {})
    )
    state.reserve(3)
    images = {"image_key.0": np.ones((1, 1, 2, 3, 4), np.float32)}
    state.set_constants(images)
    first = state.feeds["image_key.0"]
    assert set(state.feeds) == {"image_key.0", "key_cache.0"}
    assert (first is images["image_key.0"]) == (device == "host")
    state.reorder(np.array([1, 1, 0]))
    state.reserve(8)
    assert state.feeds["image_key.0"] is first  # neither copied nor uploaded again
    state.set_constants({"image_key.0": np.zeros((1, 1, 1, 3, 4), np.float32)})
    second = state.feeds["image_key.0"]
    assert (second if device == "host" else second.numpy()).shape == (1, 1, 1, 3, 4)
