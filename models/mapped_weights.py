"""Read safetensors through a memory map whose pages can be given back while nothing computes with them."""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from transom.runtime.errors import CheckpointError, one_line

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # that models take


class MappedWeights:
    """A safetensors file; tensors of DTYPES share the memory of the mapped file.

    Raises CheckpointError for a file that safetensors refuses: it checks the header, which says where tensors lie.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} cannot be read as safetensors ({one_line(error)}); the file is truncated or damaged. "
                "Download it again."
            ) from None
        with path.open("rb") as file:
            self._state = state_of(os.fstat(file.fileno()))
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # a write would be this process' own
        (length,) = struct.unpack("<Q", self._map[:8])
        self._start = 8 + length
        self._header: dict[str, Any] = json.loads(self._map[8 : self._start])

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.keys())

    def tensor(self, name: str) -> Tensor:
        """Return a tensor; a copy where its dtype is no model's, or its place does not fit its dtype."""
        entry = self._header[name]
        dtype, (begin, _) = DTYPES.get(entry["dtype"]), entry["data_offsets"]
        count, place = prod(entry["shape"]), self._start + begin
        if dtype is None or count == 0 or place % dtype.itemsize:
            return self._file.get_tensor(name)  # type: ignore[no-any-return]
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=place).reshape(entry["shape"])

    def require_unchanged(self) -> None:
        """Raise CheckpointError where the file was written to or replaced since it was opened."""
        try:
            state = state_of(self.path.stat())
        except OSError:
            state = None
        if state != self._state:
            raise CheckpointError(
                f"{self.path} changed while it was exported; expected the same file until the end. Nothing was "
                "written. Export it again when nothing else writes to it."
            )

    def give_back(self) -> None:
        """Give the pages in memory back to the system, which reads them again when they are needed.

        A change made to a tensor in place is lost.
        """
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


def state_of(status: os.stat_result) -> tuple[int, int, int, int]:
    """Return what a write to a file, or another in its place, changes: inode, size, times in nanoseconds."""
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
