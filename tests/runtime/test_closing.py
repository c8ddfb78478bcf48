"""A bundle that is closed while others use it, and one that somebody tries to send elsewhere."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from paths import KEPT
from transom.runtime import load
from transom.runtime.bundle import Bundle
from transom.runtime.errors import BackendError
from transom.runtime.tasks.bert import Bert
from transom.runtime.tasks.gpt import GPT

FEEDS = {"input_ids": np.ones((1, 3), np.int64)}
SECONDS = 60  # of patience with a thread that should be done at once
CLOSED = "this bundle is closed; load it again"


def in_thread(work: Callable[[], object]) -> None:
    """Run ``work`` in a thread of its own and wait for it."""
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(SECONDS)
    assert not thread.is_alive()


def closing_at_read(family: type, number: int) -> Any:
    """A loaded bundle that another thread closes right after a call has looked for its backends ``number`` times."""

    class Closing(family):  # type: ignore[misc]
        reads = -1  # armed by the test

        @property
        def _backends(self) -> Any:
            held = self.__dict__["held"]
            if self.reads >= 0:
                self.reads += 1
                if self.reads == number:
                    self.reads = -1
                    in_thread(self.close)
            return held

        @_backends.setter
        def _backends(self, backends: Any) -> None:
            self.__dict__["held"] = backends

    loaded = Closing(Bundle(KEPT / f"{family.__name__.lower()}-fp32"), threads=1)
    loaded.reads = 0
    return loaded


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize(
    ("family", "call"),
    [
        (Bert, lambda b: b.run(FEEDS)["logits"].tolist()),
        (Bert, lambda b: b.graph_for(FEEDS).name),
        (Bert, lambda b: b.backend("model").graph.name),
        (Bert, lambda b: b.embed(["a", "b", "a"]).tolist()),
        (GPT, lambda g: g.generate([[1], [2], [3]], max_new_tokens=2)),
        (GPT, lambda g: list(g.stream([1], max_new_tokens=2))),
    ],
    ids=["run", "graph_for", "backend", "embed", "generate", "stream"],
)
def test_a_call_that_is_overtaken_finishes_or_says_that_the_bundle_is_closed(
    family: type, call: Any, number: int
) -> None:
    with load(KEPT / f"{family.__name__.lower()}-fp32", threads=1) as whole:
        expected = call(whole)
    said = ""
    try:
        found = call(closing_at_read(family, number))
    except BackendError as error:
        said = str(error)
    assert CLOSED in said if said else found == expected


def test_a_run_in_progress_finishes() -> None:
    bert = load(KEPT / "bert-fp32", threads=1)
    expected = bert.run(FEEDS)["logits"]
    backend, runs, may_go = bert._backends[0], threading.Event(), threading.Event()
    inner = backend.run

    def held(*arguments: Any) -> Any:
        runs.set()
        assert may_go.wait(SECONDS)
        return inner(*arguments)

    backend.run = held
    found = []
    thread = threading.Thread(target=lambda: found.append(bert.run(FEEDS)["logits"]))
    thread.start()
    assert runs.wait(SECONDS)
    bert.close()
    may_go.set()
    thread.join(SECONDS)
    np.testing.assert_array_equal(found[0], expected)
    with pytest.raises(BackendError, match=CLOSED):
        bert.run(FEEDS)


def test_a_stream_that_has_begun_goes_on_when_its_bundle_is_closed() -> None:
    gpt = load(KEPT / "gpt-fp32", threads=1)
    expected = gpt.generate([1, 2], max_new_tokens=4)
    stream = gpt.stream([1, 2], max_new_tokens=4)
    first, late = next(stream), gpt.stream([1, 2], max_new_tokens=4)
    gpt.close()
    assert [first, *stream] == expected
    with pytest.raises(BackendError, match=CLOSED):
        next(late)


def test_a_callback_of_a_submitted_run_may_close() -> None:
    bert = load(KEPT / "bert-fp32", threads=1)
    seen: list[BaseException | None] = []
    done = threading.Event()

    def close(future: object) -> None:
        try:
            bert.close()
            seen.append(None)
        except BaseException as error:
            seen.append(error)
        done.set()

    may_go, inner = threading.Event(), bert._backends[0].run
    bert._backends[0].run = lambda *arguments: (may_go.wait(SECONDS), inner(*arguments))[1]
    future = bert.submit(FEEDS)
    future.add_done_callback(close)  # before it is done, so that the worker calls it
    may_go.set()
    assert done.wait(SECONDS)
    assert seen == [None]
    assert future.result()["logits"].shape == (1, 3)
    with pytest.raises(BackendError, match=CLOSED):
        bert.submit(FEEDS)


def test_a_submitted_run_can_be_cancelled_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    from transom.runtime import session

    monkeypatch.setattr(session, "usable_cores", lambda: 1)
    with load(KEPT / "bert-fp32", threads=1) as bert:
        ran, may_go, inner = [], threading.Event(), bert._backends[0].run
        bert._backends[0].run = lambda *arguments: (ran.append(may_go.wait(SECONDS)), inner(*arguments))[1]
        first, second = bert.submit(FEEDS), bert.submit(FEEDS)
        assert second.cancel()
        may_go.set()
        assert first.result(SECONDS)["logits"].shape == (1, 3)
        assert second.cancelled()
    assert ran == [True]  # by now both are through


# --------------------------------------------------------------------------------------------- other processes

HELD: dict[str, Callable[[Any], object]] = {
    "bundle": lambda g: g,
    "in a list": lambda g: [g],
    "method": lambda g: g.generate,
    "backend": lambda g: g.backend("decoder"),
    "stream": lambda g: g.stream([1], max_new_tokens=2),
    "decoder": lambda g: g.prefill([[1]]),
    "future": lambda g: g.submit({"input_ids": np.ones((1, 2), np.int64)}),
}
WAYS: dict[str, Callable[[Any], object]] = {"pickle": pickle.dumps, "deepcopy": copy.deepcopy}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", HELD)
def test_what_a_process_holds_cannot_be_sent_or_copied(name: str, way: str) -> None:
    said = r"can be neither pickled nor copied.*Call load\(path\) in each process; threads may share"
    with load(KEPT / "gpt-fp32", threads=1) as gpt:
        held = HELD[name](gpt)
        if (name, way) == ("method", "deepcopy"):
            return  # copy takes functions and methods as they are
        with pytest.raises(BackendError, match=said):
            WAYS[way](held)


def test_a_shallow_copy_is_refused_as_well() -> None:
    """It would share the sessions, and its close would not free them."""
    with load(KEPT / "bert-fp32", threads=1) as bert, pytest.raises(BackendError, match="Bert can be neither"):
        copy.copy(bert)


def test_answers_and_labels_can_be_sent() -> None:
    with load(KEPT / "clip-fp32", threads=1) as clip:
        labels = clip.embed_labels(["a", "b"])
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(labels)).embeds, labels.embeds)
