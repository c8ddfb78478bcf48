"""Caches: a folder that cannot be had fails nothing and is logged once, what is kept has a bound, keys hold it all."""

from __future__ import annotations

import json
import logging
import os
import pwd
from pathlib import Path
from typing import Any, NoReturn

import pytest

from rtx import needs_rtx
from tiny_graphs import graph_of
from transom.export.engine import build_process as builder
from transom.export.engine import build_worker as worker
from transom.export.engine.profiles import Profile
from transom.export.engine.targets import TARGETS
from transom.export.engine.trt_graphs import TensorRTGraph
from transom.runtime import disk_cache as caches
from transom.runtime.backends import trt_kernel_cache as runtime_cache
from transom.runtime.backends.trt_kernel_cache import KernelCache
from transom.runtime.disk_cache import Cache, cache_root, trim


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "_logged", set())


def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user of whom the system knows nothing, as in a container that runs as some number."""

    def unknown(uid: int) -> NoReturn:
        raise KeyError(uid)

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


def in_the_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))


def kernel_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file where the folder of the kind should be."""
    (tmp_path / "transom").mkdir()
    for kind in caches.LIMITS:
        (tmp_path / "transom" / kind).write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def not_allowed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file system on which root makes no folder either."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc")


def read_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The folder is there, on a file system that is mounted read-only."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for kind in caches.LIMITS:
        (tmp_path / "transom" / kind).mkdir(parents=True)
    monkeypatch.setattr(os, "access", lambda path, mode: False)


WITHOUT_A_CACHE = [nobody, in_the_way, kernel_file, not_allowed, read_only]


