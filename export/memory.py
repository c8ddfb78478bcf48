"""Give memory back to the system between the stages of an export."""

from __future__ import annotations

import gc

from transom.export.checkpoint import LoadedCheckpoint
from transom.runtime.backends.malloc import trim


def release(loaded: LoadedCheckpoint, *, graphs: bool = True) -> None:
    """Return what nothing needs until the next stage: the module's mapped weights, the free heap.

    With ``graphs`` those that are not used any more too: each is a cycle of references, and finding them takes as long
    as all objects of a process with PyTorch are many.
    """
    loaded.give_back()
    if graphs:
        gc.collect()
    trim()
