"""Keep what a decoder's rows need between steps: their KV caches, and the encoder's outputs beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from transom.runtime.backends.base import Array, Backend
from transom.runtime.errors import BackendError
from transom.runtime.feeds import storage
from transom.runtime.graph_spec import Tensor, cache_inputs

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
        self.buffers = {tensor.name: self._zeros(tensor, rows, 0) for tensor in tensors}

    @property
    def capacity(self) -> int:
        """Return how many tokens fit in a row now."""
        return int(next(iter(self.buffers.values())).shape[2])

    def reserve(self, tokens: int) -> None:
        """Grow the buffers to ``tokens`` in every row, which will be used: in steps of STEP, at most to the limit."""
        if tokens > self.capacity:
            self._move(np.arange(self.rows), min(-(-tokens // STEP) * STEP, self._limit))
        self.used = max(self.used, tokens)

    def reorder(self, rows: NDArray[np.intp]) -> None:
        """Replace row i by what row ``rows[i]`` was; only rows that change are copied, up to ``used``."""
        if len(rows) > self.rows:
            self._move(rows, self.capacity)
            return
        changed = np.flatnonzero(rows != np.arange(len(rows)))
        for name, buffer in self.buffers.items():
            buffer[changed, :, : self.used] = buffer[rows[changed], :, : self.used]  # numpy copies the right side first
            self.buffers[name] = buffer[: len(rows)]
        self.rows = len(rows)

    def _move(self, rows: NDArray[np.intp], capacity: int) -> None:
        """Make new buffers, one tensor at a time so that only one is there twice."""
        for tensor in self._tensors:
            old, new = self.buffers[tensor.name], self._zeros(tensor, len(rows), capacity)
            new[:, :, : self.used] = old[rows, :, : self.used]
            self.buffers[tensor.name] = new
        self.rows = len(rows)

    def _zeros(self, tensor: Tensor, rows: int, capacity: int) -> Array:
        _, heads, _, size = tensor.shape
        shape = (rows, int(heads), capacity, int(size))
        try:
            return np.zeros(shape, storage(tensor))
        except (MemoryError, ValueError):
            raise BackendError(
                f"there is no memory for a cache of {shape}. Give fewer or shorter prompts, or fewer beams."
            ) from None


class DecoderState(Protocol):
    """Caches of R rows and what their encoder gave. Belongs to one generation, not to be shared by threads."""

    @property
    def capacity(self) -> int:
        """Return how many tokens fit in a row now."""
        ...

    @property
    def feeds(self) -> Mapping[str, Any]:
        """Return the graph's inputs by name: arrays, or what the backend that made this state takes for them."""
        ...

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` in every row, which will be used."""
        ...

    def reorder(self, rows: NDArray[np.intp]) -> None:
        """Replace row i by what row ``rows[i]`` was; there are ``len(rows)`` from now on."""
        ...


@runtime_checkable
class SupportsDeviceCache(Protocol):
    """A backend that keeps the state on its device, so that no step copies it there and back."""

    def new_decoder_state(self, rows: int, limit: int, encoder_outputs: Mapping[str, Array]) -> DecoderState: ...


class HostDecoderState:
    """A decoder's state in numpy arrays."""

    def __init__(self, caches: Sequence[Tensor], rows: int, limit: int, encoder_outputs: Mapping[str, Array]) -> None:
        self.cache = KVCache(caches, rows, limit)
        self._encoder_outputs = EncoderOutputs(encoder_outputs, rows)

    @property
    def capacity(self) -> int:
        return self.cache.capacity

    @property
    def feeds(self) -> dict[str, Array]:
        return {**self._encoder_outputs.arrays, **self.cache.buffers}

    def reserve(self, tokens: int) -> None:
        self.cache.reserve(tokens)

    def reorder(self, rows: NDArray[np.intp]) -> None:
        self.cache.reorder(rows)
        self._encoder_outputs.reorder(rows, lambda array, chosen: array[chosen])


class EncoderOutputs:
    """Arrays that rows read and never write, one row of each per row: the encoder's keys and values, and its mask."""

    def __init__(self, arrays: Mapping[str, Any], rows: int) -> None:
        self.arrays = dict(arrays)
        self._origin = np.arange(rows)  # the original row that each row reads

    def reorder(self, rows: NDArray[np.intp], take: Callable[[Any, NDArray[np.intp]], Any]) -> None:
        """Replace row i by what row ``rows[i]`` was; ``take(array, rows)`` returns an array of those rows."""
        origin = self._origin[rows]
        if not np.array_equal(origin, self._origin):  # beams of one source read the same
            self.arrays = {name: take(array, rows) for name, array in self.arrays.items()}
        self._origin = origin


def new_decoder_state(backend: Backend, rows: int, limit: int, encoder_outputs: Mapping[str, Array]) -> DecoderState:
    """Make empty caches for ``rows`` rows of ``backend``'s graph, at most ``limit`` tokens each.

    ``encoder_outputs`` are read beside them, one row of each array per row.
    """
    if isinstance(backend, SupportsDeviceCache):
        return backend.new_decoder_state(rows, limit, encoder_outputs)
    return HostDecoderState(cache_inputs(backend.graph), rows, limit, encoder_outputs)
