"""The command line: what it prints and where, its exit statuses, and that it needs no torch to run a bundle.

In-process through typer's CliRunner; real processes only where signals, pipes and imports are the subject.
"""

from __future__ import annotations

import json
import math
import os
import pty
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from transom.cli.failures import Terminated
from transom.cli.main import app
from transom.cli.show import bytes_text, plain, printable
from transom.runtime import load
from transom.runtime.bench import example_feeds, percentile, sizes_of
from transom.runtime.bundle import MANIFEST, manifest_sha256
from transom.runtime.compare import Comparison
from transom.runtime.errors import BackendError, InputError, ParityError, ShapeError
from transom.runtime.spec import Axis, Graph, Tensor

COMMANDS = ("export", "verify", "selftest", "run", "bench", "inspect", "doctor", "table")
ANSI = "\x1b"
SHORT = ("--runs", "3", "--warmup", "1")


def transom(*arguments: str | Path, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin, prog_name="transom")


def document(result: Result) -> Any:
    """Stdout as the one JSON document it must be: no NaN, nothing before or after."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(result.stdout, parse_constant=refuse)


def error_line(result: Result, status: int = 1) -> str:
    """The one line on stderr of a command that failed with nothing on stdout."""
    assert (result.exit_code, result.stdout) == (status, ""), result.output
    (line,) = result.stderr.splitlines()
    return line


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "transom.cli.main", *map(str, arguments)]


def process(folder: Path, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """A real process, run away from the repository's root, where the rooms could be imported bare."""
    return subprocess.run(
        command(*arguments), cwd=folder, capture_output=True, text=True, timeout=240, encoding="utf-8", **options
    )


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "ein Bild – 写真.png"
    Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(path)
    return path


