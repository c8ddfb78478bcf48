"""Write a file whole or not at all: beside its place, flushed to the disk, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the place of ``path`` when the block succeeds.

    A reader sees the old bytes or the new, after a power cut too. When the block or the disk fails, ``path`` is as it
    was and nothing is left beside it. Raises OSError.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Replace the content of ``path`` as ``replacing`` does."""
    with replacing(path) as file:
        file.write(data)
