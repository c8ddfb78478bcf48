"""Turn a missing library that only the export needs into a BackendError that names what to install."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from transom.runtime.errors import BackendError

# Distributions, as the extra `export` in pyproject.toml names them; their modules have "_" for "-".
EXPORT_EXTRA = ("torch", "onnx", "onnx-ir", "onnxscript", "ml-dtypes", "huggingface-hub", "sentencepiece", "jinja2")

# Threads that wait for work spin by default, which takes several times the CPU time of the work where it is little.
QUIET_THREADS = {
    "OMP_WAIT_POLICY": "PASSIVE",  # PyTorch's
    "OPENBLAS_NUM_THREADS": "1",  # numpy's, whose products are small here
}


@contextmanager
def export_extra() -> Iterator[None]:
    """Import and call transom.export inside this: a missing library becomes one BackendError.

    What the user has not set of QUIET_THREADS is set first: the libraries read it when they are imported.
    """
    for variable, value in QUIET_THREADS.items():
        os.environ.setdefault(variable, value)
    try:
        yield
    except ImportError as error:
        missing = (error.name or str(error)).partition(".")[0]
        if missing.replace("_", "-") not in EXPORT_EXTRA:
            raise
        raise BackendError(
            f"{missing} cannot be imported ({error}); export, verify and report need it, the other commands do not. "
            "Run `pip install 'transom[export]'`."
        ) from None
