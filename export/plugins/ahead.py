"""The kernel compiled for a GPU that is not here: PTX, what a launch of it takes, and what the assembler says of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transom.export.plugins.blocks import blocks_for
from transom.export.plugins.launch import Blocks, width

CAPABILITIES = (75, 80, 86, 87, 89, 90, 100, 120)
WARP = 32  # threads
RESOURCES = re.compile(r"Used (\d+) registers")
SPILLS = re.compile(r"(\d+) bytes spill stores")


@dataclass(frozen=True)
class Variant:
    """What is constant in one compilation; ``size`` is that of a head."""

    dtype: str
    size: int
    causal: bool = False
    lengths: bool = False
    mask: int = 0
    bias: bool = False
    int8: bool = False
    split: bool = False
    precision: str = "ieee"


@dataclass(frozen=True)
class Compiled:
    """A kernel's PTX; ``shared`` bytes of shared memory, registers of a thread, bytes spilled to local memory."""

    name: str
    ptx: bytes
    shared: int
    warps: int
    registers: int
    spilled: int


def compile_attention(capability: int, variant: Variant, blocks: Blocks | None = None) -> Compiled:
    """PTX of one variant for one compute capability, as 89. No GPU is needed."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from transom.export.plugins import attention as kernels

    blocks = blocks or blocks_for(capability, variant.dtype, variant.size, step=variant.split)
    kernel = kernels.attention_part if variant.split else kernels.attention
    constants = {
        "CAUSAL": variant.causal,
        "LENGTHS": variant.lengths,
        "MASK": variant.mask,
        "BIAS": variant.bias,
        "INT8": variant.int8,
        "BLOCK_M": blocks.m,
        "BLOCK_N": blocks.n,
        "BLOCK_D": width(variant.size),
        "PRECISION": variant.precision,
        "WIDEN": False,
    }
    signature = signature_of(kernel.arg_names, variant, constants)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    made = triton.compile(source, target=GPUTarget("cuda", capability, WARP), options=options)
    ptx = made.asm["ptx"]
    registers, spilled = assembled(ptx, capability)
    return Compiled(made.metadata.name, ptx.encode(), int(made.metadata.shared), blocks.warps, registers, spilled)


def signature_of(names: list[str], variant: Variant, constants: Mapping[str, Any]) -> dict[str, str]:
    """Triton's type of every argument: pointers, 32-bit sizes and strides, an FP32 scale."""
    stored = "i8" if variant.int8 else variant.dtype
    pointers = {"query": variant.dtype, "output": variant.dtype, "key": stored, "value": stored, "bias": variant.dtype}
    pointers |= {"mask": "i1" if variant.mask == 1 else variant.dtype, "lengths": "i32"}
    pointers |= {"key_scale": "fp32", "value_scale": "fp32", "sums": "fp32", "parts": "fp32"}

    def kind(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in pointers:
            return f"*{pointers[name]}"
        return "fp32" if name == "scale" else "i32"

    return {name: kind(name) for name in names}


def assembled(ptx: str, capability: int) -> tuple[int, int]:
    """(registers of a thread, bytes spilled) by the assembler that Triton brings."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as made:
        path = Path(made) / "kernel.ptx"
        path.write_text(ptx)
        suffix = "a" if capability >= 90 else ""
        command = [
            get_ptxas(capability).path,
            "-v",
            f"--gpu-name=sm_{capability}{suffix}",
            str(path),
            "-o",
            "/dev/null",
        ]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spills = RESOURCES.search(said), SPILLS.search(said)
    return int(registers[1]) if registers else 0, int(spills[1]) if spills else 0
