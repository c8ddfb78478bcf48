"""Try an instruction set of the native library in a child process before this one runs it."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path

from transom.runtime.disk_cache import Cache
from transom.runtime.host import cpu_flags, cpu_name
from transom.runtime.native.dry_call import WRONG
from transom.runtime.native.records import ISA_NAMES

DRY_CALL = Path(__file__).with_name("dry_call.py")
TIMEOUT_S = 60  # 50 ms where nothing else runs
RIGHT = "right"  # the result of kernels that can be used


def why_not_trusted(path: Path, isa: int) -> str | None:
    """Return why the kernels of an instruction set cannot be used here, None where they can.

    What a child process found is kept: that its calls were right, that they were not, or which signal ended it. What
    may be otherwise the next time is not: a child that could not be started, or that was too slow.
    """
    cache = Cache("native", "Each process that loads a bundle tries the native kernels anew, in 50 ms.")
    key = result_key(path, isa)
    kept = kept_result(cache, key)
    if kept is not None:
        return None if kept == RIGHT else kept
    result, lasting = dry_call(path, isa)
    if lasting:
        cache.add(key, lambda entry: entry.write_text(json.dumps({"result": result})))
    return None if result == RIGHT else result


def result_key(path: Path, isa: int) -> str:
    """Return a key of the library's bytes, the dry call's, and the processor."""
    found = hashlib.sha256()
    for part in (path.read_bytes(), DRY_CALL.read_bytes(), cpu_name().encode(), " ".join(sorted(cpu_flags())).encode()):
        found.update(hashlib.sha256(part).digest())
    return f"{ISA_NAMES[isa]}-{found.hexdigest()}"


def kept_result(cache: Cache, key: str) -> str | None:
    """Return a result from the cache; None where none was written to its end."""
    entry = cache.entry(key)
    if entry is None:
        return None
    try:
        result = json.loads(entry.read_text("utf-8"))["result"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    cache.used(key)
    return result if isinstance(result, str) else None


def dry_call(path: Path, isa: int) -> tuple[str, bool]:
    """Call every kernel in a child process: RIGHT or what is wrong, and whether that will be so the next time."""
    if not sys.executable or getattr(sys, "frozen", False):
        return "there is no Python interpreter to try them in: sys.executable is not one", False
    start = f"import sys; sys.path.append({str(DRY_CALL.parent)!r}); import dry_call; dry_call.main()"
    command = [sys.executable, "-I", "-S", "-c", start, str(path.resolve()), str(isa)]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"they could not be tried: {error}", False
    if done.returncode == 0:
        return RIGHT, True
    if done.returncode > 0:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        return f"the dry call failed: {said}", done.returncode == WRONG
    try:
        name = signal.Signals(-done.returncode).name
    except ValueError:
        name = f"signal {-done.returncode}"
    # Others than the processor's may come from outside: a system that runs out of memory kills.
    lasting = name in ("SIGILL", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGTRAP")
    return f"the dry call died of {name}: this processor does not execute what it claims to have", lasting
