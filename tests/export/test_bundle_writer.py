"""Exports that are stopped half-way, and what must be left of them: nothing, or the old bundle."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from transom.export.bundle_writer import BundleWriter, check_out, new_bundle
from transom.export.pipeline import export
from transom.runtime.bundle import Bundle
from transom.runtime.errors import CheckpointError, ExportError


@pytest.mark.usefixtures("traced_once")
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


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("stage", ["writing the bundle", "scoring"])
def test_a_disk_that_takes_no_more(shallow_bert: Path, tmp_path: Path, stage: str) -> None:
    """The kernel refuses writes past a limit, early or late: as near to a full disk as a test gets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def shrink(what: str, done: int, total: int) -> None:
        if what == stage:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))  # bytes

    try:
        with pytest.raises(ExportError, match=r"File too large\. Nothing was left there\. Free some space and export"):
            export(str(shallow_bert), tmp_path / "out", progress=shrink)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("number", "stage"), [(signal.SIGINT, "tracing the module"), (signal.SIGTERM, "parity at")], ids=["INT", "TERM"]
)
def test_an_interrupted_export_leaves_nothing(
    shallow_bert: Path, tmp_path: Path, number: signal.Signals, stage: str
) -> None:
    command = [sys.executable, "-m", "transom.cli.main", "export", str(shallow_bert), "--out", str(tmp_path / "out")]
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


def test_a_killed_export_leaves_no_half_bundle(shallow_bert: Path, tmp_path: Path) -> None:
    """SIGKILL cannot be cleaned up after, but what is at --out is whole or not there; `make sweep` kills 200 times."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "transom.cli.main", "export", str(shallow_bert), "--out", str(out), "--force"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if "writing the bundle" in line)
        time.sleep(0.05)
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


WRITING = """
import os, shutil, signal, sys, time
from pathlib import Path
from transom.export.bundle_writer import new_bundle

def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)

rename = Path.rename
def dies_between_the_renames(self, target):
    die() if self.name.endswith(".partial") else rename(self, target)

with new_bundle(Path(sys.argv[1]), force=True) as writer:
    writer.add("bundle.json", b"new")
    print("writing", flush=True)
    match sys.argv[2]:
        case "never ends": time.sleep(3600)
        case "between the renames": Path.rename = dies_between_the_renames
        case "while the old one is deleted": shutil.rmtree = die
"""


@contextmanager
def writing(out: Path, fate: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has begun to write a bundle; its fate is to be killed, at the end of the block at the latest."""
    command = [sys.executable, "-c", WRITING, str(out), fate]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as started:
        try:
            assert started.stdout is not None
            assert started.stdout.readline() == "writing\n"
            yield started
        finally:
            started.kill()


def hidden(folder: Path) -> list[str]:
    return sorted(name for name in os.listdir(folder) if name.startswith("."))


def test_what_a_killed_export_left_is_cleared_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    with writing(tmp_path / "one", "never ends") as killed, writing(tmp_path / "two", "never ends") as living:
        killed.kill()
        killed.wait()
        assert len(hidden(tmp_path)) == 2
        with new_bundle(tmp_path / "three", force=False):
            assert len(hidden(tmp_path)) == 2  # the living one's and our own
        (left,) = hidden(tmp_path)
        assert living.poll() is None
        assert (tmp_path / left / "bundle.json").read_bytes() == b"new"
    check_out(tmp_path / "three", force=True)
    assert os.listdir(tmp_path) == ["three"]


def old_bundle(out: Path) -> Path:
    out.mkdir()
    (out / "bundle.json").write_bytes(b"old")
    (out / "model.onnx").write_bytes(b"weights")
    return out


def test_a_bundle_that_was_moved_aside_is_put_back(tmp_path: Path) -> None:
    """Killed between the two renames: nothing is at --out, and the only copy lies in a hidden folder."""
    out = old_bundle(tmp_path / "out")
    with writing(out, "between the renames") as process:
        assert process.wait() == -signal.SIGKILL
    assert not out.exists()
    with pytest.raises(ExportError, match="exists; give another folder"):
        check_out(out, force=False)
    assert sorted(os.listdir(tmp_path)) == ["out"]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        "bundle.json": b"old",
        "model.onnx": b"weights",
    }


def test_a_bundle_that_was_being_deleted_is_not_put_back(tmp_path: Path) -> None:
    out = old_bundle(tmp_path / "out")
    with writing(out, "while the old one is deleted") as process:
        assert process.wait() == -signal.SIGKILL
    assert (out / "bundle.json").read_bytes() == b"new"
    (left,) = hidden(tmp_path)
    assert left.endswith(".partial")
    shutil.rmtree(out)  # the new one goes: half of the old one must not come back in its place
    check_out(out, force=False)
    assert os.listdir(tmp_path) == []


def test_only_folders_of_ours_are_cleared(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    (tmp_path / ".transom-abcdefgh.partial").symlink_to(precious)
    (tmp_path / ".transom-notes.partial").mkdir()
    (tmp_path / ".transom-12345678.old").write_text("a file")
    before = sorted(os.listdir(tmp_path))
    check_out(tmp_path / "new", force=False)
    assert sorted(os.listdir(tmp_path)) == before
    assert (precious / "thesis.txt").exists()


def test_where_folders_cannot_be_locked_nothing_is_taken_for_abandoned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / ".transom-abcdefgh.partial"
    left.mkdir()

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with new_bundle(tmp_path / "out", force=False) as writer:
        writer.add("bundle.json", b"new")
    assert (tmp_path / "out" / "bundle.json").exists()
    assert left.exists()
