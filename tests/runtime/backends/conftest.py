"""Fixtures of an emulated GPU, and of bundles with plans for it."""

from __future__ import annotations

import gc
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from emulated_gpu import (
    EmulatedCuda,
    EmulatedTensorRT,
    Plan,
    Put,
)
from transom.export.bundle_writer import add_to_bundle
from transom.export.engine.profiles import profiles_of
from transom.export.engine.shapes import Shapes, bounds_to_json, narrowed
from transom.export.engine.trt_graphs import tensorrt_graphs
from transom.runtime.backends import cuda, trt, trt_library
from transom.runtime.bundle import Bundle
from transom.runtime.errors import BackendError


@pytest.fixture(scope="session")
def real_cuda() -> Any:
    """Return cuda-python's runtime; skips where it is not installed."""
    return pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed")


@pytest.fixture(scope="session")
def real_trt() -> Any:
    """Return TensorRT-RTX; skips where it is not installed."""
    try:
        return trt_library.library(trt_library.RTX)
    except BackendError:
        pytest.skip("TensorRT-RTX is not installed: pip install 'transom[rtx]'")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, real_cuda: Any, real_trt: Any) -> Iterator[EmulatedTensorRT]:
    """Emulate an SM89 of 4 GiB with TensorRT-RTX."""
    emulated = EmulatedTensorRT(real_trt, EmulatedCuda(real_cuda))
    monkeypatch.setattr(cuda, "runtime", lambda: emulated.cuda)
    monkeypatch.setattr(trt, "library", lambda kind: emulated)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield emulated
    gc.collect()  # what holds device memory gives it back to this GPU, not to the next test's


@pytest.fixture
def put(gpu: EmulatedTensorRT, tmp_path: Path, real_trt: Any) -> Put:
    """Return ``put(bundle)`` -> a copy of it with a plan of each graph for SM89, which the emulation knows."""

    def copy(
        source: Path,
        target: str = "rtx-sm89",
        library: str = "TensorRT-RTX",
        shapes: Shapes | None = None,
        **more: str,
    ) -> Path:
        folder = Path(shutil.copytree(source, tmp_path / f"bundle{len(list(tmp_path.iterdir()))}"))
        bundle = Bundle(folder)
        plans, names = {}, {}
        specs = [file.graph for file in bundle.manifest.graphs]
        axes = narrowed(bundle.manifest.axes, specs, shapes or Shapes())
        recorded = {"axes": bounds_to_json(axes, specs)} if shapes is not None else {}
        for name, graph in tensorrt_graphs(bundle, axes=axes).items():
            spec = next(file.graph for file in bundle.manifest.graphs if file.graph.name == name)
            profiles = [profile.shapes for profile in profiles_of(spec, axes)]
            names[name] = f"engines/{target}.{name}.plan"
            plans[names[name]] = f"plan of {folder} {name}".encode()
            gpu.plans[hashlib.sha256(plans[names[name]]).hexdigest()] = Plan(graph.serialized(), profiles)
        described = {"library": library, "version": real_trt.__version__, "plans": names, **recorded, **more}
        add_to_bundle(folder, plans, {"engines": {target: described}})
        return folder

    return copy
