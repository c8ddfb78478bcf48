"""Outliers moved into the weights: the function stays, what else reads an activation sees it as before."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tiny_graphs import Float, graph_of, histogram_of, normal, operators, relative_error, run, weights_of
from transom.calib.quantized_weights import QuantizedWeights
from transom.calib.scales import Scale, activation_scale, clip_range
from transom.calib.smoothquant import smoothing_factors
from transom.export.passes.linear_layers import find_linears
from transom.export.passes.qdq_static import quantize_static
from transom.export.passes.smoothquant import find_smoothquant_sites, fold_smoothing

WIDTH = 8
FACTORS = np.array([4, 0.5, 3, 1, 1, 0.3, 60, 2], np.float32)

PRE_NORM = """
pre (float[R, S, 8] x) => (float[R, S, 8] y) {
    n = LayerNormalization <axis = -1> (x, gain, shift)
    a = MatMul (n, W_a)
    b = Gemm_form
    p = Add (a, b)
    y = Add (x, p)
}
"""
POST_NORM = """
post (float[R, S, 8] x) => (float[R, S, 8] n, float[R, S, 8] y) {
    n = LayerNormalization <axis = -1> (x, gain, shift)
    a = MatMul (n, W_a)
    y = Add (n, a)
}
"""


def weights() -> dict[str, Any]:
    found: dict[str, Any] = {f"W_{name}": normal(WIDTH, WIDTH, seed=index) for index, name in enumerate("abcd")}
    return found | {"gain": 1 + 0.1 * normal(WIDTH, seed=7), "shift": normal(WIDTH, seed=8)}


def graph(text: str, **more: Any) -> ir.Model:
    return graph_of(text.replace("Gemm_form", "MatMul (n, W_b)"), weights() | more)


def assert_same_function(text: str, smoothed: dict[str, Float], **more: Any) -> ir.Model:
    """Fold, and compare all outputs at six positions; returns the folded graph."""
    exact, model = graph(text, **more), graph(text, **more)
    assert fold_smoothing(model, smoothed)
    feeds = {value.name: normal(2, 3, WIDTH, seed=20 + i) for i, value in enumerate(model.graph.inputs)}
    theirs, ours = run(exact, **feeds), run(model, **feeds)  # type: ignore[arg-type]
    for name, expected in theirs.items():
        np.testing.assert_allclose(ours[name], expected, atol=1e-6 * float(np.abs(expected).max()), err_msg=name)
    return model


def test_pre_norm_takes_its_factors_for_nothing() -> None:
    model = assert_same_function(PRE_NORM, {"n": FACTORS})
    assert operators(model) == operators(graph(PRE_NORM))
    found = weights_of(model)
    np.testing.assert_array_equal(found["gain.n"], weights()["gain"].astype(np.float32) / FACTORS)
    np.testing.assert_array_equal(found["shift.n"], weights()["shift"] / FACTORS)
    np.testing.assert_array_equal(found["W_a.n"], weights()["W_a"] * FACTORS[:, None])
    assert not {"gain", "shift", "W_a", "W_b"} & {*found}


def test_post_norm_gets_one_mul_and_the_residual_stream_stays() -> None:
    model = assert_same_function(POST_NORM, {"n": FACTORS})
    assert operators(model) == operators(graph(POST_NORM)) + Counter(Mul=1)
    x = normal(2, 3, WIDTH, seed=3)
    np.testing.assert_array_equal(run(model, x=x)["n"], run(graph(POST_NORM), x=x)["n"])


def test_a_norm_that_is_an_output_or_feeds_anything_else_keeps_its_values() -> None:
    """Of three norms only the one that linear layers alone read is free."""
    text = """g (float[R, S, 8] x) => (float[R, S, 8] n, float[R, S, 8] y) {
        n = LayerNormalization <axis = -1> (x, gain, shift)
        m = LayerNormalization <axis = -1> (x, gain_m, shift)
        k = LayerNormalization <axis = -1> (x, gain_k)
        a = MatMul (n, W_a)  b = MatMul (m, W_b)  c = MatMul (k, W_c)
        active = Tanh (m)
        p = Add (a, b)  q = Add (p, c)  y = Add (q, active)
    }"""
    more = {"gain_m": normal(WIDTH, seed=30), "gain_k": normal(WIDTH, seed=31)}
    model = assert_same_function(text, {"n": FACTORS, "m": FACTORS, "k": FACTORS}, **more)
    assert operators(model)["Mul"] == 2
    assert [site.name for site in find_smoothquant_sites(graph(text, **more)) if site.norm is not None] == ["k"]


def test_norms_that_share_a_gain_are_divided_apart() -> None:
    """One initializer, two norms: each has factors of its own, and one that has none goes on with the old gain."""
    text = """g (float[R, S, 8] x, float[R, S, 8] z) => (float[R, S, 8] y, float[R, S, 8] w, float[R, S, 8] v) {
        n = LayerNormalization <axis = -1> (x, gain, shift)
        m = LayerNormalization <axis = -1> (z, gain, shift)
        k = LayerNormalization <axis = -1> (z, gain, shift)
        y = MatMul (n, W_a)  w = MatMul (m, W_a)  v = MatMul (k, W_b)
    }"""
    model = assert_same_function(text, {"n": FACTORS, "m": FACTORS[::-1].copy()})
    assert {"gain", "gain.n", "gain.m", "W_a.n", "W_a.m"} <= {*weights_of(model)}
    assert operators(model)["Mul"] == 0


def test_a_weight_that_others_read_stays_theirs() -> None:
    """W_a multiplies the graph's input, too."""
    text = """g (float[R, S, 8] x) => (float[R, S, 8] y) {
        n = LayerNormalization <axis = -1> (x, gain, shift)
        a = MatMul (n, W_a)  b = MatMul (x, W_a)  y = Add (a, b)
    }"""
    assert {"W_a", "W_a.n"} <= {*weights_of(assert_same_function(text, {"n": FACTORS}))}


