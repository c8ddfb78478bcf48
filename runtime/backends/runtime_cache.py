"""TensorRT-RTX compiles an engine's kernels where it runs. What it compiled is kept in the user's cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import weakref
from pathlib import Path
from typing import Any

FOLDER = "kernels"  # below the user's cache folder
MOST_BYTES = 1 << 30  # of a file that is read: more is none of ours


def cache_folder() -> Path:
    """Where Transom keeps what it can make again: $XDG_CACHE_HOME/transom, or ~/.cache/transom."""
    base = os.environ.get("XDG_CACHE_HOME")
    return Path(base if base else Path.home() / ".cache") / "transom"


class KernelCache:
    """The compiled kernels of one engine, read when it is loaded, written when it goes.

    ``key`` names library, version, SM and driver: a file of another never matches. Full TensorRT compiles when it
    builds, and has none of this.
    """

    def __init__(self, engine: Any, plan: bytes, key: str) -> None:
        self._engine, self._cache = engine, None
        config: Any = engine.create_runtime_config() if hasattr(engine, "create_runtime_config") else None
        self.records = hasattr(config, "create_runtime_cache")  # only TensorRT-RTX has one
        if not self.records:
            return
        self._cache = config.create_runtime_cache()
        path = cache_folder() / FOLDER / f"{key}-{hashlib.sha256(plan).hexdigest()[:16]}"
        before = read(path)
        if before and not self._cache.deserialize(before):
            before = b""  # of another GPU or version, which it finds out by itself
        self._save = weakref.finalize(self, save, self._cache, path, before)

    def config(self, *, whole_graph: bool) -> Any:
        """How a context is to be made, None for the default; ``whole_graph`` runs it as one recorded CUDA graph."""
        if self._cache is None:
            return None
        config = self._engine.create_runtime_config()
        config.set_runtime_cache(self._cache)
        strategy = type(config.cuda_graph_strategy)
        config.cuda_graph_strategy = strategy.WHOLE_GRAPH_CAPTURE if whole_graph else strategy.DISABLED
        return config


def read(path: Path) -> bytes:
    try:
        return path.read_bytes() if path.stat().st_size <= MOST_BYTES else b""
    except OSError:
        return b""


def save(cache: Any, path: Path, before: bytes) -> None:
    """Write what was compiled since; a full disk costs the next start a few seconds and nothing else."""
    with contextlib.suppress(Exception):  # it runs when everything goes, the driver perhaps first
        data = bytes(cache.serialize())
        if data == before:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            Path(partial).replace(path)
        except OSError:
            Path(partial).unlink(missing_ok=True)
