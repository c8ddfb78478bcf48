"""Keep what can be made again in the user's cache folder: within a bound, and never as a reason to fail.

A cache has entries, files or folders by key, in ``$XDG_CACHE_HOME/transom/<kind>`` or ``~/.cache/transom/<kind>``. A
folder that cannot be had (no home, a read-only file system, a file in its place) costs what was to be kept there and
one line of the log "transom". It is a line and no warning: ``-W error`` would make a load fail of it.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

LIMITS = {  # bytes that entries of a kind take together; the oldest go first
    "engines": 8 << 30,  # what `transom build` built, so that a second build takes it as it is
    "kernels": 1 << 30,  # what TensorRT-RTX compiled of an engine, a few megabytes each
    "exports": 256 << 20,  # what the long stages of exports computed, so that one that is interrupted goes on
    "triton": 1 << 30,  # what Triton compiled of our attention, some hundred kilobytes each
    "native": 1 << 20,  # whether this processor executes our kernels, some bytes for each instruction set
}
NO_HOME = "there is no home folder: HOME is not set, and the system does not know this user"
log = logging.getLogger("transom")
_logged: set[str] = set()  # kinds whose absence was logged: once in a process


def our_version() -> str:
    """Return the version of this package, for keys: another one may make something else of the same input."""
    try:
        return importlib.metadata.version("transom")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def cache_root() -> Path | None:
    """Return ``$XDG_CACHE_HOME/transom``, or ``~/.cache/transom``; None where there is no home.

    A relative XDG_CACHE_HOME is passed over, as the XDG Base Directory Specification says.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):
        return Path(base) / "transom"
    try:
        return Path.home() / ".cache" / "transom"
    except RuntimeError:  # neither HOME nor an entry of this user in the system's list
        return None


class Cache:
    """The entries of one ``kind``, a key of LIMITS. ``costs`` is what the log says it costs that nothing is kept.

    ``folder`` is None where there can be no cache. What lies in a folder that cannot be written is read all the same.
    """

    def __init__(self, kind: str, costs: str) -> None:
        self._kind, self._costs = kind, costs
        root = cache_root()
        self.folder = root / kind if root is not None else None
        self._why: str | None = NO_HOME

    @cached_property
    def keeps(self) -> bool:
        """Return whether entries can be added; the folder is made for it."""
        if self.folder is not None:
            self._why = unwritable(self.folder)
        return self._why is None

    def entry(self, key: str) -> Path | None:
        """Return the path of the entry of ``key``, where it is if there is one; None without a folder."""
        return self.folder / key if self.folder is not None else None

    def used(self, key: str) -> None:
        """Note that an entry was used: the least recently used are removed first."""
        path = self.entry(key)
        if path is not None and self.keeps:
            with contextlib.suppress(OSError):
                os.utime(path)

    def add(self, key: str, write: Callable[[Path], object]) -> None:
        """Let ``write`` make a new file or folder at a path, and keep that under ``key``.

        It has its final name only when it is whole. A full disk costs the entry and nothing else.
        """
        path = self.entry(key)
        if path is None or not self.keeps:
            return self.warn()
        try:
            with tempfile.TemporaryDirectory(dir=path.parent) as made:
                partial = Path(made) / "entry"
                write(partial)
                if partial.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                partial.replace(path)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):  # another process was faster
                return
            self._why = f"{self.folder} cannot be written: {error.strerror or error}"
            return self.warn()
        self.trim()

    def trim(self) -> None:
        """Remove the oldest entries beyond the kind's limit."""
        if self.folder is not None and self.keeps:
            trim(self.folder, LIMITS[self._kind])

    def warn(self) -> None:
        """Log, once in a process, that nothing is kept, why, and what that costs."""
        if self._kind not in _logged:
            _logged.add(self._kind)
            log.warning(
                "nothing is kept in the cache of %s: %s. %s Set XDG_CACHE_HOME to a folder that can be written.",
                self._kind,
                self._why,
                self._costs,
            )


def unwritable(folder: Path) -> str | None:
    """Return why ``folder``, made where it is missing, cannot be written; None where it can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"{folder} cannot be made: {error.strerror or error}"
    return None if os.access(folder, os.W_OK | os.X_OK) else f"{folder} cannot be written"


def trim(folder: Path, limit: int) -> None:
    """Remove the oldest entries of ``folder`` until the others take at most ``limit`` bytes.

    What another process removes or writes meanwhile is passed over.
    """
    with contextlib.suppress(OSError):
        entries = []
        for path in folder.iterdir():
            with contextlib.suppress(OSError):
                entries.append((path.stat().st_mtime_ns, bytes_of(path), path))
        taken = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if taken <= limit:
                return
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            taken -= size


def bytes_of(path: Path) -> int:
    """Return the size in bytes of a file, or of all files below a folder."""
    files = [path] if not path.is_dir() else [found for found in path.rglob("*") if found.is_file()]
    return sum(file.stat().st_size for file in files)