@pytest.mark.parametrize(
    "form",
    [
        "y = Gemm <transB = 1> (n, V, bias)",
        "y = Gemm (n, U, bias)",
        "V_t = Transpose <perm = [1, 0]> (V)  y = MatMul (n, V_t)",
        "V_t = Transpose <perm = [1, 0]> (V)  y = Gemm (n, V_t, bias)",
        "U_t = Transpose <perm = [1, 0]> (U)  y = Gemm <transB = 1> (n, U_t)",
        "V_t = Transpose <perm = [1, 0]> (V)  a = MatMul (n, V_t)  b = Gemm <transB = 1> (n, V)  y = Add (a, b)",
    ],
)
def test_a_weight_lies_as_its_layer_reads_it(form: str) -> None:
    """8 inputs and 5 outputs."""
    text = f"g (float[6, 8] x) => (float[6, 5] y) {{ n = LayerNormalization <axis = -1> (x, gain, shift) {form} }}"
    kernel = normal(WIDTH, 5, seed=9)
    more = {"U": kernel, "V": kernel.T, "bias": normal(5)}
    exact, model = graph(text, **more), graph(text, **more)
    assert fold_smoothing(model, {"n": FACTORS})
    x = normal(6, WIDTH, seed=2)
    np.testing.assert_allclose(run(model, x=x)["y"], run(exact, x=x)["y"], rtol=1e-5, atol=1e-5)
    for linear in find_linears(model):
        np.testing.assert_array_equal(linear.kernel(), kernel * FACTORS[:, None])


def test_activations_behind_no_norm_get_a_mul() -> None:
    text = """g (float[R, S, 8] x) => (float[R, S, 8] y) {
        h = Relu (x)  a = MatMul (h, W_a)  b = MatMul (h, W_b)  y = Add (a, b)
    }"""
    assert operators(assert_same_function(text, {"h": FACTORS}))["Mul"] == 1


def test_no_factors_change_nothing() -> None:
    model = graph(PRE_NORM)
    assert not fold_smoothing(model, {})
    assert not fold_smoothing(model, {"y": FACTORS})  # no linear layer reads it
    assert {"gain", "shift", "W_a", "W_b"} <= {*weights_of(model)}


def minmax(model: ir.Model, x: Float) -> Scale:
    """The scale of n over everything it is on x."""
    instrumented = model.clone()
    instrumented.graph.outputs.append(
        next(node.outputs[0] for node in instrumented.graph if node.outputs[0].name == "n")
    )
    low, high = clip_range(histogram_of(run(instrumented, x=x)["n"]), "minmax", symmetric=False)
    return activation_scale(low, high, signed=False)


def quantized_error(model: ir.Model, x: Float, exact: Float) -> float:
    scales = {"n": minmax(model, x)}
    quantize_static(model, find_linears(model), QuantizedWeights(8), scales, signed=False)
    return relative_error(run(model, x=x)["y"], exact)


def test_outlier_channels_that_fail_hold_when_smoothed() -> None:
    """Three channels sixty times as loud, and weights that undo it: 60 / 127 of a step for everyone else's values."""
    width = 64
    loud = np.ones(width, np.float32)
    loud[[3, 20, 41]] = 60
    kernel = normal(width, 32) / loud[:, None]
    text = """g (float[R, 64] x) => (float[R, 32] y) {
        n = LayerNormalization <axis = -1> (x, gain, shift)  y = MatMul (n, W)
    }"""
    given = {"gain": loud, "shift": np.zeros(width), "W": kernel}
    x = normal(200, width, seed=1)
    exact = run(graph_of(text, given), x=x)["y"]
    assert quantized_error(graph_of(text, given), x, exact) > 0.1
    smoothed = graph_of(text, given)
    fold_smoothing(smoothed, {"n": smoothing_factors(3 * loud, [kernel], 0.5)})
    assert quantized_error(smoothed, x, exact) < 0.03
