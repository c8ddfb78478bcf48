"""The ONNX files that ship are checked as they lie on the disk, whatever their precision and size."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from paths import TESTS
from tiny_graphs import graph_of
from transom.export.bundle_writer import BundleWriter
from transom.export.passes.half_precision import convert_precision
from transom.export.pipeline import Converted, write_files
from transom.export.variants import Variants, check_file, serialized
from transom.export.weights_file import externalize
from transom.runtime.errors import ExportError

KEPT = TESTS / "bundles"
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")
UNTOKENIZED: Any = type("LoadedCheckpoint", (), {"tokenizers": []})


def written(folder: Path, model: ir.Model, *, outside: bool) -> Path:
    """The model's file, its weights beside it or in it."""
    if outside:
        (folder / "model.weights").write_bytes(externalize([model], "model.weights")[0])
    path = folder / "model.onnx"
    path.write_bytes(serialized(model))
    return path


def halves(precision: str) -> ir.Model:
    model = graph_of("add (float[1, 640] x) => (float[1, 640] y) { y = Add(x, w) }", {"w": np.ones((1, 640))})
    convert_precision(model, precision)
    return model


def spoilt(model: ir.Model) -> ir.Model:
    """What a Cast gives is an integer; what reads it takes none."""
    next(node for node in model.graph if node.op_type == "Cast").attributes["to"] = ir.AttrInt64("to", 7)  # int64
    return model


@pytest.mark.parametrize("outside", [False, True], ids=["inside", "outside"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_graph_whose_types_do_not_agree_is_refused(precision: str, outside: bool, tmp_path: Path) -> None:
    """Though BF16 has no kernels here that would say so."""
    check_file(written(tmp_path, halves(precision), outside=outside))
    path = written(tmp_path, spoilt(halves(precision)), outside=outside)
    with pytest.raises(ExportError, match=r"model\.onnx is no valid ONNX model: .*node name: .*y"):
        check_file(path)


def test_weights_that_are_not_there_are_missed(tmp_path: Path) -> None:
    """A model in memory has them; what counts is what was written."""
    path = written(tmp_path, halves("bf16"), outside=True)
    (tmp_path / "model.weights").unlink()
    with pytest.raises(ExportError, match=r"no valid ONNX model: .*model\.weights, but it is not regular file"):
        check_file(path)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_ships_in_each_precision_is_valid(precision: str) -> None:
    paths = sorted((KEPT / "0.1.0").glob(f"*-{precision}/*.onnx"))
    assert len(paths) >= 5
    for path in paths:
        check_file(path)


def large(folder: Path, result: int) -> Path:
    """A product with a weight of 3 GiB, which lies in a file with nothing written to it."""
    rows, columns = 1 << 14, 3 << 14
    sides = [helper.make_tensor_value_info(name, kind, [1, n]) for name, kind, n in
             (("x", TensorProto.FLOAT, rows), ("y", result, columns))]  # fmt: skip
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[rows, columns])
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "model.weights"), ("offset", "0"), ("length", str(3 << 30))):
        weight.external_data.add(key=key, value=value)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")], "g", *[[s] for s in sides]
    )
    graph.initializer.append(weight)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    with (folder / "model.weights").open("wb") as file:
        file.truncate(3 << 30)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_a_model_beyond_two_gigabytes_is_checked(tmp_path: Path) -> None:
    """Its bytes on the disk are holes, and none of them is read."""
    check_file(large(tmp_path, TensorProto.FLOAT))
    with pytest.raises(ExportError, match=r"no valid ONNX model: .*Inferred elem type differs"):
        check_file(large(tmp_path, TensorProto.FLOAT16))


@pytest.mark.parametrize("name", ["with space", "é", os.fsdecode(b"\xff")], ids=["space", "letter", "byte"])
def test_a_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    folder.mkdir()
    check_file(written(folder, halves("fp16"), outside=True))
    with pytest.raises(ExportError, match="no valid ONNX model"):
        check_file(written(folder, spoilt(halves("fp16")), outside=True))


def test_every_file_that_is_written_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of them is wrong; the weights, which are checked with each, are no graph."""
    good, wrong = halves("bf16"), spoilt(halves("bf16"))
    weights, _ = externalize([good, wrong], "model.weights")
    files = {"model.weights": weights, "model.onnx": serialized(good), "model.cpu.onnx": serialized(good)}
    seen: list[str] = []
    check = onnx.checker.check_model

    def spy(path: str, **options: bool) -> None:
        assert options == {"full_check": True}
        seen.append(Path(path).name)
        check(path, **options)

    monkeypatch.setattr(onnx.checker, "check_model", spy)
    converted = Converted(Variants((), files, (), {}), {}, {})
    write_files(BundleWriter(tmp_path), UNTOKENIZED, converted)
    assert seen == ["model.onnx", "model.cpu.onnx"]
    files["model.cpu.onnx"] = serialized(wrong)
    with pytest.raises(ExportError, match=r"model\.cpu\.onnx is no valid ONNX model"):
        write_files(BundleWriter(tmp_path), UNTOKENIZED, converted)
