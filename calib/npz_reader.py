"""Read raw inputs from a .npz file row by row: however large the arrays are, one row of each is in memory.

The format is numpy's (``numpy.lib.format``): a zip archive of .npy files, each a header and the elements.
"""

from __future__ import annotations

import math
import weakref
import zipfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from transom.calib.samples import Sample, printable
from transom.runtime.backends.base import Array
from transom.runtime.errors import CalibrationError, one_line

MAX_BYTES = 64 << 30  # unpacked, in all: 100,000 images of 224x224 pixels. A small file can unpack to any number
MAX_ROW_BYTES = 1 << 30
MAX_ARRAYS = 1000  # a decoder's caches are two for each layer
KINDS = "iufb"  # of dtypes: what a graph takes; never objects, which are pickled
NEXT = "Write it with np.savez(file, name=array): plain arrays whose first axis counts the samples."


@dataclass
class Rows:
    """One array of the archive, its elements in C order behind byte ``start`` of ``file``."""

    file: IO[bytes]
    start: int
    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def row(self, index: int) -> Array:
        """Read one row, (1, ...). Rows read in order are unpacked once, and their checksum is compared at the end."""
        place = self.start + index * self.row_bytes
        if self.file.tell() != place:
            self.file.seek(place)
        data = self.file.read(self.row_bytes)
        if len(data) != self.row_bytes:
            raise ValueError("it is cut short")
        elements: NDArray[np.generic] = np.frombuffer(data, self.dtype)
        return elements.reshape(1, *self.shape[1:]).copy()


class NpzRows:
    """A .npz file whose arrays are graph inputs by name, with a common first axis that counts the samples.

    Raises CalibrationError for anything else: pickled objects, arrays of different lengths, a damaged archive, one
    that unpacks to more than MAX_BYTES.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with ExitStack() as stack:
            try:
                archive = stack.enter_context(zipfile.ZipFile(path))
                check_members(archive.infolist())
                self._arrays = {
                    member.filename.removesuffix(".npy"): rows_of(stack.enter_context(archive.open(member)), member)
                    for member in archive.infolist()
                }
                self._count = common_length(self._arrays)
            except Exception as error:  # zipfile, zlib and numpy's header parser raise a dozen types
                raise self._refused(error) from None
            self._close = weakref.finalize(self, stack.pop_all().close)

    def __len__(self) -> int:
        return self._count

    def sample(self, index: int) -> Sample:
        try:
            feeds = {name: rows.row(index) for name, rows in self._arrays.items()}
        except Exception as error:  # as above
            raise self._refused(error) from None
        return Sample(f"{printable(self._path.name)}[{index}]", feeds=feeds)

    def _refused(self, error: Exception) -> CalibrationError:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error, 200)
        return CalibrationError(f"{printable(self._path)} cannot be used as calibration data: {reason}. {NEXT}")


def check_members(members: list[zipfile.ZipInfo]) -> None:
    size = sum(member.file_size for member in members)
    if size > MAX_BYTES:
        raise ValueError(f"it unpacks to {size} bytes, at most {MAX_BYTES} are read")
    names = [member.filename for member in members]
    strange = [name for name in names if not name.endswith(".npy")]
    if strange:
        raise ValueError(f"it holds {printable(strange[0])[:60]!r}, which is no array")
    if not 0 < len(names) == len(set(names)) <= MAX_ARRAYS:
        raise ValueError(f"it holds {len(names)} arrays of {len(set(names))} names, expected 1 to {MAX_ARRAYS}")


def rows_of(file: IO[bytes], member: zipfile.ZipInfo) -> Rows:
    """Read and check the header of one .npy; no element is read."""
    name = printable(member.filename.removesuffix(".npy"))[:60]
    version = npy.read_magic(file)
    if version not in ((1, 0), (2, 0)):  # (3, 0) has field names that are not ASCII
        raise ValueError(f"array {name!r} is of .npy version {version}")
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise ValueError(f"array {name!r} holds pickled objects, which can run code")
    if dtype.kind not in KINDS:
        raise ValueError(f"array {name!r} is of {dtype}, expected numbers")
    if not shape:
        raise ValueError(f"array {name!r} is a single number, without an axis for the samples")
    if fortran:
        raise ValueError(f"array {name!r} is in Fortran order, expected C order (np.ascontiguousarray)")
    if min(shape) < 1:
        raise ValueError(f"array {name!r} is {dtype} {shape}, expected samples of at least one number each")
    rows = Rows(file, file.tell(), dtype, shape)
    if rows.start + shape[0] * rows.row_bytes != member.file_size:
        raise ValueError(f"array {name!r} is {dtype} {shape} by its header, but has {member.file_size} bytes")
    if rows.row_bytes > MAX_ROW_BYTES:
        raise ValueError(f"a sample of {name!r} is {rows.row_bytes} bytes, at most {MAX_ROW_BYTES} are read")
    return rows


def common_length(arrays: dict[str, Rows]) -> int:
    sizes = {rows.shape[0] for rows in arrays.values()}
    if len(sizes) > 1:
        said = ", ".join(f"{printable(name)[:40]} {rows.shape}" for name, rows in list(arrays.items())[:6])
        raise ValueError(f"its arrays differ in their first axis ({said})")
    return sizes.pop()
