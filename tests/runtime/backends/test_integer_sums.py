"""Sums of 8-bit products, compared with numpy's: equal on every processor, whatever it multiplies with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from tiny_graphs import Float, graph_of, operators, run
from transom.calib.quantized_weights import QuantizedWeights
from transom.calib.scales import Scale
from transom.export.passes.cpu import optimize_for_cpu
from transom.export.passes.linear_layers import find_linears
from transom.export.passes.qdq_dynamic import quantize_dynamic
from transom.export.passes.qdq_static import quantize_static
from transom.export.passes.weight_only import quantize_weights
from transom.runtime.backends import integer_sums as measured
from transom.runtime.backends.integer_sums import LOST, NATIVE, U8U8, WIDENED, integer_sums, sums_right
from transom.runtime.backends.known_sum import K, N, known_product, qdq_model
from transom.runtime.backends.ort import OrtBackend, session_entries
from transom.runtime.graph_spec import Graph, Tensor
from transom.runtime.manifest_graphs import BLOCKS, PRODUCTS, SIMULATED, GraphFile

ROWS = (1, 2, 5, 64)  # one row has kernels of its own
SIZES = ((1, 1), (2, 5), (7, 16), (31, 33), (64, 17), (256, 64))  # K, N
LINEAR = "g (float[R, K] x) => (float[R, N] y) { y = MatMul (x, W) }"
TWO = "g (float[R, K] x) => (float[R, N] y, float[R, N] z) { y = MatMul (x, W)  z = Gemm (x, V, bias) }"


@pytest.fixture
def asked_anew() -> Iterator[None]:
    """Measure again in this test, and again after it."""
    integer_sums.cache_clear()
    yield
    integer_sums.cache_clear()


def integers(*shape: int, low: int, high: int, seed: int) -> Float:
    """Whole numbers low..high; half of them at either end, where sums are largest."""
    rng = np.random.default_rng(seed)
    values = rng.integers(low, high + 1, shape)
    ends = rng.choice([low, high], shape)
    return np.where(rng.random(shape) < 0.5, values, ends).astype(np.float32)


def weights(k: int, n: int, seed: int) -> Float:
    """Whole numbers whose columns all reach 127, so that every column's scale is 1 and they are their own integers."""
    made = integers(k, n, low=-127, high=127, seed=seed)
    made[0] = 127
    return made


def product(x: NDArray[np.float32], w: NDArray[np.float32]) -> NDArray[np.int64]:
    return x.astype(np.int64) @ w.astype(np.int64)


def test_sums_are_exact_on_this_processor() -> None:
    """onnxruntime 1.32 has exact sums everywhere: as the processor multiplies, or by the option."""
    assert integer_sums() in (NATIVE, WIDENED)
    assert integer_sums().entries in ({}, {U8U8: "1"})


