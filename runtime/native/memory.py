"""Take memory for the native library: aligned, of its own, in large pages where the system has them."""

from __future__ import annotations

import mmap
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.runtime.errors import BackendError
from transom.runtime.process_bound import ProcessBound

ALIGNMENT = 64  # bytes: a line of the processor's caches, and its widest vector
LARGE_PAGE = 2 << 20  # bytes, of x86 and of most Arm systems


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
        if size >= LARGE_PAGE:
            with suppress(OSError, AttributeError, ValueError):  # a kernel without them
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self.address = int(np.frombuffer(self._map, np.uint8).ctypes.data)

    def view(self, offset: int, size: int) -> NDArray[np.uint8]:
        """Return a view of ``size`` bytes from ``offset`` on."""
        return self.bytes[offset : offset + size]


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
