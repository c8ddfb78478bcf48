"""Test failing commands: one line on stderr, an exit status, and no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from command_line import command, document, error_line, transom
from time_limits import PATIENCE_S
from transom.cli.failures import Terminated


def test_an_error_of_ours_is_one_line_with_its_full_name(tmp_path: Path) -> None:
    """However long it is, and whatever it contains: not wrapped, no markup, no emoji."""
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
    message = f"{tmp_path} has no bundle.json; it is no bundle, or an incomplete one. Copy or export it again."
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


@pytest.mark.parametrize(
    ("sent", "status", "said"),
    [(signal.SIGINT, 130, "transom: interrupted"), (signal.SIGTERM, 143, "transom: terminated")],
)
def test_a_signal_ends_a_long_command_with_one_line(
    vit_bundle: Path, tmp_path: Path, sent: signal.Signals, status: int, said: str
) -> None:
    arguments = command("bench", vit_bundle, "--runs", "100000000", "--seconds", "3600")
    with subprocess.Popen(
        arguments, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stderr is not None
        first = running.stderr.readline()  # the measurement has begun
        running.send_signal(sent)
        stdout, rest = running.communicate(timeout=PATIENCE_S)
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
            timeout=PATIENCE_S,
            env=BUFFERED | buffering,
        )
    assert done.stderr == "transom: the output cannot be written: No space left on device\n"
    assert done.returncode == 1
