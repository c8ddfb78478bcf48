"""Give memory back to the system between the stages of an export."""

from __future__ import annotations

import gc

from transom.export.checkpoint import LoadedCheckpoint
from transom.runtime.backends.malloc import trim


def release(loaded: LoadedCheckpoint) -> None:
    """Return what nothing needs until the next stage: the module's mapped weights, graphs in cycles, the free heap."""
    loaded.give_back()
    gc.collect()
    trim()
