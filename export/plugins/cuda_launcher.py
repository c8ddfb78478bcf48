"""Kernels compiled ahead of time, launched through CUDA's driver: the very PTX, with the parameters it declares.

A ``Kernel`` is the PTX in the primary context of the current device, the one of PyTorch and of the CUDA runtime. It
takes anything with data_ptr(), as PyTorch's tensors, or plain addresses of the GPU's memory; torch is not needed.

**No GPU has executed this for us.** What is tested is the packing: an emulated driver reads every parameter as the PTX
declares it, also behind the real cuda-python.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from transom.export.plugins.aot import ALIGNED, Compiled
from transom.export.plugins.kernel_spec import MOST_PARTS, MOST_PROGRAMS, kind
from transom.export.plugins.tile_sizes import FIRST_ALONE, SHARED
from transom.runtime.backends import cuda
from transom.runtime.backends.cuda import Gpu, OutOfMemory, Stream, find_gpu, quietly
from transom.runtime.errors import BackendError, InputError, one_line

LOG = 8192  # bytes of what the driver's compiler may say
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "i8": "int8", "i32": "int32", "i1": "bool"}
NO_MEMORY = "CUDA_ERROR_OUT_OF_MEMORY"
LEGACY_STREAM = 0  # CUDA's own, on which PyTorch works unless it is told otherwise
THREAD = threading.local()


class Kernel:
    """A compiled kernel on this process's GPU, unloaded when nobody holds it: wait for its work before.

    Raises BackendError where there is no GPU, where it is of another kind, or where its driver does not take the PTX.
    """

    def __init__(self, made: Compiled) -> None:
        gpu = find_gpu()
        require_capability(made, gpu)
        self.made = made
        use_primary_context()
        api, log = cuda.driver(), bytearray(LOG)
        options = [api.CUjit_option.CU_JIT_ERROR_LOG_BUFFER, api.CUjit_option.CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES]
        image = made.ptx + b"\0"  # the driver reads text up to its end
        code, self._module = api.cuModuleLoadDataEx(image, len(options), options, [log, LOG])
        if int(code) != 0:
            raise not_loaded(made, name_of(code), log)
        self._unload = weakref.finalize(self, quietly, api.cuModuleUnload, self._module)
        self._function = call("cuModuleGetFunction", self._module, made.name.encode())
        if made.shared > SHARED:
            most = api.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            (code,) = api.cuFuncSetAttribute(self._function, most, made.shared)
            if int(code) != 0:
                raise BackendError(
                    f"{made.name} wants {made.shared} bytes of shared memory for a block, and {gpu} refused: "
                    f"{name_of(code)}; expected no more than it has. Compile with smaller blocks, or fewer stages."
                )

    def bind(self, tensors: Mapping[str, Any], B: int, S: int, T: int, parts: int = 1) -> Bound:
        """One launch, ready: ``tensors`` by name, inputs and outputs, laid out as the kernel's ``Layout`` says.

        Sizes are those of one attention, with the keys in ``parts``. Raises InputError for what does not fit.
        """
        made = self.made
        if min(B, S, T) < 0 or not 1 <= parts <= MOST_PARTS or (parts > 1 and not made.variant.split):
            raise InputError(
                f"{made.name} was given B={B}, S={S}, T={T} and {parts} parts; expected sizes from 0, and 1 part or, "
                f"with split, up to {MOST_PARTS}. Give the sizes of the tensors."
            )
        counts, grid = made.elements(B, S, T, parts), made.grid(B, S, parts)
        if tensors.keys() != counts.keys():
            raise InputError(
                f"{made.name} was given {', '.join(tensors) or 'nothing'}; expected {', '.join(counts)}. Name them all."
            )
        if grid[0] > MOST_PROGRAMS:
            raise InputError(
                f"{made.name} was given {B} rows; expected at most {MOST_PROGRAMS} programs, not {grid[0]}. Split them."
            )
        addresses = {
            name: address_of(name, tensors[name], made.types[name], count, made.name) for name, count in counts.items()
        }
        values = [
            *(ctypes.c_uint64(addresses[name]) for name in made.tensors),
            *(ctypes.c_int32(value) for value in made.sizes(B, S, T, parts)),
            *(ctypes.c_uint64(addresses[name]) for name in made.outputs),
        ]
        return Bound(self, grid, values, tensors)

    def launch(
        self, tensors: Mapping[str, Any], B: int, S: int, T: int, parts: int = 1, stream: int | Stream = LEGACY_STREAM
    ) -> None:
        """``bind`` and launch once."""
        self.bind(tensors, B, S, T, parts).launch(stream)

    def enqueue(self, grid: tuple[int, int, int], parameters: int, stream: int) -> None:
        """The launch itself, of the parameters whose addresses lie at ``parameters``."""
        use_primary_context()
        block, extra = (self.made.threads, 1, 1), 0
        call("cuLaunchKernel", self._function, *grid, *block, self.made.shared, stream, parameters, extra)


class Bound:
    """A kernel with its arguments, to be launched as often as one likes; it holds the tensors."""

    def __init__(
        self, kernel: Kernel, grid: tuple[int, int, int], values: Sequence[Any], tensors: Mapping[str, Any]
    ) -> None:
        self.grid = grid
        self._kernel, self._values, self._tensors = kernel, values, dict(tensors)
        # What cuLaunchKernel reads: an address for every parameter, at which its value lies
        self._parameters = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))

    def launch(self, stream: int | Stream = LEGACY_STREAM) -> None:
        """Put it on a stream, or on one's handle; BackendError where the driver refuses. It runs later."""
        if min(self.grid) == 0:
            return  # nothing to write
        handle = stream.handle if isinstance(stream, Stream) else int(stream)
        self._kernel.enqueue(self.grid, ctypes.addressof(self._parameters), handle)


