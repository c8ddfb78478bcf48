"""Whether TensorRT-RTX is here, which builds engines where no GPU is."""

from __future__ import annotations

import pytest

from transom.runtime.backends.trt_library import RTX, library
from transom.runtime.errors import BackendError


def has_rtx() -> bool:
    try:
        return library(RTX) is not None
    except BackendError:
        return False


needs_rtx = pytest.mark.skipif(not has_rtx(), reason="TensorRT-RTX is not installed: pip install 'transom[rtx]'")
