"""Builds one engine in a process of its own, or takes it from the cache; turns what went wrong into errors of ours."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transom.export.engine.build_worker import ERROR, GRAPH, JOB, LOG, PLAN
from transom.export.engine.profiles import Profile
from transom.export.engine.targets import Target
from transom.runtime.backends.trt_library import NAMES, library
from transom.runtime.disk_cache import Cache, our_version
from transom.runtime.errors import BackendError, EngineError

KIND = "engines"  # of cache
COSTS = "Every build of the same engine takes as long as the first."
FLAGS = {  # of the builder, the worker goes by them; whatever is set there belongs here, and so into the cache's keys
    "tf32": False,  # both libraries have it on: FP32 would lose 13 of its 24 bits
    "profiling_verbosity": "DETAILED",  # the log lists layers and the nodes in each
}
SUMS = "sha256.json"  # of what lies beside it there
LAST_LINES = 3  # of the log, in the message of a builder that died


@dataclass(frozen=True)
class EngineResult:
    """A serialised engine and the builder's log, by line."""

    plan: bytes
    log: Sequence[str]


def build_engine(
    graph: str, model: bytes, profiles: Sequence[Profile], target: Target, plugins: Sequence[str] = ()
) -> EngineResult:
    """An engine of the ONNX ``model`` for ``target``, with TF32 off and the layers in the log.

    ``graph`` is its name in messages; ``plugins`` are the nodes that have to be plugins of ours. The same model,
    profiles, target and library give the engine that was built before. Raises BackendError where the library is
    missing, EngineError where it cannot build this, or has no room to.
    """
    job = {
        "library": target.library,
        "capability": target.capability,
        "profiles": [{name: list(sizes) for name, sizes in profile.shapes.items()} for profile in profiles],
        "flags": FLAGS,
        **({"plugins": list(plugins)} if plugins else {}),
    }
    key = key_of(model, job, str(library(target.library).__version__))
    kept = Cache(KIND, COSTS) if target.capability is not None else None  # else it depends on the GPU here
    found = kept_engine(kept, key) if kept is not None else None
    if found is not None:
        return found
    try:
        with tempfile.TemporaryDirectory(prefix="transom-engine-") as made:
            folder = Path(made)
            (folder / JOB).write_text(json.dumps(job))
            (folder / GRAPH).write_bytes(model)
            run_worker(folder, graph, target)
            built = read(folder)
    except OSError as error:
        raise EngineError(
            f"the graph {graph!r} cannot be built for {target.name} in {tempfile.gettempdir()}: "
            f"{error.strerror or error}. Free some space there, or set TMPDIR to another folder."
        ) from error
    if kept is not None:
        keep(kept, key, built)
    return built


def key_of(model: bytes, job: Mapping[str, Any], version: str) -> str:
    """SHA-256, in hex, of all that decides what is built: model, shapes, flags, versions of library and tools."""
    tools = {"transom": our_version(), "polygraphy": importlib.metadata.version("polygraphy"), "library": version}
    return hashlib.sha256(json.dumps([job, tools], sort_keys=True).encode() + model).hexdigest()


def run_worker(folder: Path, graph: str, target: Target) -> None:
    """The worker's process from its start to its end; whatever ends this one ends it as well."""
    command = [sys.executable, "-m", "transom.export.engine.build_worker", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            _, said = process.communicate()
        except BaseException:
            process.kill()
            process.wait()  # it writes into a folder that is removed next
            raise
    if process.returncode != 0:
        raise failure(folder, graph, target, process.returncode, said)


def failure(folder: Path, graph: str, target: Target, status: int, said: str) -> Exception:
    path = folder / ERROR
    wrong: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    message = str(wrong.get("message", ""))
    if wrong.get("kind") == "library":
        return BackendError(message)
    what = f"{NAMES[target.library]} cannot"
    if wrong.get("kind") == "parse":
        return EngineError(
            f"{what} read the node {wrong.get('node')!r} ({wrong.get('operator')}) of the graph {graph!r}: {message} "
            "Export the bundle again, or use it with device='cpu' or 'cuda'."
        )
    if wrong.get("kind") == "plugin":
        told = message.rstrip(". ") + "."
        advice = "" if "--no-plugin" in told else " Build with --no-plugin, where it is written out, and report this."
        return EngineError(f"{what} build the graph {graph!r} for {target.name} with our attention: {told}{advice}")
    if not wrong:
        last = " ".join([*lines_of(folder / LOG)[-LAST_LINES:], *said.split()[-40:]])
        message = f"its process ended with status {status}: {last:.400}"
    reasons = [line for line in lines_of(folder / LOG) if "Error Code" in line]
    return EngineError(
        f"{what} build the graph {graph!r} for {target.name}: {(reasons or [message])[-1]:.500}. "
        "Free memory, try another --target, or another --precision."
    )


def read(folder: Path) -> EngineResult:
    return EngineResult((folder / PLAN).read_bytes(), lines_of(folder / LOG))


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


def kept_engine(kept: Cache, key: str) -> EngineResult | None:
    """What the cache has under this key; None where there is nothing, or not what was put there."""
    folder = kept.entry(key)
    try:
        if folder is None:
            return None
        sums = json.loads((folder / SUMS).read_text())
        if sums == {name: digest(folder / name) for name in (PLAN, LOG)}:
            kept.used(key)
            return read(folder)
    except (OSError, ValueError):
        return None
    return None


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def keep(kept: Cache, key: str, built: EngineResult) -> None:
    """Into the cache, with what tells whether it is still the same."""

    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / PLAN).write_bytes(built.plan)
        (folder / LOG).write_text("\n".join(built.log), encoding="utf-8")
        (folder / SUMS).write_text(json.dumps({name: digest(folder / name) for name in (PLAN, LOG)}))

    kept.add(key, write)
