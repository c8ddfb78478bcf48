"""Import TensorRT or TensorRT-RTX: one Python API in two libraries, found where they are installed.

TensorRT-RTX comes as NVIDIA's own package ``tensorrt_rtx``, or as two wheels of PyPI: bindings alone, and the package
of an ONNX Runtime plugin that brings the library and its ONNX parser. TensorRT is ``tensorrt``.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from transom.runtime.errors import BackendError, one_line

RTX, FULL = "tensorrt_rtx", "tensorrt"
NAMES = {RTX: "TensorRT-RTX", FULL: "TensorRT"}
INSTALL = {
    RTX: "pip install 'transom[rtx]'",
    FULL: "pip install 'transom[tensorrt]' tensorrt",
}
RTX_CAPABILITIES = ((7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1))  # that TensorRT-RTX 1.7 builds for and runs on
BINDINGS, LIBRARIES = "tensorrt_rtx_bindings", "onnxruntime_ep_nv_tensorrt_rtx"  # modules of the two wheels
SHARED_OBJECTS = ("libtensorrt_rtx.so.*", "libtensorrt_onnxparser_rtx.so.*")  # in the order they need each other


@cache
def library(kind: str) -> ModuleType:
    """Import the module of RTX or FULL. Raises BackendError where it is absent, with the command that installs it."""
    try:
        if find_spec(kind) is not None:
            return import_module(kind)
        if kind == RTX and find_spec(BINDINGS) is not None and find_spec(LIBRARIES) is not None:
            return bindings_alone()
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise BackendError(
            f"{NAMES[kind]} is installed but cannot be loaded: {one_line(error, 200)}. Run `{INSTALL[kind]}` again."
        ) from None
    where = "" if kind == RTX else " on the machine with the GPU; a Jetson has it from JetPack"
    raise BackendError(f"{NAMES[kind]} is not installed. Run `{INSTALL[kind]}`{where}.")


def bindings_alone() -> ModuleType:
    """Import the bindings around the shared objects of the other wheel; from then on ``tensorrt_rtx`` is their name."""
    spec = find_spec(LIBRARIES)
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec is not None else []
    for pattern in SHARED_OBJECTS:
        found = sorted(path for folder in folders for path in folder.glob(pattern))
        if not found:
            raise ImportError(f"the package {LIBRARIES} has no {pattern}")
        ctypes.CDLL(str(found[-1]), mode=ctypes.RTLD_GLOBAL)
    module = import_module(BINDINGS)
    sys.modules[RTX] = module  # the name that Polygraphy imports
    return module
