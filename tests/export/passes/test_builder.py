"""Weights that passes write into a graph: one of a name is shared only where its contents are the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from tiny_graphs import graph_of, normal, run, weights_of
from transom.calib.quantized_weights import QuantizedWeights
from transom.calib.scales import Scale
from transom.export.passes._builder import NodeBuilder
from transom.export.passes.layer_switches import SWITCHES, add_layer_switches
from transom.export.passes.linear_layers import find_linears
from transom.export.passes.qdq_static import quantize_static
from transom.export.passes.smoothquant import fold_smoothing

NAN = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)  # two NaNs of different bits


def builder() -> tuple[ir.Model, NodeBuilder]:
    model = graph_of("g (float[2] x) => (float[2] y) { y = Add (x, w) }", {"w": [1.0, 2.0]})
    return model, NodeBuilder(model.graph, model.graph[0])


def test_the_same_weight_is_made_once() -> None:
    model, new = builder()
    first = new.weight("scale", np.array([3.0], np.float32))
    assert new.weight("scale", np.array([3.0], np.float32)) is first
    assert new.weight("w", np.array([1.0, 2.0], np.float32)) is model.graph.initializers["w"]
    assert sorted(model.graph.initializers) == ["scale", "w"]


@pytest.mark.parametrize(
    "other",
    [
        np.array([1.0, 3.0], np.float32),
        np.array([1.0, 2.0], np.float64),
        np.array([1.0, 2.0], np.float32).view(np.int32),
        np.array([[1.0, 2.0]], np.float32),
        np.array([1.0], np.float32),
        np.array([1.0, 2.0], np.float16),
    ],
    ids=["numbers", "float64", "bits of int32", "shape", "length", "half"],
)
def test_another_weight_of_that_name_is_another_weight(other: Any) -> None:
    model, new = builder()
    made = new.weight("w", other)
    assert made is new.weight("w", other)
    assert made.name == "w.2"
    found = weights_of(model)
    np.testing.assert_array_equal(found["w.2"], other)
    assert (found["w.2"].dtype, found["w.2"].shape) == (other.dtype, other.shape)
    np.testing.assert_array_equal(found["w"], np.array([1.0, 2.0], np.float32))
    assert new.weight("w", np.array([9.0], np.float32)).name == "w.3"


def test_zeros_of_either_sign_and_nans_are_compared_by_their_bits() -> None:
    _, new = builder()
    zero = new.weight("zero", np.array([0.0], np.float32))
    assert new.weight("zero", np.array([-0.0], np.float32)) is not zero
    first = new.weight("nan", NAN[:1])
    assert new.weight("nan", NAN[:1]) is first
    assert new.weight("nan", NAN[1:]) is not first


def test_layers_whose_weights_have_names_that_run_together() -> None:
    """``a`` behind the tensor ``b.c`` and ``a.b`` behind ``c``: each smoothed weight is called ``a.b.c``."""
    text = """g (float[3, 2] x) => (float[3, 2] p, float[3, 2] q) {
        b.c = Relu (x)
        c = Neg (x)
        p = MatMul (b.c, a)
        q = MatMul (c, a.b)
    }"""
    weights = {"a": normal(2, 2), "a.b": normal(2, 2, seed=1)}
    model = renamed(text, weights)
    feeds = {"x": normal(3, 2, seed=2)}
    expected = run(model.clone(), **feeds)
    factors = {"b.c": np.array([2, 0.5], np.float32), "c": np.array([0.25, 4], np.float32)}
    assert fold_smoothing(model, factors)
    found = run(model, **feeds)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-6)


def renamed(text: str, weights: dict[str, Any]) -> ir.Model:
    """The graph of ``text`` with the names that ONNX's textual form cannot spell."""
    plain = {"b.c": "b_c", "a.b": "a_b"}
    for name, spelled in plain.items():
        text = text.replace(name, spelled)
    model = graph_of(text, {plain.get(name, name): array for name, array in weights.items()})
    for value in [*model.graph.initializers.values(), *(out for node in model.graph for out in node.outputs)]:
        value.name = {spelled: name for name, spelled in plain.items()}.get(str(value.name), value.name)
    return model


def with_transposed() -> ir.Model:
    """A layer that reads ``w`` transposed, and one whose own weight is called ``w.transposed``."""
    text = """g (float[3, 2] x) => (float[3, 2] p, float[3, 2] q) {
        p = Gemm <transB = 1> (x, w)
        q = MatMul (x, w_transposed)
    }"""
    model = graph_of(text, {"w": normal(2, 2), "w_transposed": normal(2, 2, seed=1)})
    model.graph.initializers["w_transposed"].name = "w.transposed"
    return model


@pytest.mark.parametrize("signed", [True, False])
def test_a_weight_that_is_called_as_another_one_transposed(signed: bool) -> None:
    model = with_transposed()
    feeds = {"x": normal(3, 2, seed=2)}
    expected = run(model.clone(), **feeds)
    scale = Scale(4 / 127, 0 if signed else 128)
    quantize_static(model, find_linears(model), QuantizedWeights(8), {"x": scale}, signed=signed)
    found = run(model, integers="simulated", **feeds)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=0.1)


def test_a_weight_that_is_read_both_ways_round_is_two() -> None:
    text = "g (float[3, 2] x) => (float[3, 2] p, float[3, 2] q) { p = MatMul (x, w)  q = Gemm <transB = 1> (x, w) }"
    weights = QuantizedWeights(8)
    plain, turned_round = (weights.int8(linear)[0] for linear in find_linears(graph_of(text, {"w": normal(2, 2)})))
    assert plain.tolist() != turned_round.tolist()


def test_weights_of_one_name_in_two_graphs_are_not_mixed() -> None:
    weights = QuantizedWeights(8)
    text = "g (float[3, 2] x) => (float[3, 2] y) { y = MatMul (x, w) }"
    for factor in (1, 2):
        (linear,) = find_linears(graph_of(text, {"w": factor * np.array([[127.0, 1], [-2, 127]])}))
        _, scales = weights.int8(linear)
        np.testing.assert_allclose(scales, [factor, factor])


def test_fp32_weights_are_those_of_their_layer() -> None:
    fp32 = with_transposed()
    model = fp32.clone()
    quantize_static(model, find_linears(model), QuantizedWeights(8), {"x": Scale(4 / 127, 0)}, signed=True)
    layers = add_layer_switches(model, fp32)
    feeds = {"x": normal(3, 2, seed=2)}
    expected = run(fp32, **feeds)
    proto = ir.to_proto(model)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(["p", "q"], {**feeds, SWITCHES: np.ones(len(layers), np.int64)})
    for values, name in zip(found, ("p", "q"), strict=True):
        np.testing.assert_allclose(values, expected[name], rtol=1e-5)
