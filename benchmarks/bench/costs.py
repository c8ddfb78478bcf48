"""Count a workload's work, and the least time that this machine's limits allow for it.

Linear layers count 2 M N K operations, attention 4 S^2 E per layer; norms, softmax and activations count nothing. The
least time is the larger of arithmetic (linear layers at the format's measured rate, attention at the faster of FP32 and
BF16) and reading the weights once at the measured read rate. A model that stays in the caches can be faster.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bench.workloads import VOCABULARY, Workload

BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5}  # of a weight; scales not counted
GIGA = 1e9


@dataclass(frozen=True)
class Cost:
    """Operations of linear layers and of attention, weights that are read, bytes of caches that are read in FP32."""

    linear: float
    attention: float
    weights: float
    cache: float = 0.0


@dataclass(frozen=True)
class Shape:
    """A Transformer of L layers of width E, feed-forward F, S tokens; ``outside`` counts weights used once per row."""

    L: int
    E: int
    F: int

    @property
    def weights(self) -> float:
        return self.L * (4 * self.E**2 + 2 * self.E * self.F)


BASE, CLIP_TEXT, MARIAN = Shape(12, 768, 3072), Shape(12, 512, 2048), Shape(6, 512, 2048)


def forward(shape: Shape, rows: int, S: int, patch: float = 0.0) -> Cost:
    """Count one pass over ``rows`` of S tokens; ``patch`` is the size of the projection of an image's patches."""
    linear = 2 * rows * S * shape.weights + 2 * rows * (S - 1) * patch
    return Cost(linear, 4 * rows * S**2 * shape.E * shape.L, shape.weights + patch)


def cost_of(workload: Workload, part: str) -> Cost:
    """Return the work of one timed part."""
    if workload.model == "bert":
        return forward(BASE, workload.B, workload.S)
    if workload.model == "vit":
        return forward(BASE, workload.B, 197, patch=3 * 16 * 16 * 768)
    if workload.part == "image":
        return forward(BASE, workload.B, 50, patch=3 * 32 * 32 * 768)
    if workload.part == "text":
        return forward(CLIP_TEXT, workload.B, workload.S)
    if workload.model == "gpt":
        head = VOCABULARY["gpt"] * BASE.E
        if part == "prefill":
            read = forward(BASE, 1, workload.S)
            return Cost(read.linear + 2 * head, read.attention / 2, read.weights + head)  # causal: half of the pairs
        length = workload.S + workload.new / 2
        cache = 2 * BASE.L * length * BASE.E
        return Cost(2 * (BASE.weights + head), 2 * cache, BASE.weights + head, 4 * cache)
    encoder = forward(MARIAN, 1, workload.S)
    decoder = MARIAN.weights + MARIAN.L * 4 * MARIAN.E**2 + VOCABULARY["transformer"] * MARIAN.E  # cross-attention too
    steps = workload.new
    linear = encoder.linear + 2 * steps * workload.beams * decoder
    return Cost(linear, encoder.attention, encoder.weights + steps * decoder)


def least_seconds(workload: Workload, part: str, precision: str, limits: Mapping[str, float]) -> float:
    """Return the least time of a part. ``limits``: ``read`` in GB/s; ``fp32``, ``bf16``, ``int8`` in G operations/s."""
    cost = cost_of(workload, part)
    fp32, bf16 = limits["fp32"], limits.get("bf16") or limits["fp32"]
    rates = {"fp32": fp32, "bf16": max(bf16, fp32), "int8": max(limits.get("int8", fp32), fp32)}
    rates["int4"] = rates["int8"]
    attention = fp32 if precision == "fp32" else rates["bf16"]
    arithmetic = cost.linear / rates[precision] + cost.attention / attention
    reading = (cost.weights * BYTES[precision] + cost.cache) / limits["read"]
    return max(arithmetic, reading) / GIGA