def call(function: str, *arguments: Any) -> Any:
    """What a function of the CUDA driver returns behind its error code: None or a value.

    Raises BackendError for every code but success.
    """
    code, *values = getattr(cuda.driver(), function)(*arguments)
    if int(code) != 0:
        name = name_of(code)
        if name == NO_MEMORY:
            raise cuda.failure(function, cuda.NO_MEMORY)
        raise BackendError(
            f"{function} failed on the GPU: {name}; expected CUDA_SUCCESS. Earlier work on the GPU may be the cause: "
            "run again with CUDA_LAUNCH_BLOCKING=1; `nvidia-smi` tells its state."
        )
    return values[0] if values else None


def use_primary_context() -> None:
    """Make it this thread's, as every call of the CUDA runtime does."""
    if not getattr(THREAD, "ready", False):
        cuda.call("cudaFree", 0)
        THREAD.ready = True


def require_capability(made: Compiled, gpu: Gpu) -> None:
    """PTX runs on its own compute capability and later ones; from SM90 on Triton's is for that very GPU."""
    here = 10 * gpu.capability[0] + gpu.capability[1]
    if here < made.capability or (here > made.capability >= FIRST_ALONE):
        wanted = f"SM{made.capability}" + ("" if made.capability >= FIRST_ALONE else " or later")
        raise BackendError(
            f"the kernel is for {wanted}, and this is {gpu}; expected a kernel for it. Compile with portable({here})."
        )


def not_loaded(made: Compiled, code: str, log: bytearray) -> BackendError:
    if code == NO_MEMORY:
        return OutOfMemory(str(cuda.failure("cuModuleLoadDataEx", cuda.NO_MEMORY)))
    said = one_line(RuntimeError(log.split(b"\0")[0].decode(errors="replace") or "nothing"))
    return BackendError(
        f"the driver did not load {made.name} for SM{made.capability}: {code}, and its compiler said: {said}; expected "
        "PTX that it takes. Update the driver, or compile the kernel again for this GPU."
    )


def name_of(code: Any) -> str:
    return str(getattr(code, "name", code))


def address_of(name: str, tensor: Any, stored: str, count: int, kernel: str) -> int:
    """Where a tensor lies. What it tells of itself is held against what the kernel will read or write there."""
    expected, wrong = DTYPES[stored.removeprefix("*")], None
    address = tensor if isinstance(tensor, int) else int(tensor.data_ptr())
    if not isinstance(tensor, int):
        elements = 1
        for size in tensor.shape:
            elements *= int(size)
        if kind(tensor) != expected:
            wrong = f"in {kind(tensor)}; expected {expected}"
        elif elements != count:
            wrong = f"of {tuple(tensor.shape)}, {elements} elements; expected {count}"
        elif hasattr(tensor, "is_contiguous") and not tensor.is_contiguous():
            wrong = f"of {tuple(tensor.shape)} that is not contiguous; expected one that is"
        elif not getattr(tensor, "is_cuda", True):
            wrong = "that lies in the host's memory; expected the GPU's"
    if wrong is None and count and (address <= 0 or address % ALIGNED):
        wrong = f"at address {address:#x}; expected a multiple of {ALIGNED} bytes"
    if wrong is not None:
        raise InputError(f"{kernel} was given {name} {wrong}. Give tensors that fit the kernel's Layout.")
    return address
