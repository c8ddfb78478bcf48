"""Memory that stays bound between runs: how often it is bound, and that no caller's array is of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from paths import KEPT
from transom.runtime import kv_cache, load
from transom.runtime.backends.base import RepeatedRun, bound_run
from transom.runtime.backends.ort_bound import OrtBoundRun
from transom.runtime.errors import BackendError
from transom.runtime.graph_spec import Graph, Tensor

IDS = [5, 6, 7, 8, 9, 10]


class Recorder:
    """A session, or one of its bindings, whose calls are counted by name."""

    def __init__(self, inner: Any, calls: Counter[str]) -> None:
        self._inner, self._calls = inner, calls

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            self._calls[name] += 1
            given = [argument._inner if isinstance(argument, Recorder) else argument for argument in arguments]
            found = getattr(self._inner, name)(*given, **keywords)
            return Recorder(found, self._calls) if name == "io_binding" else found

        return call


def recorded(bundle: Any, graph: str) -> Counter[str]:
    calls: Counter[str] = Counter()
    backend = bundle.backend(graph)
    backend._session = Recorder(backend._session, calls)
    return calls


@pytest.fixture
def gpt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A GPT of seven positions whose caches grow by two."""
    monkeypatch.setattr(kv_cache, "STEP", 2)
    with load(KEPT / "gpt-fp32", threads=1) as bundle:
        yield bundle


def test_steps_of_one_capacity_bind_nothing_but_their_logits(gpt: Any) -> None:
    calls, graph = recorded(gpt, "decoder"), gpt.backend("decoder").graph
    decoder = gpt.new_decoder(1)
    decoder.prefill(np.array([IDS[:2]]))
    for capacity in (4, 6):
        for step in range(2):
            calls.clear()
            decoder.decode_step(np.array([3]))
            first = {"io_binding": 1, "bind_input": len(graph.inputs), "bind_output": len(graph.outputs)}
            assert calls == {**({"bind_output": 1} if step else first), "run_with_iobinding": 1}
            assert decoder.capacity == capacity


def test_beams_that_change_places_bind_nothing(gpt: Any) -> None:
    calls = recorded(gpt, "decoder")
    decoder = gpt.new_decoder(1)
    decoder.prefill(np.array([IDS[:2]]))
    decoder.reorder(np.array([0, 0]))
    decoder.decode_step(np.array([3, 4]))
    calls.clear()
    decoder.reorder(np.array([1, 1]))
    decoder.decode_step(np.array([3, 4]))
    assert calls == {"bind_output": 1, "run_with_iobinding": 1}
    decoder.reorder(np.array([1]))
    decoder.decode_step(np.array([3]))
    assert calls["io_binding"] == 1


def test_a_generation_binds_its_logits_once_and_gives_what_fresh_logits_give(gpt: Any) -> None:
    decoder, expected = gpt.new_decoder(1), []
    logits = decoder.prefill(np.array([IDS[:3]]))
    for _ in range(4):
        expected.append(int(logits.argmax()))
        logits = decoder.decode_step(np.array(expected[-1:]))
    calls = recorded(gpt, "decoder")
    assert gpt.generate(IDS[:3], max_new_tokens=4, eos_token_id=None) == expected
    assert list(gpt.stream(IDS[:3], max_new_tokens=4, eos_token_id=None)) == expected
    graph = gpt.backend("decoder").graph
    assert calls["run_with_iobinding"] == 8
    assert calls["bind_output"] == 6 * len(graph.outputs)  # the prompt, and the capacities of four and six


def test_logits_of_a_step_that_reuses_none_are_its_own(gpt: Any) -> None:
    decoder = gpt.new_decoder(1)
    decoder.prefill(np.array([IDS[:2]]))
    decoder.reuse_logits()
    first = decoder.decode_step(np.array([3]))
    assert decoder.decode_step(np.array([4])) is first
    run = decoder._steps._run
    own, reused, other = run.run()["logits"], run.run(reused=True)["logits"], run.run()["logits"]
    assert run.run(reused=True)["logits"] is not reused  # a caller's array is bound in between
    np.testing.assert_array_equal(own, other)
    for one, two in ((own, reused), (own, other), (reused, other), (reused, first)):
        assert not np.shares_memory(one, two)


def test_rows_that_change_places_take_along_what_steps_wrote(gpt: Any) -> None:
    decoder = gpt.new_decoder(1)
    decoder.prefill(np.array([IDS[:1]]))
    decoder.reorder(np.array([0, 0]))
    for tokens in ([1, 2], [3, 4], [7, 8]):
        decoder.decode_step(np.array(tokens))
    decoder.reorder(np.array([1, 1]))
    found = decoder.decode_step(np.array([5, 6]))
    for row, last in enumerate((5, 6)):
        alone = gpt.new_decoder(1).prefill(np.array([[IDS[0], 2, 4, 8, last]]))
        np.testing.assert_allclose(found[row], alone[0], atol=1e-5)


