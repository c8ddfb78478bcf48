"""Test `transom capacity`: its tables and JSON agree, and what it refuses."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import ANSI, document, error_line, transom
from paths import KEPT
from time_limits import PATIENCE_S

BERT, GPT, VIT = (KEPT / f"{family}-fp32" for family in ("bert", "gpt", "vit"))
LIGHT = ("--rate", "0.01", "--p99", "60s")  # no queue, and time for the slowest machine
SHORT = ("--runs", "3", "--seconds", "0.5")


def test_json_has_service_times_alternatives_and_an_answer_that_agree() -> None:
    printed = document(transom("capacity", BERT, *LIGHT, "--shape", "S=5", "--threads", "1", *SHORT, "--json"))
    assert (printed["bundle"], printed["work"], printed["sizes"]) == (str(BERT), "graph model", {"S": 5})
    assert (printed["rate_per_s"], printed["p99_ms"]) == (0.01, 60_000)
    assert [one["batch"] for one in printed["service"]] == [1, 2]
    for one in printed["service"]:
        assert 1 <= one["runs"] <= 3
        assert 0 < one["p50_ms"] <= one["p95_ms"] <= one["p99_ms"] <= one["most_ms"]
        assert one["rows_per_s"] == pytest.approx(one["batch"] * 1e3 / one["mean_ms"])
    rows = {one["batch"]: one["rows_per_s"] for one in printed["service"]}
    for one in printed["alternatives"]:
        assert one["keeps"] == (one["p99_ms"] <= printed["p99_ms"])
        assert one["most_per_s"] == pytest.approx(one["replicas"] * rows[one["limit"]])
        assert 1 <= one["mean_batch"] <= one["limit"]
        assert 0 <= one["busy"] <= 1
    assert printed["answer"] in printed["alternatives"]
    assert printed["answer"]["replicas"] == printed["machines"] == 1
    assert printed["replicas_here"] == printed["cores"]
    assert printed["cpu"]


def test_text_has_both_tables_the_answer_and_the_command_that_serves_it() -> None:
    result = transom("capacity", BERT, *LIGHT, "--threads", "1", *SHORT)
    assert result.exit_code == 0
    assert "service times of batches of 1, 2 ..." in result.stderr
    assert "simulating queues ..." in result.stderr
    text = result.stdout
    assert ANSI not in text
    assert re.search(r"^service time of the graph model, S=\d, 1 thread on cpu$", text, re.MULTILINE)
    assert re.search(r"^0.01 requests/s, p99 within 60 s$", text, re.MULTILINE)
    assert re.search(r"^batch limit +replicas +busy +batch +p50 ms +p95 ms +p99 ms +most/s +keeps$", text, re.MULTILINE)
    (chosen,) = re.findall(r"^ *(\d+) +(\d+) .* yes <$", text, re.MULTILINE)
    assert chosen[1] == "1"
    assert re.search(r"^answer +1 replica, (one row at a time|batches of at most 2)$", text, re.MULTILINE)
    assert re.search(r"^replica +one process with the bundle loaded, 1 thread$", text, re.MULTILINE)
    assert re.search(
        r"^machines +this one, \d+ cores?, holds \d+; the answer takes 1 machine like it$", text, re.MULTILINE
    )
    options = f"--out models --instances 1 --threads 1 --max-batch {chosen[0]}"
    assert re.search(rf"^serve +transom repository {re.escape(str(BERT))} {options}$", text, re.MULTILINE)


def test_the_command_that_serves_can_be_pasted(tmp_path: Path) -> None:
    folder = tmp_path / "my bundles; $HOME" / "bert"
    folder.parent.mkdir()
    folder.symlink_to(BERT, target_is_directory=True)
    text = transom("capacity", folder, *LIGHT, "--threads", "1", "--runs", "1", "--seconds", "0").stdout
    (command,) = re.findall(r"^serve +(.*)$", text, re.MULTILINE)
    assert shlex.split(command)[2] == str(folder)


def test_a_generation_is_measured_whole() -> None:
    options = ("--shape", "S=3", "--new-tokens", "4", "--max-batch", "1")
    printed = document(transom("capacity", GPT, *LIGHT, *options, *SHORT, "--json"))
    assert (printed["work"], printed["sizes"]) == ("generation", {"S": 3, "new": 4})
    assert [one["batch"] for one in printed["service"]] == [1]
    assert printed["threads"] is None
    assert printed["replicas_here"] == 1


def test_other_replicas_can_be_at_work_meanwhile() -> None:
    result = transom("capacity", VIT, *LIGHT, *SHORT, "--threads", "1", "--busy-replicas", "1")
    assert result.exit_code == 0, result.stderr
    assert "starting other replicas ..." in result.stderr
    first = result.stdout.splitlines()[0]
    assert first == "service time of the graph model, 1 thread on cpu, 1 other replica at work"


def test_a_queue_delay_has_a_column() -> None:
    text = transom("capacity", VIT, *LIGHT, "--queue-delay", "1500us", *SHORT).stdout
    assert re.search(r"^batch limit +replicas +delay ms +busy ", text, re.MULTILINE)
    assert re.search(r"^ *2 +1 +1.5 ", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("p99", "ms"), [("50ms", 50), ("0.05s", 50), ("1.5 s", 1500), ("800us", 0.8), (" 2ms ", 2), ("1e3ms", 1000)]
)
def test_times_have_units(p99: str, ms: float) -> None:
    from transom.cli.capacity import time_ms

    assert time_ms(p99, "--p99") == pytest.approx(ms)


@pytest.mark.parametrize("p99", ["50", "", "ms", "fast", "0ms", "-5ms", "nanms", "infs", "50 min"])
def test_a_p99_without_a_unit_or_above_zero_is_wrong_usage(p99: str) -> None:
    result = transom("capacity", BERT, "--rate", "5", f"--p99={p99}")
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"--p99 is {p99!r}; expected a time with its unit, such as 50ms, 1.5s or 800us." in " ".join(
        result.stderr.split()
    )


@pytest.mark.parametrize("rate", ["0", "-3", "nan", "inf"])
def test_a_rate_is_above_zero(rate: str) -> None:
    result = transom("capacity", BERT, f"--rate={rate}", "--p99", "50ms")
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"--rate is {rate}; expected requests per second, above 0" in " ".join(result.stderr.split())


def test_a_p99_below_the_service_time_says_what_is_possible() -> None:
    result = transom("capacity", BERT, "--rate", "5", "--p99", "0.001us", *SHORT, "--threads", "1", "--json")
    assert result.exit_code == 1
    error = document(result)["error"]
    assert error["type"] == "InputError"
    assert "a p99 of 1e-06 ms cannot be kept: one row takes longer without any waiting" in error["message"]
    assert "Ask for a p99 above that, or make a row cheaper" in error["message"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--shape", "B=2"), "InputError: B is 2; batches of 1, 2, 4, ... rows are measured"),
        (("--shape", "S=8"), "ShapeError: axis S is 8; this bundle allows 1..7"),
        (("--max-batch", "3"), "ShapeError: axis B is 3; this bundle allows 1..2"),
        (("--graph", "text"), "InputError: unknown graph 'text'; this bundle has model."),
        (("--new-tokens", "4"), "InputError: new_tokens is 4, but a bundle for text-classification generates nothing."),
        (
            ("--queue-delay", "61s"),
            "InputError: the queue delay is 61000 ms; expected 0 or more, and less than the p99",
        ),
    ],
)
def test_what_the_bundle_cannot_do_is_one_line(arguments: tuple[str, ...], said: str) -> None:
    assert said in error_line(transom("capacity", BERT, *LIGHT, *arguments))


def test_capacity_needs_neither_torch_nor_onnx(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'transformers', 'onnx', 'onnx_ir']))\n"
        "from transom.cli.main import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "capacity", str(VIT), *LIGHT, *SHORT],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    assert "the answer takes 1 machine like it" in done.stdout
