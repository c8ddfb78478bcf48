"""Manage the TensorRT backend's device memory: staging allocated once, a decoder's state, and a pool for it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from transom.runtime.backends.base import Array
from transom.runtime.backends.cuda import Memory, OutOfMemory, PinnedMemory, Stream
from transom.runtime.decoder_state import EncoderOutputs
from transom.runtime.errors import BackendError
from transom.runtime.feeds import storage
from transom.runtime.graph_spec import Tensor
from transom.runtime.process_bound import ProcessBound

GRAIN = 1 << 16  # bytes: staging grows in such steps, so that a few bytes more do not mean another allocation


@dataclass(frozen=True)
class DeviceArray:
    """An array on the GPU, C order. ``memory`` keeps it alive."""

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    memory: Memory

    @property
    def address(self) -> int:
        return self.memory.address

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class Pool(ProcessBound):
    """Device memory that is given back and taken again: a call that repeats sizes allocates nothing.

    At most ``most`` bytes are kept unused: beyond that, what was given back first is freed. Without a bound a service
    that sees every batch size would keep blocks of each.
    """

    def __init__(self, most: int) -> None:
        self._most, self._kept = most, 0  # bytes
        self._free: list[Memory] = []  # in the order in which they were given back
        self._lock = threading.RLock()  # a finalizer may give back while this thread takes

    def take(self, size: int) -> Memory:
        """Take ``size`` bytes, uninitialised. OutOfMemory where there are none even when unused memory is freed."""
        with self._lock:
            for place in reversed(range(len(self._free))):
                if self._free[place].size == size:
                    self._kept -= size
                    return self._free.pop(place)
        try:
            return Memory(size)
        except OutOfMemory:
            self.clear()
            return Memory(size)

    def give(self, memory: Memory) -> None:
        with self._lock:
            self._free.append(memory)
            self._kept += memory.size
            while self._kept > self._most:
                self._kept -= self._free.pop(0).size

    def clear(self) -> None:
        """Free unused memory."""
        with self._lock:
            self._free.clear()
            self._kept = 0


class Staging:
    """Pinned host memory and device memory that copies of one tensor go through, as large as was ever needed."""

    def __init__(self) -> None:
        self._device: Memory | None = None
        self._pinned: PinnedMemory | None = None

    def reserve_bytes(self, size: int) -> int:
        """Return the device address of at least ``size`` bytes; it changes only when it grows."""
        if self._device is None or self._device.size < size:
            self._device = None  # first, so that old and new need not fit together
            self._device = Memory(grown(size))
        return self._device.address

    def put(self, array: Array, stream: Stream) -> int:
        """Queue the copy of ``array`` to the GPU and return its address. The array may change from then on."""
        address = self.reserve_bytes(array.nbytes)
        self.host(array.nbytes)[...] = as_bytes(array)
        stream.copy(address, self._address(), array.nbytes)
        return address

    def fetch(self, size: int, stream: Stream) -> NDArray[np.uint8]:
        """Queue the copy of ``size`` bytes to the host and return them, valid after ``stream.wait``."""
        host = self.host(size)
        stream.copy(self._address(), self.reserve_bytes(size), size)
        return host

    def keep(self, array: Array) -> int:
        """Copy ``array`` to pinned memory and return its host address: TensorRT reads some shapes there."""
        self.host(array.nbytes)[...] = as_bytes(array)
        return self._address()

    def put_padded(self, array: Array, shape: tuple[int, ...], stream: Stream) -> int:
        """Queue the copy of a cache (B, H, C, D) into one of ``shape``, whose C is longer; the rest are zeros."""
        address = self.reserve_bytes(prod(shape) * array.dtype.itemsize)
        self.host(array.nbytes)[...] = as_bytes(array)
        rows, width, pitch = rows_of(array, shape[2])
        stream.clear(address, rows * pitch)
        stream.copy_rows(address, pitch, self._address(), width, width, rows)
        return address

    def fetch_padded(self, array: Array, length: int, stream: Stream) -> NDArray[np.uint8]:
        """Queue the copy of as much of a cache of ``length`` as ``array`` holds to the host."""
        host = self.host(array.nbytes)
        rows, width, pitch = rows_of(array, length)
        stream.copy_rows(self._address(), width, self.reserve_bytes(rows * pitch), pitch, width, rows)
        return host

    def host(self, size: int) -> NDArray[np.uint8]:
        """Return pinned bytes; only the newest view is valid."""
        if self._pinned is None or self._pinned.size < size:
            self._pinned = None
            self._pinned = PinnedMemory(grown(size))
        return self._pinned.bytes(size)

    def _address(self) -> int:
        assert self._pinned is not None
        return self._pinned.address


def rows_of(cache: Array, length: int) -> tuple[int, int, int]:
    """Return (rows, bytes in each, bytes from one to the next at ``length``) of a cache (B, H, C, D)."""
    B, H, C, D = cache.shape
    return B * H, C * D * cache.dtype.itemsize, length * D * cache.dtype.itemsize


def repeated_rows(array: Array, rows: int) -> Array:
    """Return ``array`` with each row repeated, so that there are ``rows``, a multiple; itself where it has them.

    Row b is row b // K of the array then, as groups of K neighbours share it.
    """
    return array if len(array) == rows else np.repeat(array, rows // len(array), axis=0)


def grown(size: int) -> int:
    return -(-max(size, 1) // GRAIN) * GRAIN


def as_bytes(array: Array) -> NDArray[np.uint8]:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


class TrtDecoderState(ProcessBound):
    """A decoder's state on the GPU: caches written in place, the encoder's outputs and constants beside them.

    A cache (rows, H, C, D) has the one length C that the engine was built for. Every method waits for its own work, so
    that any thread may go on.
    """

    def __init__(
        self,
        pool: Pool,
        caches: Sequence[Tensor],
        length: int,
        rows: int,
        limit: int,
        encoder_outputs: Mapping[str, Array],
    ) -> None:
        self._pool, self._stream = pool, Stream()
        self._held: list[Memory] = []
        weakref.finalize(self, give_back, pool, self._held)
        self.capacity = min(limit, length)  # tokens that fit in a row
        self._used, self._rows = 0, rows
        self.revision = 0
        self._constants = EncoderOutputs({}, rows)
        try:
            self._caches = {tensor.name: self._empty(tensor, rows, length) for tensor in caches}
            self._encoder_outputs = EncoderOutputs(
                {name: self._uploaded(array) for name, array in encoder_outputs.items()}, rows
            )
        except BaseException:
            give_back(pool, self._held)  # now: the error's traceback keeps this object alive for as long as it likes
            raise
        finally:
            self._stream.wait()

    @property
    def feeds(self) -> dict[str, DeviceArray]:
        """Return the graph's inputs besides the tokens, by name."""
        return {**self._encoder_outputs.arrays, **self._constants.arrays, **self._caches}

    def reserve(self, tokens: int) -> None:
        """Note that positions up to ``tokens`` will be written. BackendError past the end: TensorRT would drop them."""
        if tokens > self.capacity:
            raise BackendError(f"{tokens} tokens were to be written; the engine's cache holds {self.capacity}.")
        self._used = max(self._used, tokens)

    def reorder(self, rows: NDArray[np.intp], ends: NDArray[np.int64] | None = None) -> None:
        """Replace row i by what row ``rows[i]`` was."""
        if not np.array_equal(rows, np.arange(self._rows)):
            self._caches = {name: self._cache_of(old, rows) for name, old in self._caches.items()}
            self._encoder_outputs.reorder(rows, self._rows_of)
            self._constants.reorder(rows, self._rows_of)
            self._rows = len(rows)
            self.revision += 1

    def set_constants(self, arrays: Mapping[str, Array]) -> None:
        """Copy arrays to the GPU, where every step reads them; the memory of those before is taken again where it fits.

        The engine reads a row of its own for every row: one of an array stands for as many neighbours as there are
        times more rows, and is repeated. ``reorder`` copies on the GPU where they get the images of other rows, or
        where their number changes. Arrays of the sizes of those before lie where these did, and what was recorded of
        the steps stays of use.
        """
        self.revision += 1
        self._give_back_constants()
        alike = self._rows // max(map(len, arrays.values()), default=self._rows)
        self._constants = EncoderOutputs({}, self._rows, alike)
        try:
            for name, array in arrays.items():
                self._constants.arrays[name] = self._uploaded(repeated_rows(array, self._rows))
        except BaseException:
            self._give_back_constants()
            raise

    def _give_back_constants(self) -> None:
        """Give their memory back, the first array's last: it is the first that is taken again."""
        for old in reversed(self._constants.arrays.values()):
            self._held.remove(old.memory)
            self._pool.give(old.memory)
        self._constants = EncoderOutputs({}, self._rows)

    def _cache_of(self, old: DeviceArray, rows: NDArray[np.intp]) -> DeviceArray:
        """Make a cache of the chosen rows: the positions in use are copied, the rest are zeros."""
        new = self._take((len(rows), *old.shape[1:]), old.dtype)
        _, heads, length, size = old.shape
        pitch, width = length * size * old.dtype.itemsize, self._used * size * old.dtype.itemsize
        self._stream.clear(new.address, new.nbytes)
        for to, source in enumerate(rows.tolist()):
            if width:
                start, end = old.address + source * heads * pitch, new.address + to * heads * pitch
                self._stream.copy_rows(end, pitch, start, pitch, width, heads)
        return self._instead_of(old, new)

    def _rows_of(self, old: DeviceArray, rows: NDArray[np.intp]) -> DeviceArray:
        new = self._take((len(rows), *old.shape[1:]), old.dtype)
        each = prod(old.shape[1:]) * old.dtype.itemsize
        for to, source in enumerate(rows.tolist()):
            self._stream.copy(new.address + to * each, old.address + source * each, each)
        return self._instead_of(old, new)

    def _instead_of(self, old: DeviceArray, new: DeviceArray) -> DeviceArray:
        """Return ``new``, whose copies are done; the memory of ``old`` goes back to the pool."""
        self._stream.wait()
        self._held.remove(old.memory)
        self._pool.give(old.memory)
        return new

    def _empty(self, tensor: Tensor, rows: int, length: int) -> DeviceArray:
        _, heads, _, size = tensor.shape
        array = self._take((rows, int(heads), length, int(size)), storage(tensor))
        self._stream.clear(array.address, array.nbytes)  # a NaN there would reach the output, masked or not
        return array

    def _uploaded(self, array: Array) -> DeviceArray:
        held = self._take(array.shape, array.dtype)
        staging = PinnedMemory(array.nbytes)
        staging.bytes(array.nbytes)[...] = as_bytes(array)
        self._stream.copy(held.address, staging.address, array.nbytes)
        self._stream.wait()  # before the staging goes
        return held

    def _take(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> DeviceArray:
        memory = self._pool.take(prod(shape) * dtype.itemsize)
        self._held.append(memory)
        return DeviceArray(shape, dtype, memory)


def give_back(pool: Pool, held: list[Memory]) -> None:
    while held:
        pool.give(held.pop())
