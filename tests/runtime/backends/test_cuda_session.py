"""Sessions on CUDA without CUDA: their options, and what they may leave on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from transom.runtime import load
from transom.runtime.backends import ort, ort_library
from transom.runtime.backends.ort_library import load_cuda, onnxruntime
from transom.runtime.errors import BackendError

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
CUDA_ERROR = (
    "[ONNXRuntimeError] : 1 : FAIL : /onnxruntime_src/onnxruntime/core/providers/cuda/cuda_call.cc:154 "
    "std::conditional_t<THRW, void, onnxruntime::common::Status> onnxruntime::CudaCall(ERRTYPE, const char*) [with "
    "ERRTYPE = cudaError; bool THRW = true; std::conditional_t<THRW, void, common::Status> = void] CUDA failure 35: "
    "CUDA driver version is insufficient for CUDA runtime version ; GPU=-1 ; hostname=vm ; "
    "file=/onnxruntime_src/onnxruntime/core/cuda_execution_provider.cc ; line=355 ; expr=cudaSetDevice(0);"
)


@dataclass
class Node:
    op_type: str


@dataclass
class Part:
    """Nodes that ONNX Runtime assigned to one provider."""

    ep_name: str
    nodes: Sequence[Node]

    def get_nodes(self) -> Sequence[Node]:
        return self.nodes


@dataclass
class Session:
    parts: Sequence[Part]

    def get_provider_graph_assignment_info(self) -> Sequence[Part]:
        return self.parts


@pytest.fixture(autouse=True)
def forget_loading() -> Iterator[None]:
    load_cuda.cache_clear()
    yield
    load_cuda.cache_clear()


def test_sizes_may_stay_on_the_cpu_and_layers_may_not() -> None:
    """ONNX Runtime leaves Concat and Squeeze of sizes there, in every graph of a bundle, and CLIP's search for EOS."""
    sizes = Part(CPU, [Node("Concat"), Node("Squeeze"), Node("ArgMax")])
    layers = Part(CUDA, [Node("MatMul"), Node("Attention"), Node("Concat")])
    ort.require_on_device(Session([sizes, layers]), "cuda")
    moved = Part(CPU, [Node("MatMul"), Node("Concat"), Node("TensorScatter"), Node("MatMul")])
    with pytest.raises(
        BackendError, match=r"no kernels on cuda for 2 MatMul, 1 TensorScatter of this graph.*--upgrade"
    ):
        ort.require_on_device(Session([layers, moved]), "cuda")


def test_a_real_session_lists_the_nodes_on_the_cpu(vit_bundle: Path) -> None:
    """All nodes are on the CPU here, and none is left out."""
    (model,) = vit_bundle.glob("*.onnx")
    options = onnxruntime().SessionOptions()
    options.add_session_config_entry(ort.RECORD_PROVIDERS, "1")
    session = onnxruntime().InferenceSession(model, options, providers=[CPU])
    with pytest.raises(BackendError, match=r"no kernels on cuda for \d+ Attention, 1 Conv, "):
        ort.require_on_device(session, "cuda")


def test_cuda_multiplies_fp32_as_fp32(vit_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 is its default. It is not configured to refuse the operators that it leaves on the CPU on purpose."""
    library, asked = onnxruntime(), []
    monkeypatch.setattr(library, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(library, "preload_dlls", lambda: asked.append("its libraries were loaded"))

    class Options(library.SessionOptions):  # type: ignore[misc, name-defined]
        def add_session_config_entry(self, key: str, value: str) -> None:
            asked.append((key, value))

    def make(model: bytes, options: Any, **rest: Any) -> Any:
        asked.append({name: rest[name] for name in ("providers", "provider_options")})
        raise RuntimeError(CUDA_ERROR)

    monkeypatch.setattr(library, "SessionOptions", Options)
    monkeypatch.setattr(library, "InferenceSession", make)
    with pytest.raises(BackendError) as raised:
        load(vit_bundle, device="cuda")
    assert asked[:2] == ["its libraries were loaded", ("session.record_ep_graph_assignment_info", "1")]
    assert {"providers": [CUDA], "provider_options": [{"use_tf32": "0"}]} in asked
    assert not any("fallback" in str(entry) for entry in asked)
    message = (
        "cannot load model.onnx on cuda: CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version."
    )
    assert message in str(raised.value)


def test_missing_cuda_libraries_are_not_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`transom --json` prints JSON alone. The libraries are loaded once; the session names what is missing."""
    calls: list[int] = []

    def preload() -> None:
        calls.append(1)
        print("Failed to load libcublasLt.so.13: no such file")

    monkeypatch.setattr(ort_library.onnxruntime(), "preload_dlls", preload)
    for _ in range(2):
        load_cuda()
    assert len(calls) == 1
    assert capsys.readouterr().out == ""


def test_an_export_beside_onnxruntime_gpu_records_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """No distribution is called onnxruntime there; `transom export` used to end in PackageNotFoundError."""
    from transom.export import manifest_fields

    def version(distribution: str) -> str:
        if distribution == "onnxruntime":
            raise PackageNotFoundError(distribution)
        return "1.2.3"

    monkeypatch.setattr(manifest_fields, "version", version)
    versions = {tool: manifest_fields.version_of(tool) for tool in manifest_fields.TOOLS}
    assert versions["onnxruntime"] == onnxruntime().__version__
    assert versions["torch"] == "1.2.3"


def test_an_error_is_reduced_to_its_reason() -> None:
    assert ort.reason_of(RuntimeError(CUDA_ERROR)) == (
        "CUDA failure 35: CUDA driver version is insufficient for CUDA runtime version"
    )
    assert ort.reason_of(RuntimeError("Invalid rank for input: x")) == "Invalid rank for input: x"