def changed_bundle(bundle: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy whose bundle.json was changed, and signed again."""
    copy = folder / "changed"
    shutil.copytree(bundle, copy)
    manifest = json.loads((copy / MANIFEST).read_text())
    change(manifest)
    manifest["manifest_sha256"] = manifest_sha256(manifest)
    (copy / MANIFEST).write_text(json.dumps(manifest))
    return copy


# Help and usage


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_every_command_explains_itself_by_example(name: str, flag: str) -> None:
    result = transom(name, flag)
    assert (result.exit_code, result.stderr) == (0, "")
    assert re.search(rf"^  Examples?:\n    transom {name} ?", result.stdout, re.MULTILINE)


def test_help_names_the_commands_the_statuses_and_completion() -> None:
    text = transom("--help").stdout
    assert set(COMMANDS) <= set(text.split())
    for line in ("0    done", "1    a Transom error", "2    wrong usage", "130  Ctrl-C", "--install-completion"):
        assert line in text
    assert ANSI not in text


def test_help_is_what_one_gets_without_arguments() -> None:
    result = transom()
    assert result.exit_code == 2
    assert "Usage: transom [OPTIONS] COMMAND" in result.output


def test_version() -> None:
    assert re.fullmatch(r"transom \d+\.\d+\.\d+\n", transom("--version").stdout)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["inspect"], "Missing argument 'BUNDLE'"),
        (["inspect", "b", "--frobnicate"], "No such option: --frobnicate"),
        (["selftest", "b", "--threads", "0"], "'--threads'"),
        (["bench", "b", "--shape", "S"], "--shape is 'S'; expected AXIS=SIZE"),
        (["bench", "b", "--shape", "S=0"], "--shape is 'S=0'"),
        (["bench", "b", "--shape", "S=²"], "--shape is 'S=²'"),
        (["bench", "b", "--shape", "S=1,S=2"], "axis S is given twice"),
        (["export", "s"], "Missing option '--out'"),
        (["export", "s", "--out", "o", "--precision", "fp8"], "'--precision'"),
        (["export", "s", "--out", "o", "--max", "512"], "--max is '512'"),
        (["export", "s", "--out", "o", "--image-size", "3x4x5"], "--image-size is '3x4x5'"),
        (["export", "s", "--out", "o", "--image-size", "0"], "--image-size is '0'"),
    ],
)
def test_a_wrong_call_exits_2_and_says_what_is_wrong(arguments: list[str], said: str) -> None:
    result = transom(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_a_wrong_call_with_json_is_json() -> None:
    result = transom("bench", "b", "--shape", "S", "--json")
    assert result.exit_code == 2
    assert document(result)["error"]["type"] == "UsageError"
    assert "--shape is 'S'" in document(result)["error"]["message"]


def test_completion_knows_the_commands_and_the_precisions(tmp_path: Path) -> None:
    for words, expected in (("transom exp", "export"), ("transom export s --precision fp1", "fp16")):
        asked = {"_TRANSOM_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        assert process(tmp_path, env={**os.environ, **asked}).stdout.split() == [expected]


# Errors


def test_an_error_of_ours_is_one_line_with_its_full_name(tmp_path: Path) -> None:
    """However long, whatever it looks like: not wrapped, no markup, no emoji."""
    path = tmp_path / ("x" * 200) / "[bold red]not[/] :smile: [MASK]"
    line = error_line(transom("inspect", path))
    assert line == (
        f"transom.runtime.errors.BundleError: {path} is no folder; expected a bundle that `transom export` made."
    )


def test_an_error_stays_one_line_and_steers_no_terminal(tmp_path: Path) -> None:
    line = error_line(transom("inspect", f"{tmp_path}/a\nb\x1b[31m"))
    assert f"{tmp_path}/a b\\x1b[31m is no folder" in line


@pytest.mark.parametrize("name", ["verify", "selftest", "bench", "inspect"])
def test_an_error_with_json_is_on_both_streams(name: str, tmp_path: Path) -> None:
    result = transom(name, tmp_path, "--json")
    assert result.exit_code == 1
    message = f"{tmp_path} has no bundle.json; the bundle is incomplete, copy it again."
    assert document(result) == {"error": {"type": "BundleError", "message": message}}
    assert result.stderr == f"transom.runtime.errors.BundleError: {message}\n"


@pytest.mark.parametrize(
    "arguments",
    [["--debug", "inspect", "nowhere"], ["inspect", "--debug", "nowhere"], ["inspect", "nowhere", "--debug"]],
)
def test_debug_shows_the_traceback_from_any_position(arguments: list[str]) -> None:
    result = transom(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("Traceback (most recent call last)")
    assert "\ntransom.runtime.errors.BundleError: nowhere is no folder" in result.stderr


def test_debug_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSOM_DEBUG", "1")
    assert "Traceback" in transom("inspect", "nowhere").stderr
    monkeypatch.setenv("TRANSOM_DEBUG", "0")
    assert "Traceback" not in transom("inspect", "nowhere").stderr


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def raise_it(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr("transom.runtime.bundle.Bundle", raise_it)


def test_a_bug_is_one_line_and_status_70(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, ZeroDivisionError("first line\nsecond [line]"))
    line = error_line(transom("inspect", "b"), status=70)
    assert line == ("transom: internal error (ZeroDivisionError: first line second [line]), run again with --debug")
    assert "Traceback" in transom("inspect", "b", "--debug").stderr
    assert document(transom("inspect", "b", "--json"))["error"]["type"] == "ZeroDivisionError"


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [(KeyboardInterrupt(), 130, "transom: interrupted"), (Terminated(), 143, "transom: terminated")],
)
def test_an_interruption_is_one_line(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, said: str
) -> None:
    fail_with(monkeypatch, error)
    assert error_line(transom("inspect", "b"), status) == said
    assert document(transom("inspect", "b", "--json"))["error"]["message"] == said


# Processes


@pytest.mark.parametrize(
    ("sent", "status", "said"),
    [(signal.SIGINT, 130, "transom: interrupted"), (signal.SIGTERM, 143, "transom: terminated")],
)
def test_a_signal_ends_a_long_command_with_one_line(
    vit_bundle: Path, tmp_path: Path, sent: signal.Signals, status: int, said: str
) -> None:
    arguments = command("bench", vit_bundle, "--runs", "100000000", "--seconds", "200")
    with subprocess.Popen(
        arguments, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stderr is not None
        first = running.stderr.readline()  # the measurement has begun
        running.send_signal(sent)
        stdout, rest = running.communicate(timeout=60)
    assert first.endswith("B=1 ...\n")
    assert (running.returncode, stdout, rest) == (status, "", f"{said}\n")


# Output that is written late, when the buffer is flushed, fails late: that is the harder case.
BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


@pytest.mark.parametrize(
    ("arguments", "status", "lines"),
    [(("inspect", "{bundle}"), 141, 0), (("doctor", "--json"), 141, 0), (("inspect", "nowhere", "--json"), 1, 1)],
)
def test_a_reader_that_goes_away_is_no_error_to_talk_about(
    vit_bundle: Path, tmp_path: Path, arguments: tuple[str, ...], status: int, lines: int
) -> None:
    filled = [argument.format(bundle=vit_bundle) for argument in arguments]
    with subprocess.Popen(
        command(*filled), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=BUFFERED
    ) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        said = running.stderr.read().splitlines()
    assert (running.returncode, len(said)) == (status, lines), said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("arguments", [("doctor",), ("doctor", "--json"), ("--help",), ("--version",)])
@pytest.mark.parametrize("buffering", [{}, {"PYTHONUNBUFFERED": "1"}], ids=["buffered", "unbuffered"])
def test_a_full_disk_under_stdout_is_said_once(
    tmp_path: Path, arguments: tuple[str, ...], buffering: dict[str, str]
) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command(*arguments),
            cwd=tmp_path,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            env=BUFFERED | buffering,
        )
    assert done.stderr == "transom: the output cannot be written: No space left on device\n"
    assert done.returncode == 1


BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "onnx", "onnx_ir", "onnxscript", "transformers", "huggingface_hub"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
"""


@pytest.fixture
def without_torch(tmp_path: Path) -> dict[str, str]:
    """An environment whose Python has neither torch nor onnx, nor what stands on them."""
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "sitecustomize.py").write_text(BLOCK)
    return {**os.environ, "PYTHONPATH": str(tmp_path / "blocked")}


