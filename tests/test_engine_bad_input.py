"""What goes wrong while engines are built: a signal, a cache that rots or cannot be written, axes beyond the model."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from command_line import changed_bundle, command, transom
from conftest import listing
from rtx import needs_rtx
from transom.export.engine import builder
from transom.export.engine.build import build
from transom.export.engine.flavour import tensorrt_graphs
from transom.export.engine.targets import TARGETS, find_targets
from transom.runtime.bundle import Bundle
from transom.runtime.errors import BundleError

ALL = [word for name in TARGETS if name.startswith("rtx") for word in ("--target", name)]


def processes_about(text: str) -> list[str]:
    """Command lines of this machine's processes that contain ``text``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended
            continue
        if text in words:
            found.append(words)
    return found


@needs_rtx
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("whom", ["the command", "its group"])
def test_an_interrupted_build_leaves_nothing(
    int8_bundle: Path, tmp_path: Path, sent: signal.Signals, whom: str
) -> None:
    """A terminal sends Ctrl-C to the whole group, the builder's process among it; `kill` sends to one."""
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
        (os.killpg if whom == "its group" else os.kill)(running.pid, sent)
        stdout, rest = running.communicate(timeout=60)
    assert said
    assert (running.returncode, stdout) == (128 + sent, "")
    assert rest.splitlines()[-1] in ("transom: interrupted", "transom: terminated")
    assert "Traceback" not in rest
    assert listing(folder) == before
    assert list(temporary.iterdir()) == []
    assert processes_about(str(temporary)) == []


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
