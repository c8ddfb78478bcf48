"""Import ONNX Runtime once, with telemetry off, and refuse a version that computes wrongly."""

from __future__ import annotations

import importlib.metadata
import io
import os
from contextlib import redirect_stdout
from functools import cache
from types import ModuleType
from typing import cast

from transom.runtime.errors import BackendError

OLDEST = (1, 28)  # 1.26 and 1.27 align causal attention top-left when the cache is longer than the query
FATAL = 4  # log level: errors reach the caller as exceptions, once, not on stderr as well


@cache
def onnxruntime() -> ModuleType:
    """Return the library; BackendError where it is absent, doubled or too old."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # official wheels send it; the variable is read at import
    installed = [name for name in ("onnxruntime", "onnxruntime-gpu") if _version(name)]
    if len(installed) == 2:
        raise BackendError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files. "
            "Run `pip uninstall -y onnxruntime onnxruntime-gpu`, then install the one you want."
        )
    try:
        import onnxruntime as library
    except ImportError as error:
        raise BackendError(
            f"onnxruntime cannot be imported ({error}). Run `pip install 'onnxruntime>=1.28'`."
        ) from None
    if version_of(library) < OLDEST:
        raise BackendError(
            f"onnxruntime is {library.__version__}; older than 1.28 computes causal attention wrongly. "
            "Run `pip install --upgrade 'onnxruntime>=1.28'`."
        )
    return cast(ModuleType, library)


def version_of(library: ModuleType) -> tuple[int, ...]:
    """Return a library's version, (1, 32) of 1.32.0."""
    return tuple(int(part) for part in library.__version__.split(".")[:2])


@cache
def load_cuda() -> None:
    """Load the CUDA libraries of `pip install 'onnxruntime-gpu[cuda,cudnn]'`, once: ONNX Runtime does not look there.

    It finds the system's by itself. Where both are absent, creating a session fails and names the missing library.
    """
    with redirect_stdout(io.StringIO()):  # it prints the libraries that it does not find
        onnxruntime().preload_dlls()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
