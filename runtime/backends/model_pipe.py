"""Give ONNX Runtime a model through a pipe, so that no copy of it has to be in memory."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TypeVar

PIPES = "/proc/self/fd"  # whose entries are opened like files; Linux's alone are opened anew, each with its own end
CAPACITY = 1 << 20  # bytes, the most that Linux gives to everybody
SET_CAPACITY = 1031  # F_SETPIPE_SZ of linux/fcntl.h
FULL_S = 3e-4  # until a full pipe is looked at again: the library empties it in about 1 ms
NO_FIELD = b"\x07"  # wire type 7, which Protocol Buffers do not have: no message goes on or ends with it

Session = TypeVar("Session")

_ends: set[int] = set()  # of pipes that a child process must not keep open: writer and reader would wait for it


def can_pipe() -> bool:
    """Return whether a pipe can be opened by a path here."""
    return sys.platform == "linux" and os.path.isdir(PIPES)


def session_from_parts(parts: Iterator[bytes | memoryview], make: Callable[[str], Session]) -> Session | None:
    """Return what ``make`` makes of a path, from which it reads the concatenated ``parts``.

    ``make`` must release the interpreter's lock while it reads: another thread writes. None where it did not read
    them all. An error that ``parts`` raises is raised here, and the reader was given no model; any other is ``make``'s.
    """
    reading, writing = os.pipe()
    _ends.update((reading, writing))
    feeder = Feeder(writing, parts)
    try:
        feeder.start()
    except BaseException:
        feeder.finish()
        close(reading)
        raise
    try:
        session = make(f"{PIPES}/{reading}")
    except Exception as error:
        raise feeder.end(reading) or error from None
    except BaseException:
        feeder.end(reading)
        raise
    problem = feeder.end(reading)
    if problem is not None:
        raise problem
    return session if feeder.complete else None


class Feeder(threading.Thread):
    """A thread that writes parts into a pipe and closes it.

    ``complete`` says whether all were written, ``error`` is what ``parts`` raised.
    """

    def __init__(self, writing: int, parts: Iterator[bytes | memoryview]) -> None:
        super().__init__(name="transom-load", daemon=True)
        self._writing, self._parts = writing, parts
        self.complete = False
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            enlarge(self._writing)
            os.set_blocking(self._writing, False)
            for part in self._parts:
                write(self._writing, part)
            self.complete = True
        except BrokenPipeError:  # the reader has ended
            pass
        except BaseException as error:
            self.error = error
            with suppress(OSError):
                os.write(self._writing, NO_FIELD)
        finally:
            self.finish()

    def finish(self) -> None:
        close(self._writing)
        del self._parts  # and with it the file that it reads

    def end(self, reading: int) -> BaseException | None:
        """Close the reader's end, wait for the thread, and return what ``parts`` raised."""
        close(reading)
        self.join()
        return self.error


def close(end: int) -> None:
    """Close an end of a pipe."""
    _ends.discard(end)
    os.close(end)


def write(writing: int, part: bytes | memoryview) -> None:
    """Write all of a part into a pipe that does not block.

    A thread that blocks in a full pipe is woken for every 8 KiB that the library reads: it costs as much as the copy.
    """
    rest = memoryview(part)
    while len(rest):
        try:
            rest = rest[os.write(writing, rest) :]
        except BlockingIOError:
            time.sleep(FULL_S)


def enlarge(writing: int) -> None:
    """Make a pipe as large as Linux gives to everybody; one process may have too many of them for that."""
    import fcntl

    with suppress(OSError):
        fcntl.fcntl(writing, SET_CAPACITY, CAPACITY)


def close_in_child() -> None:
    """Close the ends that a fork copied while another thread was loading."""
    for end in list(_ends):
        with suppress(OSError):
            os.close(end)
    _ends.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=close_in_child)
