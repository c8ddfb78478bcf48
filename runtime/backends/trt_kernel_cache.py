"""Keep the kernels that TensorRT-RTX compiles of an engine where it runs, in the user's cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import weakref
from pathlib import Path
from typing import Any

from transom.runtime.disk_cache import Cache, our_version

KIND = "kernels"
MAX_BYTES = 1 << 30  # of a file that is read: a larger one is not from here
COSTS = "Every start on the GPU compiles an engine's kernels again, which takes seconds."


class KernelCache:
    """The compiled kernels of one engine, read when it is loaded, written when it is freed.

    ``key`` names library, version, SM and driver, and a file our version and the plan beside it: a file of another
    never matches. Full TensorRT compiles when it builds, and has none of this.
    """

    def __init__(self, engine: Any, plan: bytes, key: str) -> None:
        self._engine, self._cache = engine, None
        config: Any = engine.create_runtime_config() if hasattr(engine, "create_runtime_config") else None
        self.records = hasattr(config, "create_runtime_cache")  # only TensorRT-RTX has one
        if not self.records:
            return
        self._cache = config.create_runtime_cache()
        kept, name = Cache(KIND, COSTS), f"{key}-{our_version()}-{hashlib.sha256(plan).hexdigest()}"
        before = read(kept.entry(name))
        if before and not self._cache.deserialize(before):
            before = b""  # of another GPU or version, which it finds out by itself
        if before:
            kept.used(name)
        elif not kept.keeps:
            kept.warn()
        self._save = weakref.finalize(self, save, self._cache, kept, name, before)

    def config(self, *, whole_graph: bool) -> Any:
        """Return a context's configuration, None for the default; ``whole_graph`` records it as one CUDA graph."""
        if self._cache is None:
            return None
        config = self._engine.create_runtime_config()
        config.set_runtime_cache(self._cache)
        strategy = type(config.cuda_graph_strategy)
        config.cuda_graph_strategy = strategy.WHOLE_GRAPH_CAPTURE if whole_graph else strategy.DISABLED
        return config


def read(path: Path | None) -> bytes:
    try:
        return path.read_bytes() if path is not None and path.stat().st_size <= MAX_BYTES else b""
    except OSError:
        return b""


def save(cache: Any, kept: Cache, name: str, before: bytes) -> None:
    """Write the kernels to the cache if some were compiled since."""
    with contextlib.suppress(Exception):  # it may run at the end of the process, after the driver is gone
        data = bytes(cache.serialize())
        if data != before:
            kept.add(name, lambda path: path.write_bytes(data))
