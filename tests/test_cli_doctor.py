"""What is installed: `transom doctor`, and the commands where torch and onnx are absent."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from command_line import document, process, transom
from transom.runtime.cpu import instruction_set
from transom.runtime.errors import BackendError


def test_doctor_reports_versions_and_what_auto_chooses() -> None:
    told = document(transom("doctor", "--json"))
    assert told["libraries"]["numpy"] == np.__version__
    assert "CPUExecutionProvider" in told["onnxruntime_providers"]
    assert told["auto"]["device"] in ("cpu", "cuda")
    assert told["problems"] == []
    assert told["cpu"]["cores"] >= 1
    text = transom("doctor").stdout
    int8 = told["cpu"]["int8"]
    assert int8["instruction_set"] == instruction_set()
    assert re.search(rf"^int8 +{int8['instruction_set']}: {re.escape(int8['meaning'])}$", text, re.MULTILINE)
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


def test_the_device_commands_need_no_torch(vit_bundle: Path, without_torch: dict[str, str], tmp_path: Path) -> None:
    Image.new("RGB", (10, 10)).save(tmp_path / "photo.png")
    for arguments in (
        ("selftest", vit_bundle),
        ("run", vit_bundle, "photo.png"),
        ("bench", vit_bundle, "--runs", "3", "--warmup", "1"),
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
