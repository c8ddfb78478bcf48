"""CUDA's driver for machines that have none, as far as it loads PTX and launches it; memory is ``emulated_gpu``'s.

A launch reads its parameters as the driver does: one address for each ``.param`` that the PTX declares, at which lies
a value of the declared width. What then runs is not the PTX but the kernel it was compiled from, under Triton's
interpreter, with what was read, and every access to memory is compared with what is allocated. Which parameter is which
the emulation takes from the order of the kernel's own arguments, not from what the launcher says.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from emulated_gpu import GARBAGE, STREAMS, EmulatedCuda
from transom.export.plugins import flash_attention as kernels
from transom.export.plugins.compiled import POINTERS, Compiled, CompiledCombine, compiled_from_json
from transom.runtime.backends.cuda import Memory

TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "i8": torch.int8, "i32": torch.int32}
TYPES |= {"i1": torch.bool}
WIDTHS = {"u64": "<Q", "u32": "<i"}  # Triton's integers are signed, whatever PTX calls them
GIVEN, MOST_SHARED = 48 << 10, 99 << 10  # bytes of shared memory: without asking, and at most, on SM89
ALIGNED = 256  # bytes, as cudaMalloc's
FIRST_ARCH_SPECIFIC = 90  # PTX for this and later SMs runs nowhere else
SCRIPT = """
import sys
from transom.export.plugins.aot import attention_ptx, combine_ptx
from transom.export.plugins.compiled import json_from_compiled
from transom.export.plugins.kernel_spec import TileSizes, Variant
from transom.export.plugins.layout import Layout
import json
for kind, capability, variant, layout, tiles in json.loads(sys.stdin.read()):
    about = capability, Variant(**variant), Layout(**layout)
    kernel = combine_ptx(*about) if kind == "combine" else attention_ptx(*about, tiles and TileSizes(*tiles))
    print(json_from_compiled(kernel))
"""


def compile_elsewhere(
    wanted: list[tuple[str, int, Mapping[str, Any], Mapping[str, str], Any]], cache: Path
) -> list[Compiled]:
    """Kernels, in a process of its own, for this one interprets them.

    Each is "attention" or "combine", for an SM, of a variant, a layout, and tile sizes or None for the table's.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT],
        input=json.dumps(wanted),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [compiled_from_json(line) for line in done.stdout.splitlines()]


