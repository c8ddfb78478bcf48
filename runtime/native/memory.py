"""Take memory for the native library: aligned, of its own, in large pages where the system has them."""

from __future__ import annotations

import ctypes
import mmap
import sys
import time
import weakref
from contextlib import suppress
from threading import Thread
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.runtime.errors import BackendError
from transom.runtime.process_bound import ProcessBound

ALIGNMENT = 64  # bytes: a line of the processor's caches, and its widest vector
LARGE_PAGE = 2 << 20  # bytes, of x86 and of most Arm systems
POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, of Linux 5.14 and later
COLLAPSE = 25  # MADV_COLLAPSE, of Linux 6.1 and later
WORTH_IT = 1 << 16  # bytes that are made ready by a call; to touch fewer costs no more than that
LARGE_PAGE_SECONDS = 1e-3  # of processor time that one may take; to touch as much in small pages takes that


def aligned(size: int) -> int:
    """Return the size rounded up to ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class Memory(ProcessBound):
    """Bytes that begin as zeros at a multiple of ALIGNMENT, freed with the last reference to this or to a view.

    Raises BackendError where the system has none left.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        try:
            # Private: Python's default would share it with child processes, and then it is never in large pages.
            self._map = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self.bytes: NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)[:size]
        except (OSError, ValueError, OverflowError, MemoryError):
            raise BackendError(
                f"there is no memory for {size} bytes of weights or activations. Give fewer or shorter inputs, or "
                "close other programs."
            ) from None
        self._large = False  # whether pages not touched yet will be large ones
        if size >= LARGE_PAGE:
            with suppress(OSError, AttributeError, ValueError):  # a kernel without them
                self._map.madvise(mmap.MADV_HUGEPAGE)
                self._large = True
        self.address = int(np.frombuffer(self._map, np.uint8).ctypes.data)

    def prepare(self, offset: int, size: int) -> None:
        """Have the system give pages for bytes that will be written: less work than page by page as they are touched.

        Large pages take a quarter of the time of small ones, or, where a virtual machine's host has to find the memory
        first, five times as much: then the rest comes in small ones, of which the system has those that were freed.
        """
        if MADVISE is None or size < WORTH_IT:
            return
        end = offset + size
        for first in range(offset // mmap.PAGESIZE * mmap.PAGESIZE, end, LARGE_PAGE):
            length = min(LARGE_PAGE, end - first)
            begun = time.thread_time()
            MADVISE(self.address + first, length, POPULATE_WRITE)  # may fail: pages then come as they are touched
            if self._large and time.thread_time() - begun > LARGE_PAGE_SECONDS:
                self._large = False
                with suppress(OSError, ValueError):
                    self._map.madvise(mmap.MADV_NOHUGEPAGE)

    def enlarge(self) -> Thread | None:
        """Make large pages of the small ones that came instead, in a thread of its own; return it, None where none did.

        Products read large pages some 3 % faster, as long as the process runs; they may be read and written meanwhile.
        """
        if MADVISE is None or self._large or self.size < LARGE_PAGE:
            return None
        with suppress(OSError, ValueError):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        thread = Thread(
            target=enlarge, args=(weakref.ref(self), self.address, self.size), name="transom-pages", daemon=True
        )
        thread.start()
        return thread

    def view(self, offset: int, size: int) -> NDArray[np.uint8]:
        """Return a view of ``size`` bytes from ``offset`` on."""
        return self.bytes[offset : offset + size]


def enlarge(memory: weakref.ref[Memory], address: int, size: int) -> None:
    """Make one large page after another, until all are or the memory is gone.

    The memory is not held meanwhile: where it is freed during a call, the system refuses what is no longer there.
    """
    first = -(-address // LARGE_PAGE) * LARGE_PAGE
    for start in range(first, address + size - LARGE_PAGE + 1, LARGE_PAGE):
        if memory() is None or MADVISE(start, LARGE_PAGE, COLLAPSE):
            return  # no memory, or an older kernel


def madvise() -> Any:
    """Return the C library's madvise, which unlike that of ``mmap`` lets other threads run; None but on Linux."""
    if sys.platform != "linux":
        return None
    found = ctypes.CDLL(None).madvise
    found.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return found


MADVISE = madvise()


def address_of(array: NDArray[Any] | None) -> int | None:
    """Return where an array's data lies; None for none."""
    return None if array is None else int(array.ctypes.data)


def aligned_floats(values: NDArray[Any]) -> NDArray[np.float32]:
    """Return a copy in float32 at a multiple of ALIGNMENT, one axis."""
    room = np.zeros(values.size + ALIGNMENT // 4, np.float32)
    start = -(room.ctypes.data % ALIGNMENT) % ALIGNMENT // 4
    found = room[start : start + values.size]
    found[:] = values.reshape(-1)
    return found
