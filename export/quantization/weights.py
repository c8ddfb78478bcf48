"""Weights as integers, each computed once however many candidates of a graph are tried."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.calib.scales import block_scales, quantize_blocks, quantize_weight, weight_scales
from transom.export.passes.linear_layers import Linear

LEVELS = {8: 127, 7: 63}  # of a sign: symmetric, the most negative number unused


class QuantizedWeights:
    """Of graphs and their clones, by the weight itself, not its name. ``bits`` are 8, or 7 for CPUs that saturate."""

    def __init__(self, bits: int) -> None:
        self._levels = LEVELS.get(bits, LEVELS[8])  # of 4 bits there are blocks alone
        self._known: dict[tuple[Any, ...], tuple[NDArray[Any], NDArray[np.float32]]] = {}

    def int8(self, linear: Linear) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """int8 (K, N) and the scales (N,)."""
        key = kernel_of(linear)
        if key not in self._known:
            kernel = linear.kernel()
            scales = weight_scales(kernel, self._levels)
            self._known[key] = quantize_weight(kernel, scales, self._levels), scales
        return self._known[key]

    def blocks(self, linear: Linear, bits: int, block_size: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """As ``MatMulNBits`` wants them: uint8 (N, blocks, bytes) and the scales (N, blocks)."""
        key = (*kernel_of(linear), bits, block_size)
        if key not in self._known:
            kernel = linear.kernel()
            scales = block_scales(kernel, bits, block_size)
            self._known[key] = quantize_blocks(kernel, scales, bits, block_size), scales
        return self._known[key]


def kernel_of(linear: Linear) -> tuple[Any, bool]:
    """The tensor, which clones share and which is equal to itself alone, and which way round it is read."""
    return linear.weight.const_value, linear.stored_transposed