def test_the_known_sums_are_what_onnx_and_numpy_say(tmp_path: Path) -> None:
    """The first row is K x 255 x 127 = 2,072,640 and its negative; the model becomes one integer product."""
    model, x, expected = known_product()
    proto = onnx.load_from_string(model)
    onnx.checker.check_model(proto, full_check=True)
    assert [node.op_type for node in proto.graph.node] == [
        "QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "MatMul"
    ]  # fmt: skip
    w = onnx.numpy_helper.to_array(next(each for each in proto.graph.initializer if each.name == "w"))
    assert (w.shape, w.dtype, x[0].tolist()) == ((K, N), np.int8, [255.0] * K)
    assert expected[0].tolist() == [2_072_640.0, -2_072_640.0] * (N // 2)
    np.testing.assert_array_equal(expected, product(x, w.astype(np.float32)))
    assert np.abs(expected).max() < 2**24
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    assert operators(tmp_path / "optimized.onnx")["MatMulIntegerToFloat"] == 1


def test_a_wrong_sum_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with one weight of 126 in place of 127: 255 less in one column."""
    model, x, expected = known_product()
    weights = np.where(np.arange(N) % 2 == 0, 127, -127).astype(np.int8) * np.ones((K, 1), np.int8)
    assert qdq_model(weights) == model
    weights[5, 2] = 126
    monkeypatch.setattr(measured, "known_product", lambda: (qdq_model(weights), x, expected))
    assert not sums_right({})


@pytest.mark.usefixtures("asked_anew")
@pytest.mark.parametrize(
    ("right", "way"),
    [
        (lambda entries: True, NATIVE),
        (lambda entries: entries == {U8U8: "1"}, WIDENED),
        (lambda entries: False, LOST),
    ],
)
def test_the_option_is_set_only_where_it_helps(right: object, way: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "sums_right", right)
    assert integer_sums() is way


def test_which_sessions_get_the_option() -> None:
    """The CPU's products alone: a graph for TensorRT stays in float32, weights in blocks do without KleidiAI."""

    def entries(integers: str | None, device: str = "cpu") -> Mapping[str, str]:
        return session_entries(GraphFile(Graph("g", (), ()), {"default": "g.onnx"}, None, integers=integers), device)

    assert entries(PRODUCTS) == integer_sums().entries
    assert entries(SIMULATED) == {"session.disable_quant_qdq": "1"}
    assert entries(BLOCKS) == {"mlas.disable_kleidiai": "1"}
    assert entries(None) == {}
    for integers in (None, PRODUCTS, SIMULATED, BLOCKS):
        assert entries(integers, "cuda") == {"session.record_ep_graph_assignment_info": "1"}


@pytest.mark.parametrize("rewritten", [False, True])
@pytest.mark.parametrize("zero_point", [0, 7, 128, 255])
def test_static_sums_are_numpys(zero_point: int, rewritten: bool, tmp_path: Path) -> None:
    """Two layers behind one activation, one with a bias: scales are 1, so float32 holds the integer sums.

    In Q/DQ, which ONNX Runtime fuses, and rewritten for the CPU, as they ship.
    """
    for k, n in SIZES:
        w, v, bias = weights(k, n, 1), weights(k, n, 2), integers(n, low=-9, high=9, seed=3)
        model = graph_of(TWO, {"W": w, "V": v, "bias": bias})
        quantize_static(model, find_linears(model), QuantizedWeights(8), {"x": Scale(1.0, zero_point)}, signed=False)
        assert not rewritten or optimize_for_cpu(model)["integer_products"] == 2
        for rows in ROWS:
            x = integers(rows, k, low=-zero_point, high=255 - zero_point, seed=rows)
            found = run(model, tmp_path / "optimized.onnx", x=x)
            np.testing.assert_array_equal(found["y"], product(x, w))
            np.testing.assert_array_equal(found["z"], product(x, v) + bias)
        assert operators(tmp_path / "optimized.onnx")["MatMulIntegerToFloat"] == 2


@pytest.mark.parametrize("rewritten", [False, True])
def test_dynamic_sums_are_numpys(rewritten: bool, tmp_path: Path) -> None:
    """Rows that reach 127 have a scale of 1: around a zero point of 128 they are their own integers."""
    assert np.float32(127) * np.float32(1 / 127) == 1
    for k, n in SIZES:
        w = weights(k, n, 1)
        model = graph_of(LINEAR, {"W": w})
        quantize_dynamic(model, find_linears(model), QuantizedWeights(8))
        assert not rewritten or optimize_for_cpu(model)["integer_products"] == 1
        for rows in ROWS:
            x = integers(rows, k, low=-127, high=127, seed=rows)
            x[:, 0] = -127
            np.testing.assert_array_equal(run(model, tmp_path / "optimized.onnx", x=x)["y"], product(x, w))
        assert operators(tmp_path / "optimized.onnx")["MatMulIntegerToFloat"] == 1


def test_sums_of_the_graph_for_tensorrt_are_numpys() -> None:
    """int8 activations: S8 x S8 saturates where U8 x S8 does, so a CPU computes them in float32."""
    for k, n in SIZES:
        w = weights(k, n, 1)
        model = graph_of(LINEAR, {"W": w})
        quantize_static(model, find_linears(model), QuantizedWeights(8), {"x": Scale(1.0, 0)}, signed=True)
        for rows in ROWS:
            x = integers(rows, k, low=-127, high=127, seed=rows)
            np.testing.assert_array_equal(run(model, integers=SIMULATED, x=x)["y"], product(x, w))


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_in_blocks_never_saturate(bits: int) -> None:
    """Activations of -1 and 1 alone are exact whether MatMulNBits rounds rows to 8 bits or computes in float32.

    So one right answer holds on every processor, with all weights at the ends of their range.
    """
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    for k, n in ((64, 17), (256, 64), (96, 33)):
        w = np.where(np.random.default_rng(k).random((k, n)) < 0.5, low, high).astype(np.float32)
        model = graph_of(LINEAR, {"W": w})
        quantize_weights(model, find_linears(model), QuantizedWeights(bits), bits, 32)
        for rows in ROWS:
            x = np.where(np.random.default_rng(rows).random((rows, k)) < 0.5, -1, 1).astype(np.float32)
            np.testing.assert_allclose(run(model, integers=BLOCKS, x=x)["y"], x @ w, rtol=0, atol=1e-5 * k * high)


def backend_of(model: ir.Model) -> OrtBackend:
    """The model as the runtime opens a graph of integer products."""
    data = ir.to_proto(model).SerializeToString()
    inputs, outputs = (
        tuple(Tensor(str(each.name), "float32", ("R", each.shape[1])) for each in side)
        for side in (model.graph.inputs, model.graph.outputs)
    )
    file = GraphFile(Graph("g", inputs, outputs), {"default": "g.onnx"}, None, integers=PRODUCTS)
    return OrtBackend(file, lambda name: data, "cpu", 1)


@pytest.mark.parametrize("version", ["now", "0.1.0"])
def test_a_weight_that_two_layers_share(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The option makes each initializer unsigned once, so each layer has its own; 0.1.0's graph runs in float32.

    The option rewrites graphs on every processor, so that its limits show on every processor.
    """
    monkeypatch.setattr("transom.runtime.backends.ort.integer_sums", lambda: WIDENED)
    k, n = 64, 17
    w = weights(k, n, 1)
    edges = f"(float[R, {k}] x, float[R, {k}] z) => (float[R, {n}] y, float[R, {n}] s)"
    text = f"g {edges} {{ y = MatMul (x, W)  s = MatMul (z, W) }}"
    model = graph_of(text, {"W": w})
    scales = {"x": Scale(1.0, 7), "z": Scale(1.0, 200)}
    quantize_static(model, find_linears(model), QuantizedWeights(8), scales, signed=False)
    if version == "0.1.0":
        as_version_0_1_0(model)
    x, z = integers(5, k, low=-7, high=248, seed=2), integers(5, k, low=-200, high=55, seed=3)
    found = backend_of(model).run({"x": x, "z": z}, {"y": (5, n), "s": (5, n)})
    np.testing.assert_array_equal(found["y"], product(x, w))
    np.testing.assert_array_equal(found["s"], product(z, w))


@pytest.mark.parametrize("version", ["now", "0.1.0"])
def test_a_weight_that_no_integer_product_took(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias makes a Gemm in float32 of a two-dimensional MatMul, before ONNX Runtime looks for integers."""
    monkeypatch.setattr("transom.runtime.backends.ort.integer_sums", lambda: WIDENED)
    k, n = 64, 17
    w = weights(k, n, 1)
    text = f"g (float[R, {k}] x) => (float[R, {n}] y) {{ p = MatMul (x, W)  y = Add (p, bias) }}"
    model = graph_of(text, {"W": w, "bias": np.ones(n, np.float32)})
    quantize_static(model, find_linears(model), QuantizedWeights(8), {"x": Scale(1.0, 7)}, signed=False)
    if version == "0.1.0":
        as_version_0_1_0(model)
    x = integers(5, k, low=-7, high=248, seed=2)
    np.testing.assert_array_equal(backend_of(model).run({"x": x}, {"y": (5, n)})["y"], product(x, w) + 1)


def as_version_0_1_0(model: ir.Model) -> None:
    """Weights without zero points, and one initializer for all layers that share one."""
    for node in model.graph:
        name = str(node.inputs[0].name) if node.inputs[0] is not None else ""
        if node.op_type == "DequantizeLinear" and name.endswith(".int8"):
            node.resize_inputs(2)
            node.replace_input_with(0, model.graph.initializers["W.int8"])
