"""Weights as integers, each computed once for all quantised candidates of a graph."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from transom.calib.scales import block_scales, quantize_blocks, quantize_weight, weight_scales

LEVELS = {8: 127, 7: 63}  # of a sign: symmetric, the most negative number unused


class Kernel(Protocol):
    """The weight of a linear layer."""

    @property
    def kernel_id(self) -> Hashable:
        """Return a key that layers share which share a weight, in clones of a graph as well."""
        ...

    def kernel(self) -> NDArray[np.float32]:
        """Return the weight as float32 (K, N)."""
        ...


class QuantizedWeights:
    """Integers and scales by weight, shared by a graph and its clones. ``bits`` are 8, or 7 for CPUs that saturate."""

    def __init__(self, bits: int) -> None:
        self._levels = LEVELS.get(bits, LEVELS[8])  # of 4 bits there are blocks alone
        self._known: dict[Hashable, tuple[NDArray[Any], NDArray[np.float32]]] = {}

    def int8(
        self, weight: Kernel, least: NDArray[np.float32] | None = None
    ) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """Return the weight as int8 (K, N) and its scales (N,), none of them below ``least`` (N,) if that is given."""
        key = weight.kernel_id
        if key not in self._known:
            kernel = weight.kernel()
            scales = weight_scales(kernel, self._levels)
            self._known[key] = quantize_weight(kernel, scales, self._levels), scales
        integers, scales = self._known[key]
        if least is not None and (scales < least).any():
            scales = np.maximum(scales, least)
            integers = quantize_weight(weight.kernel(), scales, self._levels)
        return integers, scales

    def blocks(self, weight: Kernel, bits: int, block_size: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """Return the weight as ``MatMulNBits`` takes it: uint8 (N, blocks, bytes) and the scales (N, blocks)."""
        key = (weight.kernel_id, bits, block_size)
        if key not in self._known:
            kernel = weight.kernel()
            scales = block_scales(kernel, bits, block_size)
            self._known[key] = quantize_blocks(kernel, scales, bits, block_size), scales
        return self._known[key]
