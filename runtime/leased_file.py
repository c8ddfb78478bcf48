"""Keep a file from changing while it is read: Linux's read leases.

The kernel grants a read lease to who owns the file while nobody has it open for writing, through a mapping either.
Who then opens it for writing, or cuts it, waits until the lease is given back, or for /proc/sys/fs/lease-break-time.
"""

from __future__ import annotations

import io
import mmap
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

# Those that every writer to a file goes through. On others a lease may not see what another machine or program writes.
FILE_SYSTEMS = {"ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "tmpfs", "overlay"}


class LeasedFile:
    """An open file under a lease. ``compare`` raises where its bytes are not the expected ones, in another thread."""

    def __init__(self, source: io.FileIO, compare: Callable[[], None]) -> None:
        self.descriptor = source.fileno()
        self._source = source
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="transom-verify")
        self._compared = self._pool.submit(compare)

    def wait(self) -> None:
        """Wait for the comparison, and raise what it raised."""
        self._compared.result()

    def held(self) -> bool:
        """Return whether nothing could change the file up to now; False as soon as a writer waits."""
        return is_leased(self.descriptor)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer with the bytes from ``offset`` on. Raises EOFError where the file is shorter."""
        while len(buffer):
            count = os.preadv(self.descriptor, [buffer], offset)
            if not count:
                raise EOFError
            buffer, offset = buffer[count:], offset + count

    def window(self, offset: int, size: int) -> memoryview:
        """Return ``size`` bytes from ``offset`` on, mapped, as ``mapped`` does."""
        return mapped(self.descriptor, offset, size)

    def close(self) -> None:
        """Give the lease back and close the file."""
        import fcntl

        self._pool.shutdown()
        # A child that was forked meanwhile has the file open as well: closing it here would not end the lease.
        with self._source, suppress(OSError):  # the kernel has ended it
            fcntl.fcntl(self.descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)


def take_lease(descriptor: int) -> bool:
    """Take a read lease on a file that is open for reading; return whether it was granted.

    The kernel tells the owner of a descriptor by a signal that somebody waits, and SIGIO ends a process. The owner is
    nobody; until that is set, the signal is one that does nothing.
    """
    if sys.platform != "linux" or file_system(descriptor) not in FILE_SYSTEMS:
        return False
    import fcntl
    import signal

    try:
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETOWN, 0)
    except OSError:  # another's file, open for writing, or no leases here
        return False
    return True


def is_leased(descriptor: int) -> bool:
    """Return whether a descriptor's file is under a read lease that nobody waits for."""
    import fcntl

    return fcntl.fcntl(descriptor, fcntl.F_GETLEASE) == fcntl.F_RDLCK


def mapped(descriptor: int, offset: int, size: int) -> memoryview:
    """Return ``size`` bytes from ``offset`` on as the system's cache has them, freed with the last reference.

    Whoever cuts a file waits for its lease, but not for ever, and to read a mapping beyond the end ends the process:
    see that the lease is held, map what is read at once, and forget it. Raises EOFError where the file is shorter.
    """
    before = offset % mmap.ALLOCATIONGRANULARITY
    try:
        found = mmap.mmap(descriptor, before + size, access=mmap.ACCESS_READ, offset=offset - before)
    except ValueError:
        raise EOFError from None
    return memoryview(found)[before:]


def file_system(descriptor: int) -> str | None:
    """Return the type of the file system that a descriptor's file lies on, as /proc/self/mountinfo names it."""
    try:
        about = dict(line.split(":\t") for line in Path(f"/proc/self/fdinfo/{descriptor}").read_text().splitlines()[:4])
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            if line.split()[0] == about["mnt_id"]:
                return line.partition(" - ")[2].split()[0]
    except (OSError, ValueError, KeyError, IndexError):
        pass
    return None
