"""Exports that are stopped half-way, and what must be left of them: nothing, or the old bundle."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from transom.export.bundle import BundleWriter, new_bundle
from transom.export.pipeline import export
from transom.runtime.bundle import Bundle
from transom.runtime.errors import CheckpointError, ExportError

MakeCheckpoint = Callable[..., Path]


def test_an_existing_out_is_refused(bert_checkpoint: Path, bert_bundle: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(bert_bundle, tmp_path / "out"))
    with pytest.raises(ExportError, match=r"exists; give another folder, or --force to replace it"):
        export(str(bert_checkpoint), out)
    export(str(bert_checkpoint), out, force=True, precision="fp16")
    assert Bundle(out).manifest.precision == "fp16"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_force_replaces_bundles_only(bert_checkpoint: Path, tmp_path: Path, kind: str) -> None:
    precious, out = tmp_path / "precious", tmp_path / "out"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    match kind:
        case "folder":
            out = precious
        case "file":
            out.write_text("also precious")
        case "link":
            out.symlink_to(precious)
    with pytest.raises(ExportError, match="--force replaces only bundles"):
        export(str(bert_checkpoint), out, force=True)
    assert (precious / "thesis.txt").read_text() == "years of work"


def test_missing_parents_are_made_and_removed_again_on_failure(tmp_path: Path) -> None:
    with (
        pytest.raises(ExportError, match="No such file"),
        new_bundle(tmp_path / "a" / "b" / "out", force=False) as writer,
    ):
        writer.add("no such folder/x", b"x")
    assert list(tmp_path.iterdir()) == []
    with new_bundle(tmp_path / "a" / "b" / "out", force=False) as writer:
        writer.add("model.onnx", b"x")
    assert (tmp_path / "a" / "b" / "out" / "model.onnx").read_bytes() == b"x"


def test_a_bad_checkpoint_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError):
        export(str(tmp_path / "empty"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_an_unwritable_place_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ExportError, match=r"cannot write .*: File exists\. Nothing was left"),
        new_bundle(tmp_path / "file" / "out", force=False),
    ):
        pass


LIMITED = """
import resource, sys
from pathlib import Path
from transom.export.pipeline import export
from transom.runtime.errors import ExportError

def shrink(what, done, total):
    if what == sys.argv[3]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, resource.RLIM_INFINITY))  # bytes

try:
    export(sys.argv[1], Path(sys.argv[2]), progress=shrink)
except ExportError as error:
    print(error)
"""


@pytest.mark.parametrize("stage", ["writing the bundle", "scoring"])
def test_a_disk_that_takes_no_more(bert_checkpoint: Path, tmp_path: Path, stage: str) -> None:
    """The kernel refuses writes past a limit, early or late: as near to a full disk as a test gets."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(bert_checkpoint), str(tmp_path / "out"), stage],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "File too large. Nothing was left there. Free some space and export again." in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stage", ["tracing the module", "parity at"])
def test_an_interrupted_export_leaves_nothing(
    bert_checkpoint: Path, tmp_path: Path, number: signal.Signals, stage: str
) -> None:
    command = [sys.executable, "-m", "transom.cli.main", "export", str(bert_checkpoint), "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:  # a line per stage where stderr is no terminal
            said.append(line)
            if stage in line:
                process.send_signal(number)
                break
        said += process.stderr.readlines()
    assert process.returncode == 128 + number, said
    assert not any("Traceback" in line for line in said)
    assert list(tmp_path.iterdir()) == []


def test_killed_at_any_moment_there_is_no_half_bundle(bert_checkpoint: Path, tmp_path: Path) -> None:
    """SIGKILL cannot be cleaned up after, but what is at --out is whole or not there."""
    out = tmp_path / "out"
    for delay in (0.0, 0.1):
        command = [
            sys.executable,
            "-m",
            "transom.cli.main",
            "export",
            str(bert_checkpoint),
            "--out",
            str(out),
            "--force",
        ]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            next(line for line in process.stderr if "writing the bundle" in line)
            time.sleep(delay)
            process.kill()
        assert not out.exists() or Bundle(out).manifest.family == "bert"


def test_the_writer_replaces_whole_files(tmp_path: Path) -> None:
    writer = BundleWriter(tmp_path)
    writer.add("a", b"one")
    writer.add("a", b"three")
    assert sorted(os.listdir(tmp_path)) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"three"


def test_what_appears_at_out_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ExportError, match="exists"), new_bundle(out, force=False):  # noqa: PT012
        out.mkdir()
        (out / "precious.txt").write_text("mine")
    assert (out / "precious.txt").read_text() == "mine"
    assert list(tmp_path.iterdir()) == [out]


def test_ctrl_c_between_the_two_renames_keeps_the_old_bundle(
    bert_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(bert_bundle, tmp_path / "out"))
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(self, target)

    with pytest.raises(KeyboardInterrupt), new_bundle(out, force=True):  # noqa: PT012
        monkeypatch.setattr(Path, "rename", interrupted)
        monkeypatch.setattr(Path, "replace", interrupted)
    assert Bundle(out).manifest.family == "bert"
    assert list(tmp_path.iterdir()) == [out]
