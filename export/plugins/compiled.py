"""Compiled attention kernels: PTX, launch parameters, their JSON. Nothing here compiles, or needs Triton."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from transom.export.plugins.kernel_spec import TileSizes, Variant
from transom.export.plugins.layout import Formula, Layout, product
from transom.runtime.errors import EngineError, one_line

ATTENTION, COMBINE = "attention", "attention_combine"  # the kernels of flash_attention.py
KERNELS_DIR = "TRANSOM_KERNELS"  # names a folder: a kernel that it has is not compiled again, any other is added
SOURCES = ("flash_attention.py", "kernel_spec.py", "layout.py", "compiled.py", "aot.py")  # that decide what a kernel is
ALIGNED = 16  # bytes of a pointer, elements of a stride: Triton then loads 16 bytes at once
INPUTS = ("query", "key", "value", "key_scale", "value_scale", "lengths", "mask", "bias")
POINTERS = (*INPUTS, "output", "split_ml", "split_acc")
RESOURCES = re.compile(r"Used (\d+) registers")
SPILLS = re.compile(r"(\d+) bytes spill stores")


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel: its PTX and its launch parameters.

    ``tensors``, ``integers``, ``outputs`` are the kernel's parameters in this order, and it has no others: pointers,
    32-bit integers, pointers. ``shared`` is dynamic shared memory in bytes: beyond 48 KiB a launcher must request it
    (cuFuncSetAttribute, MAX_DYNAMIC_SHARED_SIZE_BYTES). ``types`` are Triton's, such as "*fp16". Pointers are multiples
    of ALIGNED bytes.
    """

    capability: int
    variant: Variant
    tiles: TileSizes
    name: str
    ptx: bytes
    shared: int
    threads: int
    tensors: tuple[str, ...]
    integers: tuple[str, ...]
    outputs: tuple[str, ...]
    formulas: Mapping[str, Formula] = field(repr=False)
    types: Mapping[str, str] = field(default_factory=dict, repr=False)
    layout: Layout = field(default_factory=Layout)

    def grid(self, B: Any, S: Any, splits: Any = 1) -> tuple[Any, Any, int]:
        """Return the grid for a batch of B rows of S queries; integers or an engine builder's symbols."""
        return self.variant.programs(self.tiles, B, S), splits, 1

    def sizes(self, B: Any, S: Any, T: Any, splits: Any = 1) -> tuple[Any, ...]:
        """Return the values of ``integers``; numbers or an engine builder's symbols.

        Raises EngineError for numbers that do not fit in 32 bits.
        """
        sizes = {"B": B, "S": S, "T": T, "P": splits}
        values = []
        for name in self.integers:
            value: Any = product(self.formulas[name], sizes)
            if isinstance(value, int) and not -(2**31) <= value < 2**31:
                raise EngineError(
                    f"{name} is {value} for B={B}, S={S}, T={T}; expected 32 bits. Use fewer rows at once."
                )
            values.append(value)
        return tuple(values)

    def elements(self, B: int, S: int, T: int, splits: int = 1) -> dict[str, int]:
        """Return the number of elements of every tensor and output."""
        sizes, counts = {"B": B, "S": S, "T": T, "P": splits}, self.layout.elements(self.variant)
        return {name: product(counts[name], sizes) for name in (*self.tensors, *self.outputs)}

    @cached_property
    def assembled(self) -> tuple[int, int]:
        """Registers per thread and bytes spilled per thread, as reported by the assembler that Triton ships."""
        from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.ptx"
            path.write_bytes(self.ptx)
            target = f"--gpu-name={sm_arch_from_capability(self.capability)}"
            command = [get_ptxas(self.capability).path, "-v", target, str(path), "-o", f"{path}.cubin"]
            done = subprocess.run(command, capture_output=True, text=True)
        registers, spills = RESOURCES.search(done.stderr), SPILLS.search(done.stderr)
        if done.returncode or registers is None or spills is None:
            said = one_line(RuntimeError(done.stderr))
            raise EngineError(
                f"ptxas did not take the kernel for SM{self.capability}: {said}. Install triton 3.7 or 3.9."
            )
        return int(registers[1]), int(spills[1])


class CompiledCombine(Compiled):
    """The compiled combine kernel of split-KV: a program for every query of every head."""

    def grid(self, B: Any, S: Any, splits: Any = 1) -> tuple[Any, Any, int]:
        return B * S * self.variant.heads, 1, 1


def kernel_file(kernel: str, capability: int, variant: Variant, layout: Layout, tiles: TileSizes) -> Path | None:
    """Return the file of a kernel in ``$TRANSOM_KERNELS``, by a hash of its source and options; None without one."""
    folder = os.environ.get(KERNELS_DIR)
    if not folder:
        return None
    sources = [Path(__file__).with_name(name).read_text(encoding="utf-8") for name in SOURCES]
    key = [kernel, capability, asdict(variant), asdict(layout), asdict(tiles), sources]
    return Path(folder) / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.json"


def json_from_compiled(compiled: Compiled) -> str:
    """Serialise a kernel for a launcher that compiles nothing; ``compiled_from_json`` reads it."""
    return json.dumps({**asdict(compiled), "ptx": compiled.ptx.decode()})


def compiled_from_json(text: str) -> Compiled:
    """Read back a kernel that ``json_from_compiled`` wrote."""
    fields = json.loads(text)
    kind = Compiled if fields["name"] == ATTENTION else CompiledCombine
    fields |= {name: tuple(fields[name]) for name in ("tensors", "integers", "outputs")}
    fields |= {"variant": Variant(**fields["variant"]), "tiles": TileSizes(**fields["tiles"])}
    fields |= {"layout": Layout(**fields["layout"]), "ptx": fields["ptx"].encode()}
    fields["formulas"] = {name: (factor, sizes) for name, (factor, sizes) in fields["formulas"].items()}
    return kind(**fields)
