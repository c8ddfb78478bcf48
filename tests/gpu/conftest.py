"""What runs on a GPU alone. Without one every test here is skipped, and says so.

What is found goes to $TRANSOM_GPU_RESULTS, as Markdown and JSON with the GPU's name, where that is set.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from conftest import Once, export_to, reference
from transom.runtime.backends.cuda import Gpu, find_gpu
from transom.runtime.backends.ort import PROVIDERS
from transom.runtime.backends.ort_library import onnxruntime
from transom.runtime.backends.trt_library import FULL, NAMES, RTX, library
from transom.runtime.backends.trt_plans import target_for
from transom.runtime.errors import BackendError

Ready = Callable[..., Path]


@dataclass
class Results:
    """Rows of one table: what, on which backend, in which precision, what was found."""

    gpu: Gpu
    libraries: dict[str, str]
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, what: str, backend: str, precision: str, found: str) -> None:
        self.rows.append({"what": what, "backend": backend, "precision": precision, "found": found})

    def to_json(self) -> dict[str, Any]:
        report = {"gpu": self.gpu.name, "sm": self.gpu.sm, "driver": self.gpu.driver, "libraries": self.libraries}
        return {**report, "date": time.strftime("%Y-%m-%d"), "rows": self.rows}


def write(report: Mapping[str, Any], folder: Path) -> None:
    """Write a report as Markdown and JSON, named after the GPU."""
    name = "gpu-" + "-".join(report["gpu"].lower().split()) + "-parity"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    used = ", ".join(f"{name} {version}" for name, version in report["libraries"].items())
    lines = [f"# Parity on {report['gpu']} ({report['sm'].upper()})", ""]
    lines += [f"{report['date']}, driver for CUDA {report['driver'] / 1000:g}; {used}.", ""]
    lines += ["| what | backend | precision | found |", "| --- | --- | --- | --- |"]
    lines += ["| " + " | ".join(row.values()) + " |" for row in report["rows"]]
    (folder / f"{name}.md").write_text("\n".join([*lines, ""]))


@pytest.fixture(scope="session")
def gpu() -> Gpu:
    try:
        return find_gpu()
    except BackendError as error:
        pytest.skip(str(error))


WRITTEN: list[dict[str, Any]] = []  # results of this process, or of its workers (`pytest -n`)
DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu", "torch", "triton", "cuda-bindings")


@pytest.fixture(scope="session")
def results(gpu: Gpu, request: pytest.FixtureRequest) -> Iterator[Results]:
    found = Results(gpu, {name: version for name in DISTRIBUTIONS if (version := version_of(name))})
    for kind in (RTX, FULL):
        if is_installed(kind):
            found.libraries[NAMES[kind]] = str(library(kind).__version__)
    yield found
    if hasattr(request.config, "workeroutput"):
        request.config.workeroutput["results"] = found.to_json()
    else:
        WRITTEN.append(found.to_json())


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Collect the results of a worker (pytest-xdist)."""
    WRITTEN.extend([node.workeroutput["results"]] if "results" in getattr(node, "workeroutput", {}) else [])


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the results of all processes as one report, sorted, so that the order of workers does not show."""
    folder, rows = os.environ.get("TRANSOM_GPU_RESULTS"), [row for each in WRITTEN for row in each["rows"]]
    if folder and rows:
        write(
            {**WRITTEN[0], "rows": sorted(rows, key=lambda row: (row["backend"], row["what"], row["precision"]))},
            Path(folder),
        )


def version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_installed(kind: str) -> bool:
    try:
        return library(kind) is not None
    except BackendError:
        return False


@pytest.fixture(scope="session", params=["tensorrt", "cuda"])
def backend(request: pytest.FixtureRequest, gpu: Gpu) -> str:
    """Each backend that is present: TensorRT with an engine for this GPU, ONNX Runtime's CUDA provider."""
    device = str(request.param)
    if device == "cuda" and PROVIDERS["cuda"] not in onnxruntime().get_available_providers():
        pytest.skip("onnxruntime has no CUDA provider: pip install onnxruntime-gpu in place of onnxruntime")
    if device == "tensorrt":
        kind = RTX if target_for(gpu).startswith("rtx") else FULL
        if not is_installed(kind):
            pytest.skip(f"{NAMES[kind]}, which has kernels for {gpu}, is not installed")
    return device


@pytest.fixture(scope="session")
def ready(once: Once, gpu: Gpu, backend: str) -> Ready:
    """``ready("gpt", "fp16")`` -> a bundle of a reference model, or of a checkpoint's folder, with an engine."""

    def get(model: str, precision: str, source: Path | None = None, **options: Any) -> Path:
        def make(folder: Path) -> None:
            from transom.export.engine.build import build
            from transom.export.engine.targets import find_targets
            from transom.runtime.bundle import Bundle

            # By name where INT8 needs the model's own data, else as a folder, which has no score to take
            path = source or (model if precision == "int8" else reference(model))
            export_to(folder, path, precision=precision, **options)
            if backend == "tensorrt":
                targets = find_targets([target_for(gpu)])
                build(Bundle(folder / "bundle"), targets, allow_unfused=False, tell=lambda _: None)

        return once(f"gpu-{backend}-{model}-{precision}", make) / "bundle"

    return get
