"""What the passes that make integers find: linear layers, tables of embeddings, further places."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tiny_graphs import graph_of, normal, operators, run, weights_of
from transom.calib.quantized_weights import QuantizedWeights
from transom.calib.scales import Scale
from transom.export.bundle_graphs import canonical_graphs
from transom.export.passes.fp16_embeddings import fp16_embeddings
from transom.export.passes.linear_layers import find_linears
from transom.export.passes.qdq_static import optional_sites, quantize_static
from transom.runtime.bundle import Bundle

W = [[127 / 64, -127 / 128, 0], [-0.5, 0.3, 0]]


def found(text: str, weights: dict[str, Any] | None = None) -> list[tuple[str, tuple[int, int]]]:
    return [(linear.name, linear.kernel_shape) for linear in find_linears(graph_of(text, weights))]


def test_each_kind_of_linear_layer_is_found() -> None:
    """Six layers of 2 inputs and 3 outputs, their weights stored as (2, 3) and as (3, 2)."""
    model = graph_of(
        """g (float[R, 2] x)
        => (float[R, 3] a, float[R, 3] b, float[R, 3] c, float[R, 3] d, float[R, 3] e, float[R, 3] f) {
            a = MatMul (x, W)
            V_t = Transpose <perm = [1, 0]> (V)
            b = MatMul (x, V_t)
            c = Gemm (x, W, bias)
            d = Gemm <transB = 1> (x, V, bias)
            e = Gemm (x, V_t)
            W_t = Transpose <perm = [1, 0]> (W)
            f = Gemm <transB = 1> (x, W_t)
        }""",
        {"W": W, "V": np.transpose(W), "bias": [1, 2, 3]},
        ["plain"],
    )
    linears = find_linears(model)
    assert [linear.name for linear in linears] == ["plain", "b", "c", "d", "e", "f"]
    assert [linear.stored_transposed for linear in linears] == [False, True, False, True, True, False]
    assert [linear.bias is not None for linear in linears] == [False, False, True, True, False, False]
    for linear in linears:
        np.testing.assert_array_equal(linear.kernel(), np.array(W, np.float32))
        assert linear.kernel_shape == (2, 3)


def test_a_layer_without_a_module_goes_by_the_name_behind_its_bias_and_names_differ() -> None:
    text = "g (float[R, 2] x) => (float[R, 3] y) { p = MatMul (x, W)  y = Add (p, bias) }"
    model = graph_of(text, {"W": W, "bias": [1, 2, 3]})
    assert [linear.name for linear in find_linears(model)] == ["y"]
    twice = (
        "g (float[R, 2] x, float[R, 2] z) => (float[R, 3] y, float[R, 3] w) { y = MatMul (x, W)  w = MatMul (z, W) }"
    )
    model = graph_of(twice, {"W": W}, ["head", "head"])
    assert [linear.name for linear in find_linears(model)] == ["head", "head:w"]


@pytest.mark.parametrize(
    "text",
    [
        "g (float[2, 2] x, float[2, 3] z) => (float[2, 3] y) { y = MatMul (x, z) }",  # two activations
        "g (float[2, 3] x) => (float[2, 3] y) { y = MatMul (Q, x) }",  # the weight in front
        "g (float[2, 3] x) => (float[2, 3] y, float[2, 3] z) { z = Relu (x)  y = MatMul (Q, W) }",  # two weights
        "g (float[2, 3] x) => (float[2, 3] y) { y = Add (x, W) }",
        "g (float[2, 2] x) => (float[2, 3] y) { y = Gemm <alpha = 0.5> (x, W) }",
        "g (float[2, 2] x) => (float[2, 3] y) { y = Gemm <beta = 2.0> (x, W, bias) }",
        "g (float[2, 2] x) => (float[2, 3] y) { y = Gemm <transA = 1> (x, W) }",
        "g (float[2, 2] x) => (float[2] y) { y = MatMul (x, vector) }",
        "g (float[5, 2, 2] x) => (float[5, 2, 2] y) { y = MatMul (x, batch) }",  # a matrix for each of five
        "g (float[2, 1, 4, 4] x) => (float[2, 3, 2, 2] y) { y = Conv <strides = [2, 2]> (x, patches) }",
    ],
)
def test_everything_else_is_no_linear_layer(text: str) -> None:
    weights = {"W": W, "Q": np.eye(2), "bias": [1, 2, 3], "vector": [1, 2], "batch": np.ones((5, 2, 2))}
    assert found(text, weights | {"patches": np.ones((3, 1, 2, 2))}) == []


def test_layers_of_the_reference_models_are_all_found(
    exported: Callable[..., tuple[Path, Path]],
    vit_bundle: Path,
    gpt_bundle: Path,
    dates_bundle: Path,
    clip_bundle: Path,
) -> None:
    """A block has query, key, value, output and two of its MLP; GPT's first three are one; a decoder's crosses too.

    BERT of three blocks: 18, and of the masked-language head the transform and the tied decoder. The cross-attention
    of the Transformer's two decoder layers takes keys and values from caches, which the encoder's graph fills.
    """
    bundles = {"bert": exported("BertForMaskedLM")[1], "vit": vit_bundle, "gpt": gpt_bundle}
    bundles |= {"transformer": dates_bundle, "clip": clip_bundle}
    counts = {
        name: {graph: len(find_linears(model)) for graph, model in canonical_graphs(Bundle(bundle)).items()}
        for name, bundle in bundles.items()
    }
    assert counts == {
        "bert": {"model": 3 * 6 + 2},
        "vit": {"model": 3 * 6 + 1},
        "gpt": {"decoder": 4 * 4 + 1},
        "transformer": {"encoder": 2 * 6 + 2 * 2, "decoder": 2 * 8 + 1},
        "clip": {"image": 3 * 6 + 1, "text": 2 * 6 + 1},
    }


EMBEDDING = """
g (int64[R] ids) => (float[R, 2] rows, float[R, 2] y) {
    rows = Gather (table, ids)
    p = Gather (positions, ids)
    y = Add (rows, p)
}
"""


def test_embeddings_are_halved_where_they_are_only_looked_up() -> None:
    """A third needs 11 bits more than FP16 has; 70,000 is beyond it, so that table stays."""
    table = [[1 / 3, 2.0], [0.1, -1.0]]
    model = graph_of(EMBEDDING, {"table": table, "positions": [[0.0, 7e4], [0.0, 0.0]]})
    assert fp16_embeddings(model)
    weights = weights_of(model)
    assert (weights["table"].dtype, weights["positions"].dtype) == (np.float16, np.float32)
    assert operators(model) == {"Gather": 2, "Cast": 1, "Add": 1}
    found = run_ids(model, [1, 0])
    halves = np.array(table, np.float16).astype(np.float32)
    assert found["rows"].tolist() == halves[::-1].tolist()
    assert found["y"].tolist() == (halves[::-1] + np.array([[0, 0], [0, 7e4]], np.float32)).tolist()
    assert not fp16_embeddings(graph_of("g (float[R, 2] x) => (float[R, 3] y) { y = MatMul (x, W) }", {"W": W}))


def run_ids(model: ir.Model, ids: list[int]) -> dict[str, Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"ids": np.array(ids)}), strict=True))


def test_a_table_that_a_layer_multiplies_by_is_not_halved() -> None:
    text = """g (int64[R] ids) => (float[R, 3] y) {
        e = Gather (V, ids)  V_t = Transpose <perm = [1, 0]> (V)  y = MatMul (e, V_t)
    }"""
    model = graph_of(text, {"V": np.transpose(W)})
    assert not fp16_embeddings(model)
    assert weights_of(model)["V"].dtype == np.float32
    columns = graph_of("g (int64[R] ids) => (float[2, R] y) { y = Gather <axis = 1> (W, ids) }", {"W": W})
    assert not fp16_embeddings(columns)


ATTENTION = """
g (float[B, S, 4] x) => (float[B, S, 4] y) {
    q = MatMul (x, W_q)
    a = Attention <q_num_heads = 2, kv_num_heads = 2> (q, x, x)
    o = MatMul (a, W_o)
    biased = Add (o, bias)
    summed = Add (x, biased)
    both = Add (summed, biased)
    shifted = Add (both, table)
    computed = Relu (table)
    y = Add (shifted, computed)
}
"""


def test_further_places_are_those_that_were_asked_for() -> None:
    """The operands of attention; Adds of two activations, not of a bias, a table, computed or not, nor an input."""
    weights = {"W_q": normal(4, 4), "W_o": normal(4, 4, seed=1), "bias": np.ones(4), "table": np.ones((1, 1, 4))}

    def sites(*extras: str) -> list[tuple[str, int]]:
        model = graph_of(ATTENTION, weights)
        return [(str(node.outputs[0].name), index) for node, index in optional_sites(model, extras)]

    assert sites() == []
    assert sites("attention") == [("a", 0), ("a", 1), ("a", 2)]
    assert sites("residual") == [("both", 0), ("both", 1)]
    model = graph_of(ATTENTION, weights)
    scales = {name: Scale(1 / 16, 128) for name in ("x", "q", "a", "summed", "biased")}
    linears, sites = find_linears(model), optional_sites(model, ("attention", "residual"))
    assert quantize_static(model, linears, QuantizedWeights(8), scales, signed=False, sites=sites)
    assert operators(model)["QuantizeLinear"] == 5
    read = {node.outputs[0].name: [value.name for value in node.inputs if value is not None] for node in model.graph}
    assert read["both"] == ["summed.dequantized", "biased.dequantized"]
    assert read["a"] == ["q.dequantized", "x.dequantized", "x.dequantized"]
    assert read["summed"] == ["x", "biased"]
    assert np.isfinite(run(model, x=normal(1, 3, 4))["y"]).all()