@pytest.mark.parametrize("lose", WITHOUT_A_CACHE)
def test_a_folder_that_cannot_be_had_costs_the_cache_and_one_line(
    lose: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lose(monkeypatch, tmp_path)
    for _ in range(2):
        kept = Cache("kernels", "It takes seconds.")
        kept.add("key", lambda path: path.write_bytes(b"data"))
        entry = kept.entry("key")
        assert entry is None or not entry.exists()
    (line,) = [record.getMessage() for record in caplog.records if record.name == "transom"]
    assert line.startswith("nothing is kept in the cache of kernels: ")
    assert line.endswith(" It takes seconds. Set XDG_CACHE_HOME to a folder that can be written.")


class Config:
    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()


class RuntimeCache:
    """TensorRT-RTX's, as far as it is kept; ``deserialize`` takes what was compiled."""

    def __init__(self) -> None:
        self.data = b"compiled"

    def serialize(self) -> bytes:
        return self.data

    def deserialize(self, data: bytes) -> bool:
        return data == b"compiled"


class Engine:
    def create_runtime_config(self) -> Config:
        return Config()


@pytest.mark.parametrize("lose", WITHOUT_A_CACHE)
def test_an_engine_loads_without_a_cache_of_kernels(
    lose: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The line comes when the engine is loaded, not when it goes."""
    lose(monkeypatch, tmp_path)
    kernels = KernelCache(Engine(), b"plan", "key")
    (line,) = [record.getMessage() for record in caplog.records if record.name == "transom"]
    assert "Every start on the GPU compiles an engine's kernels again" in line
    kernels._save()


def test_kernels_in_a_read_only_folder_are_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As in an image that was started once before it was shipped: nothing is lost, so nothing is said."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    KernelCache(Engine(), b"plan", "key")._save()
    (kept,) = (tmp_path / "transom/kernels").iterdir()
    assert kept.read_bytes() == b"compiled"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    KernelCache(Engine(), b"plan", "key")
    assert caplog.records == []


def test_kernels_of_another_version_or_plan_are_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for version, plan in (("1.0", b"plan"), ("1.1", b"plan"), ("1.1", b"other plan")):
        monkeypatch.setattr(runtime_cache, "our_version", lambda version=version: version)
        KernelCache(Engine(), plan, "key")._save()
    assert len(list((tmp_path / "transom/kernels").iterdir())) == 3


def test_the_oldest_entries_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four of 10 bytes where 30 may be: the one that was of no use for longest goes, be it a file or a folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(caches.LIMITS, "kernels", 30)
    kept = Cache("kernels", "")

    def folder(path: Path) -> None:
        path.mkdir()
        (path / "part").write_bytes(bytes(10))

    for age, (name, write) in enumerate(
        (("a", folder), ("b", lambda path: path.write_bytes(bytes(10))), ("c", folder))
    ):
        kept.add(name, write)
        entry = kept.entry(name)
        assert entry is not None
        os.utime(entry, (100 + age, 100 + age))
    kept.used("a")
    kept.add("d", folder)
    assert sorted(path.name for path in (tmp_path / "transom/kernels").iterdir()) == ["a", "c", "d"]
    trim(tmp_path / "transom/kernels", 10)
    (left,) = (tmp_path / "transom/kernels").iterdir()
    trim(tmp_path / "transom/kernels", 9)
    assert left.name == "d"
    assert list((tmp_path / "transom/kernels").iterdir()) == []
    trim(tmp_path / "absent", 0)


def test_every_cache_has_a_bound() -> None:
    assert {runtime_cache.KIND, builder.KIND, "triton", "exports", "native"} == {*caches.LIMITS}
    assert all(0 < limit <= 8 << 30 for limit in caches.LIMITS.values())


def test_a_relative_cache_folder_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """XDG Base Directory Specification: all paths set in these variables must be absolute."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_root() == tmp_path / ".cache/transom"


def test_the_key_of_an_engine_holds_versions_and_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    job: dict[str, Any] = {"library": "tensorrt_rtx", "profiles": [], "flags": builder.FLAGS}
    keys = [builder.key_of(b"model", job, "1.7.1")]
    keys.append(builder.key_of(b"model", job, "1.7.2"))
    keys.append(builder.key_of(b"another", job, "1.7.1"))
    keys += [
        builder.key_of(b"model", {**job, "flags": {**builder.FLAGS, name: "another"}}, "1.7.1")
        for name in builder.FLAGS
    ]
    monkeypatch.setattr(builder, "our_version", lambda: "99.0")
    keys.append(builder.key_of(b"model", job, "1.7.1"))
    assert len({*keys}) == len(keys) == 6


def relu() -> bytes:
    graph = graph_of("model (float[4, 4] x) => (float[4, 4] y) { y = Relu (x) }", {}, ["relu"])
    next(iter(graph.graph)).name = "relu"
    return TensorRTGraph(graph).serialized()


@needs_rtx
def test_the_worker_goes_by_the_flags_of_its_job(tmp_path: Path) -> None:
    """Each flag of the key reaches the builder; what the job does not name is not set."""
    (tmp_path / worker.GRAPH).write_bytes(relu())
    job = {"library": "tensorrt_rtx", "capability": [8, 6], "profiles": []}
    logs = {}
    for name, verbosity in (("detailed", "DETAILED"), ("none", "NONE")):
        flags = {**builder.FLAGS, "profiling_verbosity": verbosity}
        (tmp_path / worker.JOB).write_text(json.dumps({**job, "flags": flags}))
        builder.run_worker(tmp_path, "model", TARGETS["rtx-sm86"])
        logs[name] = (tmp_path / worker.LOG).read_text()
    assert "LayerType: " in logs["detailed"]
    assert "LayerType: " not in logs["none"]


@needs_rtx
@pytest.mark.parametrize("lose", [nobody, kernel_file])
def test_an_engine_is_built_without_a_cache(
    lose: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lose(monkeypatch, tmp_path)
    model = relu()
    shape = Profile("all", {})
    assert len(builder.build_engine("model", model, [shape], TARGETS["rtx-sm86"]).plan) > 1_000
    (record,) = [record for record in caplog.records if record.name == "transom"]
    assert (record.levelno, "cache of engines" in record.getMessage()) == (logging.WARNING, True)


def test_triton_keeps_its_kernels_in_our_cache_and_elsewhere_only_where_it_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Triton's own cache is in the home folder, without one below the folder that one is in, and grows for ever."""
    pytest.importorskip("triton", reason="triton is not installed: pip install 'transom[plugin]'")
    from triton import knobs

    from transom.export.plugins.aot import bounded_triton_cache

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(caches.LIMITS, "triton", 10)
    with bounded_triton_cache():
        inside = Path(knobs.cache.dir)
        (inside / "kernel").mkdir()
        (inside / "kernel" / "ptx").write_bytes(bytes(11))
    assert inside == tmp_path / "cache/transom/triton"
    assert list(inside.iterdir()) == []
    assert "TRITON_CACHE_DIR" not in os.environ
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "theirs"))
    with bounded_triton_cache():
        assert Path(knobs.cache.dir) == tmp_path / "theirs"
    monkeypatch.setenv("TRITON_CACHE_DIR", "/proc/none")
    nobody(monkeypatch, tmp_path)
    with bounded_triton_cache():
        inside = Path(knobs.cache.dir)
        assert inside.is_dir()
        assert inside.name.startswith("transom-triton-")
    assert not inside.exists()
