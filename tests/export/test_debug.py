"""``transom debug accuracy``: a damaged layer is found and named, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import numpy_helper

from command_line import changed_bundle, document, error_line, transom
from transom.calib.data import open_calibration_data
from transom.export import debug, pipeline
from transom.export.checkpoint import load_checkpoint
from transom.export.debug import debug_accuracy
from transom.runtime.errors import CalibrationError, CheckpointError, ExportError
from transom.runtime.manifest import MANIFEST, manifest_sha256

KEY, VALUE = (f"encoder.layer.1.attention.attention.{name}" for name in ("key", "value"))

# The reference ViT, exported once: a damaged layer comes first.


@pytest.fixture(autouse=True)
def traced(traced_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debug, "onnx_from_module", pipeline.onnx_from_module)


@pytest.fixture
def half_bundle(once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    return once("fp16-vit", lambda folder: pipeline.export("vit", folder / "bundle", precision="fp16")) / "bundle"


def damaged(bundle: Path, folder: Path, file: str, change: Callable[[onnx.ModelProto], None]) -> Path:
    """A copy with one of its graphs changed, signed again as an exporter with a fault would; its weights lie inside."""
    copy = folder / "damaged"
    shutil.copytree(bundle, copy)
    model = onnx.load(copy / file)
    change(model)
    data = model.SerializeToString()
    (copy / file).write_bytes(data)
    words = json.loads((copy / MANIFEST).read_text())
    words["files"][file] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    words["manifest_sha256"] = manifest_sha256(words)
    (copy / MANIFEST).write_text(json.dumps(words))
    return copy


def times_three(name: str) -> Callable[[onnx.ModelProto], None]:
    """Three times the initializer."""

    def change(model: onnx.ModelProto) -> None:
        (found,) = (each for each in model.graph.initializer if each.name == name)
        array = numpy_helper.to_array(found)
        found.CopyFrom(numpy_helper.from_array((3 * array).astype(array.dtype), name))

    return change


def scale_of(bundle: Path, layer: str) -> str:
    """The name of a layer's weight scales in the CPU's file."""
    model = onnx.load(bundle / "model.cpu.onnx", load_external_data=False)
    (found,) = (
        node.input[3]
        for node in model.graph.node
        if node.op_type == "MatMulIntegerToFloat" and any(entry.value == layer for entry in node.metadata_props)
    )
    return str(found)


def test_a_scale_three_times_too_large_is_found_in_an_int8_bundle(int8_bundle: Path, tmp_path: Path) -> None:
    bundle = damaged(int8_bundle, tmp_path, "model.cpu.onnx", times_three(scale_of(int8_bundle, VALUE)))
    result = transom("debug", "accuracy", bundle, "--json", "--most", "2")
    assert result.exit_code == 0, result.output
    findings = document(result)
    assert (findings["flavour"], findings["layers"]) == ("cpu", 19)
    first, *_ = findings["worst"]
    assert (first["name"], first["graph"]) == (VALUE, "model")
    assert first["before"] == findings["error"]["shipped"] > 0.2
    assert first["after"] < 0.03
    assert (findings["agreement"], first["agreement"]) == (1.0, 1.0)  # of 48 digits none tips over
    assert findings["error"]["everything_restored"] < 1e-5


def test_the_other_variant_is_not_damaged(int8_bundle: Path, tmp_path: Path) -> None:
    bundle = damaged(int8_bundle, tmp_path, "model.cpu.onnx", times_three(scale_of(int8_bundle, VALUE)))
    assert debug_accuracy(bundle, variant="default", most=1).shipped < 0.03


def test_a_weight_three_times_too_large_is_found_in_an_fp16_bundle(half_bundle: Path, tmp_path: Path) -> None:
    bundle = damaged(half_bundle, tmp_path, "model.onnx", times_three(weight_of(half_bundle, KEY)))
    result = transom("debug", "accuracy", bundle, "--target", "0.01")
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()]
    assert [row[:3] for row in rows if row and row[0].isdigit()] == [["1", KEY, "model"]]
    assert "with 1 of 38 layers in FP32" in result.stdout
    assert "--precision bf16" in result.stdout


def weight_of(bundle: Path, layer: str) -> str:
    """The name of a linear layer's weight in half precision."""
    model = onnx.load(bundle / "model.onnx")
    (found,) = (
        node.input[1]
        for node in model.graph.node
        if node.op_type in ("MatMul", "Gemm") and any(entry.value == layer for entry in node.metadata_props)
    )
    return str(found)


def test_a_fault_outside_the_layers_is_told(int8_bundle: Path, tmp_path: Path) -> None:
    model = onnx.load(int8_bundle / "model.cpu.onnx", load_external_data=False)
    norms = [node.input[1] for node in model.graph.node if node.op_type == "LayerNormalization"]
    bundle = damaged(int8_bundle, tmp_path, "model.cpu.onnx", times_three(norms[-1]))
    result = transom("debug", "accuracy", bundle, "--most", "1")
    assert result.exit_code == 0, result.output
    assert "the rest comes from outside of them" in result.stdout


def test_what_cannot_be_examined_is_refused(vit_bundle: Path, int8_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="is in fp32: nothing in it was quantised or rounded"):
        debug_accuracy(vit_bundle)
    assert "transom.runtime.errors.ExportError: " in error_line(transom("debug", "accuracy", vit_bundle))

    gone = {"checkpoint": str(tmp_path / "gone")}
    elsewhere = changed_bundle(int8_bundle, tmp_path / "else", lambda words: words["source"].update(gone))
    with pytest.raises(CalibrationError, match="Give --calibration-data what it was calibrated on"):
        debug_accuracy(elsewhere)
    with pytest.raises(CalibrationError, match="was calibrated on digits; the data given now makes digits"):
        debug_accuracy(elsewhere, calibration_data=["digits"])  # all of them: none was held out

    def moves(words: dict[str, Any]) -> None:
        words["source"].update(gone, sha256="0" * 64)
        words["quantization"]["data"].update(sha256=open_calibration_data(["digits"]).split(4)[0].sha256)

    moved = changed_bundle(int8_bundle, tmp_path / "moved", moves)
    with pytest.raises(CheckpointError, match="gone"):
        debug_accuracy(moved, calibration_data=["digits"])
    with pytest.raises(CheckpointError, match="its hash differs"):
        debug_accuracy(moved, source="vit", calibration_data=["digits"])
    rangeless = changed_bundle(int8_bundle, tmp_path / "rangeless", lambda words: words["files"].pop("ranges.json"))
    with pytest.raises(CalibrationError, match=r"has no ranges\.json"):
        debug_accuracy(rangeless)


def test_a_half_precision_bundle_without_data_is_measured_on_what_parity_runs_on(bert_checkpoint: Path) -> None:
    loaded = load_checkpoint(str(bert_checkpoint), task=None, max_sizes={"S": 23}, image_size=None, ignore_unused=False)
    samples, name = debug.parity_samples(loaded)
    assert name == "passages and photographs of the parity runs"
    rows = [sample.feeds["input_ids"] for sample in samples if sample.feeds]
    assert [row.shape for row in rows] == [(1, 23)] * 48
    assert len({row.tobytes() for row in rows}) > 40
    assert max(int(row.max()) for row in rows) < loaded.config.vocab_size
