"""Staging folders beside a bundle while it is made, and the removal of those whose writer was killed.

``.transom-<8 characters>.partial`` is garbage once no process writes to it. ``.transom-<8 characters>.old``
holds, under its own name, a bundle that was moved aside: if nothing is in its place it is the only copy, and goes
back there.

A writer holds a lock (flock) on its folder for as long as it lives; the kernel drops it at any death, SIGKILL too. So a
folder is known to be abandoned by its lock alone, not by its age. Where folders cannot be locked (Windows, some network
file systems) none is ever taken for abandoned.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL, OLD = ".partial", ".old"
NAME = re.compile(r"\.transom-[a-z0-9_]{8}(\.partial|\.old)")  # as mkdtemp makes them; others are left alone
ATTEMPTS = 100


@contextmanager
def staging_dir(parent: Path, suffix: str) -> Iterator[Path]:
    """Make a folder in ``parent``, locked for the block, and remove it with its contents at the end.

    The contents of one with the suffix OLD are moved back to their place, if that is free.
    """
    for _ in range(ATTEMPTS):
        folder = Path(tempfile.mkdtemp(prefix=".transom-", suffix=suffix, dir=parent))
        try:
            lock = lock_folder(folder)
        except (BlockingIOError, FileNotFoundError):  # another export cleared it between its making and its locking
            continue
        try:
            yield folder
        finally:
            discard(folder)
            if lock is not None:
                os.close(lock)
        return
    raise OSError(f"no folder could be locked in {parent} in {ATTEMPTS} attempts")


def remove_stale(parent: Path) -> None:
    """Remove the staging folders of killed exports from ``parent``, and put back what they had moved aside."""
    with contextlib.suppress(OSError):  # no such folder, or not readable: nothing to remove
        for name in sorted(os.listdir(parent)):
            if NAME.fullmatch(name):
                discard_if_abandoned(parent / name)


def discard_if_abandoned(folder: Path) -> None:
    """Discard a staging folder, unless its writer lives, or that cannot be known."""
    try:
        lock = lock_folder(folder)
    except OSError:
        return
    if lock is not None:
        try:
            discard(folder)
        finally:
            os.close(lock)


def discard(folder: Path) -> None:
    """Delete a staging folder; a bundle that was moved aside is put back first, where its place is free."""
    with contextlib.suppress(OSError):
        if folder.suffix == OLD:
            for held in list(folder.iterdir()):
                place = folder.parent / held.name
                if not os.path.lexists(place):
                    held.rename(place)
            # Half-deleted it must never be put back, so it stops being such a folder in one step
            folder = folder.rename(folder.with_suffix(PARTIAL))
    if folder.suffix != OLD:  # else putting back failed, and this may be the only copy
        shutil.rmtree(folder, ignore_errors=True)


def lock_folder(folder: Path) -> int | None:
    """Lock a folder; return the descriptor that holds the lock until it is closed, None where folders have no locks.

    The lock lies on the folder itself: it needs no file in it, and stays through a rename. Raises BlockingIOError
    where another process has it, and FileNotFoundError where the folder is gone.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(lock), os.lstat(folder)):
            raise FileNotFoundError(f"{folder} was replaced")
    except OSError as error:
        os.close(lock)
        if isinstance(error, (BlockingIOError, FileNotFoundError)):
            raise
        return None  # ENOLCK, EBADF, EOPNOTSUPP of network file systems
    return lock