def test_steps_give_what_the_whole_text_gives_and_keep_it(gpt: Any) -> None:
    """Logits of earlier steps do not change, and each is that of its tokens, bit for bit."""
    decoder, kept = gpt.new_decoder(1), []
    kept.append(decoder.prefill(np.array([IDS[:2]])))
    kept += [decoder.decode_step(np.array([token])) for token in IDS[2:5]]
    copies = [logits.copy() for logits in kept]
    for _ in range(2):
        decoder.decode_step(np.array([1]))
    for length, (logits, copy) in enumerate(zip(kept, copies, strict=True), 2):
        np.testing.assert_array_equal(logits, copy)
        np.testing.assert_allclose(logits, gpt.new_decoder(1).prefill(np.array([IDS[:length]])), atol=1e-5)


def test_runs_of_one_shape_bind_once_and_share_no_array() -> None:
    rng = np.random.default_rng(0)
    given = [{"input_ids": rng.integers(0, 9, (2, 7)), "attention_mask": np.ones((2, 7), np.int64)} for _ in range(4)]
    with load(KEPT / "bert-fp32", threads=1) as bert:
        expected = []
        for feeds in given:  # alone: a call of another shape comes between
            expected.append(bert.run(feeds))
            bert.run({"input_ids": np.ones((1, 3), np.int64)})
        calls = recorded(bert, "model")
        bert._backends[0]._small._session = bert._backends[0]._session
        found = []
        for feeds in given:
            own = {name: array.copy() for name, array in feeds.items()}
            found.append(bert.run(own))
            own["input_ids"][...] = 1  # the caller's again
        assert calls == {"io_binding": 2, "bind_input": 6, "bind_output": 6, "run_with_iobinding": 4}
        for ours, theirs in zip(found, expected, strict=True):
            for name, array in ours.items():
                np.testing.assert_array_equal(array, theirs[name])
                assert array.flags.owndata
                assert array.flags.writeable


def test_a_caller_may_write_into_what_a_run_returned() -> None:
    feeds = {"input_ids": np.array([[1, 2, 3]])}
    with load(KEPT / "bert-fp32", threads=1) as bert:
        expected = {name: array.copy() for name, array in bert.run(feeds).items()}
        for _ in range(3):
            found = bert.run(feeds)
            for name, array in found.items():
                np.testing.assert_array_equal(array, expected[name])
                array[...] = np.nan


class Binding:
    """A binding that notes what is bound."""

    def __init__(self) -> None:
        self.bound: list[tuple[str, int]] = []

    def bind_input(self, name: str, device: str, number: int, kind: Any, shape: Any, address: int) -> None:
        self.bound.append((name, address))

    bind_output = bind_input


class Session:
    def __init__(self, error: str = "") -> None:
        self.binding, self.error = Binding(), error

    def io_binding(self) -> Binding:
        return self.binding

    def run_with_iobinding(self, binding: Binding) -> None:
        if self.error:
            raise RuntimeError(self.error)


GRAPH = Graph("model", (Tensor("x", "float32", ("B",)),), (Tensor("y", "float32", ("B",)),))


@pytest.mark.parametrize(("device", "names"), [("cpu", "xyy"), ("cuda", "xxyxy")])
def test_a_gpu_gets_inputs_of_host_memory_at_every_run(device: str, names: str) -> None:
    """It has copies, made as memory is bound; a CPU reads the memory itself."""
    session, x = Session(), np.zeros(3, np.float32)
    run = OrtBoundRun(session, GRAPH, device, {"x": x}, {"y": (3,)})
    first, second = run.run()["y"], run.run()["y"]
    assert "".join(name for name, _ in session.binding.bound) == names
    assert {address for name, address in session.binding.bound if name == "x"} == {x.ctypes.data}
    assert first.ctypes.data != second.ctypes.data


def test_what_the_library_refuses_is_one_error() -> None:
    run = OrtBoundRun(Session("[ONNXRuntimeError] = void] no such kernel"), GRAPH, "cpu", {"x": np.zeros(3)}, {})
    with pytest.raises(BackendError, match=r"^ONNX Runtime failed on cpu: no such kernel"):
        run.run()


def test_a_backend_that_binds_nothing_runs_again_on_what_the_arrays_hold() -> None:
    class Doubling:
        device, graph = "cpu", GRAPH

        def run(self, feeds: Any, shapes: Any) -> Any:
            return {"y": 2 * feeds["x"]}

    x = np.float32([1, 2])
    run = bound_run(Doubling(), {"x": x}, {"y": (2,)})
    assert isinstance(run, RepeatedRun)
    first = run.run()["y"]
    x[...] = 5
    assert (first.tolist(), run.run()["y"].tolist()) == ([2, 4], [10, 10])