def test_the_device_commands_need_no_torch(
    vit_bundle: Path, photo: Path, without_torch: dict[str, str], tmp_path: Path
) -> None:
    for arguments in (
        ("selftest", vit_bundle),
        ("run", vit_bundle, photo),
        ("bench", vit_bundle, *SHORT),
        ("inspect", vit_bundle),
        ("doctor",),
        ("table", vit_bundle),
    ):
        done = process(tmp_path, *arguments, "--json", env=without_torch)
        assert (done.returncode, done.stderr) == (0, ""), arguments
        assert "error" not in json.loads(done.stdout)


@pytest.mark.parametrize("arguments", [("export", "vit", "--out", "new"), ("verify", "{bundle}")])
def test_export_and_verify_without_torch_say_what_to_install(
    arguments: tuple[str, ...], vit_bundle: Path, without_torch: dict[str, str], tmp_path: Path
) -> None:
    filled = [argument.format(bundle=vit_bundle) for argument in arguments]
    done = process(tmp_path, *filled, env=without_torch)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert re.match(r"transom\.runtime\.errors\.BackendError: (torch|onnx|onnx_ir) cannot be imported", line)
    assert line.endswith("Run `pip install 'transom[export]'`.")
    assert not (tmp_path / "new").exists()


def test_the_command_line_starts_in_a_third_of_a_second(tmp_path: Path) -> None:
    """The best of five, a busy machine slows some; rich and numpy wait until a command needs them."""
    code = "import sys, transom.cli.main; sys.exit(bool({'rich', 'numpy', 'torch'} & set(sys.modules)))"
    best_us = math.inf
    for _ in range(5):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0
        (cumulative,) = re.findall(r"\|\s*(\d+) \| +transom\.cli\.main$", done.stderr, re.MULTILINE)
        best_us = min(best_us, int(cumulative))
    assert best_us < 300_000


def test_a_terminal_gets_a_bar_and_a_pipe_does_not(vit_bundle: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        command("bench", vit_bundle, "--runs", "50"),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm"},
    ) as running:
        os.close(theirs)
        shown = b"".join(read_terminal(ours))
        assert running.stdout is not None
        piped = running.stdout.read().decode()
    os.close(ours)
    assert running.returncode == 0
    assert b"\x1b[" in shown
    assert b"50/50" in shown or b"/50" in shown
    assert ANSI not in piped
    assert "p50 ms" in piped


def read_terminal(descriptor: int) -> Iterator[bytes]:
    """What arrives at a terminal until the other side closes it."""
    while select.select([descriptor], [], [], 60)[0]:
        try:
            data = os.read(descriptor, 4096)
        except OSError:  # Linux says EIO there
            return
        if not data:
            return
        yield data


# inspect, selftest, verify


def test_inspect_shows_what_the_manifest_says(vit_bundle: Path) -> None:
    told = document(transom("inspect", vit_bundle, "--json"))
    manifest = json.loads((vit_bundle / MANIFEST).read_text())
    for name in ("family", "task", "precision", "axes", "files", "labels", "source", "tools", "parity"):
        assert told[name] == manifest[name], name
    assert told["graphs"][0]["inputs"][0]["name"] == "pixel_values"
    assert told["size_bytes"] == sum(file.stat().st_size for file in vit_bundle.iterdir())

    text = transom("inspect", vit_bundle).stdout
    for word in ("image-classification", "fp32", "pixel_values float32 (B, ", "allowed", "golden.safetensors"):
        assert word in text
    assert all(file["sha256"] in text for file in manifest["files"].values())  # in a pipe nothing is cut off
    assert ANSI not in text


