"""Prepare what `make bench` times: environments, checkpoints, references, exports, quantised models. Kept by a key."""

from __future__ import annotations

import hashlib
import json
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.checkpoints import checkpoint_key, make_checkpoint, references
from bench.environments import make_environment, python_of
from bench.graphs.names import canonical_graphs
from bench.paths import Paths
from bench.process import WorkerError, WorkerProcess, environment
from bench.registry import ALL, ENCODERS, Peer, Variant
from bench.workloads import WORKLOADS, Workload

TIMEOUT_S = 3600.0  # for one model of one variant
EXPORTING = ("models", "export", "calib")  # packages whose files decide what an export writes
ON_OUR_GRAPHS = {"onnxruntime": ALL, "openvino": (*ENCODERS, "transformer")}  # peers that read the FP32 bundle's graphs
FIND = "from importlib.util import find_spec as f; print(f('transom.{0}').submodule_search_locations[0])"
KERNELS = "from transom.runtime.native.library import status; found = status().library; print(found and found.name)"


@dataclass(frozen=True)
class Job:
    """One variant of one model."""

    peer: Peer
    variant: Variant
    model: str


def jobs(peers: Iterable[Peer], models: Iterable[str], *, saturates: bool) -> Iterator[Job]:
    """Yield the jobs of these models, FP32 of this project first, since others need it."""
    for peer in peers:
        for variant in peer.variants:
            if variant.saturates and not saturates:
                continue
            for model in models:
                if model in variant.models:
                    yield Job(peer, variant, model)


def prepare(
    peers: list[Peer],
    workloads: list[Workload],
    paths: Paths,
    say: Callable[[str], None],
    *,
    saturates: bool,
    precisions: Iterable[str] = (),
    earlier: Path | None = None,
    pip_arguments: list[str] | None = None,
) -> None:
    """Make everything that is missing or older than what it was made from; failures are recorded, not raised."""
    models = list(dict.fromkeys(workload.model for workload in workloads))
    missing = {}
    for peer in peers:
        if peer.requirements:
            say(f"environment of {peer.title}: {', '.join(peer.requirements)}")
            reason = make_environment(peer, paths, pip_arguments or [])
            if reason is not None:
                missing[peer.name] = reason
                say(f"  missing: {reason}")
    for model in models:
        if make_checkpoint(model, paths):
            say(f"checkpoint of {model}")
    for name in references(workloads, paths):
        say(f"PyTorch's outputs of {name}")
    todo = [
        job for job in jobs(peers, models, saturates=saturates) if not precisions or job.variant.precision in precisions
    ]
    for number, job in enumerate(todo, 1):
        name = f"[{number}/{len(todo)}] {job.peer.title}, {job.variant.label}: {job.model}"
        if job.peer.name in missing:
            record(job, paths, key="", ok=False, note=f"not installed: {missing[job.peer.name]}")
            continue
        python = python_of(job.peer, paths, earlier)
        key = key_of(job, paths, python)
        known = state(job, paths)
        if known.get("ok") and known.get("key") == key:
            continue
        began = time.monotonic()
        say(name)
        ok, note = True, ""
        worker = WorkerProcess(job.peer.name, job.variant.name, job.peer.worker_module, python, paths)
        try:
            note = worker.ask(TIMEOUT_S, do="prepare", model=job.model)["note"]
        except WorkerError as error:
            ok, note = False, str(error)
        finally:
            worker.end()
        seconds = time.monotonic() - began
        record(job, paths, key=key, ok=ok, note=note, seconds=seconds)
        say(f"  {seconds:.0f} s" + ("" if ok else f", failed: {note}"))


def record(job: Job, paths: Paths, **facts: Any) -> None:
    path = paths.stamp(job.peer.name, job.variant.name, job.model)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(facts))
    partial.replace(path)


def state(job: Job, paths: Paths) -> dict[str, Any]:
    """Return what was recorded of a job; empty where it was never tried."""
    path = paths.stamp(job.peer.name, job.variant.name, job.model)
    return json.loads(path.read_text()) if path.exists() else {}


def key_of(job: Job, paths: Paths, python: Path) -> str:
    """Return a hash of what a preparation depends on: weights, the peer's module and versions, the exporter."""
    found = hashlib.sha256(checkpoint_key(job.model, paths).encode())
    found.update((Path(__file__).parent / "peers" / f"{job.peer.worker_module}.py").read_bytes())
    found.update(repr(job.peer.requirements).encode())
    if job.peer.name in ("transom", "earlier"):
        found.update(exporter_key(job.peer, paths, python).encode())
    elif job.peer.name in ON_OUR_GRAPHS and job.model in ON_OUR_GRAPHS[job.peer.name]:
        with suppress(OSError):  # the bundle is exported first; without it the preparation says what is missing
            for file in canonical_graphs(job.model, paths).values():
                found.update(file.read_bytes())
    return found.hexdigest()[:16]


_keys: dict[Path, str] = {}


def exporter_key(peer: Peer, paths: Paths, python: Path) -> str:
    """Return a hash of the exporting packages' files in an installation, by its Python."""
    if python not in _keys:
        found = hashlib.sha256()
        for package in EXPORTING:
            done = subprocess.run(
                [str(python), "-P", "-c", FIND.format(package)], capture_output=True, text=True, check=True,
                env=environment(paths, peer.worker_module),
            )  # fmt: skip
            folder = Path(done.stdout.strip())
            for file in sorted(folder.rglob("*.py")):
                found.update(f"{file.relative_to(folder)}".encode() + file.read_bytes())
        found.update(kernels_of(peer, paths, python).encode())
        _keys[python] = found.hexdigest()[:16]
    return _keys[python]


def kernels_of(peer: Peer, paths: Paths, python: Path) -> str:
    """Return the native kernels of an installation, which an export proves its lists with; empty where it has none."""
    done = subprocess.run(
        [str(python), "-P", "-c", KERNELS], capture_output=True, text=True, check=False,
        env=environment(paths, peer.worker_module),
    )  # fmt: skip
    return done.stdout.strip() if done.returncode == 0 else ""


def chosen_workloads(names: Iterable[str], *, everything: bool) -> list[Workload]:
    """Return the workloads whose name has one of ``names``; without names the core ones, or all."""
    wanted = tuple(names)
    if wanted:
        return [workload for workload in WORKLOADS.values() if any(name in workload.name for name in wanted)]
    return [workload for workload in WORKLOADS.values() if workload.core or everything]
