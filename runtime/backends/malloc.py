"""Have glibc give memory back to the system: large blocks while a session is made, and what is free when asked."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of glibc's malloc.h
LARGE = 1 << 20  # bytes; a weight of less is noise
# Where glibc ends by itself in a process that has freed blocks of any size: DEFAULT_MMAP_THRESHOLD_MAX on 64 bits, and
# twice that to trim.
USUAL = {MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: 64 << 20}
SET_BY_USER = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")

_lock = threading.Lock()
_users = 0


@contextmanager
def large_blocks_apart() -> Iterator[None]:
    """Take blocks of LARGE bytes and more from the system one by one, and return each when it is freed.

    glibc raises its threshold for that with each large block that is freed. A session frees each weight once it has a
    packed copy, and the holes that these leave in the heap fit none of the next: a quarter of the peak, and of what
    stays. Afterwards the thresholds are those that glibc would have raised them to. Does nothing without glibc, and
    where the environment sets thresholds.
    """
    global _users
    set_threshold = mallopt()
    if set_threshold is None:
        yield
        return
    with _lock:
        _users += 1
        set_threshold(MMAP_THRESHOLD, LARGE)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                for name, size in USUAL.items():
                    set_threshold(name, size)


def trim() -> None:
    """Return the free memory of the heap to the system, wherever it lies in it; do nothing without glibc."""
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda kept: None)(0)


@cache
def mallopt() -> Any:
    """Return glibc's ``mallopt``; None where there is none or the user has set what it would."""
    if any(name in os.environ for name in SET_BY_USER):
        return None
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018 - AttributeError elsewhere
        return library.mallopt
    except (OSError, TypeError, AttributeError):  # TypeError: Windows
        return None
