"""Test the pool of threads: many callers at once, what each of them gets, and a child after fork."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from native_kernels import Case
from time_limits import PATIENCE_S
from transom.runtime.native.library import NativeLibrary
from transom.runtime.native.records import NONE, TOKENS, Select

ROWS, COLUMNS = 256, 1024  # 16 tasks of 16 rows


def copied(kernels: NativeLibrary, threads: int, seed: int) -> bool:
    """Whether rows come out as they went in: each task was done, by whichever thread."""
    rows = np.random.default_rng(seed).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    case = Case(kernels, threads=threads)
    select = Select(rows=TOKENS, input=case.slot(rows), index=NONE, columns=COLUMNS)
    select.then = case.then(out=case.out(rows.shape))
    case.run(*[select] * 20, tokens=ROWS)
    return bool((case[select.then.out] == rows).all())


def workers() -> int:
    """Threads of the pool in this process, by their name."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return names.count("transom")


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_every_task_is_done_once(plain_kernels: NativeLibrary, threads: int) -> None:
    assert copied(plain_kernels, threads, seed=threads)


def test_many_callers_share_the_pool(plain_kernels: NativeLibrary) -> None:
    """12 at once, of 1 to 4 threads each: those that find no idle worker do all their tasks themselves."""
    barrier = threading.Barrier(12)

    def call(seed: int) -> bool:
        barrier.wait(PATIENCE_S)
        return all(copied(plain_kernels, 1 + seed % 4, seed * 1000 + turn) for turn in range(10))

    with ThreadPoolExecutor(12) as callers:
        assert all(callers.map(call, range(12)))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="this system does not list threads")
def test_the_pool_is_as_large_as_the_largest_run_wants(plain_kernels: NativeLibrary) -> None:
    """Two callers of 9 threads share 8 workers; runs of one thread make none."""
    before = workers()
    copied(plain_kernels, 1, seed=0)
    assert workers() == before
    with ThreadPoolExecutor(2) as callers:
        assert all(callers.map(lambda seed: copied(plain_kernels, 9, seed), range(4)))
    assert workers() == max(before, 8)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_after_fork_has_a_pool_of_its_own(plain_kernels: NativeLibrary) -> None:
    """A parent that has used three threads forks; the child uses three, and so does the parent afterwards."""
    code = f"""
import os, sys
sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}
from pathlib import Path
from test_threads import copied, workers
from transom.runtime.native.library import open_library
kernels = open_library(Path({str(plain_kernels.path)!r}))
assert copied(kernels, 3, seed=1) and workers() == 2
child = os.fork()
if child == 0:
    os._exit(0 if workers() == 0 and copied(kernels, 3, seed=2) and workers() == 2 else 9)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert copied(kernels, 3, seed=3) and workers() == 2
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("threads", [0, -3, 2**31 - 1])
def test_any_number_of_threads_is_taken(plain_kernels: NativeLibrary, threads: int) -> None:
    """None and fewer mean the caller's own; there are never more than tasks."""
    assert copied(plain_kernels, threads, seed=5)
