"""Tile sizes of the attention kernel, by GPU, dtype, head size and features of the attention.

**Not measured on a GPU.** They are derived from the assembler's report (``preference``): no spills that count, no more
shared memory per block than every GPU grants by default, enough warps on an SM to hide latencies, and as many queries
per block as that leaves, for each of them uses every key that is loaded. One row of a table serves all its GPUs.

FP32 runs on the FP32 units, and so does everything on SM75, for Triton does not support Turing's tensor cores: there
operands are held in registers, and tiles are small.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from transom.export.plugins.kernel_spec import LEAST, NO_MASK, TileSizes, Variant, padded_size
from transom.runtime.errors import EngineError

KIB = 1024
REGISTERS = 65536  # of an SM, of 32 bits; every GPU below has so many
REGISTER_UNIT = 256  # allocation granularity of a warp's registers
SHARED = 48 * KIB  # of a block, without opting in to more (CUDA C++ Programming Guide, 16.4.3 and later)
SPILLED = 32  # bytes per thread that do not count: the assembler spills a little to fit one more block
HIDING = 8  # warps that hide latency: two for each of an SM's four schedulers, one computes while one waits


@dataclass(frozen=True)
class Gpu:
    """Limits of an SM; ``reserved`` is the shared memory in bytes that CUDA adds to each block."""

    warps: int
    blocks: int
    shared: int
    reserved: int = KIB


GPUS = {  # by compute capability (CUDA C++ Programming Guide, "Technical Specifications per Compute Capability")
    75: Gpu(32, 16, 64 * KIB, 0),
    80: Gpu(64, 32, 164 * KIB),
    86: Gpu(48, 16, 100 * KIB),
    87: Gpu(48, 16, 164 * KIB),
    89: Gpu(48, 24, 100 * KIB),
    90: Gpu(64, 32, 228 * KIB),
    100: Gpu(64, 32, 228 * KIB),
    120: Gpu(48, 24, 100 * KIB),
}
FEWEST_QUERIES = 64  # that a program is halved to for the last of many queries; fewer where there are no more
FIRST_ARCH_SPECIFIC = 90  # from here on Triton's PTX is architecture-specific ("sm_90a"): no later GPU runs it
AMPERE, HOPPER, BLACKWELL = "mma", "wgmma", "tcgen05"  # tensor-core instructions that Triton uses
FAMILIES = {80: AMPERE, 86: AMPERE, 87: AMPERE, 89: AMPERE, 120: AMPERE, 90: HOPPER, 100: BLACKWELL}
PROMPT, ADDED, STEP = 0, 1, 2  # only lengths and causality; also a mask, a bias or INT8 keys; split-KV

HALVES = {  # FP16 and BF16, by instructions and padded head size: PROMPT, ADDED, STEP
    AMPERE: {
        32: (TileSizes(128, 64, 8, 2), TileSizes(128, 32, 8, 2), TileSizes(16, 128, 4, 2)),
        64: (TileSizes(128, 64, 8, 3), TileSizes(64, 32, 8, 2), TileSizes(16, 64, 4, 3)),
        128: (TileSizes(128, 32, 8, 2), TileSizes(64, 32, 8, 2), TileSizes(16, 64, 4, 2)),
        256: (TileSizes(64, 16, 8, 1), TileSizes(64, 16, 8, 1), TileSizes(16, 32, 4, 2)),
    },
    HOPPER: {
        32: (TileSizes(128, 64, 8, 3), TileSizes(128, 32, 8, 2), TileSizes(16, 64, 4, 3)),
        64: (TileSizes(128, 64, 8, 2), TileSizes(64, 64, 4, 2), TileSizes(16, 64, 4, 3)),
        128: (TileSizes(64, 32, 4, 2), TileSizes(64, 32, 8, 1), TileSizes(16, 64, 4, 2)),
        256: (TileSizes(64, 16, 8, 1), TileSizes(64, 16, 8, 1), TileSizes(16, 32, 4, 2)),
    },
    BLACKWELL: {
        32: (TileSizes(128, 64, 8, 3), TileSizes(128, 32, 8, 2), TileSizes(16, 64, 4, 3)),
        64: (TileSizes(128, 32, 8, 2), TileSizes(64, 64, 4, 2), TileSizes(16, 64, 4, 3)),
        128: (TileSizes(64, 32, 8, 1), TileSizes(64, 32, 8, 1), TileSizes(16, 64, 4, 2)),
        256: (TileSizes(32, 32, 4, 1), TileSizes(32, 16, 4, 2), TileSizes(16, 32, 4, 2)),
    },
}
TF32 = {
    32: (TileSizes(64, 32, 8, 2), TileSizes(64, 32, 8, 2), TileSizes(16, 32, 4, 3)),
    64: (TileSizes(64, 32, 8, 1), TileSizes(64, 16, 4, 2), TileSizes(16, 32, 4, 3)),
    128: (TileSizes(32, 16, 4, 1), TileSizes(32, 16, 4, 1), TileSizes(16, 32, 4, 2)),
    256: (TileSizes(16, 16, 8, 1), TileSizes(16, 16, 8, 1), TileSizes(16, 16, 8, 1)),
}
FP32_UNITS = {
    32: (TileSizes(64, 32, 8, 1), TileSizes(64, 32, 8, 1), TileSizes(16, 64, 8, 1)),
    64: (TileSizes(64, 32, 8, 1), TileSizes(64, 32, 8, 1), TileSizes(16, 64, 8, 1)),
    128: (TileSizes(32, 16, 8, 1), TileSizes(32, 32, 8, 1), TileSizes(16, 32, 8, 1)),
    256: (TileSizes(16, 16, 8, 1), TileSizes(16, 16, 8, 1), TileSizes(16, 16, 8, 1)),
}
TURING = {  # FP16 on the FP32 units
    32: (TileSizes(64, 32, 8, 1), TileSizes(64, 32, 8, 1), TileSizes(16, 64, 8, 1)),
    64: (TileSizes(64, 32, 8, 1), TileSizes(32, 32, 8, 2), TileSizes(16, 64, 8, 1)),
    128: (TileSizes(32, 32, 8, 2), TileSizes(32, 32, 8, 2), TileSizes(16, 32, 8, 1)),
    256: (TileSizes(32, 16, 8, 1), TileSizes(32, 16, 8, 1), TileSizes(16, 32, 8, 1)),
}


def tile_sizes_for(capability: int, variant: Variant) -> TileSizes:
    """Return the tile sizes for a compute capability such as 89. Raises EngineError for one that is not in ``GPUS``."""
    if capability not in GPUS:
        known = ", ".join(map(str, GPUS))
        raise EngineError(f"there is no kernel for compute capability {capability!r:.20}; expected one of {known}.")
    added = variant.mask != NO_MASK or variant.bias or variant.int8
    column = STEP if variant.split else ADDED if added else PROMPT
    row = max(32, padded_size(variant.size))
    if variant.dtype == "fp32":
        table = TF32 if variant.precision == "tf32" else FP32_UNITS
    else:
        table = TURING if capability == 75 else HALVES[FAMILIES[capability]]
    return table[row][column]


def fitted(tiles: TileSizes, queries: int | None, keys: int | None) -> TileSizes:
    """Return ``tiles`` for the number of queries and of keys, which windows of an image fix; None for an unknown one.

    Queries are halved while fewer are then computed for nothing: 49 take 64 instead of 128, 144 three times 64 instead
    of twice 128. Keys are halved while one block holds them all. Warps are halved with each: a thread keeps its work.
    """
    m, n = tiles.m, tiles.n
    while queries is not None and m > LEAST and (m > FEWEST_QUERIES or queries <= m // 2):
        if -(-queries // m) * m == -(-queries // (m // 2)) * (m // 2):
            break
        m //= 2
    while keys is not None and n > LEAST and keys <= n // 2:
        n //= 2
    return replace(tiles, m=m, n=n, warps=max(1, tiles.warps * m * n // (tiles.m * tiles.n)))


def portable(capability: int) -> int:
    """Return the compute capability in ``GPUS`` whose PTX a GPU of ``capability`` runs.

    That is its own, or the greatest one that is not architecture-specific. Raises EngineError for a GPU older than all.
    """
    if capability in GPUS:
        return capability
    older = [known for known in GPUS if known < min(capability, FIRST_ARCH_SPECIFIC)]
    if not older:
        raise EngineError(f"there is no kernel for SM{capability}; expected SM{min(GPUS)} or later. Use device='cuda'.")
    return max(older)


def resident_warps(gpu: Gpu, warps: int, registers: int, shared: int) -> int:
    """Return the resident warps of an SM, for blocks of ``warps`` with ``registers`` per thread and ``shared`` bytes.

    Whole blocks only; limited by the SM's warps, blocks, registers and shared memory.
    """
    per_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    limits = [gpu.warps // warps, gpu.blocks, REGISTERS // per_warp // warps]
    if shared + gpu.reserved:
        limits.append(gpu.shared // (shared + gpu.reserved))
    return min(limits) * warps


def preference(gpu: Gpu, tiles: TileSizes, registers: int, spilled: int, shared: int) -> tuple[int, ...]:
    """Return a sort key, larger is better: no spills, default shared memory, latency-hiding warps, queries, keys."""
    warps = resident_warps(gpu, tiles.warps, registers, shared)
    return (
        -max(0, spilled - SPILLED),
        int(shared <= SHARED),
        min(warps, HIDING),
        tiles.m,
        tiles.n * tiles.stages,
        warps,
    )
