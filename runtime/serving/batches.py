"""Put requests together that wait at the same time: no delay of their own, and no call that could have been shared."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from transom.runtime.errors import TransomError
from transom.runtime.serving.ports import Array
from transom.runtime.serving.service import Request, Service


class BusyError(TransomError):
    """Too many requests wait; the caller may ask again later."""


class Batches:
    """A service for the coroutines of one event loop: what arrives while a call runs is answered by the next call.

    most     requests that share a call
    waiting  requests that may wait for one; the next is refused
    """

    def __init__(self, service: Service, most: int = 32, waiting: int = 256) -> None:
        self.service, self.most, self.bound = service, most, waiting
        self._pool = ThreadPoolExecutor(1, "transom-batches")
        self._waiting: list[tuple[Request, asyncio.Future[dict[str, Array]]]] = []
        self._running: asyncio.Task[None] | None = None

    async def answer(self, request: Request) -> dict[str, Array]:
        """Return the arrays of a request's answer.

        Raises InputError for a request that cannot be used, BusyError where too many wait, and what is no request's
        fault, such as BackendError. A request whose coroutine is cancelled before its call begins is left out of it.
        """
        if len(self._waiting) >= self.bound:
            self._waiting = [each for each in self._waiting if not each[1].done()]  # others left meanwhile
        if len(self._waiting) >= self.bound:
            raise BusyError(f"{self.bound} requests wait already; ask again later.")
        future: asyncio.Future[dict[str, Array]] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        return await future

    def _take(self) -> list[tuple[Request, asyncio.Future[dict[str, Array]]]]:
        """Return the requests of the next call, those whose callers left not among them."""
        there = [(request, future) for request, future in self._waiting if not future.done()]
        self._waiting = there[self.most :]
        return there[: self.most]

    async def _run(self) -> None:
        """Answer what waits, call by call, until nothing does."""
        loop = asyncio.get_running_loop()
        try:
            while taken := self._take():
                requests = [request for request, _ in taken]
                try:
                    answers: Sequence[Any] = await loop.run_in_executor(self._pool, self.service.answer, requests)
                except Exception as error:  # no request's fault: every caller learns of it
                    answers = [error] * len(taken)
                for (_, future), answer in zip(taken, answers, strict=True):
                    if future.done():  # its caller left while the call ran
                        continue
                    if isinstance(answer, Exception):
                        future.set_exception(answer)
                    else:
                        future.set_result(answer)
        finally:
            self._running = None
