"""Keep other processes busy with a bundle's work while something is measured, as other replicas of a machine are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import Any

from transom.runtime.capacity.service_times import work_of
from transom.runtime.errors import BackendError, TransomError, one_line
from transom.runtime.loading import load
from transom.runtime.progress import Progress, silent

READY = "ready"
CODE = "from transom.runtime.capacity.neighbours import keep_busy; keep_busy()"
PATIENCE_S = 10  # for a process to end by itself


@contextmanager
def neighbours(
    count: int,
    path: str | PathLike[str],
    shape: Mapping[str, int],
    options: Mapping[str, Any],
    device: str = "cpu",
    threads: int | None = None,
    progress: Progress = silent,
) -> Iterator[None]:
    """Run ``count`` processes that answer batches without a pause, from the start of the block to its end.

    ``shape`` and ``options`` are those of ``work_of``. Raises BackendError where one of them does not start.
    """
    work = {"path": os.fspath(path), "shape": dict(shape), "options": dict(options)}
    said = json.dumps({**work, "device": device, "threads": threads})
    started: list[subprocess.Popen[str]] = []
    try:
        for _ in range(count):
            started.append(
                subprocess.Popen(
                    [sys.executable, "-P", "-c", CODE, said],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    text=True,
                )
            )
        for done, process in enumerate(started):
            progress("starting other replicas", done, count)
            answer = process.stdout.readline().strip() if process.stdout else ""
            if answer != READY:
                raise BackendError(f"another replica did not start: {answer or 'it ended without a word'}")
        yield
    finally:
        for process in started:
            end(process)


def end(process: subprocess.Popen[str]) -> None:
    """End a process of ``keep_busy``: it sees its stdin close; one that does not is killed."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    try:
        process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def keep_busy() -> None:
    """Answer batches of every size in turn until stdin closes, or the process that holds its other end is gone."""
    said = json.loads(sys.argv[1])
    try:
        with load(said["path"], said["device"], said["threads"]) as loaded:
            calls = work_of(loaded, said["shape"], **said["options"]).calls
            next(iter(calls.values()))()
            print(READY, flush=True)
            threading.Thread(target=end_with_stdin, daemon=True).start()
            while True:
                for call in calls.values():
                    call()
    except TransomError as error:
        print(one_line(error), flush=True)


def end_with_stdin() -> None:
    """End this process, whatever its other threads do, when stdin closes."""
    sys.stdin.read()
    os._exit(0)
