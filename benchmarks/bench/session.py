"""The interface between a worker and a peer's library."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from bench.workloads import GENERATION, Workload

Arrays = dict[str, Any]


class Session(Protocol):
    """A model that is loaded and given its inputs.

    ``outputs`` returns what is compared: an encoder's output as ``output``, or ``tokens`` and, where the library shows
    them, ``logits`` of the prompt's last position. ``parts`` are the calls that are timed.
    """

    def outputs(self) -> Arrays: ...

    def parts(self) -> Mapping[str, Callable[[], object]]: ...

    def close(self) -> None: ...


class Calls:
    """A session of functions. ``generate(new)`` returns that many tokens; ``logits()`` those of the last position."""

    def __init__(
        self,
        workload: Workload,
        *,
        run: Callable[[], Any] | None = None,
        generate: Callable[[int], Any] | None = None,
        logits: Callable[[], Any] | None = None,
        close: Callable[[], object] | None = None,
    ) -> None:
        self._workload, self._run, self._generate, self._logits = workload, run, generate, logits
        self._close = close

    def outputs(self) -> Arrays:
        import numpy as np

        if self._run is not None:
            return {"output": np.asarray(self._run(), np.float32)}
        assert self._generate is not None
        found: Arrays = {"tokens": np.asarray(self._generate(self._workload.new), np.int64)}
        if self._logits is not None:
            found["logits"] = np.asarray(self._logits(), np.float32)
        return found

    def parts(self) -> Mapping[str, Callable[[], object]]:
        generate, new = self._generate, self._workload.new
        if self._run is not None:
            return {"run": self._run}
        assert generate is not None
        if self._workload.kind == GENERATION:
            return {"prefill": lambda: generate(1), "whole": lambda: generate(new)}
        return {"run": lambda: generate(new)}

    def close(self) -> None:
        if self._close is not None:
            self._close()
        self._run = self._generate = self._logits = self._close = None


def seconds_of(call: Callable[[], object]) -> float:
    """Return the wall time of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def block(session: Session, seconds: float) -> dict[str, list[float]]:
    """Return the times of one block: a call to warm up, if it is short, then calls until ``seconds`` are over."""
    parts = session.parts()
    first = next(iter(parts.values()))
    warm = seconds_of(first)
    found: dict[str, list[float]] = {name: [] for name in parts}
    if warm > seconds and len(parts) == 1:  # a warm-up as long as a whole block would double the run
        found["run"].append(warm)
        return found
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or not all(found.values()):
        for name, call in parts.items():
            found[name].append(seconds_of(call))
    return found
