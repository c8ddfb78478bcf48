"""What quantised layers compute, by pencil: static and dynamic activations, weights in blocks."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from tiny_graphs import graph_of, normal, operators, run, weights_of
from transom.calib.quantized_weights import QuantizedWeights
from transom.calib.scales import Scale, block_scales, dequantize_blocks, quantize_blocks
from transom.export.passes.linear_layers import find_linears
from transom.export.passes.qdq_dynamic import quantize_dynamic
from transom.export.passes.qdq_static import quantize_static
from transom.export.passes.weight_only import quantize_weights
from transom.runtime.manifest_graphs import SIMULATED

# Values whose scales are powers of two, so that every result is exact: columns reach 127/64, 127/128 and 0.
W = [[127 / 64, -127 / 128, 0], [-0.5, 0.3, 0]]
W_INT8 = [[127, -127, 0], [-32, 38, 0]]  # 0.3 * 128 = 38.4
W_SCALES = [1 / 64, 1 / 128, 1]
TWICE = "g (float[R, 2] x, float[R, 2] z) => (float[R, 3] y, float[R, 3] w) { y = MatMul (x, W)  w = MatMul (z, W) }"
ONE = "one (float[R, 2] x) => (float[R, 3] y) { y = MatMul (x, W) }"


def static(model: ir.Model, scales: dict[str, Scale], signed: bool = False, skip: tuple[str, ...] = ()) -> ir.Model:
    linears = [linear for linear in find_linears(model) if linear.name not in skip]
    assert quantize_static(model, linears, QuantizedWeights(8), scales, signed=signed) == bool(linears)
    return model


def test_static_by_pencil() -> None:
    """x in steps of 0.5 is [2, -1.2] and [1.6, 4]: 4 1 and 4 6 around the zero point 2; [-9, 200] is clipped to 0 255.

    286 = 2 * 127 + 32 steps of 0.5 / 64; -292 = -2 * 127 - 38 steps of 0.5 / 128.
    """
    model = static(graph_of(ONE, {"W": W}), {"x": Scale(0.5, 2)})
    weights = weights_of(model)
    assert weights["W.int8"].tolist() == W_INT8
    assert weights["W.int8"].dtype == np.int8
    assert weights["W.scale"].tolist() == W_SCALES
    assert (weights["x.zero_point"].dtype, weights["x.zero_point"].tolist()) == (np.uint8, 2)
    assert "W" not in weights
    y = run(model, x=[[1.0, -0.6], [0.8, 2.0], [-9.0, 200.0]])["y"]
    assert (y[:2] * [128, 256, 1]).tolist() == [[286, -292, 0], [126, -102, 0]]
    assert y[2].tolist() == [(-2 * 127 - 253 * 32) / 128, (2 * 127 + 253 * 38) / 256, 0]


def test_signed_static_by_pencil() -> None:
    """In int8 around zero: -1.2 steps are -1, and -90 is clipped to -128."""
    model = static(graph_of(ONE, {"W": W}), {"x": Scale(0.5, 0)}, signed=True)
    weights = weights_of(model)
    assert (weights["x.zero_point"].dtype, weights["x.zero_point"].tolist()) == (np.int8, 0)
    y = run(model, x=[[1.0, -0.6], [0.8, 2.0], [-90.0, 0.0]], integers=SIMULATED)["y"]
    assert (y * [128, 256, 1]).tolist() == [[286, -292, 0], [126, -102, 0], [-128 * 127, 128 * 127, 0]]


@pytest.mark.parametrize(
    "node",
    [
        "y = Gemm (x, W, bias)",
        "y = Gemm <transB = 1> (x, V, bias)",
        "V_t = Transpose <perm = [1, 0]> (V)  p = MatMul (x, V_t)  y = Add (p, bias)",
        "W_t = Transpose <perm = [1, 0]> (W)  y = Gemm <transB = 1> (x, W_t, bias)",
    ],
)
@pytest.mark.parametrize("mode", ["static", "dynamic", "int8 blocks"])
def test_every_form_of_a_layer_computes_the_same(node: str, mode: str) -> None:
    """The weight transposed where it has to be, the bias added once, as the first form does."""
    expected, ours = (
        graph_of(
            f"g (float[R, 2] x) => (float[R, 3] y) {{ {form} }}", {"W": W, "V": np.transpose(W), "bias": [10, 20, 30]}
        )
        for form in ("p = MatMul (x, W)  y = Add (p, bias)", node)
    )
    for model in (expected, ours):
        match mode:
            case "static":
                static(model, {"x": Scale(0.5, 2)})
                bias = "Sub" if node.startswith(("y", "W")) and model is ours else "Add"  # of Gemm, negated
                assert operators(model) == {"QuantizeLinear": 1, "DequantizeLinear": 2, "MatMul": 1, bias: 1}
            case "dynamic":
                quantize_dynamic(model, find_linears(model), QuantizedWeights(8))
                assert (operators(model)["MatMul"], operators(model)["Gemm"]) == (1, 0)
            case _:
                quantize_weights(model, find_linears(model), QuantizedWeights(8), 8, 32)
                assert operators(model)["MatMulNBits"] == 1
    x = [[1.0, -0.6], [0.8, 2.0]]
    np.testing.assert_array_equal(run(ours, x=x)["y"], run(expected, x=x)["y"])


@pytest.mark.parametrize("shape", ["R", "R, S"])
def test_onnx_runtime_multiplies_integers_whatever_the_rank(shape: str, tmp_path: Path) -> None:
    """Of a two-dimensional MatMul and Add it would make a Gemm in FP32 before it looks at Q and DQ."""
    form = "y = Gemm (x, W, bias)" if shape == "R" else "p = MatMul (x, W)  y = Add (p, bias)"
    text = f"g (float[{shape}, 64] x) => (float[{shape}, 3] y) {{ {form} }}"
    model = static(graph_of(text, {"W": normal(64, 3), "bias": [1, 2, 3]}), {"x": Scale(0.05, 128)})
    run(model, tmp_path / "optimised.onnx", x=normal(*[2] * len(shape.split(",")), 64))
    counts = operators(tmp_path / "optimised.onnx")
    assert (counts["MatMulIntegerToFloat"], counts["MatMul"], counts["Gemm"]) == (1, 0, 0)


BLOCK = """
block (float[R, S, 4] x) => (float[R, S, 4] y, float[R, S, 4] n) {
    n = LayerNormalization <axis = -1> (x, gain, shift)
    q = MatMul (n, W_q)
    k = MatMul (n, W_k)
    v = MatMul (n, W_v)
    k_t = Transpose <perm = [0, 2, 1]> (k)
    scores = MatMul (q, k_t)
    shares = Softmax (scores)
    mixed = MatMul (shares, v)
    o = MatMul (mixed, W_o)
    y = Add (x, o)
}
"""


def block(seed: int = 0) -> ir.Model:
    """Self-attention of width 4 behind a LayerNormalization, and its residual Add."""
    weights = {f"W_{name}": normal(4, 4, seed=seed + index) for index, name in enumerate("qkvo")}
    return graph_of(BLOCK, weights | {"gain": np.ones(4), "shift": np.zeros(4)})


def test_one_pair_for_all_who_read_an_activation_and_nothing_behind_a_layer() -> None:
    """Two pairs, of n and mixed, and four weights; the products of activations and all else stay as they were."""
    scales = {"n": Scale(1 / 32, 128), "mixed": Scale(1 / 16, 128)}
    before, model = operators(block()), static(block(), scales)
    assert operators(model) == before + Counter({"QuantizeLinear": 2, "DequantizeLinear": 2 + 4})
    for node in model.graph:
        if node.op_type in ("Add", "LayerNormalization", "Softmax"):
            sources = [value.producer() for value in node.inputs if value is not None]
            assert not [source for source in sources if source is not None and source.op_type == "DequantizeLinear"]
        if node.op_type == "QuantizeLinear":
            assert node.inputs[0] is not None
            assert node.inputs[0].name in scales
    assert [value.name for value in model.graph.outputs] == ["y", "n"]
    x = normal(2, 3, 4, seed=9)
    np.testing.assert_array_equal(run(model, x=x)["n"], run(block(), x=x)["n"])  # the output is not rounded
    assert 0 < np.abs(run(model, x=x)["y"] - run(block(), x=x)["y"]).max() < 0.5


def test_layers_that_are_kept_read_what_they_read_before() -> None:
    model = static(block(), {"n": Scale(1 / 32, 128)}, skip=("v", "y"))
    by_name = {node.outputs[0].name: node for node in model.graph}
    assert [value.name for value in by_name["v"].inputs if value is not None] == ["n", "W_v"]
    assert [value.name for value in by_name["o"].inputs if value is not None] == ["mixed", "W_o"]
    assert operators(model)["QuantizeLinear"] == 1
    untouched = block()
    assert not quantize_static(untouched, [], QuantizedWeights(8), {}, signed=False)
    assert operators(untouched) == operators(block())


def test_layers_that_share_a_weight_have_its_integers_each() -> None:
    """For the CPU an initializer of its own, with zero points of 0; for TensorRT they share one, without."""
    model = static(graph_of(TWICE, {"W": W}), {"x": Scale(0.5, 2), "z": Scale(0.25, 0)})
    weights = weights_of(model)
    assert sorted(name for name in weights if name.startswith("W")) == [
        "W.2.int8", "W.2.int8_zero", "W.int8", "W.int8_zero", "W.scale"
    ]  # fmt: skip
    assert weights["W.int8"].tolist() == weights["W.2.int8"].tolist() == W_INT8
    assert (weights["W.int8_zero"].tolist(), weights["W.int8_zero"].dtype) == ([0, 0, 0], np.int8)
    signed = static(graph_of(TWICE, {"W": W}), {"x": Scale(0.5, 0), "z": Scale(0.25, 0)}, signed=True)
    assert sorted(name for name in weights_of(signed) if name.startswith("W")) == ["W.int8", "W.scale"]
    found = run(model, x=[[1.0, -0.6]], z=[[0.5, 0.0]])
    assert (found["y"] * [128, 256, 1]).tolist() == [[286, -292, 0]]
    assert (found["w"] * [256, 512, 1]).tolist() == [[254, -254, 0]]


def test_a_tied_table_keeps_its_other_reader() -> None:
    """The head is the transposed embedding: its integers are new, the table itself is still looked up."""
    text = """g (int64[R] ids, float[R, 2] x) => (float[R, 2] e, float[R, 3] y) {
        e = Gather (V, ids)  V_t = Transpose <perm = [1, 0]> (V)  y = MatMul (x, V_t)
    }"""
    model = static(graph_of(text, {"V": np.transpose(W)}), {"x": Scale(0.5, 2)})
    assert operators(model) == {"Gather": 1, "QuantizeLinear": 1, "DequantizeLinear": 2, "MatMul": 1}
    assert weights_of(model)["V"].shape == (3, 2)
    assert weights_of(model)["V.transposed.int8"].tolist() == W_INT8


def dynamic(model: ir.Model) -> ir.Model:
    assert quantize_dynamic(model, find_linears(model), QuantizedWeights(8))
    return model


def test_dynamic_by_pencil() -> None:
    """[2.54, -1] is [127, -50] steps of 0.02: 127 * 127 + 50 * 32 = 17729, -127 * 127 - 50 * 38 = -18029.

    A thousand times as much is a thousand times as much; a row of zeros is zeros.
    """
    rows = [[2.54, -1.0], [2540.0, -1000.0], [0.0, 0.0], [2.54e-9, -1e-9]]
    y = run(dynamic(graph_of(ONE, {"W": W})), x=rows)["y"]
    expected = np.array([17729 * 0.02 / 64, -18029 * 0.02 / 128, 0])
    np.testing.assert_allclose(y, expected * np.array([[1], [1000], [0], [1e-9]]), rtol=1e-6)
    assert y[2].tolist() == [0, 0, 0]


@pytest.mark.parametrize("louder", [10, 1000, 1e30])
def test_no_row_changes_another(louder: float) -> None:
    """Bit for bit: a row beside a louder one, beside padding, and alone."""
    model = dynamic(
        graph_of("g (float[B, S, 48] x) => (float[B, S, 40] y) { y = MatMul (x, W) }", {"W": normal(48, 40)})
    )
    x = normal(1, 5, 48, seed=1)
    alone = run(model, x=x)["y"]
    beside = run(model, x=np.concatenate([x * np.float32(louder), x]))["y"]
    np.testing.assert_array_equal(beside[1], alone[0])
    padded = run(model, x=np.concatenate([x, np.full((1, 3, 48), louder, np.float32)], axis=1))["y"]
    np.testing.assert_array_equal(padded[0, :5], alone[0])
    for row in range(5):
        np.testing.assert_array_equal(run(model, x=x[:, row : row + 1])["y"][0, 0], alone[0, row])


def test_dynamic_rows_are_quantised_once_for_all_who_read_them() -> None:
    model = dynamic(block())
    assert operators(model)["QuantizeLinear"] == 2
    assert operators(model)["ReduceMax"] == 2
    assert operators(model)["DequantizeLinear"] == 2 + 4
    x = normal(2, 3, 4, seed=9)
    assert 0 < np.abs(run(model, x=x)["y"] - run(block(), x=x)["y"]).max() < 0.5


def test_a_row_is_a_block_of_one_operator() -> None:
    """The scale is the largest magnitude over 127, the integers those of dividing by it first: ties and all.

    Activations with as many rows share their zero points; what a Relu gave is its own magnitude.
    """
    text = "g (float[B, S, 6] x) => (float[B, S, 5] y) { h = MatMul (x, W)  a = Relu (h)  y = MatMul (a, V) }"
    model = dynamic(graph_of(text, {"W": normal(6, 4), "V": normal(4, 5)}))
    counts = operators(model)
    assert (counts["QuantizeLinear"], counts["Expand"], counts["Abs"], counts["Div"]) == (2, 1, 1, 0)
    model.graph.outputs.append(next(node for node in model.graph if node.op_type == "QuantizeLinear").outputs[0])
    x = normal(3, 2, 6, seed=4)
    x[0, 0] = [127, 0.5, 1.5, -2.5, -0.5, 3]  # a scale of 1: halves go to even numbers
    quantized = run(model, x=x)["x.quantized"]
    scale = np.abs(x).max(axis=-1, keepdims=True) * np.float32(1 / 127)
    np.testing.assert_array_equal(quantized, (np.round(x / scale) + 128).astype(np.uint8))
    assert quantized[0, 0].tolist() == [255, 128, 130, 126, 128, 131]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("block_size", [32, 64])
def test_blocks_compute_with_the_dequantised_weight(bits: int, block_size: int) -> None:
    """K = 72 ends inside a block. Whole numbers up to 127 in each block: rounding rows to 8 bits changes nothing."""
    text = "g (float[R, 72] x) => (float[R, 24] y) { y = Gemm <transB = 1> (x, V, bias) }"
    kernel, bias = normal(72, 24), normal(24, seed=1)
    model = graph_of(text, {"V": kernel.T, "bias": bias})
    assert quantize_weights(model, find_linears(model), QuantizedWeights(bits), bits, block_size)
    assert operators(model) == {"MatMulNBits": 1}
    assert weights_of(model)[f"V.transposed.int{bits}"].shape == (24, -(-72 // block_size), block_size * bits // 8)
    scales = block_scales(kernel, bits, block_size)
    dequantized = dequantize_blocks(quantize_blocks(kernel, scales, bits, block_size), scales, bits, 72)
    x = np.random.default_rng(2).integers(-127, 127, (5, 72)).astype(np.float32)
    x[:, ::block_size] = 127
    y = run(model, x=x)["y"]
    np.testing.assert_allclose(y, x @ dequantized + bias, atol=1e-6 * float(np.abs(y).max()))
    assert np.abs(dequantized - kernel).max() < (0.02 if bits == 8 else 0.4)


def test_a_layer_in_blocks_keeps_the_add_behind_it() -> None:
    text = "g (float[R, 2] x) => (float[R, 3] y) { p = MatMul (x, W)  y = Add (p, bias) }"
    model = graph_of(text, {"W": W, "bias": [10, 20, 30]})
    quantize_weights(model, find_linears(model), QuantizedWeights(8), 8, 32)
    assert operators(model) == {"MatMulNBits": 1, "Add": 1}
    np.testing.assert_allclose(run(model, x=[[1.0, 0.0]])["y"], [[10 + 127 / 64, 20 - 127 / 128, 30]], atol=0.01)
