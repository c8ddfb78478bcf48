"""From a checkpoint to a bundle, its engines and its report.

export          checkpoint -> ONNX -> variants -> parity -> bundle       pipeline.py
verify          a bundle compared with its checkpoint again              verification.py
build           a bundle's graphs -> TensorRT engines                    engine/
write_report    a bundle -> one HTML page                                report/
"""

from __future__ import annotations

import importlib
from typing import Any

HOMES = {"export": "pipeline", "verify": "verification", "build": "engine.build", "write_report": "report.report"}
__all__ = ["build", "export", "verify", "write_report"]


def __getattr__(name: str) -> Any:
    """Import a function when it is first asked for: torch and onnx take seconds."""
    if name in HOMES:
        return getattr(importlib.import_module(f"transom.export.{HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
