"""One run of `make bench`: limits, then each workload; what is done is kept, so that an interrupted run goes on."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench import limits
from bench.environments import python_of
from bench.measure import add_fractions, measure_workload
from bench.paths import BENCHMARKS, Paths
from bench.prepare import Job, jobs, state
from bench.process import WorkerError, WorkerProcess
from bench.registry import Peer
from bench.workloads import THREADS, WORKLOADS, Workload

FORMAT = 1  # of the results
PREPARE = "it was not prepared; run `make bench-env`"


class Workers:
    """Running workers by job's peer and variant: each is started once and stays for all workloads."""

    def __init__(self, paths: Paths, earlier: Path | None) -> None:
        self._paths, self._earlier = paths, earlier
        self._running: dict[tuple[str, str], WorkerProcess] = {}
        self.versions: dict[str, dict[str, str]] = {}

    def start(self, job: Job) -> WorkerProcess:
        """Return the job's worker, started the first time or after it ended."""
        key = job.peer.name, job.variant.name
        if key in self._running and not self._running[key].ended():
            return self._running[key]
        python = python_of(job.peer, self._paths, self._earlier)
        worker = WorkerProcess(job.peer.name, job.variant.name, job.peer.worker_module, python, self._paths)
        self._running[key] = worker
        if job.peer.name not in self.versions:
            try:
                self.versions[job.peer.name] = worker.ask(do="versions")["versions"]
            except WorkerError as error:
                self.versions[job.peer.name] = {"error": str(error)}
        return worker

    def end(self) -> None:
        for worker in self._running.values():
            worker.end()
        self._running.clear()


def run(
    peers: Sequence[Peer],
    workloads: Sequence[Workload],
    paths: Paths,
    about: dict[str, Any],
    flags: frozenset[str],
    say: Callable[[str], None],
    *,
    rounds: int,
    block: float,
    saturates: bool,
    earlier: Path | None = None,
    precisions: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the results: JSON. Raises KeyboardInterrupt; what was measured until then is in ``paths.partial()``."""
    key = run_key(about, peers, rounds, block, earlier, precisions)
    results = resumed(paths, key) or {
        "format": FORMAT, "key": key, **about, "threads": THREADS, "rounds": rounds, "block_seconds": block,
        "date": datetime.now(UTC).date().isoformat(), "workloads": {}, "missing": [], "versions": {}, "seconds": 0.0,
    }  # fmt: skip
    if results["workloads"]:
        say(f"going on after {len(results['workloads'])} workloads that an earlier run measured")
    began = time.monotonic() - results["seconds"]
    measured = limits.measure(paths, flags)
    results["limits"] = limits.larger(results["limits"], measured) if "limits" in results else measured
    say(f"limits: {limits_line(results['limits'])}")
    workers = Workers(paths, earlier)
    left = [workload for workload in workloads if workload.name not in results["workloads"]]
    try:
        for number, workload in enumerate(left, 1):
            say(f"[{number}/{len(left)}, {(time.monotonic() - began) / 60:.1f} min] {workload.title}")
            chosen, missing = ready(peers, workload, paths, saturates=saturates, precisions=precisions)
            rows = measure_workload(workload, chosen, workers.start, paths, say, rounds=rounds, block=block)
            results["workloads"][workload.name] = {
                "title": workload.title,
                "kind": workload.kind,
                "rows": rows + missing,
            }
            results["versions"] |= workers.versions
            results["seconds"] = round(time.monotonic() - began, 1)
            save(paths.partial(), results)
    finally:
        workers.end()
    results["limits"] = limits.larger(results["limits"], limits.measure(paths, flags))
    for name, entry in results["workloads"].items():
        entry["least_ms"] = add_fractions(entry["rows"], WORKLOADS[name], results["limits"])
    results["seconds"] = round(time.monotonic() - began, 1)
    return results


def ready(
    peers: Sequence[Peer], workload: Workload, paths: Paths, *, saturates: bool, precisions: Sequence[str]
) -> tuple[list[Job], list[dict[str, Any]]]:
    """Return the jobs whose preparation succeeded, and rows that say why the others are missing."""
    found, missing = [], []
    for job in jobs(peers, [workload.model], saturates=saturates):
        if precisions and job.variant.precision not in precisions:
            continue
        known = state(job, paths)
        if known.get("ok"):
            found.append(job)
            continue
        missing.append(
            {
                "peer": job.peer.name, "title": job.peer.title, "variant": job.variant.name, "label": job.variant.label,
                "precision": job.variant.precision, "ours": job.peer.ours, "failure": known.get("note") or PREPARE,
            }
        )  # fmt: skip
    return found, missing


def run_key(about: dict[str, Any], *settings: Any) -> str:
    """Return a hash of what a run's figures depend on: machine, settings, this project's files and the peers' pins."""
    found = hashlib.sha256(json.dumps(about, sort_keys=True).encode() + repr(settings).encode())
    for folder in (BENCHMARKS / "bench", BENCHMARKS.parent / "runtime", BENCHMARKS.parent / "export"):
        for file in sorted(folder.rglob("*.py")):
            found.update(file.read_bytes())
    return found.hexdigest()[:16]


def resumed(paths: Paths, key: str) -> dict[str, Any] | None:
    """Return what an interrupted run of the same key left."""
    try:
        found: dict[str, Any] = json.loads(paths.partial().read_text())
    except (OSError, ValueError):
        return None
    return found if found.get("key") == key else None


def save(path: Path, results: dict[str, Any]) -> None:
    """Replace a JSON file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def limits_line(found: dict[str, Any]) -> str:
    """Return the limits in words."""
    units = {"read": "GB/s", "fp32": "GFLOP/s", "bf16": "GFLOP/s", "int8": "GOP/s"}
    words = {"read": "memory read", "fp32": "FP32", "bf16": "BF16", "int8": "INT8"}
    return ", ".join(f"{words[kind]} {found[kind]:.0f} {unit}" for kind, unit in units.items() if kind in found)
