"""Where the kernels run: a GPU, by CUDA's driver, or a CPU, by Triton's interpreter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from transom.export.plugins.compiled import POINTERS, Compiled, CompiledCombine
from transom.runtime.errors import InputError

FLUSHED = 512 << 20  # bytes at least: while they are written, over 0.1 ms, the launches behind them are queued


class Launchable(Protocol):
    """A kernel with its arguments."""

    def launch(self, stream: int) -> None: ...


class Kernel(Protocol):
    """A kernel that can be given arguments, as ``transom.export.plugins.cuda_launcher.Kernel``."""

    def bind(self, tensors: Mapping[str, Any], B: int, S: int, T: int, splits: int = 1) -> Launchable: ...


class Mark(Protocol):
    """A point in the machine's queue of work."""

    def record(self) -> None: ...

    def elapsed_time(self, end: Any) -> float: ...


class Machine(Protocol):
    """Kernels, and where ``timed`` the means to time them."""

    device: str
    timed: bool

    def kernel(self, compiled: Compiled) -> Kernel: ...

    def stream(self) -> int: ...

    def mark(self) -> Mark: ...

    def flush(self) -> None: ...

    def wait(self) -> None: ...

    def free(self) -> None: ...


class CudaMachine:
    """This process's GPU, its memory and streams PyTorch's."""

    device, timed = "cuda", True

    def __init__(self) -> None:
        import torch

        self.torch = torch
        l2 = int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0))
        self.flushed = torch.empty(max(FLUSHED, 2 * l2), dtype=torch.uint8, device=self.device)

    def kernel(self, compiled: Compiled) -> Kernel:
        from transom.export.plugins.cuda_launcher import Kernel

        return Kernel(compiled)

    def stream(self) -> int:
        return int(self.torch.cuda.current_stream().cuda_stream)

    def mark(self) -> Mark:
        mark: Mark = self.torch.cuda.Event(enable_timing=True)
        return mark

    def flush(self) -> None:
        """Write over the whole L2 cache."""
        self.flushed.zero_()

    def wait(self) -> None:
        self.torch.cuda.synchronize()

    def free(self) -> None:
        self.torch.cuda.empty_cache()


class InterpretedMachine:
    """Triton's interpreter: the kernels' source with the grid and the integers that a launch of the PTX has.

    The process has to have TRITON_INTERPRET=1 before Triton is imported.
    """

    device, timed = "cpu", False

    def kernel(self, compiled: Compiled) -> Kernel:
        return InterpretedKernel(compiled)

    def stream(self) -> int:
        return 0

    def mark(self) -> Mark:
        raise InputError("the interpreter has no times; ask a machine whose `timed` is true.")

    def flush(self) -> None: ...

    def wait(self) -> None: ...

    def free(self) -> None: ...


class InterpretedKernel:
    """A kernel whose launches are interpreted."""

    def __init__(self, compiled: Compiled) -> None:
        self.compiled = compiled

    def bind(self, tensors: Mapping[str, Any], B: int, S: int, T: int, splits: int = 1) -> Launchable:
        """Prepare one launch. Raises InputError for tensors of other names or sizes than the PTX reads and writes."""
        counts = self.compiled.elements(B, S, T, splits)
        given = {name: int(tensor.numel()) for name, tensor in tensors.items()}
        if given != counts:
            raise InputError(f"{self.compiled.name} was given {given}; expected {counts}. Give tensors that fit.")
        return InterpretedLaunch(self.compiled, dict(tensors), (B, S, T, splits))


class InterpretedLaunch:
    """A launch in Triton's interpreter."""

    def __init__(self, compiled: Compiled, tensors: Mapping[str, Any], sizes: tuple[int, int, int, int]) -> None:
        self.compiled, self.tensors, self.sizes = compiled, tensors, sizes

    def launch(self, stream: int) -> None:
        from transom.export.plugins import flash_attention as kernels

        compiled, (B, S, _, splits) = self.compiled, self.sizes
        combine = isinstance(compiled, CompiledCombine)
        kernel = kernels.attention_combine if combine else kernels.attention
        constants = compiled.variant.combine_constants() if combine else compiled.variant.constants(compiled.tiles)
        fixed = {name: factor for name, (factor, letters) in compiled.formulas.items() if not letters}
        integers = dict(zip(compiled.integers, compiled.sizes(*self.sizes), strict=True))
        given: dict[str, Any] = {**dict.fromkeys(POINTERS), **fixed, **integers, **self.tensors}
        arguments = {name: given.get(name, 0) for name in kernel.arg_names if name not in constants}
        kernel[compiled.grid(B, S, splits)](**arguments, **constants)
