"""Test that other processes work while something is measured, and that none outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from paths import KEPT
from time_limits import PATIENCE_S
from transom.runtime.capacity.neighbours import neighbours
from transom.runtime.errors import BackendError

BERT, GPT = KEPT / "bert-fp32", KEPT / "gpt-fp32"


def test_as_many_processes_work_as_were_asked_for_and_end_with_the_block() -> None:
    before = children(os.getpid())
    said: list[tuple[str, int, int]] = []
    with neighbours(2, GPT, {"S": 3}, {"new_tokens": 3}, threads=1, progress=lambda *words: said.append(words)):
        started = children(os.getpid()) - before
        assert len(started) == 2
    assert children(os.getpid()) - before == set()
    assert said == [("starting other replicas", 0, 2), ("starting other replicas", 1, 2)]


def test_none_is_started_where_none_is_asked_for() -> None:
    before = children(os.getpid())
    with neighbours(0, "no bundle", {}, {}):
        assert children(os.getpid()) == before


def test_an_error_in_the_block_ends_them_too() -> None:
    before = children(os.getpid())
    with pytest.raises(ZeroDivisionError), neighbours(1, BERT, {}, {}, threads=1):
        raise ZeroDivisionError
    assert children(os.getpid()) - before == set()


def test_one_that_cannot_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(BackendError, match=r"another replica did not start: .* has no bundle\.json"),
        neighbours(1, tmp_path, {}, {}),
    ):
        pass


def test_they_end_when_the_process_that_started_them_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from transom.runtime.capacity.neighbours import neighbours\n"
        "with neighbours(1, sys.argv[1], {}, {}, threads=1):\n"
        "    print('in it', flush=True)\n"
        "    time.sleep(1000)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(BERT)], cwd=tmp_path, stdout=subprocess.PIPE) as killed:
        assert killed.stdout is not None
        assert killed.stdout.readline() == b"in it\n"
        (left,) = children(killed.pid)
        os.kill(killed.pid, signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE_S
    while is_running(left):
        assert time.monotonic() < deadline, f"process {left} is still there"
        time.sleep(0.05)


def children(pid: int) -> set[int]:
    """The processes that a process started and that are still running."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        if parent_of(int(path.name)) == pid and is_running(int(path.name)):
            found.add(int(path.name))
    return found


def parent_of(pid: int) -> int | None:
    fields = fields_of(pid)
    return int(fields[1]) if fields else None


def is_running(pid: int) -> bool:
    """False where the process is gone, or a zombie that nothing has waited for."""
    fields = fields_of(pid)
    return bool(fields) and fields[0] != "Z"


def fields_of(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state on; none where the process is gone."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return status.rpartition(")")[2].split()
