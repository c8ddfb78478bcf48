"""What a decoder's rows keep between steps: their caches, and what the graph reads beside them at every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from transom.runtime.backends.base import Array, Backend
from transom.runtime.graph_spec import Tensor
from transom.runtime.kv_cache import KVCache


class DecoderState(Protocol):
    """Caches of R rows and what their encoder gave. Belongs to one generation, not to be shared by threads."""

    @property
    def capacity(self) -> int:
        """Tokens that a row has room for now."""
        ...

    @property
    def feeds(self) -> Mapping[str, Any]:
        """What the graph is to be fed: arrays, or what the backend that made this state takes for them."""
        ...

    def reserve(self, tokens: int) -> None:
        """Room for ``tokens`` in every row, which will be used."""
        ...

    def reorder(self, rows: NDArray[np.intp]) -> None:
        """Row i goes on from what row ``rows[i]`` was; there are ``len(rows)`` from now on."""
        ...


@runtime_checkable
class SupportsDeviceCache(Protocol):
    """A backend whose device keeps the state, so that no step carries it there and back."""

    def new_decoder_state(self, rows: int, limit: int, encoder_outputs: Mapping[str, Array]) -> DecoderState: ...


class HostDecoderState:
    """State in numpy arrays."""

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
    """What rows read and never write, one row of each array per row: the encoder's keys and values, and its mask."""

    def __init__(self, arrays: Mapping[str, Any], rows: int) -> None:
        self.arrays = dict(arrays)
        self._origin = np.arange(rows)  # the original row that each row reads

    def reorder(self, rows: NDArray[np.intp], take: Callable[[Any, NDArray[np.intp]], Any]) -> None:
        """``take(array, rows)`` gives the array of those rows."""
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
    return HostDecoderState(cache_inputs(backend.graph.inputs, backend.graph.outputs), rows, limit, encoder_outputs)


def cache_inputs(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> list[Tensor]:
    """The inputs that the graph writes."""
    written = {tensor.aliases for tensor in outputs}
    return [tensor for tensor in inputs if tensor.name in written]
