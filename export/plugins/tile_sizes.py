"""How large the kernel's blocks are, by GPU, dtype, head size, and what the attention has.

**No GPU has measured them.** They come from arithmetic on what the assembler says (``preference``): nothing is spilled
that counts, a block's shared memory is what every GPU gives without being asked, an SM has the warps that hide its
latencies, and a block has as many queries as that leaves, for each of them uses every key that is read. One row of a
table serves all its GPUs, and whatever else an attention has.

FP32 is multiplied by the units of FP32, and so is everything on SM75, for Triton has no tensor cores of Turing's: there
operands lie in registers, and blocks are small.
"""

from __future__ import annotations

from dataclasses import dataclass

from transom.export.plugins.flash_attention import NO_MASK
from transom.export.plugins.kernel_spec import Blocks, Variant, width
from transom.runtime.errors import EngineError

KIB = 1024
REGISTERS = 65536  # of an SM, of 32 bits; every GPU below has so many
REGISTER_UNIT = 256  # registers are given to warps in such portions
SHARED = 48 * KIB  # of a block, without asking for more (CUDA C++ Programming Guide, 16.4.3 and later)
SPILLED = 32  # bytes of a thread that do not count: the assembler gives up some registers to have one block more
HIDING = 8  # warps of an SM: two for each of its four schedulers, one computes while one waits


@dataclass(frozen=True)
class Gpu:
    """What an SM has, and what of its shared memory a block takes besides its own."""

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
FIRST_ALONE = 90  # from here on Triton's PTX is of the kind "sm_90a", which no later GPU takes
AMPERE, HOPPER, BLACKWELL = "mma", "wgmma", "tcgen05"  # which instructions of tensor cores Triton uses
FAMILIES = {80: AMPERE, 86: AMPERE, 87: AMPERE, 89: AMPERE, 120: AMPERE, 90: HOPPER, 100: BLACKWELL}
PROMPT, ADDED, STEP = 0, 1, 2  # nothing but lengths and causality; a mask, a bias or integers besides; keys in parts

HALVES = {  # FP16 and BF16, by family and width of a head: a prompt's, one's with something added, a step's
    AMPERE: {
        32: (Blocks(128, 64, 8, 2), Blocks(128, 32, 8, 2), Blocks(16, 128, 4, 2)),
        64: (Blocks(128, 64, 8, 3), Blocks(64, 32, 8, 2), Blocks(16, 64, 4, 3)),
        128: (Blocks(128, 32, 8, 2), Blocks(64, 32, 8, 2), Blocks(16, 64, 4, 2)),
        256: (Blocks(64, 16, 8, 1), Blocks(64, 16, 8, 1), Blocks(16, 32, 4, 2)),
    },
    HOPPER: {
        32: (Blocks(128, 64, 8, 3), Blocks(128, 32, 8, 2), Blocks(16, 64, 4, 3)),
        64: (Blocks(128, 64, 8, 2), Blocks(64, 64, 4, 2), Blocks(16, 64, 4, 3)),
        128: (Blocks(64, 32, 4, 2), Blocks(64, 32, 8, 1), Blocks(16, 64, 4, 2)),
        256: (Blocks(64, 16, 8, 1), Blocks(64, 16, 8, 1), Blocks(16, 32, 4, 2)),
    },
    BLACKWELL: {
        32: (Blocks(128, 64, 8, 3), Blocks(128, 32, 8, 2), Blocks(16, 64, 4, 3)),
        64: (Blocks(128, 32, 8, 2), Blocks(64, 64, 4, 2), Blocks(16, 64, 4, 3)),
        128: (Blocks(64, 32, 8, 1), Blocks(64, 32, 8, 1), Blocks(16, 64, 4, 2)),
        256: (Blocks(32, 32, 4, 1), Blocks(32, 16, 4, 2), Blocks(16, 32, 4, 2)),
    },
}
TF32 = {
    32: (Blocks(64, 32, 8, 2), Blocks(64, 32, 8, 2), Blocks(16, 32, 4, 3)),
    64: (Blocks(64, 32, 8, 1), Blocks(64, 16, 4, 2), Blocks(16, 32, 4, 3)),
    128: (Blocks(32, 16, 4, 1), Blocks(32, 16, 4, 1), Blocks(16, 32, 4, 2)),
    256: (Blocks(16, 16, 8, 1), Blocks(16, 16, 8, 1), Blocks(16, 16, 8, 1)),
}
FP32_UNITS = {
    32: (Blocks(64, 32, 8, 1), Blocks(64, 32, 8, 1), Blocks(16, 64, 8, 1)),
    64: (Blocks(64, 32, 8, 1), Blocks(64, 32, 8, 1), Blocks(16, 64, 8, 1)),
    128: (Blocks(32, 16, 8, 1), Blocks(32, 32, 8, 1), Blocks(16, 32, 8, 1)),
    256: (Blocks(16, 16, 8, 1), Blocks(16, 16, 8, 1), Blocks(16, 16, 8, 1)),
}
TURING = {  # FP16 on those units
    32: (Blocks(64, 32, 8, 1), Blocks(64, 32, 8, 1), Blocks(16, 64, 8, 1)),
    64: (Blocks(64, 32, 8, 1), Blocks(32, 32, 8, 2), Blocks(16, 64, 8, 1)),
    128: (Blocks(32, 32, 8, 2), Blocks(32, 32, 8, 2), Blocks(16, 32, 8, 1)),
    256: (Blocks(32, 16, 8, 1), Blocks(32, 16, 8, 1), Blocks(16, 32, 8, 1)),
}


