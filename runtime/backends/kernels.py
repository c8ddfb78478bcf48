"""Choose what executes a graph on the CPU: the native library's kernels, or ONNX Runtime.

A bundle has a list of fused operators for the graphs that the native library covers. Whether the library runs depends
on the installation and on the processor; ``transom.runtime.native.library`` finds out, once in a process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from transom.runtime.errors import BackendError

if TYPE_CHECKING:
    from transom.runtime.manifest_graphs import GraphFile
    from transom.runtime.native.library import NativeLibrary

AUTO, NATIVE, ONNXRUNTIME = "auto", "native", "onnxruntime"
KERNELS = (AUTO, NATIVE, ONNXRUNTIME)
LIST = "native"  # the key of a graph's list of operators, among its files
ASKED = "it was asked for"
NO_LIST = "the bundle has no list of operators for it"
ELSEWHERE = "the kernels are for the CPU"


@dataclass(frozen=True)
class KernelChoice:
    """The kernels that execute one graph and why: NATIVE or ONNXRUNTIME on the CPU, else the device's name.

    ``isa`` is the instruction set of the native kernels.
    """

    kernels: str
    reason: str
    isa: str | None = None


def checked_kernels(kernels: str) -> str:
    """Return ``kernels``; BackendError for an unknown word."""
    if kernels not in KERNELS:
        raise BackendError(f"kernels is {kernels!r}; expected one of {', '.join(KERNELS)}.")
    return kernels


def choose_kernels(graph: GraphFile, device: str, kernels: str) -> tuple[KernelChoice, NativeLibrary | None]:
    """Return what is to execute a graph, and the native library where that is.

    Raises BackendError where kernels="native" was asked for and cannot be.
    """
    name = graph.graph.name
    if device != "cpu":
        if kernels == NATIVE:
            raise BackendError(f"kernels='native' was asked for on {device}: {ELSEWHERE}. Load with device='cpu'.")
        return KernelChoice(device, ELSEWHERE), None
    if kernels == ONNXRUNTIME:
        return KernelChoice(ONNXRUNTIME, ASKED), None
    library, reason = None, NO_LIST
    if LIST in graph.files:
        from transom.runtime.native.library import status

        found = status()
        library, reason = found.library, found.reason
    if library is not None:
        return KernelChoice(NATIVE, reason, library.name), library
    if kernels == NATIVE:
        raise BackendError(
            f"kernels='native' was asked for, and the graph {name!r} cannot run so: {reason.rstrip('.')}. Load with "
            "kernels='auto', or see `transom doctor`."
        )
    return KernelChoice(ONNXRUNTIME, reason), None
