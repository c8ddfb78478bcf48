"""The golden values: inputs, PyTorch's outputs and the bundle's own, for `transom selftest` on the device."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from safetensors.numpy import save

from transom.runtime.backends.base import Array

CASE_BYTES = 4 << 20  # of one case
TOTAL_BYTES = 12 << 20  # of all: the device checks them, it should not have to store them


class Golden:
    """Cases in the order they come, as long as they are small; the first is always kept, and a generation is."""

    def __init__(self) -> None:
        self._tensors: dict[str, Array] = {}
        self._bytes = 0

    def offer(
        self, case: str, inputs: Mapping[str, Array], sides: Mapping[str, Mapping[str, Array]], *, always: bool = False
    ) -> None:
        """Keep a case as ``<case>/input|<side>/<tensor>`` if it fits, or ``always``.

        ``sides`` are those of transom.runtime.golden_reference.
        """
        tensors = {
            f"{case}/{side}/{name}": np.ascontiguousarray(array)  # safetensors writes the memory as it lies
            for side, arrays in {"input": inputs, **sides}.items()
            for name, array in arrays.items()
        }
        size = sum(array.nbytes for array in tensors.values())
        if not (always or self.fits(size)):
            return
        self._tensors |= tensors
        self._bytes += size

    def fits(self, size: int) -> bool:
        """Whether ``size`` bytes more may be kept: always those of the first case."""
        return not self._tensors or (size <= CASE_BYTES and self._bytes + size <= TOTAL_BYTES)

    def steps(self, step_bytes: int, sides: int) -> int:
        """How many steps of ``step_bytes`` on each of ``sides`` fit into one case; at least one."""
        return max(1, CASE_BYTES // (sides * step_bytes + 1))

    def to_bytes(self) -> bytes:
        return save(self._tensors)
