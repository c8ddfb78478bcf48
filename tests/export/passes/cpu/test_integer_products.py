"""Quantised linear layers become one integer product with its bias; what is none stays as it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from tiny_graphs import graph_of, normal, operators, run, weights_of
from transom.calib.quantized_weights import QuantizedWeights
from transom.export.passes.cpu import REWRITES, optimize_for_cpu
from transom.export.passes.linear_layers import find_linears
from transom.export.passes.qdq_dynamic import quantize_dynamic

OPERATOR = "MatMulIntegerToFloat"
BEGIN = '<ir_version: 10, opset_import: ["" : 23]> g'
TEXT = """(float[N, 2] x) => (float[N, 2] y) {
    q = QuantizeLinear (x, step, zero)
    f = DequantizeLinear (q, step, zero)
    w = DequantizeLinear <axis = 1> (W, scale, zeros)
    p = MatMul (f, w)
    y = Add (p, b)
}"""
WEIGHTS: dict[str, NDArray[Any]] = {
    "step": np.array(0.5, np.float32),
    "zero": np.array(3, np.uint8),
    "W": np.array([[1, 2], [-3, 127]], np.int8),
    "scale": np.array([1, 2], np.float32),
    "zeros": np.zeros(2, np.int8),
    "b": np.array([10, 20], np.float32),
}
X = [[2.0, -1.0]]  # 7 and 1 in uint8
Y = [[2 * 1 + -1 * -3 + 10, 2 * (2 * 2 + -1 * 127) + 20]]


def quantized(text: str = TEXT, **changed: NDArray[Any]) -> ir.Model:
    model = onnx.parser.parse_model(BEGIN + text)
    given = {value.name for value in model.graph.input}
    arrays = {name: array for name, array in (WEIGHTS | changed).items() if name not in given}
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    for node in model.graph.node:
        node.metadata_props.add(key="module", value="dense")
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


def rewritten(text: str = TEXT, **changed: NDArray[Any]) -> ir.Model:
    """The graph after all rewrites, of which only this one may find something."""
    model = quantized(text, **changed)
    assert {name for name, count in optimize_for_cpu(model).items() if count} <= {"integer_products"}
    return model


def test_product_and_bias_are_one_operator() -> None:
    model = rewritten()
    assert operators(model) == {"QuantizeLinear": 1, OPERATOR: 1}
    product = list(model.graph)[1]
    assert [value.name for value in product.inputs if value] == ["q", "W", "step", "scale", "zero", "zeros.scalar", "b"]
    assert (product.domain, product.metadata_props["module"]) == ("com.microsoft", "dense")
    assert weights_of(model)["zeros.scalar"].shape == ()
    assert run(quantized(), x=X)["y"].tolist() == run(model, x=X)["y"].tolist() == Y


def test_a_subtracted_bias_is_added_negated() -> None:
    """As ``qdq_static`` writes the bias of a Gemm."""
    model = rewritten(TEXT.replace("Add", "Sub"), b=-WEIGHTS["b"])
    assert operators(model) == {"QuantizeLinear": 1, OPERATOR: 1}
    assert run(model, x=X)["y"].tolist() == Y


@pytest.mark.parametrize(
    ("left", "text", "bias"),
    [
        ("Mul", TEXT.replace("Add (p, b)", "Mul (p, b)"), WEIGHTS["b"]),
        ("Sub", TEXT.replace("Add (p, b)", "Sub (b, p)"), WEIGHTS["b"]),  # the sums are negated, not the bias
        ("Add", TEXT, np.ones((1, 2), np.float32)),
        ("Add", TEXT.replace("[N, 2] y", "[N, 2] y, float[N, 2] p"), WEIGHTS["b"]),
        ("Add", TEXT.replace("[N, 2] x", "[N, 2] x, float[2] b"), WEIGHTS["b"]),
    ],
)
def test_what_is_no_bias_stays_behind_the_product(left: str, text: str, bias: NDArray[Any]) -> None:
    theirs, ours = quantized(text, b=bias), rewritten(text, b=bias)
    assert operators(ours) == {"QuantizeLinear": 1, OPERATOR: 1, left: 1}
    feeds = {"x": X} | ({} if "b" not in {value.name for value in ours.graph.inputs} else {"b": bias})
    expected = run(theirs, **feeds)
    for name, array in run(ours, **feeds).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.mark.parametrize(
    "changed",
    [
        {"zero": np.array(3, np.int8)},  # TensorRT's: int8 times int8 is slow on a CPU
        {"W": WEIGHTS["W"].view(np.uint8), "zeros": np.zeros(2, np.uint8)},
        {"scale": np.array(1, np.float32), "zeros": np.array(0, np.int8)},  # of the whole weight
        {"step": np.ones(2, np.float32), "zero": np.zeros(2, np.uint8)},  # of a column each
    ],
)
def test_other_integers_stay_as_they_are(changed: dict[str, NDArray[Any]]) -> None:
    model = quantized(**changed)
    before = operators(model)
    assert not any(optimize_for_cpu(model).values())
    assert operators(model) == before


def test_a_scale_that_is_computed_stays_in_its_node() -> None:
    model = quantized(TEXT.replace("float[N, 2] x", "float[N, 2] x, float step"))
    assert not any(optimize_for_cpu(model).values())


def test_zero_points_other_than_zero_are_kept() -> None:
    zeros = np.array([0, 5], np.int8)
    model = rewritten(zeros=zeros)
    assert "zeros.scalar" not in weights_of(model)
    assert run(model, x=X)["y"].tolist() == [[Y[0][0], Y[0][1] - 2 * (2 * 5 - 1 * 5)]]


def test_each_layer_has_a_zero_point_of_its_own() -> None:
    """ONNX Runtime makes them unsigned one by one, under a name made of theirs."""
    model = quantized(TEXT.replace("y = Add (p, b)", "p2 = MatMul (f, w)  y = Add (p, p2)"))
    assert optimize_for_cpu(model)["integer_products"] == 2
    zeros = [node.inputs[5] for node in model.graph if node.op_type == OPERATOR]
    assert [zero.name for zero in zeros if zero] == ["zeros.scalar", "zeros.2.scalar"]


ROWS = """(float[B, S, 64] x, int64[B] write_indices) => (float[B, S, 24] y, int64[B] next) {
    p = MatMul (x, W)  b = Add (p, bias)  r = MatMul (x, V)  y = Add (r, b)  next = Identity (write_indices)
}"""


def dynamic(text: str = ROWS) -> ir.Model:
    model = graph_of(f"g {text}", {"W": normal(64, 24), "V": normal(64, 24, seed=1), "bias": normal(24, seed=2)})
    assert quantize_dynamic(model, find_linears(model), QuantizedWeights(8))
    return model


def rows_of(*shape: int) -> dict[str, Any]:
    return {"x": normal(*shape, 64, seed=3), "write_indices": np.zeros(shape[0], np.int64)}


def session_run(model: ir.Model, feeds: dict[str, Any]) -> NDArray[Any]:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    found: NDArray[Any] = session.run(["y"], feeds)[0]
    return found


def test_the_scales_of_a_decoders_rows_are_in_its_products() -> None:
    """Bit for bit, one row or several; the bias, which the operator would scale as well, is added behind it."""
    theirs, ours = dynamic(), dynamic()
    assert optimize_for_cpu(ours) == dict.fromkeys(REWRITES, 0) | {"integer_products": 2}
    counts = operators(ours)
    assert (counts[OPERATOR], counts["Mul"], counts["Add"]) == (2, 1, 2), "one Mul makes the scales"
    for shape in ((1, 1), (1, 5), (3, 1), (2, 4)):
        feeds = rows_of(*shape)
        feeds["x"][0, 0] = 0
        found = session_run(ours, feeds)
        np.testing.assert_array_equal(found, session_run(theirs, feeds), err_msg=str(shape))
        np.testing.assert_array_equal(found[0, 0], weights_of(ours)["bias"])  # a row of zeros has the scale 0


def test_rows_of_other_graphs_are_scaled_behind_their_product() -> None:
    """They are many, and with several threads the ``Mul`` is faster."""
    model = dynamic(ROWS.replace("write_indices", "starts"))
    assert optimize_for_cpu(model)["integer_products"] == 2
    assert (operators(model)[OPERATOR], operators(model)["Mul"]) == (2, 3)
