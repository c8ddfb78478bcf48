"""What goes wrong while engines are built: a signal, a cache that rots or cannot be written, axes beyond the model."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from command_line import changed_bundle, command, transom
from conftest import listing
from rtx import needs_rtx
from time_limits import PATIENCE_S
from transom.export.engine import build_process as builder
from transom.export.engine.build import build
from transom.export.engine.profiles import profiles_of
from transom.export.engine.targets import TARGETS, find_targets
from transom.export.engine.trt_graphs import tensorrt_graphs
from transom.runtime.bundle import Bundle
from transom.runtime.errors import BundleError, EngineError

ALL = [word for name in TARGETS if name.startswith("rtx") for word in ("--target", name)]


def processes_about(text: str) -> list[int]:
    """This machine's processes whose command lines contain ``text``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended
            continue
        if text in words:
            found.append(int(path.parent.name))
    return found


@needs_rtx
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("whom", ["the command", "its group"])
def test_an_interrupted_build_leaves_nothing(
    int8_bundle: Path, tmp_path: Path, sent: signal.Signals, whom: str
) -> None:
    """A terminal sends Ctrl-C to the whole group, the builder's process among it; `kill` sends to one.

    The builder is stopped first: a build that would never end, and that nothing but SIGKILL ends.
    """
    folder, temporary = tmp_path / "bundle", tmp_path / "temporary"
    shutil.copytree(int8_bundle, folder)
    temporary.mkdir()
    before = listing(folder)
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(temporary)}
    with subprocess.Popen(
        command("build", folder, *ALL),
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as running:
        assert running.stderr is not None
        said = next(line for line in running.stderr if "building model for rtx-sm80" in line)
        # Its log is there when it runs: a command that is still starting it would not know it yet
        while running.poll() is None and not (any(temporary.rglob("log.txt")) and processes_about(str(temporary))):
            time.sleep(0.01)
        (worker,) = processes_about(str(temporary))
        os.kill(worker, signal.SIGSTOP)
        (os.killpg if whom == "its group" else os.kill)(running.pid, sent)
        try:
            stdout, rest = running.communicate(timeout=PATIENCE_S)
        finally:
            left = processes_about(str(temporary))
            for process in left:
                os.kill(process, signal.SIGKILL)
    assert said
    assert (running.returncode, stdout) == (128 + sent, "")
    assert rest.splitlines()[-1] in ("transom: interrupted", "transom: terminated")
    assert "Traceback" not in rest
    assert listing(folder) == before
    assert list(temporary.iterdir()) == []
    assert left == []


@needs_rtx
def test_a_killed_build_takes_its_builder_along(int8_bundle: Path, tmp_path: Path) -> None:
    """Nobody can pass SIGKILL on: the builder sees that it is alone, and removes what it wrote."""
    folder, temporary = Path(shutil.copytree(int8_bundle, tmp_path / "bundle")), tmp_path / "temporary"
    temporary.mkdir()
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "TMPDIR": str(temporary)}
    with subprocess.Popen(
        command("build", folder, *ALL), cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as running:
        while running.poll() is None and not any(temporary.rglob("log.txt")):
            time.sleep(0.01)
        running.kill()
    ends = time.monotonic() + PATIENCE_S
    while processes_about(str(temporary)) and time.monotonic() < ends:
        time.sleep(0.05)
    assert processes_about(str(temporary)) == []
    assert list(temporary.iterdir()) == []
    assert Bundle(folder).manifest.engines == {}


@needs_rtx
@pytest.mark.parametrize("rotten", ["engine.plan", "log.txt", "sha256.json"])
def test_a_kept_engine_that_changed_is_built_again(
    int8_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rotten: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = Path(shutil.copytree(int8_bundle, tmp_path / "bundle"))
    targets, built, run_worker = find_targets(["rtx-sm86"]), [], builder.run_worker
    monkeypatch.setattr(builder, "run_worker", lambda *given: built.append(given) or run_worker(*given))
    (first,) = build(Bundle(folder), targets, allow_unfused=False, tell=lambda _: None)
    (kept,) = (tmp_path / "cache/transom/engines").iterdir()
    with (kept / rotten).open("r+b") as file:
        file.seek(40)
        file.write(b"\0\1\2")
    (again,) = build(Bundle(folder), targets, allow_unfused=False, tell=lambda _: None)
    assert (again.fusions, len(built)) == (first.fusions, 2)
    assert b"\0\1\2" not in (kept / rotten).read_bytes()[40:43]
    build(Bundle(folder), targets, allow_unfused=False, tell=lambda _: None)
    assert len(built) == 2
    assert Bundle(folder).read("engines/rtx-sm86.plan") == (kept / "engine.plan").read_bytes()


@needs_rtx
def test_a_cache_that_cannot_be_written_costs_the_cache(
    int8_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    folder = Path(shutil.copytree(int8_bundle, tmp_path / "bundle"))
    assert transom("build", folder, "--target", "rtx-sm86").exit_code == 0
    assert "rtx-sm86" in Bundle(folder).manifest.engines


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ({"S": 300}, "takes S=300 tokens at once, and its cache holds C=256"),
        ({"S": 300, "C": 300}, "reads beyond the 256 rows of its table 'wpe.weight' where its axes are greatest"),
    ],
)
def test_axes_beyond_the_model_are_refused(gpt_bundle: Path, tmp_path: Path, axes: dict[str, int], said: str) -> None:
    """A hand-edited bundle: an engine would read whatever lies behind the table, and say nothing."""

    def longer(words: dict[str, Any]) -> None:
        for name, size in axes.items():
            words["axes"][name]["max"] = size

    folder = changed_bundle(gpt_bundle, tmp_path / "longer", longer)
    result = transom("build", folder, "--target", "rtx-sm86")
    assert (result.exit_code, result.stdout) == (1, "")
    assert said in result.stderr.splitlines()[-1]
    with pytest.raises(BundleError, match="Export the bundle again"):
        tensorrt_graphs(Bundle(folder))


def axis(**sizes: int) -> Callable[[dict[str, Any]], object]:
    return lambda words: [words["axes"][name].update(max=size) for name, size in sizes.items()]


def vocabulary(size: int) -> Callable[[dict[str, Any]], object]:
    return lambda words: words["graphs"][0]["inputs"][0].update(below=size)


@pytest.mark.parametrize(
    ("fixture", "change", "table"),
    [
        ("gpt_bundle", axis(C=257), "256 rows of its table 'wpe.weight'"),
        ("gpt_bundle", axis(C=2**31 - 1), "256 rows of its table 'wpe.weight'"),
        ("gpt_bundle", vocabulary(1025), "1024 rows of its table 'wte.weight'"),
        ("dates_bundle", axis(S=65), "64 rows of its table 'model.encoder.embed_positions.weight'"),
        ("dates_bundle", axis(C=65), "64 rows of its table 'model.decoder.embed_positions.weight'"),
        ("clip_bundle", axis(S=49), "48 rows of its table 'text_model.embeddings.position_embedding.weight'"),
        ("clip_bundle", axis(S=2**31 - 1), "48 rows of its table 'text_model.embeddings.position_embedding.weight'"),
    ],
)
def test_no_table_is_read_beyond_its_end(
    fixture: str,
    change: Callable[[dict[str, Any]], object],
    table: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    """By one row or by billions; gathered or sliced; by a prompt, or by a step at the end of a cache."""
    sound = Path(request.getfixturevalue(fixture))
    tensorrt_graphs(Bundle(sound))
    with pytest.raises(BundleError, match=f"reads beyond the {table} where its axes are greatest"):
        tensorrt_graphs(Bundle(changed_bundle(sound, tmp_path, change)))


@needs_rtx
def test_a_full_disk_under_the_builder_is_said(
    int8_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel refuses writes past a limit: as near to a full disk as a test gets."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (graph,) = tensorrt_graphs(Bundle(int8_bundle)).values()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))  # bytes
    try:
        with pytest.raises(
            EngineError, match=r"for rtx-sm86 in .*: File too large\. Free some space there, or set TMP"
        ):
            builder.build_engine("model", graph.serialized(), (), TARGETS["rtx-sm86"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@needs_rtx
def test_a_disk_that_is_full_once_the_engine_is_built_costs_the_cache(
    int8_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    store = builder.store

    def store_nothing(*given: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))  # bytes
        try:
            store(*given)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(builder, "store", store_nothing)
    bundle = Bundle(int8_bundle)
    (graph,), (file,) = tensorrt_graphs(bundle).values(), bundle.manifest.graphs
    profiles = profiles_of(file.graph, bundle.manifest.axes)
    built = builder.build_engine("model", graph.serialized(), profiles, TARGETS["rtx-sm86"])
    assert len(built.plan) > 1_000
    assert list((tmp_path / "transom/engines").iterdir()) == []
