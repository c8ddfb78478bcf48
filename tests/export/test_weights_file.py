"""The file of weights that is written as they come: the bytes that it would have in memory."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from tiny_graphs import graph_of
from transom.export.passes.half_precision import convert_precision
from transom.export.variants import make_variants
from transom.export.weights_file import externalize, externalize_to, tensor_bytes
from transom.runtime.backends.base import ReadInPieces
from transom.runtime.graph_spec import Graph, Tensor

WEIGHT = np.arange(640, dtype=np.float32).reshape(20, 32)
TEXT = "g (float[1, 20] x) => (float[1, 32] y) { a = MatMul(x, w) y = Add(a, v) }"


def model() -> ir.Model:
    made = graph_of(TEXT, {"w": WEIGHT, "v": np.ones((1, 32), np.float32)})
    made.graph.initializers["w"].const_value = ir.Tensor(WEIGHT.T.copy().T, name="w")  # as a transposed weight lies
    return made


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_what_is_written_is_what_memory_would_hold(tmp_path: Path, precision: str) -> None:
    models = []
    for _ in range(2):
        made = model()
        convert_precision(made, precision)
        models.append(made)
    expected, _ = externalize([models[0], models[0].clone()], "model.weights")
    stored, _ = externalize_to([models[1], models[1].clone()], tmp_path / "model.weights")
    assert stored.path.read_bytes() == expected
    assert stored.entry() == {"size": len(expected), "sha256": hashlib.sha256(expected).hexdigest()}
    assert len(expected) == 640 * (4 if precision == "fp32" else 2)  # once, and the vector stays in the graph
    if precision == "fp32":
        assert expected == WEIGHT.tobytes()


def test_nothing_is_left_of_a_file_that_fails(tmp_path: Path) -> None:
    made = model()

    def broken() -> ir.TensorProtocol:
        raise OSError("no space")

    made.graph.initializers["w"].const_value = ir.LazyTensor(broken, ir.DataType.FLOAT, ir.Shape((20, 32)), name="w")
    with pytest.raises(OSError, match="no space"):
        externalize_to([made], tmp_path / "model.weights")
    assert [*tmp_path.iterdir()] == []


def test_no_copy_is_made_of_bytes_in_their_order() -> None:
    data = tensor_bytes(ir.Tensor(WEIGHT))
    assert np.shares_memory(np.frombuffer(data, np.float32), WEIGHT)
    four_bits = ir.Tensor(np.arange(4, dtype=np.int8), dtype=ir.DataType.INT4)
    assert bytes(tensor_bytes(four_bits)) == four_bits.tobytes() == b"\x10\x32"


def test_variants_written_to_a_folder_are_those_in_memory(tmp_path: Path) -> None:
    graphs = (Graph("model", (Tensor("x", "float32", (1, 20)),), (Tensor("y", "float32", (1, 32)),)),)
    there = make_variants({"model": model()}, graphs, "fp16", folder=tmp_path)
    here = make_variants({"model": model()}, graphs, "fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["model.weights"]
    assert isinstance(there, ReadInPieces)
    assert there.graphs == here.graphs
    for name in ("model.onnx", "model.cpu.onnx", "model.weights"):
        assert there(name) == here(name) == b"".join(there.pieces(name)) == b"".join(here.pieces(name))
        assert there.size(name) == here.size(name) == len(here(name))
