"""Exports for the CPU alone and for TensorRT alone: what ships, what is measured; and that an export repeats."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from command_line import process
from conftest import Once, export_to
from shipped_lists import if_lists_are_made
from transom.calib.table import RANGES
from transom.export.quantization.options import QuantizeOptions
from transom.export.verification import other_devices
from transom.runtime.backends.ort import session_entries
from transom.runtime.bundle import Bundle
from transom.runtime.manifest_graphs import SIMULATED
from transom.runtime.selftest import selftest


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen rows for a tiny BERT."""
    path = tmp_path_factory.mktemp("data") / "rows.npz"
    ids = np.random.default_rng(0).integers(1, 90, (16, 8))
    np.savez(path, input_ids=ids, attention_mask=np.ones_like(ids))
    return path


@pytest.fixture(scope="module")
def twice(once: Once, shallow_bert: Path, data: Path) -> list[Path]:
    """One INT8 export for the CPU alone, run twice: by processes that hash strings otherwise."""

    def make(folder: Path) -> None:
        for seed in ("1", "2"):
            arguments = ["export", shallow_bert, "--out", folder / seed, "--precision", "int8", "--for", "cpu"]
            arguments += ["--max", "S=16", "--max", "B=2", "--calibration-data", data]
            ended = process(folder, *arguments, env={**os.environ, "PYTHONHASHSEED": seed})
            assert ended.returncode == 0, ended.stderr

    folder = once("made-for-cpu", make)
    return [folder / "1", folder / "2"]


def test_the_same_export_gives_the_same_bytes(twice: list[Path]) -> None:
    first, second = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in twice)
    assert first == second


def test_only_the_cpus_graph_is_made_and_measured(twice: list[Path]) -> None:
    bundle = Bundle(twice[0])
    manifest = bundle.manifest
    assert manifest.made_for == "cpu"
    names = {"model.cpu.onnx", "tokenizer.json", RANGES, "golden.safetensors"}
    assert {*manifest.files} == names | if_lists_are_made("model.operators.json", "model.weights")
    (graph,) = manifest.graphs
    assert graph.files == {"cpu": "model.cpu.onnx"} | dict.fromkeys(if_lists_are_made("native"), "model.operators.json")
    quantization = manifest.quantization
    assert quantization is not None
    assert {*quantization["gate"]} == {*quantization["elsewhere"]} == {"cpu"} | if_lists_are_made("native")
    assert not any("emulated" in case for case in manifest.parity["cases"])
    assert other_devices(bundle) is None
    report = selftest(twice[0], kernels="onnxruntime")
    assert report.worst_against("bundle").error == 0.0


def test_a_bundle_for_tensorrt_computes_its_graph_in_float32(shallow_bert: Path, data: Path, tmp_path: Path) -> None:
    options = QuantizeOptions(calibration_data=(str(data),), gate=False)
    sizes = {"S": 16, "B": 2}
    export_to(tmp_path, shallow_bert, precision="int8", max_sizes=sizes, quantize=options, made_for="tensorrt")
    bundle = Bundle(tmp_path / "bundle")
    (graph,) = bundle.manifest.graphs
    assert dict(graph.files) == {"default": "model.onnx", "cpu": "model.cpu.onnx"}
    assert graph.integers == SIMULATED
    assert session_entries(graph, "cpu") == {"session.disable_quant_qdq": "1"}
    quantization = bundle.manifest.quantization
    assert quantization is not None
    assert {*quantization["gate"]} == {"default"}
    assert quantization["integer_means"] is None
    assert other_devices(bundle) is None
    assert selftest(tmp_path / "bundle").worst_against("bundle").error < 1e-3
