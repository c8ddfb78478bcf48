"""Test the command line: help, usage, version, completion, and how values are printed."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from command_line import ANSI, document, process, transom
from time_limits import PATIENCE_S
from transom.cli.output import plain, printable
from transom.runtime.format import bytes_text

COMMANDS = ("export", "verify", "selftest", "run", "bench", "capacity", "inspect", "repository", "doctor", "table")


@pytest.mark.parametrize("name", [*COMMANDS, "debug accuracy"])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_every_command_explains_itself_by_example(name: str, flag: str) -> None:
    result = transom(*name.split(), flag)
    assert (result.exit_code, result.stderr) == (0, "")
    assert re.search(rf"^  Examples?:\n    transom {name} ?", result.stdout, re.MULTILINE)
    assert [line for line in result.stdout.splitlines() if len(line) > 80] == []


def test_help_names_the_commands_the_statuses_and_completion() -> None:
    text = transom("--help").stdout
    assert {*COMMANDS, "debug"} <= set(text.split())
    for line in ("0    done", "1    a Transom error", "2    wrong usage", "130  Ctrl-C", "--install-completion"):
        assert line in text
    assert ANSI not in text
    assert [line for line in text.splitlines() if len(line) > 80] == []


def test_help_of_run_groups_the_options_of_generation() -> None:
    text = transom("run", "--help").stdout
    headings = re.findall(r"^(\w.*):$", text, re.MULTILINE)
    assert headings[:2] == ["Arguments", "Options"]
    assert [heading.split(" (")[0] for heading in headings[2:]] == ["Generation", "Sampling", "Beam search"]
    assert text.index("--json") < text.index("Sampling") < text.index("--seed N") < text.index("--num-beams N")


def test_help_of_export_names_every_reference_model() -> None:
    from transom.export.reference_models import REFERENCE_MODELS

    assert f"({', '.join(REFERENCE_MODELS)})" in " ".join(transom("export", "--help").stdout.split())


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


def test_the_command_line_starts_with_few_modules(tmp_path: Path) -> None:
    """rich, numpy and every library behind them wait until a command needs them; a bare Python has some 30 modules."""
    heavy = "{'rich', 'numpy', 'torch', 'onnx', 'onnxruntime', 'PIL', 'tokenizers'}"
    code = f"import sys, transom.cli.main; print(len(sys.modules), *({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S
    )
    count, *loaded = done.stdout.split()
    assert (done.returncode, loaded) == (0, [])
    assert int(count) < 350  # 232 on Python 3.11


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
