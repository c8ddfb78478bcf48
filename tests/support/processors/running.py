"""Run processes, two at a time, say what runs, and leave none behind."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TypeVar

GRACE_S = 5  # between SIGTERM and SIGKILL

Key = TypeVar("Key")


@dataclass(frozen=True)
class Done:
    """What a process left: its status, what it printed and how long it took; ``late`` if it was ended for that."""

    status: int
    stdout: str
    stderr: str
    seconds: float
    late: bool = False


class Processes:
    """The processes that run now, each in a group of its own, so that what it starts ends with it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._ended = False

    def run(
        self,
        command: Sequence[str | Path],
        *,
        folder: Path,
        variables: Mapping[str, str] | None,
        timeout_s: float,
        shown: bool = False,
    ) -> Done:
        """Run a command to its end; one that takes longer than ``timeout_s`` is ended.

        What it prints on stdout is returned, or ``shown`` as it comes.
        """
        began = time.monotonic()
        with self._lock:
            if self._ended:
                return Done(-signal.SIGTERM, "", "ended before it began", 0.0)
            process = subprocess.Popen(
                [str(word) for word in command],
                cwd=folder,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=None if shown else subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            self._running.add(process)
        late = False
        try:
            try:
                stdout, stderr = process.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                late = True
                end(process)
                stdout, stderr = process.communicate()
        finally:
            with self._lock:
                self._running.discard(process)
        return Done(process.returncode, stdout or "", stderr, time.monotonic() - began, late)

    def end_all(self) -> None:
        """End what runs, and let nothing else begin."""
        with self._lock:
            self._ended = True
            running = list(self._running)
        for process in running:
            end(process)


def end(process: subprocess.Popen[str]) -> None:
    """End a process and its group: SIGTERM, and SIGKILL for what is still there after GRACE_S."""
    send(process, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    send(process, signal.SIGKILL)


def send(process: subprocess.Popen[str], which: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, which)


def run_all(
    jobs: Mapping[Key, Callable[[], Done]], at_a_time: int, processes: Processes
) -> Iterator[tuple[Key, Done | None]]:
    """Run the jobs in their order; yield (key, None) when one begins, and (key, what it left) when it is over.

    Whatever stops this, Ctrl-C or a caller that wants no more, ends ``processes``: the pool would wait for them.
    """
    waiting = list(jobs.items())
    running: dict[Future[Done], Key] = {}
    with ThreadPoolExecutor(at_a_time) as pool:
        try:
            while waiting or running:
                while waiting and len(running) < at_a_time:
                    key, job = waiting.pop(0)
                    yield key, None
                    running[pool.submit(job)] = key
                finished, _ = wait(running, timeout=1, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield running.pop(future), future.result()
        except BaseException:
            processes.end_all()
            raise


@contextmanager
def ended_with(processes: Processes) -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does, and end all processes on the way out."""

    def interrupt(signal_number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        processes.end_all()
        signal.signal(signal.SIGTERM, before)
