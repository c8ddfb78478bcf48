"""Make the exports of a run of tests cheaper, and nothing of what they compute another.

Two costs grow with the run and not with the model: torch.onnx reads its registry of a thousand functions anew for each
trace, and each full collection of garbage walks all test items and all that was imported. Together they took 40 % of
the time of a tiny model's trace.
"""

from __future__ import annotations

import gc
import sys
from typing import Any

REGISTRY = "torch.onnx._internal.exporter._registration"  # of torch 2.13, which imports it for the first trace
PATCHED: set[str] = set()
MANY = 50_000  # objects that each full collection looks at: 20 ms
seen = 0  # collections that moved objects to the oldest generation


def pytest_collection_finish() -> None:
    """pytest's hook; conftest.py imports it, and the next two. The tests' modules have imported what they need."""
    keep_what_is_there()


def pytest_runtest_setup() -> None:
    """Look whether an earlier test has traced something, and how much stays of what was loaded and made."""
    if REGISTRY in sys.modules and REGISTRY not in PATCHED:
        PATCHED.add(REGISTRY)
        read_registry_once(getattr(sys.modules[REGISTRY], "ONNXRegistry", None))
    global seen
    before, seen = seen, gc.get_stats()[1]["collections"]
    if seen > before and len(gc.get_objects(generation=2)) > MANY:
        keep_what_is_there()


def pytest_sessionfinish() -> None:
    """Let libraries free what they have at the end: some complain of what is left over."""
    gc.unfreeze()


def keep_what_is_there() -> None:
    """Let no later collection look at objects that stay until the process ends."""
    gc.collect()
    gc.freeze()


def read_registry_once(registry: Any) -> None:
    """Give each trace a copy of one registry; does nothing where torch has none of this form."""
    read = getattr(registry, "from_torchlib", None)
    if read is None:
        return
    known: dict[str, Any] = {}

    def copy_of_registry(kind: Any, *versions: Any, **named: Any) -> Any:
        key = repr((versions, named))
        if key not in known:
            known[key] = read(*versions, **named)
        copy = kind()
        vars(copy).update(vars(known[key]))
        copy.functions = {name: list(found) for name, found in known[key].functions.items()}
        return copy

    registry.from_torchlib = classmethod(copy_of_registry)
