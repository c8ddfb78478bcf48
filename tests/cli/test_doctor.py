"""Test `transom doctor`, and the commands where torch and onnx are absent."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from command_line import document, process, transom
from stub_kernels import TRAP, compile_stub
from transom.runtime.backends import integer_sums, trt_library
from transom.runtime.errors import BackendError
from transom.runtime.host import instruction_set
from transom.runtime.native.build import BuildError
from transom.runtime.native.library import status
from transom.runtime.native.records import AVX512_BF16


def test_doctor_reports_versions_and_what_auto_chooses() -> None:
    printed = document(transom("doctor", "--json"))
    assert printed["libraries"]["numpy"] == np.__version__
    assert "CPUExecutionProvider" in printed["onnxruntime_providers"]
    assert printed["auto"]["device"] in ("cpu", "cuda")
    assert printed["problems"] == []
    assert printed["cpu"]["cores"] >= 1
    text = transom("doctor").stdout
    int8 = printed["cpu"]["int8"]
    assert int8["instruction_set"] == instruction_set()
    assert (int8["exact"], int8["saturates"]) == (True, False)
    assert int8["runs"] == f"onnxruntime {onnxruntime.__version__}"
    said = f"{int8['instruction_set']}, {int8['meaning']}; sums in {int8['runs']} are {int8['means']}"
    assert re.search(rf"^int8 +{re.escape(said)}$", text, re.MULTILINE)
    assert re.search(rf"^auto +{printed['auto']['device']}: ", text, re.MULTILINE)


def test_doctor_says_which_kernels_run_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library of this machine or none, then one that is turned off, then one that is not there."""
    kernels = document(transom("doctor", "--json"))["cpu"]["kernels"]
    found = status().to_json()
    assert kernels == found
    text = transom("doctor").stdout
    if found["instruction_set"]:
        assert re.search(rf"^kernels +native, for {found['instruction_set']}\b", text, re.MULTILINE)
    else:
        assert re.search(rf"^kernels +ONNX Runtime's alone: {re.escape(found['reason'])}$", text, re.MULTILINE)
    monkeypatch.setenv("TRANSOM_NATIVE_LIBRARY", "/absent.so")
    assert re.search(
        r"^kernels +ONNX Runtime's alone: the native library is not there: /absent\.so\. Run `make native`",
        transom("doctor").stdout,
        re.MULTILINE,
    )
    monkeypatch.setenv("TRANSOM_NATIVE_ISA", "none")
    turned_off = {
        "instruction_set": None, "compiler": None, "reason": "TRANSOM_NATIVE_ISA=none turns them off",
        "passed_over": {},
    }  # fmt: skip
    assert document(transom("doctor", "--json"))["cpu"]["kernels"] == turned_off


