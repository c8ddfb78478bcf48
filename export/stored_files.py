"""Files that an export has written: their sizes and hashes, and their bytes, whole or in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PIECE = 1 << 20  # bytes that are read at a time


@dataclass(frozen=True)
class StoredFile:
    """A file that was written and hashed: ``size`` in bytes, ``sha256`` in hex."""

    path: Path
    size: int
    sha256: str

    def entry(self) -> dict[str, Any]:
        """Return size and hash as bundle.json records them."""
        return {"size": self.size, "sha256": self.sha256}


class FolderFiles:
    """Reads files that this process wrote into ``folder``, whole or in pieces; nothing is hashed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, name: str) -> bytes:
        """Return the bytes of a file."""
        return (self.folder / name).read_bytes()

    def size(self, name: str) -> int:
        """Return the size of a file in bytes."""
        return (self.folder / name).stat().st_size

    def pieces(self, name: str) -> Iterator[memoryview]:
        """Yield the bytes of a file in order, each piece valid until the next."""
        buffer = memoryview(bytearray(PIECE))
        with (self.folder / name).open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                yield buffer[:count]
