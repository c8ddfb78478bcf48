"""Whether TensorRT-RTX is here, which builds engines where no GPU is."""

from __future__ import annotations

from typing import Any

import pytest

from transom.runtime.backends.trt_library import RTX, library
from transom.runtime.errors import BackendError


def has_rtx() -> bool:
    try:
        return library(RTX) is not None
    except BackendError:
        return False


MEASURED_WITH = "1.7.1"  # what begins the version whose kernels the tests count; of another one they may differ by
BAND = 0.1  # of their number


def counted(kernels: int) -> Any:
    """A number of kernels to compare with: exact for the version that it was counted with."""
    exact = library(RTX).__version__.startswith(f"{MEASURED_WITH}.")
    return kernels if exact else pytest.approx(kernels, rel=BAND)


needs_rtx = pytest.mark.skipif(not has_rtx(), reason="TensorRT-RTX is not installed: pip install 'transom[rtx]'")
