"""Keep the KV caches of a decoder's rows: buffers that grow, and whose rows change places."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from transom.runtime.backends.base import Array
from transom.runtime.errors import BackendError
from transom.runtime.feeds import storage
from transom.runtime.graph_spec import Tensor

# Attention on a CPU reads the whole buffer, full or not, so that a longer one costs at every step;
# growing copies what is used. benchmarks/cache_step.py measures both.
STEP = 128  # tokens


class KVCache:
    """Buffers (rows, H, capacity, D) of ``tensors``, the inputs of a decoder graph that are written in place.

    Buffers begin as zeros, and what lies past ``used`` stays zeros: a NaN there would reach the
    output, masked or not.
    """

    def __init__(self, tensors: Sequence[Tensor], rows: int, limit: int) -> None:
        self._tensors = tensors
        self._limit = limit
        self.rows = rows
        self.used = 0  # positions of every row up to here may have been written
        self.moves = 0  # how often other buffers took the place of these
        self.buffers = {tensor.name: self._zeros(tensor, rows, 0) for tensor in tensors}
        self._alike = np.zeros((rows, rows), np.int64)  # positions of two rows before which they hold the same

    @property
    def capacity(self) -> int:
        """Return how many tokens fit in a row now; without a tensor, as many as may be."""
        return next((int(buffer.shape[2]) for buffer in self.buffers.values()), self._limit)

    def reserve(self, tokens: int) -> None:
        """Grow the buffers to ``tokens`` in every row, which will be used: in steps of STEP, at most to the limit."""
        if tokens > self.capacity:
            self._move(np.arange(self.rows), min(-(-tokens // STEP) * STEP, self._limit))
        self.used = max(self.used, tokens)

    def reorder(self, rows: NDArray[np.intp], ends: NDArray[np.int64] | None = None) -> None:
        """Replace row i by what row ``rows[i]`` was; only rows that change are copied, from where they differ.

        ``ends`` (R,) are the positions from which on the rows are written next: rows made of one are alike before it,
        which is not copied when one of them takes the other's place.
        """
        alike = self._alike[rows][:, rows]
        if ends is not None:
            alike = np.where(rows[:, None] == rows, np.asarray(ends, np.int64)[rows], alike)
        if len(rows) > self.rows:
            self._move(rows, self.capacity)
        else:
            self._copy_rows(rows)
        self._alike = alike

    def _copy_rows(self, rows: NDArray[np.intp]) -> None:
        """Make rows of the first ones in place; ``len(rows)`` are left."""
        changed = np.flatnonzero(rows != np.arange(len(rows)))
        sources = rows[changed]
        if not set(changed.tolist()).isdisjoint(sources.tolist()):  # of what is read and written numpy reads all first
            for buffer in self.buffers.values():
                buffer[changed, :, : self.used] = buffer[sources, :, : self.used]
        else:
            starts = self._alike[changed, sources].tolist()
            parts = [slice(start, self.used) for start in starts]
            places = list(zip(changed.tolist(), sources.tolist(), parts, strict=True))
            for buffer in self.buffers.values():
                for to, source, part in places:
                    buffer[to, :, part] = buffer[source, :, part]
        if len(rows) < self.rows:
            self.buffers = {name: buffer[: len(rows)] for name, buffer in self.buffers.items()}
            self.rows = len(rows)
            self.moves += 1

    def _move(self, rows: NDArray[np.intp], capacity: int) -> None:
        """Make new buffers, one tensor at a time so that only one is there twice."""
        for tensor in self._tensors:
            old, new = self.buffers[tensor.name], self._zeros(tensor, len(rows), capacity)
            new[:, :, : self.used] = old[rows, :, : self.used]
            self.buffers[tensor.name] = new
        self.rows = len(rows)
        self.moves += 1

    def _zeros(self, tensor: Tensor, rows: int, capacity: int) -> Array:
        _, heads, _, size = tensor.shape
        shape = (rows, int(heads), capacity, int(size))
        try:
            return np.zeros(shape, storage(tensor))
        except (MemoryError, ValueError):
            raise BackendError(
                f"there is no memory for a cache of {shape}. Give fewer or shorter prompts, or fewer beams."
            ) from None