def test_doctor_names_kernels_that_a_processor_does_not_execute(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    try:
        path = compile_stub(tmp_path, executes={AVX512_BF16: TRAP})
    except BuildError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("TRANSOM_NATIVE_LIBRARY", str(path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    text = transom("doctor").stdout
    assert re.search(r"^kernels +native, for avx512_vnni; compiled by a stub$", text, re.MULTILINE)
    assert re.search(r"^not avx512_bf16 +the dry call died of SIGILL: this processor", text, re.MULTILINE)


def test_doctor_exits_1_when_the_runtime_cannot_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> None:
        raise BackendError("onnxruntime cannot be imported. Install it.")

    monkeypatch.setattr("transom.runtime.backends.ort_library.onnxruntime", absent)
    result = transom("doctor")
    assert result.exit_code == 1
    assert re.search(r"^problem +onnxruntime cannot be imported. Install it.$", result.stdout, re.MULTILINE)
    assert document(transom("doctor", "--json"))["auto"]["device"] is None


def test_doctor_names_an_option_that_has_no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the known sums are wrong with it and without."""
    monkeypatch.setattr(integer_sums, "sums_right", lambda entries: False)
    integer_sums.integer_sums.cache_clear()
    int8 = document(transom("doctor", "--json"))["cpu"]["int8"]
    integer_sums.integer_sums.cache_clear()
    assert (int8["exact"], int8["saturates"]) == (False, True)
    assert int8["means"] == (
        "wrong: pairs of products saturate at 16 bits, and session.x64quantprecision has no effect here"
    )


def test_doctor_finds_a_gpu_that_onnxruntime_does_not_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA X9, 8.9, 24564 MiB, 570.1'\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    printed = document(transom("doctor", "--json"))
    (gpu,) = printed["gpus"]
    assert gpu == {
        "name": "NVIDIA X9", "compute_capability": "8.9", "memory": "24564 MiB", "driver": "570.1",
        "target": "rtx-sm89",
    }  # fmt: skip
    assert "there is a GPU (NVIDIA X9)" in printed["auto"]["reason"]
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert document(transom("doctor", "--json"))["gpus"] == []


def driver_tool(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put an nvidia-smi on the path."""
    tool = folder / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'NVIDIA L4, 8.9, 9 MiB, 570.1'", "NVIDIA L4, compute 8.9, 9 MiB, 570.1, takes rtx-sm89"),
        (
            "echo 'NVIDIA H100, 9.0, 9 MiB, 570.1'",
            "NVIDIA H100, compute 9.0, 9 MiB, 570.1, takes tensorrt: TensorRT-RTX has no target for SM90",
        ),
        (
            'case "$*" in *compute_cap*) echo no such field; exit 2;; *) echo "Old, 9 MiB, 390.1";; esac',
            "Old, compute capability unknown, 9 MiB, 390.1",
        ),
        ("echo 'X, 9, [N/A], 9 MiB, 1'", "X, 9, compute capability unknown, 9 MiB, 1"),
    ],
)
def test_doctor_names_the_target_of_a_gpu(
    script: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver_tool(tmp_path, monkeypatch, script)
    assert re.search(rf"^gpu +{re.escape(said)}$", transom("doctor").stdout, re.MULTILINE)


Library = Callable[[str, str], None]


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Library:
    """Make modules that hide the installed ones, in this process and in new ones."""
    folder = tmp_path / "libraries"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    monkeypatch.syspath_prepend(folder)

    def make(name: str, text: str) -> None:
        path = folder.joinpath(*name.split("."))
        path.mkdir(parents=True)
        for parent in path.relative_to(folder).parents[:-1]:
            (folder / parent / "__init__.py").touch()
        (path / "__init__.py").write_text(text)

    return make


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import os; os.abort()", "broken: loading it ended with status -6, "),
        ("import os; os._exit(0)", "broken: loading it ended with status 0, it printed nothing"),
        ("import time; time.sleep(3600)", "broken: it did not load within 1 s. Install it again."),
        ("raise ImportError('libx.so: no such file')", "installed but cannot be loaded: libx.so: no such file. Run"),
        ("1 / 0", "broken: loading it ended with status 1, ZeroDivisionError: "),
        ("", "broken: loading it ended with status 1, AttributeError: "),  # it has no version
        ("import atexit; print('transom-probe {'); atexit.register(print, 'transom-probe {'); __version__ = '7'", "7"),
    ],
)
def test_a_broken_library_is_reported_and_breaks_nothing(
    text: str, said: str, library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "sleep" in text:  # the others are waited for as long as it takes
        monkeypatch.setattr("transom.cli.examine.PROBE_TIMEOUT_S", 1)
    library("tensorrt_rtx", text)
    result = transom("doctor")
    assert result.exit_code == 0
    assert re.search(rf"^TensorRT-RTX +{re.escape(said)}", result.stdout, re.MULTILINE)
    assert ("rtx-sm86" in re.findall("^build engines.*$", result.stdout, re.MULTILINE)[0]) == (said == "7")


A_GPU = """
from types import SimpleNamespace
FINE = 0
def cudaGetDeviceCount(): return FINE, 1
def cudaGetDevice(): return FINE, 0
def cudaDriverGetVersion(): return FINE, 12080
def cudaGetDeviceProperties(device):
    return FINE, SimpleNamespace(name=b"Fake", major={}, minor={}, totalGlobalMem=2 << 30)
"""


@pytest.mark.parametrize(
    ("capability", "full", "targets", "reason"),
    [
        ((8, 9), False, ["rtx-sm89"], "Fake can be used"),
        ((8, 9), True, ["rtx-sm89", "tensorrt"], "Fake can be used"),
        ((9, 0), True, ["tensorrt"], "Fake can be used"),
        ((9, 0), False, [], "TensorRT is "),
    ],
)
def test_what_runs_where_there_is_a_gpu(
    capability: tuple[int, int], full: bool, targets: list[str], reason: str, library: Library
) -> None:
    """Without nvidia-smi, as on a Jetson: CUDA itself is asked."""
    library("tensorrt_rtx", "__version__ = '1.7.1'")
    library("tensorrt", "__version__ = '11.0'" if full else "raise ImportError('absent')")
    library("cuda.bindings.runtime", A_GPU.format(*capability))
    printed = document(transom("doctor", "--json"))
    (gpu,) = printed["gpus"]
    name = "{}.{}".format(*capability)
    assert gpu == {
        "name": "Fake", "compute_capability": name, "memory": "2048 MiB", "driver": "CUDA 12.8",
        "target": "tensorrt" if capability == (9, 0) else "rtx-sm89",
    }  # fmt: skip
    assert printed["engines"]["run"]["targets"] == targets
    assert printed["engines"]["run"]["reason"].startswith(reason)
    assert printed["engines"]["libraries"]["tensorrt_rtx"] == {
        "name": "TensorRT-RTX",
        "version": "1.7.1",
        "problem": None,
    }
    assert ("tensorrt" in printed["engines"]["build"]["targets"]) == full


def test_a_driver_that_cuda_cannot_use_is_reported(
    library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver_tool(tmp_path, monkeypatch, "echo 'NVIDIA L4, 8.9, 9 MiB, 450.1'")
    library("tensorrt_rtx", "__version__ = '1.7.1'")
    library("cuda.bindings.runtime", "def cudaGetDeviceCount():\n    raise OSError('libcuda is too old')")
    text = transom("doctor").stdout
    assert re.search(
        r"^run engines +no: cudaGetDeviceCount cannot be called \(libcuda is too old\): ", text, re.MULTILINE
    )


def test_doctor_names_what_to_install_for_engines(tmp_path: Path, without_torch: dict[str, str]) -> None:
    printed = json.loads(process(tmp_path, "doctor", "--json", env=without_torch).stdout)["engines"]
    problems = {name: found["problem"] for name, found in printed["libraries"].items()}
    assert problems["tensorrt_rtx"] == "TensorRT-RTX is not installed: pip install 'transom[rtx]'"
    assert problems["tensorrt"].startswith("TensorRT is not installed: pip install ")
    assert problems["cuda"] == "cuda-bindings is not installed: pip install 'transom[rtx]'"
    assert printed["build"]["targets"] == printed["run"]["targets"] == []


@pytest.mark.skipif(find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT-RTX is not installed")
def test_doctor_finds_the_real_library() -> None:
    printed = document(transom("doctor", "--json"))["engines"]
    assert printed["libraries"]["tensorrt_rtx"] == {
        "name": "TensorRT-RTX",
        "version": trt_library.library("tensorrt_rtx").__version__,
        "problem": None,
    }
    assert printed["build"]["targets"][:6] == [f"rtx-sm{sm}" for sm in (75, 80, 86, 89, 120, 121)]


BLOCK = """
import sys
ABSENT = {"torch", "onnx", "onnx_ir", "onnxscript", "transformers", "huggingface_hub", "polygraphy"}
ABSENT |= {"tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings", "cuda"}

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
"""


@pytest.fixture
def without_torch(tmp_path: Path) -> dict[str, str]:
    """Return an environment whose Python has neither torch nor onnx, nor libraries that need them."""
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
