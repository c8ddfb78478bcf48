"""Convolutions: which are quantised, and what is computed of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tiny_graphs import Float, graph_of, normal, operators, run, weights_of
from transom.calib.quantized_weights import QuantizedWeights
from transom.calib.scales import Scale
from transom.export.passes.convolutions import find_convolutions, find_layers
from transom.export.passes.layer_switches import SWITCHES, add_layer_switches
from transom.export.passes.qdq_static import quantize_static
from transom.export.quantization.options import QuantizationConfig
from transom.export.quantization.quantizer import calibrated_tensors, quantized_layers
from transom.runtime.backends.integer_sums import U8U8
from transom.runtime.manifest_graphs import SIMULATED


def convolution(
    outputs: int, inputs: int, *sides: int, attributes: str = "", groups: int = 1, bias: bool = False
) -> ir.Model:
    """A Conv of an image of ``inputs * groups`` channels; its weight is drawn, its module called "conv"."""
    image = ", ".join(["B", str(inputs * groups), *("8" for _ in sides)])
    extra = f"group = {groups}" + (f", {attributes}" if attributes else "")
    text = f"g (float[{image}] x) => (float[B, {outputs}, R{', S' * (len(sides) - 1)}] y)"
    weights: dict[str, Any] = {"W": normal(outputs, inputs, *sides)} | ({"b": normal(outputs, seed=1)} if bias else {})
    return graph_of(f"{text} {{ y = Conv <{extra}> (x, W{', b' if bias else ''}) }}", weights, ["conv"])


@pytest.mark.parametrize(
    ("outputs", "inputs", "sides", "attributes", "gains"),
    [
        # C / groups * O * height * width multiply-adds for C * stride ** 2 + O values
        (32, 32, (3, 3), "", True),  # 9216 for 64: 144
        (256, 64, (1, 1), "", False),  # 16384 for 320: 51
        (128, 128, (1, 1), "", True),  # 16384 for 256: 64, the least
        (127, 128, (1, 1), "", False),  # 16256 for 255: 63.7
        (512, 256, (1, 1), "", True),  # 131072 for 768: 171
        (512, 256, (1, 1), "strides = [2, 2]", True),  # 131072 for 1536: 85
        (256, 128, (1, 1), "strides = [2, 2]", False),  # 32768 for 768: 43
        (64, 31, (3, 3), "", False),  # 31 channels
        (64, 3, (7, 7), "strides = [2, 2]", False),  # the stem of a ResNet: three channels
        (768, 3, (16, 16), "strides = [16, 16]", False),  # ViT's patches
        (64, 32, (9,), "", False),  # of a sequence
    ],
)
def test_the_rule(outputs: int, inputs: int, sides: tuple[int, ...], attributes: str, gains: bool) -> None:
    found = find_convolutions(convolution(outputs, inputs, *sides, attributes=attributes))
    assert [layer.name for layer in found] == (["conv"] if gains else [])


@pytest.mark.parametrize(("inputs", "gains"), [(32, True), (16, False)])
def test_channels_are_counted_in_a_group(inputs: int, gains: bool) -> None:
    """Two groups of 32, 64 outputs: 18432 multiply-adds for 64 + 64 values."""
    assert bool(find_convolutions(convolution(64, inputs, 3, 3, groups=2))) == gains


def test_layers_come_in_the_order_of_the_graph_under_names_of_their_own() -> None:
    text = """g (float[B, 32, 8, 8] x, float[B, 4] z) => (float[B, 32, 6, 6] y, float[B, 4] m, float[B, 32, 4, 4] w) {
        y = Conv (x, W)  m = MatMul (z, V)  w = Conv (y, W)
    }"""
    model = graph_of(text, {"W": normal(32, 32, 3, 3), "V": normal(4, 4)}, ["both", "both", "both"])
    assert [(layer.name, layer.kernel_shape) for layer in find_layers(model)] == [
        ("both:y", (288, 32)),
        ("both", (4, 4)),
        ("both:w", (288, 32)),
    ]


def small(seed: int = 0) -> tuple[ir.Model, Float]:
    """A 3x3 convolution of 32 channels to 64 whose weights are their own integers, a bias, and an image of integers."""
    rng = np.random.default_rng(seed)
    weight = rng.integers(-127, 128, (64, 32, 3, 3)).astype(np.float32)
    weight[:, 0, 0, 0] = 127
    bias = rng.integers(-500, 501, 64).astype(np.float32)
    text = """g (float[B, 32, 5, 5] x) => (float[B, 64, 3, 3] y) {
        y = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (x, W, b)
    }"""
    return graph_of(text, {"W": weight, "b": bias}, ["conv"]), rng.integers(-100, 156, (3, 32, 5, 5)).astype(np.float32)


def quantized(model: ir.Model, scales: Mapping[str, Scale], *, signed: bool) -> ir.Model:
    assert quantize_static(model, find_layers(model), QuantizedWeights(8), scales, signed=signed)
    return model


STEP = 2.0**13  # of the result: coarse, and the sums are exact


def test_for_the_cpu_a_convolution_is_one_of_integers(tmp_path: Path) -> None:
    """Its sums are those of FP32 up to the step of its result, at the border too, where padding counts as zero."""
    model, x = small()
    expected = run(model, x=x)["y"]
    scales = {"x": Scale(1.0, 100), "y": Scale(STEP, 128)}
    found = run(quantized(model, scales, signed=False), tmp_path / "optimised.onnx", x=x)["y"]
    np.testing.assert_array_equal(found, np.clip(np.rint(expected / STEP), -128, 127) * STEP)
    assert np.ptp(found) > 10 * STEP
    counts = operators(tmp_path / "optimised.onnx")
    assert (counts["QLinearConv"], counts["Conv"]) == (1, 0)
    weights = weights_of(model)
    assert (weights["W.int8"].shape, weights["W.scale"].tolist()) == ((64, 32, 3, 3), [1.0] * 64)
    assert "W" not in weights


def test_for_tensorrt_nothing_stands_behind_a_convolution() -> None:
    model, x = small()
    x = x.clip(-127, 127)
    expected = run(model, x=x)["y"]
    np.testing.assert_array_equal(
        run(quantized(model, {"x": Scale(1.0, 0)}, signed=True), integers=SIMULATED, x=x)["y"], expected
    )
    assert operators(model) == {"QuantizeLinear": 1, "DequantizeLinear": 2, "Conv": 1}


def test_sums_are_exact_on_every_processor() -> None:
    """Pairs of products at their largest, which saturate on x86 without VNNI unless something is done about it."""
    model = graph_of(
        "g (float[B, 32, 4, 4] x) => (float[B, 32, 4, 4] y) { y = Conv <pads = [1, 1, 1, 1]> (x, W) }",
        {"W": np.full((32, 32, 3, 3), 127) * np.where(np.arange(32) % 2, -1, 1)[:, None, None, None]},
    )
    largest = 255.0 * 127 * 32 * 9
    step = largest / 127
    scales = {"x": Scale(1.0, 0), "y": Scale(step, 128)}
    y = run(quantized(model, scales, signed=False), x=np.full((2, 32, 4, 4), 255.0))["y"]
    taps = np.outer([2, 3, 3, 2], [2, 3, 3, 2]) / 9  # of the window that lie in the image
    signs = np.where(np.arange(32) % 2, -1, 1)[:, None, None]
    np.testing.assert_allclose(y, np.broadcast_to(np.rint(signs * taps * 127) * step, y.shape), rtol=1e-6)


@pytest.mark.parametrize("bits", [8, 7])
def test_a_bias_beyond_int32_in_steps_of_its_channel_is_kept(bits: int) -> None:
    """Weights that batch normalisation made small beside their bias: 4e9 steps of 2 ** -24, and as many below zero."""
    weight = normal(64, 32, 3, 3)
    weight[::2] *= 1e-7
    bias = np.where(np.arange(64) % 4, 250.0, -250.0)
    model = graph_of(
        "g (float[B, 32, 5, 5] x) => (float[B, 64, 5, 5] y) { y = Conv <pads = [1, 1, 1, 1]> (x, W, b) }",
        {"W": weight, "b": bias},
    )
    x = np.asarray(normal(2, 32, 5, 5, seed=2), np.float32)
    scales = {"x": Scale(1 / 32, 128), "y": Scale(4.0, 128)}
    expected = run(model.clone(), x=x)["y"]
    assert quantize_static(model, find_layers(model), QuantizedWeights(bits), scales, signed=False)
    found = run(model, x=x)["y"]
    np.testing.assert_allclose(found[:, ::2], expected[:, ::2], atol=2.01)  # half a step of the result
    np.testing.assert_allclose(found[:, 1::2], expected[:, 1::2], atol=8)


def test_rows_do_not_depend_on_their_neighbours() -> None:
    model, x = small()
    model = quantized(model, {"x": Scale(1.0, 100), "y": Scale(64.0, 128)}, signed=False)
    together = run(model, x=x)["y"]
    for row in range(len(x)):
        np.testing.assert_array_equal(run(model, x=x[row : row + 1])["y"][0], together[row])


def test_a_convolution_is_switched_to_fp32_while_the_graph_runs() -> None:
    model, x = small()
    fp32 = model.clone()
    shipped = quantized(model, {"x": Scale(1.0, 100), "y": Scale(STEP, 128)}, signed=False)
    coarse, exact = run(shipped, x=x)["y"], run(fp32, x=x)["y"]
    assert add_layer_switches(shipped, fp32) == ["conv"]
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(U8U8, "1")  # exact sums on every processor, as ``run`` has them
    session = onnxruntime.InferenceSession(ir.to_proto(shipped).SerializeToString(), options)
    for switch, expected in ((0, coarse), (1, exact)):
        (found,) = session.run(None, {"x": x, SWITCHES: np.array([switch])})
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_convolution_that_ships_in_fp32_has_no_switch() -> None:
    model, _ = small()
    assert add_layer_switches(model.clone(), model) == []


@pytest.mark.parametrize(("mode", "expected"), [("static", ["x", "y"]), ("dynamic", ["x", "y"]), ("none", [])])
def test_activations_and_results_are_calibrated_but_for_weights_alone(mode: str, expected: list[str]) -> None:
    model, _ = small()
    config = QuantizationConfig({"g": mode})
    assert calibrated_tensors(model, config, "g") == expected
    assert [layer.name for layer in quantized_layers(model, config, "g")] == (["conv"] if expected else [])
