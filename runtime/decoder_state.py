"""Keep what a decoder's rows need between steps: caches, recurrent state, and the encoder's outputs beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from transom.runtime.backends.base import Array, Backend
from transom.runtime.feeds import storage
from transom.runtime.graph_spec import Tensor, cache_inputs, recurrent_inputs
from transom.runtime.kv_cache import KVCache


class DecoderState(Protocol):
    """State of R rows and what their encoder gave. Belongs to one generation, not to be shared by threads.

    ``revision`` is another number whenever ``feeds`` has other tensors than before: not where values changed alone.
    """

    @property
    def revision(self) -> int: ...

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

    def reorder(self, rows: NDArray[np.intp], ends: NDArray[np.int64] | None = None) -> None:
        """Replace row i by what row ``rows[i]`` was; there are ``len(rows)`` from now on.

        ``ends`` (R,) are the positions from which on the rows are written next, where the caller knows them.
        """
        ...

    def set_constants(self, arrays: Mapping[str, Array]) -> None:
        """Let the graph read these arrays, by name of the input, in place of those that were set before.

        ``reorder`` leaves them alone, and no step writes them: what is on a device was copied there once.
        """
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
        self._constants: dict[str, Array] = {}
        self._sets = 0  # calls of set_constants

    @property
    def revision(self) -> int:
        return self.cache.moves + self._encoder_outputs.moves + self._sets

    @property
    def capacity(self) -> int:
        return self.cache.capacity

    @property
    def feeds(self) -> dict[str, Array]:
        return {**self._encoder_outputs.arrays, **self._constants, **self.cache.buffers}

    def reserve(self, tokens: int) -> None:
        self.cache.reserve(tokens)

    def reorder(self, rows: NDArray[np.intp], ends: NDArray[np.int64] | None = None) -> None:
        self.cache.reorder(rows, ends)
        self._encoder_outputs.reorder(rows, lambda array, chosen: array[chosen])

    def set_constants(self, arrays: Mapping[str, Array]) -> None:
        self._constants = dict(arrays)
        self._sets += 1


class EncoderOutputs:
    """Arrays that rows read and never write, one row of each per row: the encoder's keys and values, and its mask.

    ``moves`` counts how often other arrays took their place.
    """

    def __init__(self, arrays: Mapping[str, Any], rows: int, alike: int = 1) -> None:
        """Begin with ``arrays`` of ``rows`` rows, of which ``alike`` neighbours each have the same values."""
        self.arrays = dict(arrays)
        self._origin = [row // alike for row in range(rows)]  # the original row that each row reads
        self.moves = 0

    def reorder(self, rows: NDArray[np.intp], take: Callable[[Any, NDArray[np.intp]], Any]) -> None:
        """Replace row i by what row ``rows[i]`` was; ``take(array, rows)`` returns an array of those rows."""
        origin = [self._origin[row] for row in rows.tolist()]
        if origin != self._origin:  # beams of one source read the same
            self.arrays = {name: take(array, rows) for name, array in self.arrays.items()}
            self.moves += 1
        self._origin = origin


class RecurrentDecoderState:
    """A decoder's state of which a part is recurrent: arrays (R, ...) of host memory that every step replaces.

    They are small, and begin as the encoder's outputs of their names, zeros where it has none. ``others`` keeps what
    the graph reads beside them.
    """

    def __init__(
        self, others: DecoderState, tensors: Sequence[Tensor], rows: int, initial: Mapping[str, Array]
    ) -> None:
        self._others = others
        self._arrays = {
            tensor.name: np.array(initial[tensor.name])
            if tensor.name in initial
            else np.zeros((rows, *(int(size) for size in tensor.shape[1:])), storage(tensor))
            for tensor in tensors
        }
        self._moves = 0

    @property
    def revision(self) -> int:
        return self._others.revision + self._moves

    @property
    def capacity(self) -> int:
        return self._others.capacity

    @property
    def feeds(self) -> dict[str, Any]:
        return {**self._others.feeds, **self._arrays}

    def reserve(self, tokens: int) -> None:
        self._others.reserve(tokens)

    def reorder(self, rows: NDArray[np.intp], ends: NDArray[np.int64] | None = None) -> None:
        self._others.reorder(rows, ends)
        chosen = {name: array[rows] for name, array in self._arrays.items()}
        if all(len(array) == len(rows) for array in self._arrays.values()):  # the arrays that are bound stay
            for name, array in self._arrays.items():
                array[:] = chosen[name]
        else:
            self._arrays = chosen
            self._moves += 1

    def set_constants(self, arrays: Mapping[str, Array]) -> None:
        self._others.set_constants(arrays)


def new_decoder_state(backend: Backend, rows: int, limit: int, encoder_outputs: Mapping[str, Array]) -> DecoderState:
    """Make the state of ``rows`` rows of ``backend``'s graph before the first token, of at most ``limit`` each.

    ``encoder_outputs`` have one row of each array per row: recurrent state begins as those of its names, the others
    are read beside the state.
    """
    recurrent = recurrent_inputs(backend.graph)
    initial = {tensor.name for tensor in recurrent} & encoder_outputs.keys()
    read = {name: array for name, array in encoder_outputs.items() if name not in initial}
    if isinstance(backend, SupportsDeviceCache):
        state = backend.new_decoder_state(rows, limit, read)
    else:
        state = HostDecoderState(cache_inputs(backend.graph), rows, limit, read)
    if not recurrent:
        return state
    return RecurrentDecoderState(state, recurrent, rows, {name: encoder_outputs[name] for name in initial})
