"""Which plan of a bundle a GPU and a library take, and what the error says where none can be used."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import pytest

from command_line import changed_bundle, document, probe_here, transom
from emulated_gpu import (
    EmulatedTensorRT,
    Put,
)
from transom.cli import examine
from transom.runtime import load
from transom.runtime.backends import cuda
from transom.runtime.backends.cuda import Gpu
from transom.runtime.backends.trt_plans import pick_plan, require_version
from transom.runtime.errors import BackendError, BundleError
from transom.runtime.graph_spec import Graph
from transom.runtime.manifest_graphs import GraphFile
from transom.runtime.manifest_graphs import Plan as PlanFile

ADA = Gpu("NVIDIA GeForce RTX 4090", (8, 9), 24 << 30, 13000)
HOPPER = Gpu("NVIDIA H200", (9, 0), 141 << 30, 13000)


def file_with(**plans: PlanFile) -> GraphFile:
    named = {name.replace("_", "-"): plan for name, plan in plans.items()}
    return GraphFile(Graph("model", (), ()), {"default": "model.onnx"}, None, named)


def test_the_plan_is_that_of_the_gpu() -> None:
    rtx = PlanFile("engines/rtx-sm89.plan", "TensorRT-RTX", "1.7.1.116")
    full = PlanFile("engines/tensorrt.plan", "TensorRT", "11.0.0.1", "sm90")
    both = file_with(rtx_sm89=rtx, tensorrt=full)
    assert pick_plan(both, ADA) is rtx
    assert pick_plan(both, HOPPER) is full
    with pytest.raises(
        BackendError,
        match=r"no engines; this GPU is NVIDIA GeForce RTX 4090 \(SM89\). Run `transom build BUNDLE --target rtx-sm89`",
    ):
        pick_plan(file_with(), ADA)
    with pytest.raises(BackendError, match=r"engines for rtx-sm89, tensorrt \(SM90\); .* --target rtx-sm120`"):
        pick_plan(both, Gpu("RTX 5090", (12, 0), 0, 0))
    with pytest.raises(
        BackendError, match=r"engines for rtx-sm89; this GPU is NVIDIA H200 \(SM90\). .* --target tensorrt`"
    ):
        pick_plan(file_with(rtx_sm89=rtx), HOPPER)


def test_the_library_has_to_be_able_to_read_the_plan() -> None:
    """TensorRT-RTX reads what is older; TensorRT its own version's alone."""
    rtx, full = PlanFile("a.plan", "TensorRT-RTX", "1.7.1.116"), PlanFile("b.plan", "TensorRT", "11.0.0.114")
    require_version(rtx, "1.7.1.116")
    require_version(rtx, "1.10.0.1")
    require_version(full, "11.0.0.200")
    with pytest.raises(BackendError, match=r"a.plan was built by TensorRT-RTX 1.7.1.116; TensorRT-RTX here is 1.6.2.1"):
        require_version(rtx, "1.6.2.1")
    for other in ("11.1.0.0", "10.13.0.0"):
        with pytest.raises(BackendError, match=f"TensorRT here is {other}"):
            require_version(full, other)


def test_a_plan_that_does_not_load_says_what_tensorrt_said(put: Put, gpu: EmulatedTensorRT, vit_bundle: Path) -> None:
    folder = put(vit_bundle)
    gpu.plans.clear()
    with pytest.raises(
        BackendError,
        match=r"TensorRT-RTX cannot load engines/rtx-sm89.model.plan on Emulated \(SM89\): magic tag does not match",
    ):
        load(folder, device="tensorrt")
    with (folder / "engines/rtx-sm89.model.plan").open("ab") as plan:
        plan.truncate(4)
    with pytest.raises(BundleError, match="it is truncated or changed"):  # before TensorRT sees it
        load(folder, device="tensorrt")


@pytest.mark.usefixtures("real_trt")
def test_without_a_gpu_the_error_says_so(vit_bundle: Path, real_cuda: Any) -> None:
    """The real CUDA runtime on a machine without a driver."""
    code = real_cuda.cudaGetDeviceCount()[0]
    if int(code) == 0:
        pytest.skip("there is a GPU here")
    with pytest.raises(BackendError, match=rf"no NVIDIA GPU can be used here \({code.name}\)"):
        load(vit_bundle, device="tensorrt")
    with load(vit_bundle, device="auto") as vit:
        assert vit.device == "cpu"


@pytest.mark.usefixtures("real_cuda", "real_trt")
def test_without_cuda_python_the_error_names_the_command(vit_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    cuda.runtime.cache_clear()
    with pytest.raises(BackendError, match=r"cuda-python cannot be imported .* Run `pip install 'transom\[rtx\]'`"):
        load(vit_bundle, device="tensorrt")
    cuda.runtime.cache_clear()


def test_auto_passes_over_an_engine_that_the_library_cannot_read(
    put: Put, gpu: EmulatedTensorRT, vit_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built by a newer library; or of bytes that it does not know; or of a graph with other names. Doctor says so."""
    monkeypatch.setattr(examine, "run_probe", probe_here)

    def newer(words: dict[str, Any]) -> None:
        words["engines"]["rtx-sm89"]["version"] = "99.0.0.1"

    (Path(folder := put(vit_bundle)).parent / "newer").mkdir()
    folders = {"was built by TensorRT-RTX 99.0.0.1": changed_bundle(folder, folder.parent / "newer", newer)}
    unknown = put(vit_bundle)
    gpu.plans.pop(hashlib.sha256((unknown / "engines/rtx-sm89.model.plan").read_bytes()).hexdigest())
    folders["magic tag does not match"] = unknown
    for said, bundle in folders.items():
        with pytest.raises(BackendError, match=said):
            load(bundle, device="tensorrt")
        with load(bundle, device="auto") as vit:
            assert vit.device == "cpu"
            assert said in vit.choice.passed_over["tensorrt"]
            choice = vit.choice
        told = document(transom("doctor", bundle, "--json"))["auto"]
        assert (told["device"], told["passed_over"]) == (choice.device, choice.passed_over)
    sound = put(vit_bundle)
    assert document(transom("doctor", sound, "--json"))["auto"] == {
        "device": "tensorrt", "reason": "the bundle's engine for this GPU is loaded", "passed_over": {},
    }  # fmt: skip


def test_a_driver_that_cuda_python_raises_for_is_an_absent_gpu(
    put: Put, gpu: EmulatedTensorRT, vit_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Versions of cuda-python raise where others give a code."""

    def raises() -> None:
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    folder = put(vit_bundle)
    monkeypatch.setattr(gpu.cuda, "cudaGetDeviceCount", raises)
    with pytest.raises(BackendError, match=r"cudaGetDeviceCount cannot be called \(Failed to dlopen libcuda\.so\.1\)"):
        load(folder, device="tensorrt")
    with load(folder, device="auto") as vit:
        assert vit.device == "cpu"