def test_inspect_refuses_a_changed_byte(vit_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(vit_bundle, copy)
    with (copy / "golden.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    assert "golden.safetensors does not have the SHA-256" in error_line(transom("inspect", copy))


def test_selftest_agrees_with_pytorch(vit_bundle: Path) -> None:
    told = document(transom("selftest", vit_bundle, "--threads", "1", "--json"))
    assert 0 <= told["worst"]["error"] <= told["tolerance"]
    for case in told["cases"]:
        tensors = {each["tensor"] for each in case["against_pytorch"]}
        assert tensors == {each["tensor"] for each in case["against_build"]} == {"logits", "last_hidden_state"}
    text = transom("selftest", vit_bundle).stdout
    assert "agrees with PyTorch: worst error" in text
    assert ANSI not in text


def test_selftest_beyond_tolerance_exits_1_with_the_worst_element(vit_bundle: Path, tmp_path: Path) -> None:
    def tighten(manifest: dict[str, Any]) -> None:
        manifest["parity"]["tolerance"] = 1e-12

    line = error_line(transom("selftest", changed_bundle(vit_bundle, tmp_path, tighten)))
    assert re.search(r"ParityError: .* logits\[\d+, \d+\] is \S+, expected \S+ \(error .*allows 1e-12", line)


def test_verify_compares_with_the_checkpoint(bert_bundle: Path, bert_checkpoint: Path) -> None:
    told = document(transom("verify", bert_bundle, "--source", bert_checkpoint, "--json"))
    shapes = [case["shape"] for case in told["cases"]]
    assert {"B": 1, "S": 1} in shapes
    assert max(c["error"] for case in told["cases"] for c in case["comparisons"]) < 2e-5
    text = transom("verify", bert_bundle).stdout
    assert re.search(r"^B=1,S=1 +sentence_embedding +\d\.\d\de-\d\d +\[0, \d+\]", text, re.MULTILINE)
    assert "agrees with PyTorch" in text


def test_verify_beyond_tolerance_exits_1(bert_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worst = Comparison("logits", (1, 2), 0.5, (0, 1), 1.5, 1.0)

    def differ(*arguments: Any, **options: Any) -> None:
        raise ParityError(f"it differs: {worst}")

    monkeypatch.setattr("transom.export.pipeline.verify", differ)
    line = error_line(transom("verify", bert_bundle))
    assert line == "transom.runtime.errors.ParityError: it differs: logits[0, 1] is 1.5, expected 1 (error 5.00e-01)"


# run


def test_run_embeds_texts(bert_bundle: Path) -> None:
    texts = ["a word", "[MASK] :smile: [/b]"]
    told = document(transom("run", bert_bundle, *texts, "--json"))
    assert [result["text"] for result in told["results"]] == texts
    with load(bert_bundle) as bert:
        expected = bert.embed(texts)
    found = np.array([result["embedding"] for result in told["results"]], np.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)

    lines = transom("run", bert_bundle, *texts).stdout.splitlines()
    norm = float(np.linalg.norm(expected[1]))
    assert lines[2] == "[MASK] :smile: [/b]"
    assert lines[3].startswith(f"  embedding {expected[1, 0]:.4f} {expected[1, 1]:.4f} ")
    assert lines[3].endswith(f"{len(expected[1])} numbers, norm {norm:.4f}")


def test_run_reads_lines_from_stdin(bert_bundle: Path) -> None:
    told = document(transom("run", bert_bundle, "-", "a word", "--json", stdin="\ufeffone\r\ntwo\n".encode()))
    assert [result["text"] for result in told["results"]] == ["one", "two", "a word"]
    assert "stdin is not UTF-8 (byte 1)" in error_line(transom("run", bert_bundle, "-", stdin=b"a\xff"))
    assert "stdin is empty" in error_line(transom("run", bert_bundle, "-", stdin=""))
    assert transom("run", bert_bundle, "-", "-", stdin="one").exit_code == 2


def test_run_takes_a_text_that_begins_with_a_dash(bert_bundle: Path) -> None:
    told = document(transom("run", bert_bundle, "--json", "--", "--debug"))
    assert told["results"][0]["text"] == "--debug"


def test_run_writes_embeddings_to_a_file(bert_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "vectors é.npz"
    result = transom("run", bert_bundle, "a word", "time", "--out", out)
    assert result.stdout.endswith(f"written to {out}\n")
    with load(bert_bundle) as bert, np.load(out) as file:
        np.testing.assert_allclose(file["embedding"], bert.embed(["a word", "time"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--top-k", "3"], "--top-k is 3; feature-extraction gives no ranking"),
        (["--out", "vectors.txt"], "--out is 'vectors.txt'; expected the name of a .npz file"),
    ],
)
def test_run_refuses_options_that_mean_nothing(bert_bundle: Path, options: list[str], said: str) -> None:
    result = transom("run", bert_bundle, "a word", *options)
    assert result.exit_code == 2
    assert said in result.stderr


def test_run_refuses_an_empty_text(bert_bundle: Path) -> None:
    assert "transom.runtime.errors.InputError: " in error_line(transom("run", bert_bundle, ""))


def test_run_classifies_images(vit_bundle: Path, photo: Path) -> None:
    told = document(transom("run", vit_bundle, photo, photo, "--top-k", "3", "--json"))
    with load(vit_bundle) as vit:
        expected = vit.classify(str(photo), top_k=3)
    assert [result["image"] for result in told["results"]] == [str(photo)] * 2
    for result in told["results"]:
        assert [each["label"] for each in result["labels"]] == [label for label, _ in expected]
        assert [each["probability"] for each in result["labels"]] == pytest.approx([p for _, p in expected], rel=1e-4)
    lines = transom("run", vit_bundle, photo).stdout.splitlines()
    assert lines[:2] == [str(photo), f"  {expected[0][1]:.4f}  {expected[0][0]}"]
    assert len(lines) == 6
    assert "--out holds arrays" in transom("run", vit_bundle, photo, "--out", "o.npz").stderr


def test_run_refuses_what_is_no_image(vit_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.png"
    path.write_text("no image")
    assert "transom.runtime.errors.InputError: " in error_line(transom("run", vit_bundle, path))


def test_run_takes_arrays_and_gives_arrays(bert_bundle: Path, tmp_path: Path) -> None:
    ids = np.array([[2, 7, 3]])
    np.savez(tmp_path / "in.npz", input_ids=ids)
    with load(bert_bundle) as bert:
        expected = bert.run({"input_ids": ids})
    told = document(transom("run", bert_bundle, tmp_path / "in.npz", "--json"))
    assert told["outputs"].keys() == expected.keys()
    for name, array in expected.items():
        assert told["outputs"][name]["shape"] == list(array.shape)
        np.testing.assert_allclose(np.array(told["outputs"][name]["values"]), array, rtol=1e-5, atol=1e-6)

    lines = transom("run", bert_bundle, tmp_path / "in.npz", "--out", tmp_path / "out.npz").stdout.splitlines()
    name, array = next(iter(expected.items()))
    assert lines[0].startswith(f"{name} float32 {array.shape}  min {array.min():.5g}  ")
    with np.load(tmp_path / "out.npz") as file:
        assert set(file.files) == expected.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.npz", "out.npz"]


def test_run_says_what_is_wrong_with_arrays(bert_bundle: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "pickled.npz", input_ids=np.array([{"an": "object"}], dtype=object))
    np.savez(tmp_path / "name.npz", ids=np.array([[1]]))
    np.savez(tmp_path / "good.npz", input_ids=np.array([[1]]))
    (tmp_path / "text.npz").write_text("no zip")
    said = {
        name: error_line(transom("run", bert_bundle, tmp_path / f"{name}.npz")) for name in ("pickled", "name", "text")
    }
    assert "cannot be read as a .npz file of plain arrays: " in said["pickled"]
    assert "cannot be read as a .npz file of plain arrays: " in said["text"]
    assert "InputError: unknown input 'ids'" in said["name"]
    missing = error_line(transom("run", bert_bundle, tmp_path / "missing.npz"))
    assert "missing.npz cannot be read as a .npz file of plain arrays: No such file or directory" in missing
    nowhere = error_line(transom("run", bert_bundle, tmp_path / "good.npz", "--out", tmp_path / "no" / "out.npz"))
    assert "out.npz cannot be written: No such file or directory" in nowhere


TASKS: dict[str, tuple[str, tuple[str, ...], str]] = {  # architecture -> task, INPUTs, key of the answer
    "BertForMaskedLM": ("fill-mask", ("the [MASK] of france", "a [MASK] is a [MASK]"), "masks"),
    "BertForSequenceClassification": ("text-classification", ("a word", "two more"), "labels"),
    "BertForTokenClassification": ("token-classification", ("people of paris",), "entities"),
    "BertForQuestionAnswering": ("question-answering", ("what is it", "it is the capital of france"), "answers"),
    "BertForNextSentencePrediction": ("next-sentence-prediction", ("go now", "call him"), "probability"),
}


@pytest.mark.parametrize("architecture", TASKS)
def test_run_knows_every_task_of_bert(architecture: str, make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    task, inputs, key = TASKS[architecture]
    bundle = tmp_path / "bundle"
    made = transom("export", make_checkpoint(architecture), "--out", bundle, "--json")
    assert document(made)["task"] == task
    results = document(transom("run", bundle, *inputs, "--json"))["results"]
    assert all(key in result for result in results)
    with load(bundle) as bert:
        if task == "fill-mask":
            assert [len(result["masks"]) for result in results] == [1, 2]
            one, two = bert.fill_mask(inputs[0]), bert.fill_mask(inputs[1])
            assert [each["token"] for each in results[0]["masks"][0]] == [token for token, _ in one]
            assert [each["token"] for each in results[1]["masks"][1]] == [token for token, _ in two[1]]
        elif task == "text-classification":
            assert results[1]["labels"][0]["label"] == bert.classify(inputs[1])[0][0]
        elif task == "token-classification":
            assert [each["start"] for each in results[0]["entities"]] == [each.start for each in bert.tag(inputs[0])]
        elif task == "question-answering":
            assert results[0]["answers"][0]["text"] == bert.answer(*inputs)[0].text
        else:
            assert results[0]["probability"] == pytest.approx(bert.next_sentence(*inputs), rel=1e-4)

    text = transom("run", bundle, *inputs).stdout
    assert re.search(r"^ *[01]\.\d{4} ", text, re.MULTILINE)
    if task in ("question-answering", "next-sentence-prediction"):
        assert transom("run", bundle, inputs[0]).exit_code == 2
        long = f"{inputs[1]}\nand more of it"  # all of stdin is one text
        piped = document(transom("run", bundle, inputs[0], "-", "--json", stdin=f"{long}\n"))["results"]
        assert list(piped[0].values())[:2] == [inputs[0], long]
        assert piped == document(transom("run", bundle, inputs[0], long, "--json"))["results"]


# bench and table


def test_bench_measures_each_shape(bert_bundle: Path) -> None:
    told = document(transom("bench", bert_bundle, "--shape", "B=2,S=5", "--shape", "S=3", *SHORT, "--json"))
    first, second = told["timings"]
    assert first["sizes"] == {"B": 2, "S": 5}
    assert second["sizes"]["S"] == 3
    for timing in (first, second):
        assert timing["runs"] == 3
        assert 0 < timing["p50_ms"] <= timing["p95_ms"] <= timing["p99_ms"]
    assert 1e3 * 2 / first["p99_ms"] <= first["items_per_s"] * 1.000001
    assert 0 < told["memory_before_mib"] <= told["memory_peak_mib"]
    assert told["load_s"] > 0
    assert told["cpu"]
    text = transom("bench", bert_bundle, *SHORT).stdout
    assert re.search(r"^peak memory +\d+ MiB, before loading \d+ MiB$", text, re.MULTILINE)
    assert ANSI not in text


def test_bench_stops_when_its_time_is_over(bert_bundle: Path) -> None:
    told = document(transom("bench", bert_bundle, "--runs", "1000", "--seconds", "0", "--json"))
    assert told["timings"][0]["runs"] == 1


def test_bench_refuses_axes_that_the_bundle_does_not_have(bert_bundle: Path) -> None:
    assert "InputError: unknown axis 'Q'; this bundle has B, S." in error_line(
        transom("bench", bert_bundle, "--shape", "Q=1")
    )
    line = error_line(transom("bench", bert_bundle, "--shape", "S=68"))
    assert "ShapeError: axis S is 68; this bundle allows 1..67. Export again with --max S=68." in line


IDS = Graph("g", (Tensor("ids", "int64", ("B", 4), below=7), Tensor("mask", "int64", ("B", 4), default=1)), ())
AXES = {"B": Axis(1, 3, 8)}


def test_example_feeds_are_what_the_graph_declares() -> None:
    feeds = example_feeds(IDS, {"B": 500})
    assert (feeds["ids"].min(), feeds["ids"].max(), feeds["ids"].dtype) == (0, 6, np.int64)
    assert feeds["mask"].tolist() == [[1] * 4] * 500
    np.testing.assert_array_equal(feeds["ids"], example_feeds(IDS, {"B": 500})["ids"])


def test_sizes_default_to_opt() -> None:
    assert sizes_of(IDS, AXES, {}) == {"B": 3}
    assert sizes_of(IDS, AXES, {"B": 8}) == {"B": 8}
    with pytest.raises(ShapeError, match=r"axis B is 9; this bundle allows 1\.\.8"):
        sizes_of(IDS, AXES, {"B": 9})
    with pytest.raises(InputError, match="unknown axis 'S'"):
        sizes_of(IDS, AXES, {"S": 1})


@pytest.mark.parametrize("values", [[3.0], [4.0, 1.0], [5.0, 1.0, 4.0, 2.0, 3.0]])
def test_percentile_is_numpys(values: list[float]) -> None:
    for percent in (0, 50, 95, 99, 100):
        assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), rel=1e-12)


def test_table_has_a_row_per_bundle(vit_bundle: Path, bert_bundle: Path) -> None:
    told = document(transom("table", vit_bundle, bert_bundle, "--json"))["bundles"]
    assert [row["family"] for row in told] == ["vit", "bert"]
    for row in told:
        assert row["worst_error"] <= row["tolerance"]
        assert row["p50_ms"] > 0
    score = told[0]["score"]
    assert score["pytorch"] == score["bundle"]

    lines = transom("table", vit_bundle, bert_bundle).stdout.splitlines()
    row = next(line for line in lines if line.startswith(str(vit_bundle)))
    assert row.count(f" {score['pytorch']['value']:.4f} ") == 2
    assert f"score: {score['name']} on {score['data']}, n = {score['n']}" in lines
    assert "fp32" in row
    assert not any("GPU format" in line for line in lines)


def test_a_table_shows_names_as_they_are(vit_bundle: Path, tmp_path: Path) -> None:
    """No markup, no emoji, nothing cut off."""
    path = tmp_path / f"[bold]x[{'y' * 100}] :smile: [MASK]"
    path.symlink_to(vit_bundle)
    assert f"\n{path}  vit " in transom("table", path).stdout


def test_table_marks_gpu_formats(vit_bundle: Path, tmp_path: Path) -> None:
    def pretend(manifest: dict[str, Any]) -> None:
        manifest["precision"] = "fp16"

    text = transom("table", changed_bundle(vit_bundle, tmp_path, pretend)).stdout
    assert "fp16 (GPU format)" in text
    assert "on a CPU it proves the graph, not the speed" in text


def test_table_with_a_bad_bundle_still_shows_the_good_one_and_exits_1(vit_bundle: Path, tmp_path: Path) -> None:
    result = transom("table", tmp_path, vit_bundle)
    assert result.exit_code == 1
    assert re.search(rf"^{re.escape(str(tmp_path))} +cannot be loaded", result.stdout, re.MULTILINE)
    assert re.search(rf"^{re.escape(str(vit_bundle))} +vit +fp32", result.stdout, re.MULTILINE)
    assert f"transom.runtime.errors.BundleError: {tmp_path} has no bundle.json" in result.stderr
    told = transom("table", tmp_path, vit_bundle, "--json")
    assert told.exit_code == 1
    assert [row.get("error", {}).get("type") for row in document(told)["bundles"]] == ["BundleError", None]


# doctor


def test_doctor_reports_versions_and_what_auto_chooses() -> None:
    told = document(transom("doctor", "--json"))
    assert told["libraries"]["numpy"] == np.__version__
    assert "CPUExecutionProvider" in told["onnxruntime_providers"]
    assert told["auto"]["device"] in ("cpu", "cuda")
    assert told["problems"] == []
    assert told["cpu"]["cores"] >= 1
    text = transom("doctor").stdout
    assert re.search(rf"^auto +{told['auto']['device']}: ", text, re.MULTILINE)


def test_doctor_exits_1_when_the_runtime_cannot_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise BackendError("onnxruntime cannot be imported. Install it.")

    monkeypatch.setattr("transom.runtime.ort.onnxruntime", absent)
    result = transom("doctor")
    assert result.exit_code == 1
    assert re.search(r"^problem +onnxruntime cannot be imported. Install it.$", result.stdout, re.MULTILINE)
    assert document(transom("doctor", "--json"))["auto"]["device"] is None


def test_doctor_finds_a_gpu_that_onnxruntime_does_not_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA X9, 8.9, 24564 MiB, 570.1'\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("transom.runtime.ort.best_device", lambda: "cpu")
    told = document(transom("doctor", "--json"))
    (gpu,) = told["gpus"]
    assert gpu == {"name": "NVIDIA X9", "compute_capability": "8.9", "memory": "24564 MiB", "driver": "570.1"}
    assert "there is a GPU (NVIDIA X9)" in told["auto"]["reason"]
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert document(transom("doctor", "--json"))["gpus"] == []


# export


def test_export_hands_every_option_on(monkeypatch: pytest.MonkeyPatch, vit_bundle: Path, tmp_path: Path) -> None:
    from transom.runtime.bundle import Bundle

    received: dict[str, Any] = {}

    def record(source: str, out: Path, **options: Any) -> Any:
        received.update(source=source, out=out, **options)
        shutil.copytree(vit_bundle, out)
        print("what a library prints")
        options["progress"]("tracing", 0, 2)
        options["progress"]("tracing", 0, 2)
        options["progress"]("done", 2, 2)
        return Bundle(out).manifest

    monkeypatch.setattr("transom.export.pipeline.export", record)
    options = "--precision fp16 --task fill-mask --max S=8 --max B=2 --image-size 32x48 --ignore-unused --force"
    result = transom("export", "some/model", "--out", tmp_path / "a b", *options.split())
    assert result.exit_code == 0
    assert received.pop("progress")
    assert received == {
        "source": "some/model",
        "out": tmp_path / "a b",
        "precision": "fp16",
        "task": "fill-mask",
        "max_sizes": {"S": 8, "B": 2},
        "image_size": (32, 48),
        "ignore_unused": True,
        "force": True,
    }
    assert result.stderr == "what a library prints\ntracing ...\n"
    assert result.stdout.splitlines()[0].startswith(f"{tmp_path}/a b: vit, image-classification, fp32, ")
    assert f"  transom run '{tmp_path}/a b' photo.png" in result.stdout.splitlines()

    document(transom("export", "some/model", "--out", tmp_path / "c", "--json"))
    assert (received["task"], received["max_sizes"], received["image_size"]) == (None, {}, None)


def test_export_prints_one_document_and_leaves_one_folder(bert_checkpoint: Path, tmp_path: Path) -> None:
    done = process(tmp_path, "export", bert_checkpoint, "--out", "new/büro 1", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    assert (told["bundle"], told["family"], told["task"]) == ("new/büro 1", "bert", "feature-extraction")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["büro 1"]


def test_export_tells_its_stages_and_ends_in_a_summary(bert_checkpoint: Path, tmp_path: Path) -> None:
    result = transom("export", bert_checkpoint, "--out", tmp_path / "new")
    assert result.exit_code == 0
    assert "tracing the module to ONNX ..." in result.stderr.splitlines()
    assert re.search(r"^worst error against PyTorch: \d\.\d\de-\d\d of 2e-05 allowed$", result.stdout, re.MULTILINE)
    assert result.stdout.splitlines()[-3].startswith(f"  transom run {tmp_path}/new 'A sentence.'")


def test_export_refuses_an_out_that_exists(bert_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    line = error_line(transom("export", bert_checkpoint, "--out", tmp_path / "there"))
    assert "transom.runtime.errors.ExportError: --out " in line
    assert "--force" in line


def test_export_of_nothing_is_one_clear_error(tmp_path: Path) -> None:
    line = error_line_after_stages(transom("export", tmp_path / "nothing", "--out", tmp_path / "new"))
    assert line.startswith("transom.runtime.errors.CheckpointError: ")
    assert list(tmp_path.iterdir()) == []


def error_line_after_stages(result: Result) -> str:
    """The last line of stderr; those before it are the stages that were begun."""
    assert (result.exit_code, result.stdout) == (1, "")
    *stages, line = result.stderr.splitlines()
    assert all(stage.endswith(" ...") for stage in stages)
    return str(line)


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt(), 130), (Terminated(), 143)])
def test_export_interrupted_in_its_last_stage_leaves_nothing(
    bert_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int
) -> None:
    seen: list[str] = []

    def interrupt(*arguments: Any, **options: Any) -> None:
        seen.extend(path.name for path in tmp_path.iterdir())
        raise error

    monkeypatch.setattr("transom.export.pipeline.score_both", interrupt)
    result = transom("export", bert_checkpoint, "--out", tmp_path / "new")
    assert (result.exit_code, result.stdout) == (status, "")
    assert len(seen) == 1  # the temporary folder was there
    assert list(tmp_path.iterdir()) == []


# What is printed


def test_json_has_no_nan() -> None:
    values = {"a": math.nan, "b": [np.float32(math.inf), np.array([1.5, -math.inf])], "c": Path("/x"), "d": np.int64(3)}
    assert plain(values) == {"a": None, "b": [None, [1.5, None]], "c": "/x", "d": 3}


def test_printable_keeps_text_and_escapes_control() -> None:
    assert printable("Zürich 東京 [MASK]") == "Zürich 東京 [MASK]"
    assert printable("a\tb\x1b[2J\x07") == "a\\tb\\x1b[2J\\x07"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (90 << 20, "90.0 MiB"), (5 << 30, "5.0 GiB")]
)
def test_bytes_are_readable(count: int, text: str) -> None:
    assert bytes_text(count) == text
