"""Keep a decoder's state in ONNX Runtime's memory of a device, where each step reads and writes it.

Growing the caches and reordering their rows goes through host memory: every 128 tokens, and where beams change places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.runtime.backends.base import Array
from transom.runtime.decoder_state import EncoderOutputs
from transom.runtime.graph_spec import Tensor
from transom.runtime.kv_cache import KVCache
from transom.runtime.process_bound import ProcessBound


class OrtDecoderState(ProcessBound):
    """Caches, encoder outputs and constants as OrtValues on ``device``, "cuda" or "cpu"."""

    def __init__(
        self,
        library: ModuleType,
        device: str,
        caches: Sequence[Tensor],
        rows: int,
        limit: int,
        encoder_outputs: Mapping[str, Array],
    ) -> None:
        self._library, self._device = library, device
        self._host = KVCache(caches, rows, limit)  # between _pull and _push it holds the caches' values
        self._rows = rows
        self.revision = 0
        self._caches: dict[str, Any] = {}
        self._constants: dict[str, Any] = {}
        self._encoder_outputs = EncoderOutputs(
            {name: self._on_device(array) for name, array in encoder_outputs.items()}, rows
        )

    @property
    def capacity(self) -> int:
        """Return how many tokens fit in a row now."""
        return self._host.capacity

    @property
    def feeds(self) -> dict[str, Any]:
        """Return OrtValues by name of the input."""
        return {**self._encoder_outputs.arrays, **self._constants, **self._caches}

    def reserve(self, tokens: int) -> None:
        """Make room for ``tokens`` in every row, which will be used."""
        if tokens <= self._host.capacity:
            self._host.reserve(tokens)
            return
        self._pull()
        self._host.reserve(tokens)
        self._push()

    def reorder(self, rows: NDArray[np.intp], ends: NDArray[np.int64] | None = None) -> None:
        """Replace row i by what row ``rows[i]`` was."""
        if np.array_equal(rows, np.arange(self._rows)):
            return
        self._pull()
        self._host.reorder(rows, ends)
        self._push()
        self._encoder_outputs.reorder(rows, lambda value, chosen: self._on_device(value.numpy()[chosen]))
        self._rows = len(rows)

    def set_constants(self, arrays: Mapping[str, Array]) -> None:
        """Copy arrays to the device, where every step reads them; what was there before is freed first."""
        self._constants = {}
        self._constants = {name: self._on_device(array) for name, array in arrays.items()}
        self.revision += 1

    def _pull(self) -> None:
        for name, value in self._caches.items():
            self._host.buffers[name] = value.numpy().copy()

    def _push(self) -> None:
        self.revision += 1
        self._caches = {name: self._on_device(buffer) for name, buffer in self._host.buffers.items()}
        for name, buffer in self._host.buffers.items():  # keep the shape, free the memory
            self._host.buffers[name] = np.broadcast_to(np.zeros((), buffer.dtype), buffer.shape)

    def _on_device(self, array: Array) -> Any:
        value = self._library.OrtValue.ortvalue_from_shape_and_type(list(array.shape), array.dtype, self._device, 0)
        value.update_inplace(np.ascontiguousarray(array))
        return value
