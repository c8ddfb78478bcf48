"""Measure workloads: every variant opened and compared with PyTorch first, then timed in turn, one at a time."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.costs import least_seconds
from bench.judge import Judgement, judged
from bench.paths import Paths
from bench.prepare import Job
from bench.process import WorkerError, WorkerProcess
from bench.session import Arrays
from bench.worker import arrays
from bench.workloads import GENERATION, Workload

ROUNDS = 5
BLOCK_S = 0.4  # of one variant before the next has its turn
OPEN_S, ANSWER_S, BLOCK_TIMEOUT_S = 300.0, 300.0, 120.0

Say = Callable[[str], None]
Start = Callable[[Job], WorkerProcess]


@dataclass
class Contender:
    """A job's worker, its judgement, and its times by part, in seconds; ``failure`` says why there are none."""

    job: Job
    worker: WorkerProcess | None = None
    judgement: Judgement | None = None
    seconds: dict[str, list[float]] = field(default_factory=dict)
    failure: str = ""

    def ask(self, timeout: float, **request: Any) -> dict[str, Any] | None:
        """Ask the worker, then let it rest; a failure ends it and is kept."""
        if self.worker is None or self.failure:
            return None
        try:
            answer = self.worker.ask(timeout, **request)
        except WorkerError as error:
            self.failure = str(error)
            return None
        self.worker.rest()
        return answer


def measure_workload(
    workload: Workload, jobs: Sequence[Job], start: Start, paths: Paths, say: Say, *, rounds: int, block: float
) -> list[dict[str, Any]]:
    """Return one row per job. The workers are started by ``start`` and stay open for the next workload."""
    contenders = [Contender(job) for job in jobs]
    reference = arrays(paths.reference(workload.name))
    with tempfile.TemporaryDirectory() as folder:
        for contender in contenders:
            compare(contender, workload, start, reference, Path(folder) / "outputs.npz")
            say(compared(contender))
    for number in range(rounds):
        for contender in contenders:
            answer = contender.ask(BLOCK_TIMEOUT_S, do="time", seconds=block)
            for part, seconds in (answer or {}).get("seconds", {}).items():
                contender.seconds.setdefault(part, []).extend(seconds)
        say(f"  round {number + 1} of {rounds}")
    for contender in contenders:
        contender.ask(OPEN_S, do="close")
    return [row_of(contender, workload) for contender in contenders]


def compare(contender: Contender, workload: Workload, start: Start, reference: Arrays, file: Path) -> None:
    """Open a session and judge its outputs."""
    contender.worker = start(contender.job)
    contender.ask(OPEN_S, do="open", workload=workload.name)
    if contender.ask(ANSWER_S, do="outputs", file=str(file)) is None:
        return
    variant = contender.job.variant
    contender.judgement = judged(workload, variant.precision, arrays(file), reference, saturates=variant.saturates)


def compared(contender: Contender) -> str:
    """Return a line of progress."""
    name = f"  {contender.job.peer.title}, {contender.job.variant.label}: "
    found = contender.judgement
    if found is None:
        return name + contender.failure
    error = "" if found.error is None else f"error {found.error:.2g}"
    tokens = "" if found.tokens is None else "{} of {} tokens".format(*found.tokens)
    return name + ", ".join(filter(None, (error, tokens, found.wrong and f"WRONG: {found.wrong}")))


def row_of(contender: Contender, workload: Workload) -> dict[str, Any]:
    """Return what is stored of a contender: JSON."""
    job, found = contender.job, contender.judgement
    row: dict[str, Any] = {
        "peer": job.peer.name,
        "title": job.peer.title,
        "variant": job.variant.name,
        "label": job.variant.label,
        "precision": job.variant.precision,
        "ours": job.peer.ours,
    }
    if contender.failure or found is None:
        return row | {"failure": contender.failure or "no outputs"}
    times = dict(contender.seconds)
    if workload.kind == GENERATION:
        whole, prefill = times.pop("whole"), times["prefill"]
        times["step"] = [(w - p) / (workload.new - 1) for w, p in zip(whole, prefill, strict=False)]
    return row | {
        "error": found.error,
        "tokens": found.tokens,
        "wrong": found.wrong,
        "ms": {part: summary(seconds) for part, seconds in times.items()},
    }


def summary(seconds: Sequence[float]) -> dict[str, float | int]:
    """Return median, minimum, quartiles in milliseconds, and the number of times."""
    ms = np.array(seconds) * 1e3
    low, high = np.quantile(ms, (0.25, 0.75))
    return {
        "median": round(statistics.median(ms.tolist()), 4),
        "min": round(float(ms.min()), 4),
        "q1": round(float(low), 4),
        "q3": round(float(high), 4),
        "n": len(seconds),
    }


def add_fractions(rows: Sequence[dict[str, Any]], workload: Workload, limits: Mapping[str, float]) -> dict[str, Any]:
    """Set each time's ``of_possible``, least time over median; return the least milliseconds by part and format."""
    least: dict[str, dict[str, float]] = {}
    for row in rows:
        for part, figures in row.get("ms", {}).items():
            possible = 1e3 * least_seconds(workload, part, row["precision"], limits)
            figures["of_possible"] = round(possible / figures["median"], 4)
            least.setdefault(part, {})[row["precision"]] = round(possible, 4)
    return least
