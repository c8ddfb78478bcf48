"""Build one engine in a process of its own, or take it from the cache; turn its failures into Transom's errors."""

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
FLAGS = {  # of the builder, applied by the worker; every setting belongs here, as part of the cache's keys
    "tf32": False,  # on by default in both libraries: FP32 would lose 13 of its 24 bits
    "profiling_verbosity": "DETAILED",  # the log lists layers and the nodes in each
}
HASHES = "sha256.json"  # of the other files of an entry
LAST_LINES = 3  # of the log, in the message about a process that died


@dataclass(frozen=True)
class EngineResult:
    """A serialised engine and the builder's log, by line."""

    plan: bytes
    log: Sequence[str]


def build_engine(
    graph: str, model: bytes, profiles: Sequence[Profile], target: Target, plugins: Sequence[str] = ()
) -> EngineResult:
    """Build an engine of the ONNX ``model`` for ``target``, with TF32 off and the layers in the log.

    ``graph`` is its name in messages; ``plugins`` are the nodes that have to be Transom's plugins. The same model,
    profiles, target and library return the cached engine. Raises BackendError where the library is missing,
    EngineError where it cannot build the graph, or has no space to.
    """
    job = {
        "library": target.library,
        "capability": target.capability,
        "profiles": [{name: list(sizes) for name, sizes in profile.shapes.items()} for profile in profiles],
        "flags": FLAGS,
        **({"plugins": list(plugins)} if plugins else {}),
    }
    key = key_of(model, job, str(library(target.library).__version__))
    cache = Cache(KIND, COSTS) if target.capability is not None else None  # else it depends on the GPU present
    cached = cached_engine(cache, key) if cache is not None else None
    if cached is not None:
        return cached
    try:
        with tempfile.TemporaryDirectory(prefix="transom-engine-") as temporary:
            folder = Path(temporary)
            (folder / JOB).write_text(json.dumps(job))
            (folder / GRAPH).write_bytes(model)
            run_worker(folder, graph, target)
            result = read_result(folder)
    except OSError as error:
        raise EngineError(
            f"the graph {graph!r} cannot be built for {target.name} in {tempfile.gettempdir()}: "
            f"{error.strerror or error}. Free some space there, or set TMPDIR to another folder."
        ) from error
    if cache is not None:
        store(cache, key, result)
    return result


def key_of(model: bytes, job: Mapping[str, Any], version: str) -> str:
    """Return the SHA-256, in hex, of all that determines an engine: model, job, versions of library and tools."""
    tools = {"transom": our_version(), "polygraphy": importlib.metadata.version("polygraphy"), "library": version}
    return hashlib.sha256(json.dumps([job, tools], sort_keys=True).encode() + model).hexdigest()


def run_worker(folder: Path, graph: str, target: Target) -> None:
    """Run the worker's process to its end; an exception here, an interrupt too, kills it."""
    command = [sys.executable, "-m", "transom.export.engine.build_worker", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            _, stderr = process.communicate()
        except BaseException:
            process.kill()
            process.wait()  # it writes into a folder that is removed next
            raise
    if process.returncode != 0:
        raise failure(folder, graph, target, process.returncode, stderr)


def failure(folder: Path, graph: str, target: Target, status: int, stderr: str) -> Exception:
    """Return the error for a worker that failed, by its error.json, else by its last lines."""
    path = folder / ERROR
    problem: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    message = str(problem.get("message", ""))
    if problem.get("kind") == "library":
        return BackendError(message)
    what = f"{NAMES[target.library]} cannot"
    if problem.get("kind") == "parse":
        return EngineError(
            f"{what} read the node {problem.get('node')!r} ({problem.get('operator')}) of the graph {graph!r}: "
            f"{message} Export the bundle again, or use it with device='cpu' or 'cuda'."
        )
    if problem.get("kind") == "plugin":
        reason = message.rstrip(". ") + "."
        advice = "" if "--no-plugin" in reason else " Build with --no-plugin, and report this."
        return EngineError(f"{what} build the graph {graph!r} for {target.name} with our attention: {reason}{advice}")
    if not problem:
        last = " ".join([*lines_of(folder / LOG)[-LAST_LINES:], *stderr.split()[-40:]])
        message = f"its process ended with status {status}: {last:.400}"
    reasons = [line for line in lines_of(folder / LOG) if "Error Code" in line]
    return EngineError(
        f"{what} build the graph {graph!r} for {target.name}: {(reasons or [message])[-1]:.500}. "
        "Free memory, try another --target, or another --precision."
    )


def read_result(folder: Path) -> EngineResult:
    return EngineResult((folder / PLAN).read_bytes(), lines_of(folder / LOG))


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


def cached_engine(cache: Cache, key: str) -> EngineResult | None:
    """Return the cache's engine under this key; None where there is none, or its files were changed."""
    folder = cache.entry(key)
    try:
        if folder is None:
            return None
        hashes = json.loads((folder / HASHES).read_text())
        if hashes == {name: digest(folder / name) for name in (PLAN, LOG)}:
            cache.used(key)
            return read_result(folder)
    except (OSError, ValueError):
        return None
    return None


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def store(cache: Cache, key: str, result: EngineResult) -> None:
    """Put an engine into the cache, with the hashes of its files."""

    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / PLAN).write_bytes(result.plan)
        (folder / LOG).write_text("\n".join(result.log), encoding="utf-8")
        (folder / HASHES).write_text(json.dumps({name: digest(folder / name) for name in (PLAN, LOG)}))

    cache.add(key, write)