def blocks_for(capability: int, variant: Variant) -> Blocks:
    """For a compute capability such as 89. Raises EngineError for one that the table does not have."""
    if capability not in GPUS:
        known = ", ".join(map(str, GPUS))
        raise EngineError(f"there is no kernel for compute capability {capability!r:.20}; expected one of {known}.")
    added = variant.mask != NO_MASK or variant.bias or variant.int8
    column = STEP if variant.split else ADDED if added else PROMPT
    row = max(32, width(variant.size))
    if variant.dtype == "fp32":
        table = TF32 if variant.precision == "tf32" else FP32_UNITS
    else:
        table = TURING if capability == 75 else HALVES[FAMILIES[capability]]
    return table[row][column]


def portable(capability: int) -> int:
    """The one of ``GPUS`` whose PTX a GPU of ``capability`` runs: its own, or the greatest that later ones take.

    From SM90 on the PTX is for that very GPU. Raises EngineError for what is older than all of them.
    """
    if capability in GPUS:
        return capability
    older = [known for known in GPUS if known < min(capability, FIRST_ALONE)]
    if not older:
        raise EngineError(f"there is no kernel for SM{capability}; expected SM{min(GPUS)} or later. Use device='cuda'.")
    return max(older)


def resident_warps(gpu: Gpu, warps: int, registers: int, shared: int) -> int:
    """How many warps an SM runs at once, of blocks of ``warps`` with ``registers`` a thread and ``shared`` bytes.

    A block is there whole or not: by the warps that an SM has, its blocks, its registers, its shared memory.
    """
    of_a_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    limits = [gpu.warps // warps, gpu.blocks, REGISTERS // of_a_warp // warps]
    if shared + gpu.reserved:
        limits.append(gpu.shared // (shared + gpu.reserved))
    return min(limits) * warps


def preference(gpu: Gpu, blocks: Blocks, registers: int, spilled: int, shared: int) -> tuple[int, ...]:
    """Larger is better: nothing spilled, shared memory without asking, warps that hide latencies, queries, keys."""
    warps = resident_warps(gpu, blocks.warps, registers, shared)
    return (
        -max(0, spilled - SPILLED),
        int(shared <= SHARED),
        min(warps, HIDING),
        blocks.m,
        blocks.n * blocks.stages,
        warps,
    )
