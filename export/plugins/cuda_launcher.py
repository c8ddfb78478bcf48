"""Launch kernels that were compiled ahead of time through CUDA's driver API.

A ``Kernel`` is the PTX in the primary context of the current device, which PyTorch and the CUDA runtime use too. It
takes anything with data_ptr(), such as PyTorch's tensors, or plain device addresses; torch is not needed.

**Not yet executed on a GPU.** The tests cover the packing: an emulated driver reads every parameter as the PTX
declares it, also behind the real cuda-python.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from transom.export.plugins.compiled import ALIGNED, Compiled
from transom.export.plugins.kernel_spec import MOST_PROGRAMS, MOST_SPLITS, dtype_name
from transom.export.plugins.tile_sizes import FIRST_ARCH_SPECIFIC, SHARED
from transom.runtime.backends import cuda
from transom.runtime.backends.cuda import Gpu, OutOfMemory, Stream, find_gpu, quietly
from transom.runtime.errors import BackendError, InputError, one_line

LOG = 8192  # bytes of the driver's compiler log
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "i8": "int8", "i32": "int32", "i1": "bool"}
NO_MEMORY = "CUDA_ERROR_OUT_OF_MEMORY"
LEGACY_STREAM = 0  # CUDA's default stream, and PyTorch's
THREAD = threading.local()


class Kernel:
    """A compiled kernel on this process's GPU, unloaded with its last reference: synchronise before.

    Raises BackendError without a GPU, on a GPU of another compute capability, or where its driver rejects the PTX.
    """

    def __init__(self, compiled: Compiled) -> None:
        gpu = find_gpu()
        require_capability(compiled, gpu)
        self.compiled = compiled
        use_primary_context()
        api, log = cuda.driver(), bytearray(LOG)
        options = [api.CUjit_option.CU_JIT_ERROR_LOG_BUFFER, api.CUjit_option.CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES]
        image = compiled.ptx + b"\0"  # the driver reads a C string
        code, self._module = api.cuModuleLoadDataEx(image, len(options), options, [log, LOG])
        if int(code) != 0:
            raise not_loaded(compiled, name_of(code), log)
        self._unload = weakref.finalize(self, quietly, api.cuModuleUnload, self._module)
        self._function = call("cuModuleGetFunction", self._module, compiled.name.encode())
        if compiled.shared > SHARED:
            most = api.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            (code,) = api.cuFuncSetAttribute(self._function, most, compiled.shared)
            if int(code) != 0:
                raise BackendError(
                    f"{compiled.name} wants {compiled.shared} bytes of shared memory for a block, and {gpu} refuses: "
                    f"{name_of(code)}; expected no more than it has. Compile with smaller tiles, or fewer stages."
                )

    def bind(self, tensors: Mapping[str, Any], B: int, S: int, T: int, splits: int = 1) -> BoundKernel:
        """Prepare one launch: ``tensors`` by name, inputs and outputs, in the kernel's ``Layout``.

        Sizes are those of one attention, with the keys in ``splits``. Raises InputError for tensors that do not fit.
        """
        compiled = self.compiled
        if min(B, S, T) < 0 or not 1 <= splits <= MOST_SPLITS or (splits > 1 and not compiled.variant.split):
            raise InputError(
                f"{compiled.name} was given B={B}, S={S}, T={T} and {splits} splits; expected sizes from 0, "
                f"and 1 split or, with split, up to {MOST_SPLITS}. Give the sizes of the tensors."
            )
        counts, grid = compiled.elements(B, S, T, splits), compiled.grid(B, S, splits)
        if tensors.keys() != counts.keys():
            raise InputError(
                f"{compiled.name} was given {', '.join(tensors) or 'nothing'}; expected {', '.join(counts)}. "
                "Name them all."
            )
        if grid[0] > MOST_PROGRAMS:
            raise InputError(
                f"{compiled.name} was given {B} rows; expected at most {MOST_PROGRAMS} programs, not {grid[0]}. "
                "Split them."
            )
        addresses = {
            name: address_of(name, tensors[name], compiled.types[name], count, compiled.name)
            for name, count in counts.items()
        }
        values = [
            *(ctypes.c_uint64(addresses[name]) for name in compiled.tensors),
            *(ctypes.c_int32(value) for value in compiled.sizes(B, S, T, splits)),
            *(ctypes.c_uint64(addresses[name]) for name in compiled.outputs),
        ]
        return BoundKernel(self, grid, values, tensors)

    def launch(
        self, tensors: Mapping[str, Any], B: int, S: int, T: int, splits: int = 1, stream: int | Stream = LEGACY_STREAM
    ) -> None:
        """Bind and launch once."""
        self.bind(tensors, B, S, T, splits).launch(stream)

    def enqueue(self, grid: tuple[int, int, int], parameters: int, stream: int) -> None:
        """Enqueue one launch; ``parameters`` is the address of the array of parameter addresses."""
        use_primary_context()
        block, extra = (self.compiled.threads, 1, 1), 0
        call("cuLaunchKernel", self._function, *grid, *block, self.compiled.shared, stream, parameters, extra)


class BoundKernel:
    """A kernel with its arguments, for repeated launches; it keeps the tensors alive."""

    def __init__(
        self, kernel: Kernel, grid: tuple[int, int, int], values: Sequence[Any], tensors: Mapping[str, Any]
    ) -> None:
        self.grid = grid
        self._kernel, self._values, self._tensors = kernel, values, dict(tensors)
        # cuLaunchKernel reads an array with the address of each parameter
        self._parameters = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))

    def launch(self, stream: int | Stream = LEGACY_STREAM) -> None:
        """Enqueue on a stream or a stream handle, asynchronously. Raises BackendError where the driver refuses."""
        if min(self.grid) == 0:
            return  # nothing to write
        handle = stream.handle if isinstance(stream, Stream) else int(stream)
        self._kernel.enqueue(self.grid, ctypes.addressof(self._parameters), handle)


def call(function: str, *arguments: Any) -> Any:
    """Call a function of the CUDA driver; return the value behind its error code, or None.

    Raises BackendError for every code but success.
    """
    code, *values = getattr(cuda.driver(), function)(*arguments)
    if int(code) != 0:
        name = name_of(code)
        if name == NO_MEMORY:
            raise cuda.failure(function, cuda.NO_MEMORY)
        raise BackendError(
            f"{function} failed on the GPU: {name}; expected CUDA_SUCCESS. Earlier work on the GPU may be the cause: "
            "run again with CUDA_LAUNCH_BLOCKING=1; `nvidia-smi` shows its state."
        )
    return values[0] if values else None


def use_primary_context() -> None:
    """Make the primary context current in this thread, as every call of the CUDA runtime does."""
    if not getattr(THREAD, "ready", False):
        cuda.call("cudaFree", 0)
        THREAD.ready = True


def require_capability(compiled: Compiled, gpu: Gpu) -> None:
    """Raise BackendError for PTX that ``gpu`` cannot run.

    PTX runs on its own compute capability and later ones; from SM90 on Triton's is architecture-specific.
    """
    here = 10 * gpu.capability[0] + gpu.capability[1]
    if here < compiled.capability or (here > compiled.capability >= FIRST_ARCH_SPECIFIC):
        wanted = f"SM{compiled.capability}" + ("" if compiled.capability >= FIRST_ARCH_SPECIFIC else " or later")
        raise BackendError(
            f"the kernel is for {wanted}, and this is {gpu}; expected a kernel for it. Compile with portable({here})."
        )


def not_loaded(compiled: Compiled, code: str, log: bytearray) -> BackendError:
    if code == NO_MEMORY:
        return OutOfMemory(str(cuda.failure("cuModuleLoadDataEx", cuda.NO_MEMORY)))
    said = one_line(RuntimeError(log.split(b"\0")[0].decode(errors="replace") or "nothing"))
    return BackendError(
        f"the driver did not load {compiled.name} for SM{compiled.capability}: {code}, and its compiler said: {said}; "
        "expected PTX that it takes. Update the driver, or compile the kernel again for this GPU."
    )


def name_of(code: Any) -> str:
    return str(getattr(code, "name", code))


def address_of(name: str, tensor: Any, stored: str, count: int, kernel: str) -> int:
    """Return a tensor's address. Raises InputError where its dtype, size, device or alignment is not the kernel's."""
    expected, wrong = DTYPES[stored.removeprefix("*")], None
    address = tensor if isinstance(tensor, int) else int(tensor.data_ptr())
    if not isinstance(tensor, int):
        elements = 1
        for size in tensor.shape:
            elements *= int(size)
        if dtype_name(tensor) != expected:
            wrong = f"in {dtype_name(tensor)}; expected {expected}"
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
