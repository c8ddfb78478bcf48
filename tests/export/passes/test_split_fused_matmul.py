"""Integer products that are cut into parts: a product for each part, of the same integers; and what is left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tiny_graphs import graph_of, normal, operators, run, weights_of
from transom.export.passes.split_fused_matmul import split_fused_matmul
from transom.runtime.manifest_graphs import SIMULATED

# Query, key and value of three channels each, in one product of rows of four numbers.
CUT = """
g (float[B, S, 4] x) => (float[B, S, 3] q, float[B, S, 3] k, float[B, S, 3] v) <WEIGHTS> {
    x_int = QuantizeLinear (x, x_scale, zero)
    x_deq = DequantizeLinear (x_int, x_scale, zero)
    W_deq = DequantizeLinear <axis = 1> (W, scale)
    p = MatMul (x_deq, W_deq)
    s = Add (p, bias)
    q, k, v = Split <axis = 2, num_outputs = 3> (s)
}
"""
WEIGHTS: dict[str, Any] = {
    "x_scale": np.float32(1 / 32),
    "zero": np.int8(0),
    "W": (np.arange(-18, 18).reshape(4, 9) * 7).astype(np.int8),  # -126 ... 119
    "scale": np.array([1, 2, 4, 8, 16, 32, 64, 128, 256], np.float32) / 1024,
    "bias": np.arange(9, dtype=np.float32),
    "sizes": np.array([2, 3, 4], np.int64),
    "zeros": np.arange(9, dtype=np.int8),
}
KINDS = {"float32": "float", "int8": "int8", "uint8": "uint8", "int64": "int64"}


def cut(*changes: tuple[str, str], **weights: Any) -> ir.Model:
    """CUT with some of its text changed; its weights are those that it reads."""
    text = CUT
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    body, read = text.partition("{")[2], []
    for name, array in (WEIGHTS | weights).items():
        if any(f"{mark}{name}{end}" in body for mark in "( " for end in ",)"):
            numbers = ", ".join(str(number) for number in np.ravel(array))
            sizes = f"[{', '.join(map(str, np.shape(array)))}]" if np.ndim(array) else ""
            read.append(f"{KINDS[str(np.asarray(array).dtype)]}{sizes} {name} = {{{numbers}}}")
    return graph_of(text.replace("WEIGHTS", ", ".join(read)), {}, ["", "", "", "attn.c_attn", "attn.c_attn"])


def test_a_product_in_three_parts_becomes_three_products() -> None:
    model = cut()
    assert split_fused_matmul(model) == 1
    counted = {"QuantizeLinear": 1, "DequantizeLinear": 4, "MatMul": 3, "Add": 3}
    assert operators(model) == counted
    kept = weights_of(model)
    assert [*kept] == ["x_scale", "zero", *(f"{n}[{r}]" for r in ("0:3", "3:6", "6:9") for n in ("W", "scale", "bias"))]
    np.testing.assert_array_equal(kept["W[3:6]"], [[-105, -98, -91], [-42, -35, -28], [21, 28, 35], [84, 91, 98]])
    np.testing.assert_array_equal(kept["scale[3:6]"], [8 / 1024, 16 / 1024, 32 / 1024])
    np.testing.assert_array_equal(kept["bias[6:9]"], [6, 7, 8])
    assert [node.name for node in model.graph if node.op_type == "MatMul"] == [
        "MatMul_p.part_0.product",
        "MatMul_p.part_1.product",
        "MatMul_p.part_2.product",
    ]
    assert {node.metadata_props.get("module") for node in model.graph if node.op_type in ("MatMul", "Add")} == {
        "attn.c_attn"
    }
    assert split_fused_matmul(model) == 0


FORMS: list[tuple[list[tuple[str, str]], dict[str, Any]]] = [
    ([], {}),
    ([("axis = 2, num", "axis = -1, num")], {}),
    ([("s = Add (p, bias)", ""), ("(s)", "(p)")], {}),
    ([("Add (p, bias)", "Add (bias, p)")], {}),
    ([("Add", "Sub")], {}),
    ([("axis = 2, num_outputs = 3> (s)", "axis = 2> (s, sizes)"), ("3] q", "2] q"), ("3] v", "4] v")], {}),
    (
        [
            ("num_outputs = 3", "num_outputs = 2"),
            ("q, k, v =", "q, k ="),
            ("3] q", "5] q"),
            ("3] k, float[B, S, 3] v", "4] k"),
        ],
        {},
    ),
    ([("(W, scale)", "(W, scale, zeros)")], {}),
    ([("<axis = 1> (W, scale)", "(W, scale)")], {"scale": np.float32(1 / 64)}),
    ([("<axis = 1> (W, scale)", "(W, scale, zero)")], {"scale": np.float32(1 / 64)}),
    ([("<axis = 1>", "<axis = -1>")], {}),
]


@pytest.mark.parametrize(("changes", "weights"), FORMS)
def test_every_form_computes_the_same_numbers(changes: list[tuple[str, str]], weights: dict[str, Any]) -> None:
    """To the last bit: axes both ways, with and without bias, uneven parts, zero points, one scale for all."""
    whole, parts = cut(*changes, **weights), cut(*changes, **weights)
    assert split_fused_matmul(parts) == 1
    assert (operators(parts)["Split"], operators(parts)["MatMul"]) == (0, len(whole.graph.outputs))
    x = normal(2, 5, 4)
    expected, found = run(whole, integers=SIMULATED, x=x), run(parts, integers=SIMULATED, x=x)
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert np.ptp(array) > 0.1
        np.testing.assert_array_equal(found[name], array, name)


def test_a_part_that_no_node_reads_is_not_computed() -> None:
    model = cut(("float[B, S, 3] k, ", ""))
    assert split_fused_matmul(model) == 1
    assert operators(model)["MatMul"] == 2
    assert not any("3:6" in name for name in weights_of(model))


def test_two_products_of_one_weight_share_its_parts() -> None:
    again = "p_2 = MatMul (x_deq, W_deq) q_2, k_2, v_2 = Split <axis = 2, num_outputs = 3> (p_2) }"
    model = cut(("3] v)", "3] v, float[B, S, 3] q_2, float[B, S, 3] k_2, float[B, S, 3] v_2)"), ("}", again))
    x = normal(2, 5, 4)
    expected = run(model, integers=SIMULATED, x=x)
    assert split_fused_matmul(model) == 2
    assert sum(name.startswith("W") for name in weights_of(model)) == 3
    names = [node.name for node in model.graph if node.name]
    assert len(names) == len(set(names))
    for name, array in run(model, integers=SIMULATED, x=x).items():
        np.testing.assert_array_equal(array, expected[name])


@pytest.mark.parametrize(
    ("changes", "weights"),
    [
        pytest.param([("(x_deq, W_deq)", "(x, W_deq)")], {}, id="the activation is in floating point"),
        pytest.param(
            [("W_deq = DequantizeLinear <axis = 1> (W, scale)", "W_deq = Cast <to = 1> (W)")], {}, id="the weight is"
        ),
        pytest.param([], {"W": np.arange(36, dtype=np.uint8).reshape(4, 9)}, id="a weight of uint8"),
        pytest.param(
            [("W_deq = Deq", "c = Abs (scale) W_deq = Deq"), ("(W, scale)", "(W, c)")], {}, id="a computed scale"
        ),
        pytest.param([("3] v)", "3] v, float[B, S, 9] p)")], {}, id="the product leaves the graph"),
        pytest.param([("3] v)", "3] v, float[B, S, 9] s)")], {}, id="the sum leaves the graph"),
        pytest.param([("3] v)", "3] v, float[B, S, 9] r)"), ("}", "r = Relu (s) }")], {}, id="read whole besides"),
        pytest.param([("3] v)", "3] v, float[B, S, 9] r)"), ("}", "r = Relu (p) }")], {}, id="read before the sum"),
        pytest.param([("Add (p, bias)", "Add (p, p)")], {}, id="added to itself"),
        pytest.param([("Add (p, bias)", "Sub (bias, p)")], {}, id="taken from the bias"),
        pytest.param([("Add (p, bias)", "Mul (p, bias)")], {}, id="no sum"),
        pytest.param([], {"bias": np.float32(2)}, id="one number added to all"),
        pytest.param(
            [("axis = 2, num_outputs = 3> (s)", "axis = 2> (s, n)"), ("s = Add", "n = Abs (sizes) s = Add")],
            {},
            id="computed sizes",
        ),
        pytest.param(
            [("<axis = 1> (W, scale)", "<axis = 0> (W, scale)"), ("S, 4] x", "S, 9] x")],
            {"W": np.arange(81, dtype=np.int8).reshape(9, 9)},
            id="a scale per input",
        ),
        pytest.param(
            [("<axis = 1> (W, scale)", "<axis = 0, block_size = 2> (W, scale)")],
            {"scale": np.ones((2, 9), np.float32)},
            id="blocks",
        ),
        pytest.param(
            [("axis = 2, num", "axis = 1, num"), *((f"S, 3] {n}", f"T, 9] {n}") for n in "qkv")],
            {},
            id="another axis",
        ),
    ],
)
def test_what_is_no_such_product_stays_as_it_is(changes: list[tuple[str, str]], weights: dict[str, Any]) -> None:
    model = cut(*changes, **weights)
    before = ir.to_proto(model).SerializeToString()
    assert split_fused_matmul(model) == 0
    assert ir.to_proto(model).SerializeToString() == before
