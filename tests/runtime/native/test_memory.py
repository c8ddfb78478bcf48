"""Memory of the native library: pages that are made ready before they are written."""

from __future__ import annotations

import mmap
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from transom.runtime.errors import BackendError
from transom.runtime.native import memory
from transom.runtime.native.memory import ALIGNMENT, LARGE_PAGE, Memory

SIZE = 4 * LARGE_PAGE + 100
LARGE, SMALL = "hg", "nh"  # flags of a mapping in /proc/self/smaps


def flags_of(address: int) -> list[str]:
    """Return the flags of the mapping that has an address."""
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, end = (int(each, 16) for each in first.split("-"))
            here = start <= address < end
        elif here and first == "VmFlags:":
            return line.split()[1:]
    raise AssertionError(f"{address:x} is not mapped")


def kilobytes_of(address: int, field: str) -> int:
    """Return a field of the mapping that begins at an address, as /proc/self/smaps has it."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    place = next(index for index, line in enumerate(lines) if line.startswith(f"{address:x}-"))
    return int(next(line for line in lines[place:] if line.startswith(f"{field}:")).split()[1])


def large_pages() -> bool:
    return sys.platform == "linux" and Path("/sys/kernel/mm/transparent_hugepage").is_dir()


with_large_pages = pytest.mark.skipif(not large_pages(), reason="this system has no large pages to ask for")


@pytest.mark.parametrize("size", [0, 1, 63, 4096, SIZE])
def test_memory_begins_as_zeros_at_its_alignment(size: int) -> None:
    made = Memory(size)
    assert (made.size, len(made.bytes), made.address % ALIGNMENT) == (size, size, 0)
    assert not made.bytes.any()


def test_what_cannot_be_had_is_an_error() -> None:
    with pytest.raises(BackendError, match="no memory for 4611686018427387904 bytes"):
        Memory(1 << 62)


def test_preparing_changes_no_byte() -> None:
    made = Memory(SIZE)
    made.bytes[:] = np.arange(SIZE, dtype=np.uint32).astype(np.uint8)
    before = made.bytes.copy()
    for offset, size in ((0, SIZE), (5, SIZE - 5), (LARGE_PAGE - 1, LARGE_PAGE + 2), (SIZE - 1, 1), (7, 0)):
        made.prepare(offset, size)
    np.testing.assert_array_equal(made.bytes, before)


def clock(step: float) -> Iterator[float]:
    """Give times that lie ``step`` seconds apart."""
    now = 0.0
    while True:
        yield now
        now += step


@with_large_pages
@pytest.mark.parametrize(("seconds", "flag"), [(0.0009, LARGE), (0.0011, SMALL)])
def test_large_pages_are_taken_while_one_takes_at_most_a_millisecond(
    seconds: float, flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Memory(SIZE)
    assert LARGE in flags_of(made.address)
    times = clock(seconds)
    monkeypatch.setattr(time, "thread_time", lambda: next(times))
    made.prepare(0, SIZE)
    assert flag in flags_of(made.address)


@with_large_pages
def test_small_pages_become_large_ones_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """SIZE is a little more than 4 large pages: 3 or 4 of them lie in it whole."""
    made = Memory(SIZE)
    times = clock(1.0)
    with monkeypatch.context() as patch:
        patch.setattr(time, "thread_time", lambda: next(times))
        made.prepare(0, SIZE)
    made.bytes[:] = np.arange(SIZE, dtype=np.uint32).astype(np.uint8)
    before = made.bytes.copy()
    large = kilobytes_of(made.address, "AnonHugePages")
    thread = made.enlarge()
    assert thread is not None
    thread.join()
    np.testing.assert_array_equal(made.bytes, before)
    start = -(-made.address // LARGE_PAGE) * LARGE_PAGE
    if memory.MADVISE(start, LARGE_PAGE, memory.COLLAPSE):
        pytest.skip("this kernel has no MADV_COLLAPSE, or no large page to give")
    whole = (made.address + SIZE - start) // LARGE_PAGE
    assert kilobytes_of(made.address, "AnonHugePages") == whole * 2048 >= large


def test_memory_in_large_pages_needs_no_thread() -> None:
    assert Memory(100).enlarge() is None
    if large_pages():
        assert Memory(SIZE).enlarge() is None


def test_memory_is_freed_while_its_pages_are_made_large() -> None:
    made = Memory(SIZE)
    gone = weakref.ref(made)
    address, size = made.address, made.size
    del made
    memory.enlarge(gone, address, size)  # touches nothing: it returns


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such call")
def test_pages_are_there_before_they_are_written() -> None:
    """Where the kernel has the call: Linux 5.14 and later."""
    tried, made = Memory(1 << 20), Memory(1 << 20)
    if memory.MADVISE(tried.address, 1, memory.POPULATE_WRITE):
        pytest.skip("this kernel has no MADV_POPULATE_WRITE")
    place = slice((1 << 18) // mmap.PAGESIZE, (1 << 19) // mmap.PAGESIZE)
    assert not pages_there(made)[place].any()
    made.prepare(1 << 18, 1 << 18)
    assert pages_there(made)[place].all()


def pages_there(made: Memory) -> NDArray[np.bool_]:
    """Return which pages the system has given; a line of smaps may hold a neighbour's as well."""
    with Path("/proc/self/pagemap").open("rb") as file:
        file.seek(8 * (made.address // mmap.PAGESIZE))
        entries = np.frombuffer(file.read(8 * made.size // mmap.PAGESIZE), np.uint64)
    return entries >> np.uint64(63) == 1


def test_a_system_without_the_call_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MADVISE", None)
    made = Memory(SIZE)
    made.prepare(0, SIZE)
    assert not made.bytes.any()
