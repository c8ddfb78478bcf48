"""The table of ranges: there and back, every hostile byte refused, and bound to one graph by its hash."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from transom.calib import table as tables
from transom.calib.graph_hash import graph_sha256
from transom.calib.histogram import Histogram
from transom.calib.table import (
    ChannelRanges,
    GraphRanges,
    RangeTable,
    Smoothing,
    TensorRanges,
    load_table,
)
from transom.export.variants import make_variants
from transom.runtime.bundle import Bundle
from transom.runtime.errors import CalibrationError

SHA = "0123456789abcdef" * 4
DATA = {"name": "austen", "samples": 3, "sha256": "f" * 64}


def example() -> RangeTable:
    values = np.array([[0.1, -2.5], [1 / 3, 0]], np.float32)
    histogram = Histogram()
    histogram.update(values)
    channels = ChannelRanges(values.min(axis=0), values.max(axis=0))
    smoothing = {"norm": Smoothing(0.65, np.array([0.1, 1e-7, 3.0], np.float32))}
    plain = Histogram()
    plain.update(np.zeros(4, np.float32))
    tensors = {"x": TensorRanges(histogram, channels), "y": TensorRanges(plain)}
    return RangeTable({"model": GraphRanges(SHA, tensors, smoothing), "other": GraphRanges("a" * 64, {})}, DATA)


def test_a_table_comes_back_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "ranges.json").write_bytes(example().to_bytes())
    found = load_table(tmp_path / "ranges.json")
    assert found.to_bytes() == example().to_bytes()
    assert found.data == DATA
    graph = found.require("model", SHA)
    channels = graph.tensors["x"].channels
    assert channels is not None
    np.testing.assert_array_equal(channels.minimum, np.array([0.1, -2.5], np.float32))
    np.testing.assert_array_equal(channels.maximum, np.array([1 / 3, 0], np.float32))
    assert channels.maximum.dtype == graph.smoothing["norm"].factors.dtype == np.float32
    histogram = graph.tensors["x"].histogram
    assert (histogram.limit, histogram.count, histogram.minimum) == (4.0, 4, -2.5)
    assert graph.tensors["y"].channels is None
    assert graph.smoothing["norm"].alpha == 0.65
    np.testing.assert_array_equal(graph.smoothing["norm"].factors, np.array([0.1, 1e-7, 3], np.float32))


def test_the_file_is_compact() -> None:
    """A tensor of BERT-base with 3,072 channels and every bin of use: under 100 KB, and BERT-base has 49 tensors."""
    values = np.random.default_rng(0).standard_normal((2000, 3072)).astype(np.float32)
    histogram = Histogram()
    histogram.update(values)
    tensor = TensorRanges(histogram, ChannelRanges(values.min(axis=0), values.max(axis=0)))
    assert len(RangeTable({"model": GraphRanges(SHA, {"x": tensor})}, DATA).to_bytes()) < 100_000


def test_a_table_of_another_graph_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"from another graph 'model': its sha256 is 0123456789ab\.\.\., .*bbbb"):
        example().require("model", "b" * 64)
    with pytest.raises(CalibrationError, match="is of model, other, this model has the graph 'decoder'"):
        example().require("decoder", SHA)


def changed(change: Callable[[Any], object]) -> Any:
    value = json.loads(example().to_bytes())
    change(value)
    return value


MODEL = ["graphs", "model"]
X = [*MODEL, "tensors", "x"]
NORM = [*MODEL, "smoothing", "norm"]


def put(*path: str, value: Any) -> Callable[[Any], None]:
    def change(top: Any) -> None:
        for key in path[:-1]:
            top = top[key]
        top[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format"], "transom-bundle", "format"),
        (["format_version"], 2, "expected 1..1"),
        (["format_version"], True, "expected 1..1"),
        (["extra"], 1, "unknown key 'extra'"),
        (["graphs"], {}, "graphs is empty"),
        (["graphs"], [], "an object"),
        (["data", "samples"], 0, "data.samples is 0"),
        (["data", "sha256"], "F" * 64, "64 hexadecimal digits"),
        (["data"], {}, "data.name is missing"),
        ([*MODEL, "sha256"], "zz", "64 hexadecimal digits"),
        ([*MODEL, "sha256"], 7, "64 hexadecimal digits"),
        ([*MODEL, "tensors"], None, "tensors is None"),
        ([*X, "histogram"], 1, "expected an object"),
        ([*X, "histogram", "limit"], 0, "power of two"),
        ([*X, "histogram", "bins"], [1], "counts of 4096 bins"),
        ([*X, "channels", "min"], [0.1], "or 1 of one and 2 of the other"),
        ([*X, "channels", "min"], [5.0, -2.5], "a min above its max"),
        ([*X, "channels", "min"], [0.1, -2.25], "another min"),
        ([*X, "channels", "max"], [], "finite float32"),
        ([*X, "channels", "max"], [True, 0.0], "finite float32"),
        ([*X, "channels", "max"], [10**300, 0.0], "finite float32"),
        ([*X, "channels", "max"], [3.4028236e38, 0.0], "finite float32"),  # rounds to infinity
        ([*X, "channels", "max"], [[1.0], 0.0], "finite float32"),
        ([*X, "channels", "step"], 1, "unknown key 'step'"),
        ([*NORM, "factors"], [0.1, 0.0, 3.0], "norm.factors is .* above zero"),
        ([*NORM, "factors"], [0.1, -1.0, 3.0], "above zero"),
        ([*NORM, "factors"], [0.1, 1e-60, 3.0], "above zero"),  # zero as float32
        ([*NORM, "factors"], "abc", "above zero"),
        ([*NORM, "alpha"], 1.5, r"0\.\.1"),
        ([*NORM, "alpha"], None, r"0\.\.1"),
    ],
)
def test_a_field_that_is_wrong_is_named(path: list[str], value: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=rf"^ranges\.json is no usable table of ranges: .*{message}") as caught:
        RangeTable.from_json(changed(put(*path, value=value)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [None, [], "ranges", 3, {}])
def test_json_that_is_no_table_is_refused(value: Any) -> None:
    with pytest.raises(CalibrationError, match="no usable table of ranges"):
        RangeTable.from_json(value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not usable JSON"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": 1e999}', "out of range"),
        (b'{"a": 1, "a": 2}', "a key is given twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" * 40 + b"]" * 40, "nested more than 32 deep"),
        (b"\xff\xfe\x00", "not usable JSON"),
        (b"1" * 10_000, "not usable JSON"),
    ],
)
def test_a_hostile_file_is_refused(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    path.write_bytes(data)
    with pytest.raises(CalibrationError, match=message) as caught:
        load_table(path)
    assert str(path) in str(caught.value)
    assert "bundle" not in str(caught.value).replace(str(tmp_path), "")


def test_a_file_that_is_too_large_a_pipe_or_absent_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ranges.json"
    path.write_bytes(example().to_bytes())
    monkeypatch.setattr(tables, "MAX_TABLE_BYTES", path.stat().st_size - 1)
    with pytest.raises(CalibrationError, match="at most"):
        load_table(path)
    with pytest.raises(CalibrationError, match="No such file"):
        load_table(tmp_path / "none.json")
    os.mkfifo(tmp_path / "pipe")
    for other in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(CalibrationError, match="no regular file"):
            load_table(other)


def norm_and_linear(epsilon: float = 1e-5, weight: float = 1.0, name: str = "w", opset: int = 23) -> ir.Model:
    """y = LayerNorm(x) W, W of 1 KB and more."""
    x, y = (ir.val(name, ir.DataType.FLOAT, ["B", 4]) for name in ("x", "y"))
    scale, w = weights = [
        ir.Value(name=name, const_value=ir.tensor(array, name=name))
        for name, array in {"scale": np.ones(4, np.float32), name: np.full((4, 100), weight, np.float32)}.items()
    ]
    for value in weights:
        assert value.const_value is not None
        value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape(value.const_value.shape.numpy())
    norm = ir.node("LayerNormalization", [x, scale, None], {"axis": -1, "epsilon": epsilon})
    norm.outputs[0].name = "norm"
    linear = ir.node("MatMul", [norm.outputs[0], w], outputs=[y])
    graph = ir.Graph([x], [y], nodes=[norm, linear], initializers=weights, opset_imports={"": opset}, name="model")
    return ir.Model(graph, ir_version=10)


def test_the_hash_is_the_same_in_memory_and_from_a_file(tmp_path: Path) -> None:
    """1e-5 is a float64 in memory and a float32 in the file; the bias left out is None, and an empty name."""
    expected = graph_sha256(norm_and_linear())
    ir.save(norm_and_linear(), tmp_path / "inside.onnx")
    ir.save(norm_and_linear(), tmp_path / "outside.onnx", external_data="w.bin", size_threshold_bytes=0)
    assert (tmp_path / "w.bin").stat().st_size >= 1616
    assert graph_sha256(ir.load(tmp_path / "inside.onnx")) == expected
    assert graph_sha256(ir.load(tmp_path / "outside.onnx")) == expected
    assert graph_sha256(norm_and_linear().clone()) == expected


def test_the_hash_leaves_out_what_only_people_read() -> None:
    model = norm_and_linear()
    model.producer_name, model.doc_string, model.metadata_props["by"] = "somebody", "a model", "hand"
    model.graph.name, model.graph.doc_string = "another name", "a graph"
    for node in model.graph:
        node.name, node.doc_string, node.metadata_props["module"] = "n", "a node", "block.0"
        node.outputs[0].shape = None
    assert graph_sha256(model) == graph_sha256(norm_and_linear())


def one_more_output(model: ir.Model) -> None:
    model.graph.outputs.append(model.graph[0].outputs[0])


def reshaped(model: ir.Model) -> None:
    model.graph.initializers["w"].const_value = ir.tensor(np.ones((100, 4), np.float32))


def renamed(model: ir.Model) -> None:
    model.graph[0].outputs[0].name = "normal"


def other_domain(model: ir.Model) -> None:
    model.graph[1].domain = "com.microsoft"


CHANGES: Mapping[str, Callable[[ir.Model], None]] = {
    change.__name__: change for change in (one_more_output, reshaped, renamed, other_domain)
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_hash_sees_a_change(change: str) -> None:
    model = norm_and_linear()
    CHANGES[change](model)
    assert graph_sha256(model) != graph_sha256(norm_and_linear())


@pytest.mark.parametrize(
    "changed",
    [
        {"epsilon": 1.0001e-5},
        {"weight": float(np.nextafter(np.float32(1), np.float32(2)))},
        {"name": "v"},
        {"opset": 22},
    ],
)
def test_the_hash_sees_a_changed_value(changed: dict[str, Any]) -> None:
    assert graph_sha256(norm_and_linear(**changed)) != graph_sha256(norm_and_linear())


def test_a_bundle_has_one_hash_however_its_weights_are_kept(bert_bundle: Path, tmp_path: Path) -> None:
    model = ir.load(bert_bundle / "model.onnx")
    graphs = tuple(file.graph for file in Bundle(bert_bundle).manifest.graphs)
    for name, data in make_variants({"model": model}, graphs, "fp32", external_above=0).files.items():
        (tmp_path / name).write_bytes(data)
    assert (tmp_path / "model.weights").exists()
    outside = ir.load(tmp_path / "model.onnx")
    assert graph_sha256(outside) == graph_sha256(model)
    name, weight = next((n, v.const_value) for n, v in model.graph.initializers.items() if v.const_value is not None)
    array = weight.numpy().copy()
    array.flat[-1] += 1
    model.graph.initializers[name].const_value = ir.tensor(array, name=name)
    assert graph_sha256(outside) != graph_sha256(model)
