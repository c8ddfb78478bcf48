"""How large the kernel's blocks are, by SM, dtype and head size.

Not measured on a GPU: the largest of which the assembler spills next to nothing, with a mask, a bias, lengths and
causality at once and with none of them, and whose shared memory the SM has. FP32 is multiplied on FP32 units, and so is
everything on SM75: there registers are what blocks are made of.
"""

from __future__ import annotations

from transom.export.plugins.launch import Blocks, width

SHARED_KIB = {75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 120: 99}  # of a block (CUDA C++ guide)

PRODUCTS_ON_TENSOR_CORES = {  # width of a head: (a prompt's, a step's)
    16: (Blocks(128, 32, 8, 2), Blocks(16, 64, 4, 2)),
    32: (Blocks(128, 32, 8, 2), Blocks(16, 64, 4, 2)),
    64: (Blocks(64, 32, 8, 1), Blocks(16, 64, 4, 2)),
    128: (Blocks(64, 32, 8, 1), Blocks(16, 64, 4, 2)),
    256: (Blocks(32, 16, 4, 1), Blocks(16, 16, 4, 1)),
}
PRODUCTS_IN_FP32 = {
    16: (Blocks(32, 32, 8, 1), Blocks(16, 64, 4, 2)),
    32: (Blocks(32, 32, 8, 1), Blocks(16, 64, 4, 2)),
    64: (Blocks(64, 32, 8, 1), Blocks(16, 64, 4, 2)),
    128: (Blocks(16, 16, 8, 1), Blocks(16, 32, 4, 2)),
    256: (Blocks(16, 16, 4, 1), Blocks(16, 16, 4, 1)),
}
HALF_ON_TURING = {
    16: (Blocks(64, 32, 8, 1), Blocks(16, 64, 4, 2)),
    32: (Blocks(64, 32, 8, 1), Blocks(16, 64, 4, 2)),
    64: (Blocks(64, 32, 8, 1), Blocks(16, 32, 4, 2)),
    128: (Blocks(32, 16, 4, 1), Blocks(16, 16, 4, 1)),
    256: (Blocks(16, 16, 4, 1), Blocks(16, 16, 4, 1)),
}


def blocks_for(capability: int, dtype: str, size: int, *, step: bool) -> Blocks:
    """Of a capability such as 89, "fp32", "fp16" or "bf16", and heads of ``size``; ``step`` for keys in parts."""
    table = PRODUCTS_IN_FP32 if dtype == "fp32" else HALF_ON_TURING if capability == 75 else PRODUCTS_ON_TENSOR_CORES
    return table[width(size)][step]
