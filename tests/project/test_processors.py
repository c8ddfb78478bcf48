"""Check the plan, the readers and the page of `make test-arm` and `make test-x86`; nothing here is emulated."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from paths import REPO
from paths import TESTS as FOLDER
from processors.cases import (
    COMMAND,
    COMMANDS,
    LARGE_TIMEOUT_S,
    SELFTEST,
    TESTS,
    Case,
    Outcome,
    bundles_needed,
    difference,
    plan,
    read_command,
    read_selftest,
    read_tests,
    scientific,
)
from processors.emulated import PROCESSORS, arm_cpuinfo, make_environment, processors_of, x86_cpuinfo
from processors.prepare import ONNX, SEVEN, TOOLS, Workshop, draw_seven, name_of, requirements, sources_hash
from processors.running import Done, Processes, run_all
from processors.table import page
from processors.without_torch import libraries_of
from time_limits import PATIENCE_S
from transom.runtime.compare import Comparison
from transom.runtime.golden_reference import BUNDLE, PYTORCH, Reference
from transom.runtime.host import flags_of_cpuinfo, instruction_set_of
from transom.runtime.selftest import SelftestCase, SelftestReport, broken

SYSROOT = FOLDER / "support" / "processors" / "sysroot.sh"
A72, A76, NO_SME, MAX, HASWELL, NEHALEM = PROCESSORS
ARM = ("cortex-a72", "cortex-a76", "max-no-sme", "max")


def test_arm_self_tests_every_bundle_and_the_large_model_on_one_processor() -> None:
    cases = plan("aarch64", ["runtime/test_session", "runtime/test_kv_cache"])
    assert [each.name for each in processors_of("aarch64")] == list(ARM)
    assert len(cases) == len(set(cases)) == 4 * len(COMMANDS) + 4 * 5 * 4 + 2 + 4
    assert cases[-4:] == [
        Case("cortex-a76", SELFTEST, f"minilm-{precision}", LARGE_TIMEOUT_S)
        for precision in ("fp32", "fp16", "int8", "int4")
    ]
    assert [case.processor for case in cases if case.name == "runtime/test_kv_cache"] == ["cortex-a76"]
    asked = plan("aarch64", ["runtime/test_kv_cache"], processors=["max"], parts=[TESTS])
    assert [(case.processor, case.name) for case in asked] == [("max", "runtime/test_kv_cache")]


def test_x86_self_tests_integers_alone() -> None:
    cases = plan("x86_64", ["integer_sums"])
    names = [case.name for case in cases if case.processor == "Nehalem"]
    assert names == [
        *("doctor", "vit-int8", "clip-int8", "gpt-int8", "transformer-int8", "bert-int8", "gpt-int4", "integer_sums")
    ]
    assert bundles_needed(cases) == names[1:-1]


def test_a_part_can_be_chosen() -> None:
    chosen = plan(
        "aarch64", ["runtime/test_session"], processors=["max"], parts=[SELFTEST], precisions=["int8", "fp16"]
    )
    assert {case.part for case in chosen} == {SELFTEST}
    assert {case.processor for case in chosen} == {"max"}
    assert len(chosen) == 5 * 2
    assert plan("aarch64", ["runtime/test_session"], models=["minilm"], processors=["max"], parts=[SELFTEST]) == []
    commands = plan("aarch64", [], processors=["max"], parts=[COMMAND])
    assert bundles_needed(commands) == [
        "vit-int8",
        "bert-fp32",
        "vit-fp32",
        "clip-fp32",
        "gpt-fp32",
        "transformer-fp32",
    ]


def worst(error: float) -> Comparison:
    return Comparison("logits", (1, 2), error * 2, 2.0, (0, 1), 1.0 + error * 2, 1.0)


def failure(kind: str, message: str) -> str:
    return json.dumps({"error": {"type": kind, "message": message}})


def test_a_selftest_that_holds() -> None:
    describe = {"side": "pytorch", "tolerance": 0.01, "worst": worst(2.3e-3).to_json()}
    assert read_selftest(0, json.dumps(describe), "") == Outcome(True, "2.3e-3", "", 0.01, "pytorch")


@pytest.mark.parametrize(("side", "allowed"), [(PYTORCH, 0.01), (BUNDLE, 0.1)])
def test_a_selftest_that_fails_is_read_from_its_message(side: str, allowed: float) -> None:
    case, rule = SelftestCase("B=1", {side: (worst(0.25),)}), Reference(side, allowed, "not bit for bit")
    message = f"bundles/vit on cpu {broken(SelftestReport((rule,), (case,)), rule)}"
    found = read_selftest(1, failure("ParityError", message), "")
    assert found == Outcome(False, "**2.5e-1**", message, allowed, side)


def test_a_selftest_that_says_nothing_of_errors() -> None:
    assert read_selftest(1, failure("BundleError", "no golden values"), "") == Outcome(
        False, "**failed**", "no golden values"
    )
    assert read_selftest(-11, "", "a line\nqemu: uncaught target signal 11\n\n").reason.endswith("signal 11")
    assert read_selftest(-9, "", "").reason == "ended with status -9"


@pytest.mark.parametrize(
    ("status", "line", "ok", "says"),
    [
        (0, "29 passed in 160.79s (0:02:40)", True, "29"),
        (0, "40 passed, 2 skipped, 5 deselected in 3.1s", True, "40, 2 skipped"),
        (1, "2 failed, 40 passed in 63s", False, "**2 failed**"),
        (1, "1 failed, 40 passed, 1 error in 63s", False, "**2 failed**"),
        (5, "no tests ran in 0.01s", False, "**none ran**"),
        (0, "6 skipped in 0.01s", False, "**none ran**"),
        (-11, "", False, "**none ran**"),
    ],
)
def test_pytests_last_line(status: int, line: str, ok: bool, says: str) -> None:
    found = read_tests(status, f"E   ValueError: no\n{line}\n" if status == 1 else line)
    assert (found.ok, found.says) == (ok, says)
    assert bool(found.reason) == (not ok)
    if status == 1:
        assert found.reason == "E   ValueError: no"


def test_doctor_must_report_the_emulated_instructions() -> None:
    describe = {"cpu": {"instructions": ["asimd", "asimddp", "asimdhp"], "architecture": "aarch64"}, "problems": []}
    asked: Any = partial(read_command, "doctor", status=0, stdout=json.dumps(describe), stderr="", host={})
    assert asked(A76) == Outcome(True, "ok")
    assert asked(A72).reason == "instructions are asimd asimddp asimdhp, expected asimd"
    assert asked(MAX).reason.endswith("expected asimd asimddp asimdhp bf16 i8mm sve")
    assert asked(HASWELL).reason == "the architecture is aarch64, expected x86_64"


def test_a_command_is_compared_with_the_host() -> None:
    name = "run vit-fp32, an image"
    host = {"results": [{"label": "7", "probability": 0.93}], "n": 1}
    close = {"results": [{"label": "7", "probability": 0.93004}], "n": 1}
    other = {"results": [{"label": "1", "probability": 0.93}], "n": 1}
    assert read_command(name, A72, 0, json.dumps(close), "", host) == Outcome(True, "ok")
    assert read_command(name, A72, 0, json.dumps(other), "", host).reason == "results[0].label is '1', on the host '7'"
    assert read_command(name, A72, 1, failure("InputError", "no image"), "", host).reason == "no image"
    assert difference({"a": [1.0]}, {"a": [1.0, 2.0]}) == "a is [1.0], on the host [1.0, 2.0]"
    assert difference({"a": float("nan")}, {"a": 1.0}) == "a is nan, on the host 1.0"


@pytest.mark.parametrize(
    ("number", "text"), [(0.0, "0"), (1.23e-2, "1.2e-2"), (2e-5, "2.0e-5"), (0.1, "1.0e-1"), (12.0, "1.2e1")]
)
def test_numbers_of_the_table(number: float, text: str) -> None:
    assert scientific(number) == text


def test_the_page() -> None:
    half = Outcome(True, "2.3e-3", "", 0.01, "pytorch")
    outcomes = {
        Case("cortex-a72", COMMAND, "run vit-fp32, an image", 1): Outcome(True, "ok"),
        Case("cortex-a72", SELFTEST, "vit-fp16", 1): half,
        Case("cortex-a76", SELFTEST, "vit-fp16", 1): replace(half, ok=False, says="**1.1e-2**", reason="too far"),
        Case("cortex-a72", SELFTEST, "vit-int8", 1): Outcome(True, "0", "", 0.1, "bundle"),
        Case("cortex-a76", TESTS, "runtime/test_kv_cache", 1): Outcome(True, "5"),
    }
    text = page(
        "Emulated Arm processors",
        outcomes,
        ["cortex-a72", "cortex-a76"],
        facts="2026-11-29; qemu 7.2.",
        built_on={"vit-int8": "AMD EPYC, avx512_vnni"},
        tests_here=Outcome(True, "5"),
    )
    assert text == (
        "# Emulated Arm processors\n"
        "\n"
        "Emulated: right numbers, times mean nothing. 2026-11-29; qemu 7.2.\n"
        "\n"
        "## Self-tests\n"
        "\n"
        "| model | precision | compared with | allowed | cortex-a72 | cortex-a76 | built on |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n"
        "| vit | fp16 | PyTorch | 1.0e-2 | 2.3e-3 | **1.1e-2** | – |\n"
        "| vit | int8 | its build | 1.0e-1 | 0 | – | AMD EPYC, avx512_vnni |\n"
        "\n"
        "The largest error of each; in bold what is beyond the allowed one.\n"
        "\n"
        "## Tests of the runtime\n"
        "\n"
        "| passed | cortex-a72 | cortex-a76 |\n"
        "| --- | --- | --- |\n"
        "| `tests/runtime/test_kv_cache.py` | – | 5 |\n"
        "\n"
        "Together, on this machine and not emulated: 5.\n"
        "\n"
        "## The command line\n"
        "\n"
        "| command | cortex-a72 | cortex-a76 |\n"
        "| --- | --- | --- |\n"
        "| `transom run vit-fp32`, an image | ok | – |\n"
        "\n"
        "## Failed\n"
        "\n"
        "- cortex-a76, selftest vit-fp16: too far\n"
    )


@pytest.mark.parametrize(
    ("processor", "expected"),
    [
        (A72, "neon"),
        (A76, "neon_dotprod"),
        (NO_SME, "neon_i8mm"),
        (MAX, "neon_i8mm"),
        (HASWELL, "avx2"),
        (NEHALEM, "sse"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_the_runtime_sees_the_emulated_processor(processor: Any, expected: str) -> None:
    host = "processor\t: 0\nmodel name\t: AMD EPYC\ncore id\t\t: 0\nflags\t\t: sse2 avx2 avx512bw avx512_vnni\n\n"
    arm = processor.architecture == "aarch64"
    text = arm_cpuinfo(processor) if arm else x86_cpuinfo(processor, host + host.replace(": 0", ": 1"))
    assert text.count("\nprocessor\t: 1\n") == 1
    assert instruction_set_of(flags_of_cpuinfo(text)).name == expected
    assert processor.seen <= flags_of_cpuinfo(text)
    assert not processor.unseen & flags_of_cpuinfo(text)
    if not arm:
        assert "core id\t\t: 1\n" in text
        assert "AMD" not in text


def test_an_environment_takes_itself_for_the_interpreter(tmp_path: Path) -> None:
    """With a stand-in for QEMU, which runs Python as it is."""
    qemu = tmp_path / "qemu"
    qemu.write_text('#!/bin/bash\n[ "$1 $2 $3 $5" = "-cpu max -L -0" ] && exec -a "$6" "${@:7}"\n')
    qemu.chmod(0o755)
    here = Path(sys.base_prefix) / "bin" / "python{}.{}".format(*sys.version_info)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "named.py").write_text("name = 'mine'\n")
    made = make_environment(
        MAX, tmp_path / "max", qemu=qemu, root=tmp_path, python=here, packages=[tmp_path / "mine", tmp_path]
    )
    code = "import sys, named; print(sys.executable, sys.prefix, named.name)"
    done = subprocess.run([made.python, "-I", "-c", code], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.stdout == f"{made.python} {made.folder} mine\n", done.stderr
    assert (made.folder / "root/sys/devices/system/cpu/online").read_text() == "0-1\n"


def test_processes_end_with_what_they_started(tmp_path: Path) -> None:
    processes = Processes()
    slow = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(3600)'])"
    job = partial(processes.run, folder=tmp_path, variables=None)
    jobs = {
        "quick": partial(job, [sys.executable, "-c", "print('yes')"], timeout_s=PATIENCE_S),
        "slow": partial(job, [sys.executable, "-c", slow], timeout_s=0.5),
    }
    began = time.monotonic()
    found: dict[str, Done] = {}
    begun = []
    for name, done in run_all(jobs, 2, processes):
        if done is None:
            begun.append(name)
        else:
            found[name] = done
    assert begun == ["quick", "slow"]
    assert (found["quick"].status, found["quick"].stdout, found["quick"].late) == (0, "yes\n", False)
    assert found["slow"].late
    assert time.monotonic() - began < PATIENCE_S


def test_whoever_stops_looking_ends_the_processes(tmp_path: Path) -> None:
    processes = Processes()
    sleep = partial(processes.run, ["sleep", "3600"], folder=tmp_path, variables=None, timeout_s=PATIENCE_S)
    began = time.monotonic()
    going = run_all({1: sleep, 2: sleep, 3: sleep}, 2, processes)
    assert [next(going), next(going)] == [(1, None), (2, None)]
    going.close()
    assert time.monotonic() - began < PATIENCE_S
    assert sleep().stderr == "ended before it began"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f():\n    import torch", {"torch"}),
        ("    def f():\n        from transom.export.pipeline import export", {"transom.export"}),
        ("def f():\n    if True:\n        from transom import models", {"transom.models"}),
        ("def f():\n    import numpy, onnx.helper", {"onnx"}),
        ("def f():\n    from transom.runtime import load\n    import onnxruntime", set()),
        ("def f():\n    'import torch'", set()),
        ("import onnx\n\ndef f():\n    import torch", {"onnx"}),
    ],
)
def test_which_tests_need_torch(source: str, expected: set[str]) -> None:
    assert libraries_of(source) == expected


def test_requirements_are_those_of_the_runtime_and_of_the_tests() -> None:
    wanted = requirements(REPO, TOOLS, dependencies=True)
    names = [name_of(each) for each in wanted]
    assert names[:3] == ["numpy", "onnxruntime", "tokenizers"]
    assert names[-3:] == list(TOOLS)
    assert not {"torch", "onnx", "transformers"} & {*names}
    assert re.fullmatch(r"onnxruntime==[\d.]+", wanted[1])
    assert [name_of(each) for each in requirements(REPO, ONNX)] == list(ONNX)


def test_bundles_are_stale_when_the_sources_change(tmp_path: Path) -> None:
    workshop = Workshop(tmp_path, tmp_path, Processes(), print)
    source = workshop.copy / "packages" / "transom" / "export" / "onnx.py"
    source.parent.mkdir(parents=True)
    source.write_text("a = 1\n")
    first = sources_hash(workshop)
    source.write_text("a = 2\n")
    assert sources_hash(workshop) != first


def test_the_digit(tmp_path: Path) -> None:
    from PIL import Image

    draw_seven(tmp_path / "digit.png")
    with Image.open(tmp_path / "digit.png") as image:
        assert (image.size, image.getpixel((1, 0)), image.getpixel((0, 7))) == ((8, 8), 255, 0)
    assert {len(row) for row in SEVEN} == {8}


def test_every_file_of_the_makefile_is_there() -> None:
    lines = re.findall(r"^ON_(?:ARM|X86) := (.*)$", (REPO / "Makefile").read_text("utf-8"), re.MULTILINE)
    assert len(lines) == 2
    names = {name for line in lines for name in line.split() if name != "$(ON_X86)"}
    assert [name for name in sorted(names) if not (FOLDER / f"{name}.py").is_file()] == []


def test_a_machine_without_the_tools_is_told_in_one_line(tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    uname, folder = tools / "uname", tmp_path / "qemu"

    def make(system: str, machine: str) -> str:
        uname.write_text(f'#!/bin/sh\n[ "$1" = -s ] && echo {system} || echo {machine}\n')
        uname.chmod(0o755)
        command = [str(shutil.which("bash")), str(SYSROOT), "qemu", str(folder)]
        done = subprocess.run(command, env={"PATH": str(tools)}, capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == 1
        return done.stderr

    lacking = "sysroot.sh: needs Debian or Ubuntu, whose packages it unpacks; there is no apt-get here.\n"
    assert make("Linux", "x86_64") == lacking
    assert make("Darwin", "arm64") == "sysroot.sh: needs Linux on x86-64; this is Darwin on arm64.\n"
    assert not folder.exists()
