"""Batch the requests of one queue for replicas in this process, as Triton does, and send requests at given times."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Sent:
    """One request with its times in seconds of ``time.perf_counter``: planned, sent, and answered."""

    request: Any
    arrival: float
    sent: float = 0.0
    answered: float = 0.0
    error: object = None


@dataclass
class BatchingQueue:
    """Requests that wait in one queue for replicas, each a thread that answers batches with a callable of its own.

    A replica takes what waits, at most ``limit`` requests; with ``delay`` seconds it waits until a batch is full or its
    oldest request has waited that long.
    """

    replicas: Sequence[Callable[[Sequence[Any]], Sequence[object]]]  # requests -> an answer or an exception for each
    limit: int
    delay: float = 0.0
    batches: list[tuple[int, float]] = field(default_factory=list)  # requests and seconds of each batch

    def __post_init__(self) -> None:
        self._waiting: deque[Sent] = deque()
        self._change = threading.Condition()
        self._closed = False
        self._threads = [threading.Thread(target=self._work, args=(answer,)) for answer in self.replicas]
        for thread in self._threads:
            thread.start()

    def send(self, sent: Sent) -> None:
        """Put a request into the queue."""
        with self._change:
            sent.sent = time.perf_counter()
            self._waiting.append(sent)
            self._change.notify_all()

    def close(self) -> None:
        """Answer what waits, and end the threads."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        for thread in self._threads:
            thread.join()

    def _take(self) -> list[Sent]:
        """Wait for a batch and take it; an empty one when the queue is closed."""
        with self._change:
            while True:
                if not self._waiting:
                    if self._closed:
                        return []
                    self._change.wait()
                    continue
                left = self._waiting[0].sent + self.delay - time.perf_counter()
                if left <= 0 or len(self._waiting) >= self.limit or self._closed:
                    return [self._waiting.popleft() for _ in range(min(self.limit, len(self._waiting)))]
                self._change.wait(left)

    def _work(self, answer: Callable[[Sequence[Any]], Sequence[object]]) -> None:
        while batch := self._take():
            started = time.perf_counter()
            try:
                found = answer([sent.request for sent in batch])
            except Exception as error:  # a test of load goes on, and counts it
                found = [error] * len(batch)
            ended = time.perf_counter()
            for sent, answered in zip(batch, found, strict=True):
                sent.answered = ended
                sent.error = answered if isinstance(answered, Exception) else None
            self.batches.append((len(batch), ended - started))


def send_at(planned: Sequence[float], requests: Sequence[Any], send: Callable[[Sent], None]) -> list[Sent]:
    """Send a request at each of the ``planned`` seconds from now, whatever became of those before: an open loop.

    ``requests`` are used in turn.
    """
    begin = time.perf_counter()
    found = [Sent(requests[place % len(requests)], begin + at) for place, at in enumerate(planned)]
    for sent in found:
        left = sent.arrival - time.perf_counter()
        if left > 0:
            time.sleep(left)
        send(sent)
    return found