class Memories(EmulatedCuda):
    """Aligned as cudaMalloc's, and cudaFree of nothing, which makes a context."""

    def _allocate(self, size: int) -> int:
        buffer = (ctypes.c_uint8 * (size + ALIGNED))()
        ctypes.memset(buffer, GARBAGE, size + ALIGNED)
        address = -(-ctypes.addressof(buffer) // ALIGNED) * ALIGNED
        block: Any = (ctypes.c_uint8 * size).from_address(address)
        block.buffer = buffer  # as long as the block
        self.blocks[address] = block
        return address

    def cudaFree(self, address: int) -> Any:
        return super().cudaFree(address) if address else self._fine()


@dataclass
class Function:
    """An entry of loaded PTX: its parameters' types in order, its threads, what shared memory was asked for."""

    name: str
    parameters: tuple[str, ...]
    threads: int
    image: bytes
    shared: int = GIVEN


@dataclass
class EmulatedDriver:
    """``cuda.bindings.driver``; constants are the real ones. ``sources`` are the kernels behind PTX that may come."""

    real: Any
    cuda: Memories
    sources: list[Compiled] = field(default_factory=list)
    launched: list[dict[str, Any]] = field(default_factory=list)  # what the parameters were, by name
    modules: dict[int, Function] = field(default_factory=dict)
    handles: Iterator[int] = field(default_factory=lambda: count(1))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def _code(self, name: str = "CUDA_SUCCESS", *values: Any) -> tuple[Any, ...]:
        return (getattr(self.real.CUresult, name), *values)

    def cuModuleLoadDataEx(self, image: bytes, number: int, options: list[Any], values: list[Any]) -> Any:
        assert [option.name for option in options] == ["CU_JIT_ERROR_LOG_BUFFER", "CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES"]
        assert number == len(options) == len(values)
        log, room = values
        assert image.endswith(b"\0"), "the driver would read on"
        text = image[:-1].decode()
        entry = re.search(r"\.entry (\w+)\((.*?)\)", text, re.DOTALL)
        target, threads = re.search(r"\.target sm_(\d+)(a?)", text), re.search(r"\.reqntid (\d+)", text)
        if entry is None or target is None or threads is None:
            said = b"ptxas application ptx input, line 1; fatal : Missing .version directive\n\0"[:room]
            log[: len(said)] = said
            return self._code("CUDA_ERROR_INVALID_PTX", None)
        here = 10 * self.cuda.capability[0] + self.cuda.capability[1]
        if int(target[1]) > here or (target[2] and int(target[1]) != here):
            return self._code("CUDA_ERROR_NO_BINARY_FOR_GPU", None)
        parameters = tuple(re.findall(r"\.param \.(\w+)", entry[2]))
        handle = next(self.handles)
        self.modules[handle] = Function(entry[1], parameters, int(threads[1]), image[:-1])
        return self._code("CUDA_SUCCESS", handle)

    def cuModuleUnload(self, module: int) -> Any:
        del self.modules[module]
        return self._code()

    def cuModuleGetFunction(self, module: int, name: bytes) -> Any:
        function = self.modules[module]
        if function.name != name.decode():
            return self._code("CUDA_ERROR_NOT_FOUND", None)
        return self._code("CUDA_SUCCESS", function)

    def cuFuncSetAttribute(self, function: Function, attribute: Any, value: int) -> Any:
        assert attribute.name == "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES"
        if value > MOST_SHARED:
            return self._code("CUDA_ERROR_INVALID_VALUE")
        function.shared = value
        return self._code()

    def cuLaunchKernel(
        self, function: Function, x: int, y: int, z: int, threads: int, more: int, most: int, shared: int,
        stream: int, parameters: int, extra: int,
    ) -> Any:  # fmt: skip
        fits = 0 < x < 2**31 and 0 < y < 2**16 and 0 < z < 2**16 and shared <= function.shared
        if not fits or (threads, more, most, extra) != (function.threads, 1, 1, 0):
            return self._code("CUDA_ERROR_INVALID_VALUE")
        values = []
        for place, kind in enumerate(function.parameters):
            (at,) = struct.unpack("<Q", memory_at(parameters + 8 * place, 8))
            (value,) = struct.unpack(WIDTHS[kind], memory_at(at, struct.calcsize(WIDTHS[kind])))
            values.append(value)
        source = next(source for source in self.sources if source.ptx == function.image)

        def run() -> bool:
            return self._interpret(source, values, (x, y, z))

        if stream:
            STREAMS[stream].put(run)
        elif not run():
            return self._code("CUDA_ERROR_ILLEGAL_ADDRESS")
        return self._code()

    def _interpret(self, source: Compiled, values: list[int], grid: tuple[int, int, int]) -> bool:
        """The kernel that ``source`` was compiled from; whether it kept to the memory that is allocated."""
        combine = isinstance(source, CompiledCombine)
        kernel = kernels.attention_combine if combine else kernels.attention
        variant, layout = source.variant, source.layout
        constants = variant.combine_constants() if combine else variant.constants(source.tiles)
        strides = layout.strides(variant, combine=combine)
        present = {*source.types, *(name for name, (_, sizes) in strides.items() if sizes)}
        names = [name for name in kernel.arg_names if name in present]
        if len(names) != len(values):
            return False
        given = dict(zip(names, values, strict=True))
        self.launched.append(given)
        arguments: dict[str, Any] = {}
        for name in kernel.arg_names:
            if name in source.types:
                arguments[name] = self._tensor_at(given[name], TYPES[source.types[name].removeprefix("*")])
                if arguments[name] is None:
                    return False
            elif name not in constants:
                fixed = None if name in POINTERS else strides.get(name, (0,))[0]
                arguments[name] = given.get(name, fixed)
        with only_inside(self.cuda) as outside:
            kernel[grid](**arguments, **constants)
        return not outside

    def _tensor_at(self, address: int, dtype: torch.dtype) -> torch.Tensor | None:
        """The rest of the allocation that ``address`` lies in; nothing of it at zero, which may be given unread."""
        if not address:
            return torch.empty(0, dtype=dtype)
        for start, block in self.cuda.blocks.items():
            if start <= address < start + len(block):
                size = (start + len(block) - address) // dtype.itemsize
                return torch.frombuffer(block, dtype=dtype, offset=address - start, count=size)
        return None


@dataclass
class OnGpu:
    """A tensor of the emulated GPU: what PyTorch's says of itself."""

    memory: Memory
    shape: tuple[int, ...]
    dtype: torch.dtype
    contiguous: bool = True

    def data_ptr(self) -> int:
        return self.memory.address

    def is_contiguous(self) -> bool:
        return self.contiguous

    def host(self) -> torch.Tensor:
        found = torch.empty(self.shape, dtype=self.dtype)
        ctypes.memmove(found.data_ptr(), self.memory.address, found.nbytes)
        return found


def to_gpu(tensor: torch.Tensor) -> OnGpu:
    tensor = tensor.contiguous()
    memory = Memory(tensor.nbytes)
    ctypes.memmove(memory.address, tensor.data_ptr(), tensor.nbytes)
    return OnGpu(memory, tuple(tensor.shape), tensor.dtype)


def empty(made: Compiled, name: str, *shape: int) -> OnGpu:
    """Garbage, which is NaN: an element that the kernel leaves out shows."""
    dtype = TYPES[made.types[name].removeprefix("*")]
    return OnGpu(Memory(torch.Size(shape).numel() * dtype.itemsize), shape, dtype)


def memory_at(address: int, size: int) -> bytes:
    """Of this process. What is not there reads as zeros instead of ending it."""
    try:
        memory = os.open("/proc/self/mem", os.O_RDONLY)
        try:
            return os.pread(memory, size, address)
        finally:
            os.close(memory)
    except (OSError, OverflowError):
        return bytes(size)


@contextmanager
def only_inside(cuda: EmulatedCuda) -> Iterator[list[int]]:
    """Addresses that the interpreter reads or writes and that are nobody's: nothing is read or written there."""
    from triton.runtime.interpreter import InterpreterBuilder

    starts = np.array(sorted(cuda.blocks), dtype=np.uint64)
    ends = starts + np.array([len(cuda.blocks[int(start)]) for start in starts], dtype=np.uint64)
    outside: list[int] = []
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def allow(pointers: Any, mask: Any) -> None:
        """Turn off in ``mask`` what lies outside."""
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        place = np.searchsorted(starts, pointers.data, side="right").astype(np.int64) - 1
        inside = (place >= 0) & (pointers.data + np.uint64(size) <= ends[place])
        outside.extend(pointers.data[mask.data & ~inside].ravel().tolist())
        mask.data = mask.data & inside

    def checked_load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        allow(pointers, mask)
        return load(builder, pointers, mask, *rest)

    def checked_store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        allow(pointers, mask)
        return store(builder, pointers, value, mask, *rest)

    InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = checked_load, checked_store
    try:
        yield outside
    finally:
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store
