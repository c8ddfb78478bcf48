"""Pack the weights of a list of operators as they are read from their file and hashed.

Each tensor is read once, and is in memory beside its packed copies no longer than it takes to make them: the peak is
what stays and the largest tensor that does not. Tables of embeddings stay as they are, float16 ones too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from threading import Lock, local
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.runtime.backends.base import Read, ReadInPieces, ReadLeased
from transom.runtime.backends.inlined_model import Cursor
from transom.runtime.host import usable_cores
from transom.runtime.leased_file import LeasedFile
from transom.runtime.native.library import NativeLibrary
from transom.runtime.native.list_registers import ITEM_BYTES, Register
from transom.runtime.native.memory import Memory, aligned, aligned_floats
from transom.runtime.native.operators import Attention, Embed, Epilogue, Linear, OperatorList, Prepend, Unpack
from transom.runtime.native.records import F16, F32, S8

MOST_WORKERS = 4  # each has a buffer of the largest tensor that it packs, or maps it
MAPPED = 1 << 16  # bytes of a leased file; to map fewer costs more than to copy them
DTYPES = {"float32": F32, "float16": F16, "int8": S8}

Bytes = NDArray[np.uint8]
MapPart = Callable[[int, int], memoryview]  # the offset and the size of a part of a file, mapped


@dataclass
class Panels:
    """The packed weight (k, n) of one Linear: where it lies, and of int8 the sums of its columns, int32 (n)."""

    k: int
    n: int
    dtype: int
    place: int  # in the arena
    size: int
    column_sum: NDArray[np.int32] | None
    lock: Lock = field(default_factory=Lock)  # of the parts that are written into it


@dataclass
class Part:
    """One stored tensor's columns of ``panels``, from ``column`` on."""

    panels: Panels
    column: int
    columns: int
    transposed: bool


@dataclass
class Piece:
    """A part of the file, and what is made of its bytes; they stay at ``place`` of the arena, or nowhere."""

    offset: int
    size: int
    place: int | None = None
    uses: list[Callable[[Bytes], None]] = field(default_factory=list)


class Weights:
    """The weights of a list: ``panels`` by the place of their Linear, ``vectors`` in float32 by name, and tables.

    Raises BundleError where the file is not the one of bundle.json, BackendError where there is no memory.
    """

    def __init__(
        self, operators: OperatorList, registers: Mapping[str, Register], library: NativeLibrary, read: Read
    ) -> None:
        self._operators, self._library = operators, library
        self.panels: dict[int, Panels] = {}
        self.vectors: dict[str, NDArray[np.float32]] = {}
        self._tables: dict[str, int] = {}
        self._room = 0
        parts: dict[str, list[Part]] = defaultdict(list)
        for index, operator in enumerate(operators.operators):
            if isinstance(operator, Linear):
                self._add_panels(index, operator, registers[operator.source].columns, parts)
            elif isinstance(operator, Embed):
                for table in operator.tables:
                    if table.table not in self._tables:
                        self._tables[table.table] = self._take(self._bytes(table.table))
        vectors = {name for operator in operators.operators for name in vectors_of(operator)}
        self.memory = Memory(self._room)
        read_pieces(read, operators.weights, self._pieces(parts, vectors), self.memory)
        self.memory.enlarge()

    def table(self, name: str) -> int:
        """Return the address of a table."""
        return self.memory.address + self._tables[name]

    def address(self, panels: Panels) -> int:
        """Return the address of a packed weight."""
        return self.memory.address + panels.place

    def _bytes(self, name: str) -> int:
        tensor = self._operators.tensors[name]
        return ITEM_BYTES[tensor.dtype] * prod(tensor.shape)

    def _take(self, size: int) -> int:
        place = self._room
        self._room += aligned(size)
        return place

    def _add_panels(self, index: int, linear: Linear, k: int, parts: dict[str, list[Part]]) -> None:
        shapes = [self._operators.tensors[name].shape for name in linear.weights]
        widths = [shape[0] if linear.transposed else shape[1] for shape in shapes]
        dtype = S8 if linear.scales else F32
        size = self._library.packed_bytes(dtype, k, sum(widths))
        sums = np.zeros(sum(widths), np.int32) if dtype == S8 else None
        panels = self.panels[index] = Panels(k, sum(widths), dtype, self._take(size), size, sums)
        column = 0
        for name, width in zip(linear.weights, widths, strict=True):
            parts[name].append(Part(panels, column, width, linear.transposed))
            column += width

    def _pieces(self, parts: Mapping[str, list[Part]], vectors: set[str]) -> list[Piece]:
        """Return what is to be read, in the order of the file; tensors of the same bytes are one piece."""
        found: dict[tuple[int, int], Piece] = {}
        for name in {**parts, **self._tables, **dict.fromkeys(vectors)}:
            tensor, size = self._operators.tensors[name], self._bytes(name)
            piece = found.setdefault((tensor.offset, size), Piece(tensor.offset, size))
            if name in self._tables and piece.place is None:
                piece.place = self._tables[name]
            elif name in self._tables:
                self._tables[name] = piece.place or 0
            for part in parts.get(name, ()):
                piece.uses.append(self._packer(part, tensor.dtype))
            if name in vectors:
                piece.uses.append(self._copier(name, tensor.dtype))
        return [found[key] for key in sorted(found)]

    def _packer(self, part: Part, dtype: str) -> Callable[[Bytes], None]:
        panels = part.panels

        def pack(data: Bytes) -> None:
            self.memory.prepare(
                panels.place + panels.size * part.column // panels.n, panels.size * part.columns // panels.n
            )
            with panels.lock:
                self._library.pack(
                    panels.dtype,
                    panels.k,
                    panels.n,
                    source=int(data.ctypes.data),
                    source_dtype=DTYPES[dtype],
                    stride=panels.k if part.transposed else part.columns,
                    transposed=part.transposed,
                    panels=self.address(panels),
                    column_sum=None if panels.column_sum is None else int(panels.column_sum.ctypes.data),
                    column=part.column,
                    columns=part.columns,
                )

        return pack

    def _copier(self, name: str, dtype: str) -> Callable[[Bytes], None]:
        def copy(data: Bytes) -> None:
            self.vectors[name] = aligned_floats(data.view(dtype))

        return copy


