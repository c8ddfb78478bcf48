"""The benchmark that compares `transom capacity` with a real run: its queue, what it sends, and its page."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from paths import KEPT, REPO
from time_limits import PATIENCE_S
from transom.runtime import load
from transom.runtime.capacity.service_times import work_of
from transom.runtime.serving.service import Service


@pytest.fixture
def queueing(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(REPO / "benchmarks")
    return import_module("batching_queue")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(REPO / "benchmarks")
    return import_module("capacity_check")


class Gate:
    """A replica that answers only when it is let, and notes what it was given."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Semaphore(0), threading.Semaphore(0)
        self.batches: list[list[int]] = []

    def __call__(self, requests: Sequence[int]) -> list[object]:
        self.batches.append(list(requests))
        self.begun.release()
        assert self.go.acquire(timeout=PATIENCE_S)
        return [request * 10 if request else ValueError("none") for request in requests]


def test_a_busy_replica_finds_a_batch_of_what_waited(queueing: Any) -> None:
    gate = Gate()
    queue = queueing.BatchingQueue([gate], limit=3)
    sent = [queueing.Sent(number, 0.0) for number in (1, 2, 3, 4, 0)]
    queue.send(sent[0])
    assert gate.begun.acquire(timeout=PATIENCE_S)
    for each in sent[1:]:
        queue.send(each)
    for _ in range(3):
        gate.go.release()
    queue.close()
    assert gate.batches == [[1], [2, 3, 4], [0]]
    assert [size for size, _ in queue.batches] == [1, 3, 1]
    assert [type(each.error) for each in sent] == [type(None)] * 4 + [ValueError]
    assert all(each.answered >= each.sent > 0 for each in sent)


def test_a_batch_that_is_full_does_not_wait_for_its_delay(queueing: Any) -> None:
    gate = Gate()
    queue = queueing.BatchingQueue([gate], limit=2, delay=10 * PATIENCE_S)
    for number in (1, 2, 3):
        queue.send(queueing.Sent(number, 0.0))
    for _ in range(2):
        gate.go.release()
    assert gate.begun.acquire(timeout=PATIENCE_S)
    queue.close()  # answers the third without its delay
    assert gate.batches == [[1, 2], [3]]


def test_requests_are_sent_at_their_times_in_turn(queueing: Any) -> None:
    seen: list[Any] = []
    found = queueing.send_at([0.0, 0.01, 0.02], ["a", "b"], seen.append)
    assert [each.request for each in seen] == ["a", "b", "a"]
    assert seen == found
    assert found[2].arrival - found[0].arrival == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("name", "shape", "new"), [("bert-fp32", {"S": 5}, None), ("gpt-fp32", {"S": 3}, 4), ("vit-fp32", {}, None)]
)
def test_its_requests_are_of_the_size_that_was_measured(
    name: str, shape: dict[str, int], new: int | None, benchmark: Any
) -> None:
    with load(KEPT / name) as loaded:
        work = work_of(loaded, shape, new_tokens=new)
        operation, requests = benchmark.operation_and_requests(loaded, work.sizes, None)
        answers = Service(operation).answer(requests[:3])
        assert not any(isinstance(answer, Exception) for answer in answers)
        for request, answer in zip(requests, answers, strict=False):
            assert {len(array) for array in (*request.inputs.values(), *answer.values())} == {1}  # type: ignore[union-attr]
            if "S" in shape:
                assert request.inputs["input_ids"].shape == (1, shape["S"])
            if new:
                assert answer["generated_ids"].shape == (1, 1, new)  # type: ignore[index]


def test_a_run_is_compared_with_its_prediction(
    benchmark: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["check", str(KEPT / "bert-fp32"), "--shape", "S=5", "--limit", "2", "--load", "0.01", "0.02", "--write"]
    monkeypatch.setattr("sys.argv", [*options, "--seconds", "0.3", "--service-seconds", "0.1"])
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
    benchmark.main()
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    assert lines[0].startswith("| load | requests/s | requests | batch, predicted / measured |")
    assert [line.split(" | ")[4] for line in lines[2:]] == ["p50", "p99", "p50", "p99"]
    assert "ms at p99 at most; 0 failed." in printed
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md"}
