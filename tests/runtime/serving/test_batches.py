"""Requests that wait at the same time share a call, and none of them suffers from another."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from paths import KEPT
from served_requests import of_bytes
from time_limits import PATIENCE_S
from transom.runtime import load
from transom.runtime.errors import BackendError, InputError
from transom.runtime.serving.batches import Batches, BusyError
from transom.runtime.serving.operation import Operation
from transom.runtime.serving.service import Request, Service
from transom.runtime.serving.tasks import task_operation


class Held(Service):
    """A service that waits in each call until it is let go, and notes how many requests share a call."""

    def __init__(self, operation: Operation) -> None:
        super().__init__(operation)
        self.began, self.go = threading.Event(), threading.Event()
        self.calls: list[int] = []
        self.broken = False

    def answer(self, requests: Sequence[Request]) -> Any:
        self.calls.append(len(requests))
        self.began.set()
        assert self.go.wait(PATIENCE_S)
        if self.broken:
            raise BackendError("no device any more")
        return super().answer(requests)


@pytest.fixture(scope="module")
def operation() -> Iterator[Operation]:
    with load(KEPT / "bert-fp32", threads=1) as bundle:
        yield task_operation(bundle)


@pytest.fixture
def service(operation: Operation) -> Held:
    return Held(operation)


def request(text: str) -> Request:
    return Request({"text": of_bytes([[text.encode()]])})


async def held(service: Held, batches: Batches, others: Sequence[Request]) -> list[asyncio.Task[Any]]:
    """Return the tasks of a first request, whose call has begun, and of others, which wait for the next."""
    first = asyncio.create_task(batches.answer(request("the")))
    await asyncio.to_thread(service.began.wait, PATIENCE_S)
    tasks = [first, *(asyncio.create_task(batches.answer(other)) for other in others)]
    await asyncio.sleep(0)  # lets each of them begin to wait
    return tasks


@pytest.mark.parametrize(("most", "calls"), [(32, [1, 5]), (3, [1, 3, 2])])
def test_what_arrives_while_a_call_runs_shares_the_next(service: Held, most: int, calls: list[int]) -> None:
    texts = ["people", "city", "the city", "a", "him"]

    async def ask() -> list[Any]:
        tasks = await held(service, Batches(service, most), [request(text) for text in texts])
        service.go.set()
        return await asyncio.gather(*tasks)

    found = asyncio.run(ask())
    assert service.calls == calls
    for text, answer in zip(["the", *texts], found, strict=True):
        (alone,) = Service(service.operation).answer([request(text)])
        assert isinstance(alone, dict)
        assert answer["label"].tolist() == alone["label"].tolist()
        np.testing.assert_allclose(answer["score"], alone["score"], rtol=1e-6)


def test_a_wrong_request_fails_alone(service: Held) -> None:
    async def ask() -> list[Any]:
        wrong = Request({"texts": of_bytes([[b"the"]])})
        tasks = await held(service, Batches(service), [wrong, request("city")])
        service.go.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, wrong, last = asyncio.run(ask())
    assert service.calls == [1, 2]
    assert isinstance(wrong, InputError)
    assert "unknown input 'texts'" in str(wrong)
    assert sorted(first) == sorted(last) == ["label", "score"]


def test_more_than_may_wait_are_refused(service: Held) -> None:
    async def ask() -> list[Any]:
        tasks = await held(service, Batches(service, waiting=2), [request("a")] * 3)
        service.go.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    *answered, refused = asyncio.run(ask())
    assert [type(answer) for answer in answered] == [dict] * 3
    assert isinstance(refused, BusyError)
    assert str(refused) == "2 requests wait already; ask again later."


def test_callers_that_left_take_no_place_of_those_that_wait(service: Held) -> None:
    async def ask() -> list[Any]:
        batches = Batches(service, waiting=2)
        tasks = await held(service, batches, [request("a"), request("city")])
        tasks[1].cancel()
        await asyncio.sleep(0)
        tasks += [asyncio.create_task(batches.answer(request(text))) for text in ("him", "the")]
        await asyncio.sleep(0)
        service.go.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(ask())
    assert [type(answer) for answer in found] == [dict, asyncio.CancelledError, dict, dict, BusyError]


def test_a_caller_that_leaves_is_left_out_of_the_call(service: Held) -> None:
    async def ask() -> list[Any]:
        tasks = await held(service, Batches(service), [request("a"), request("city")])
        tasks[0].cancel()  # its call runs already
        tasks[1].cancel()
        await asyncio.sleep(0)
        service.go.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, left, answered = asyncio.run(ask())
    assert service.calls == [1, 1]
    assert [type(first), type(left), type(answered)] == [asyncio.CancelledError, asyncio.CancelledError, dict]


def test_a_failure_reaches_every_caller_and_the_next_call_runs(service: Held) -> None:
    service.broken = True

    async def ask() -> list[Any]:
        batches = Batches(service)
        tasks = await held(service, batches, [request("a"), request("city")])
        service.go.set()
        await asyncio.wait(tasks)
        service.broken = False
        return [*(task.exception() for task in tasks), await batches.answer(request("him"))]

    *failed, answered = asyncio.run(ask())
    assert [str(error) for error in failed] == ["no device any more"] * 3
    assert sorted(answered) == ["label", "score"]