def vectors_of(operator: Any) -> list[str]:
    """Return the tensors of an operator that are neither weights of a product nor tables."""
    if isinstance(operator, Unpack | Attention):
        then = Epilogue() if isinstance(operator, Unpack) else operator.then
    else:
        then = operator.then
    found: list[str | None] = [*then.bias, *(operator.scales if isinstance(operator, Linear) else ())]
    if isinstance(operator, Prepend):
        found += [operator.first, operator.position]
    if then.norm is not None:
        found += [then.norm.weight, then.norm.bias]
    if then.quantized is not None:
        found.append(then.quantized.multiplier)
    return [name for name in found if name is not None]


def read_pieces(read: Read, file: str, pieces: Sequence[Piece], memory: Memory) -> None:
    """Read parts of a file and use them, in the order of their offsets.

    Under a lease the file is hashed meanwhile, in another thread, and several read it; else it is hashed as it is read.
    What is used is checked when this returns: BundleError where the bytes are not those of bundle.json.
    """
    rooms = local()  # of each thread: one buffer for all pieces that stay nowhere

    def use(piece: Piece, fill: Callable[[Bytes, int], None], map_part: MapPart | None = None) -> None:
        if piece.place is not None:
            memory.prepare(piece.place, piece.size)
            buffer = memory.view(piece.place, piece.size)
            fill(buffer, piece.offset)
        elif map_part is not None and piece.size >= MAPPED:
            buffer = np.frombuffer(map_part(piece.offset, piece.size), np.uint8)
        else:
            if len(rooms.__dict__.get("room", b"")) < piece.size:
                rooms.room = None  # before there is a larger one, which then need not fit beside it
                rooms.room = np.empty(piece.size, np.uint8)
            buffer = rooms.room[: piece.size]
            fill(buffer, piece.offset)
        for each in piece.uses:
            each(buffer)

    if isinstance(read, ReadLeased):
        with read.leased(file) as leased:
            if leased is not None:
                use_leased(leased, pieces, use)
                leased.wait()  # and says better what is wrong with a file that is too short
                if leased.held():
                    return
    apart = all(one.offset + one.size <= other.offset for one, other in pairwise(pieces))
    if isinstance(read, ReadInPieces) and apart:
        parts = read.pieces(file)
        cursor = Cursor(parts)
        with suppress(EOFError):  # as above
            for piece in pieces:
                use(piece, lambda buffer, offset: fill_from(cursor, buffer, offset))
        for _ in parts:
            pass
        return
    whole = np.frombuffer(read(file), np.uint8)
    for piece in pieces:
        use(piece, lambda buffer, offset: np.copyto(buffer, whole[offset : offset + len(buffer)]))


def use_leased(leased: LeasedFile, pieces: Sequence[Piece], use: Callable[..., None]) -> None:
    """Use parts of a leased file in several threads, up to one that is not there or the end of the lease."""

    def fill(buffer: Bytes, offset: int) -> None:
        leased.read_into(buffer.data, offset)

    def use_one(piece: Piece) -> None:
        use(piece, fill, leased.window if leased.held() else None)

    left = iter(pieces)  # of all threads: each takes the next one

    def use_some() -> None:
        for piece in left:
            use_one(piece)

    count = workers()
    with suppress(EOFError), ThreadPoolExecutor(count, thread_name_prefix="transom-pack") as pool:
        for each in [pool.submit(use_some) for _ in range(count)]:
            each.result()


def workers() -> int:
    """Return how many threads pack at once: beside them one hashes, and is the last to end."""
    return max(1, min(MOST_WORKERS, usable_cores() - 1))


def fill_from(cursor: Cursor, buffer: Bytes, offset: int) -> None:
    """Fill a buffer with the bytes of a file from ``offset`` on, which lies at the cursor or behind it."""
    for _ in cursor.up_to(offset):
        pass
    place = 0
    for part in cursor.up_to(offset + len(buffer)):
        buffer[place : place + len(part)] = np.frombuffer(part, np.uint8)
        place += len(part)
