"""What goes into an epilogue, and what becomes an operator of its own, on graphs of a few nodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from lowered_graphs import lowered, random_feeds, worst_error
from tiny_graphs import graph_of, normal
from transom.export.native.row_program import CannotLowerError
from transom.runtime.graph_spec import Graph, Tensor
from transom.runtime.native import operators as ops

N = 4
IDS = Tensor("ids", "int64", ("B", "S"), exclusive_max=7)


def tokens(body: str, outputs: dict[str, tuple[str | int, ...]], **weights: Any) -> tuple[ir.Model, Graph]:
    """A graph of token ids whose rows x (B, S, 4) are looked up first."""
    given = ", ".join(f"float[{', '.join(map(str, shape))}] {name}" for name, shape in outputs.items())
    text = f"g (int64[B, S] ids) => ({given}) {{ x = Gather (table, ids)\n{body} }}"
    model = graph_of(text, {"table": normal(7, N), "gain": np.ones(N), "shift": normal(N, seed=9), **weights})
    return model, Graph("g", (IDS,), tuple(Tensor(name, "float32", shape) for name, shape in outputs.items()))


def proven(model: ir.Model, graph: Graph) -> tuple[ops.Operator, ...]:
    """Return the operators of a graph, once they compute what it does."""
    made = lowered(model, graph)
    assert worst_error(model, graph, made, random_feeds(graph, {"B": 2, "S": 3})) < 1e-5
    return made.operators.operators


def linear_then(*operators: ops.Operator) -> ops.Epilogue:
    found = [each.then for each in operators if isinstance(each, ops.Linear)]
    assert len(found) == 1
    return found[0]


def test_bias_activation_residual_and_norm_are_one_epilogue() -> None:
    body = """
        p = MatMul (x, w)
        b = Add (p, shift)
        a = Gelu (b)
        r = Add (x, a)
        y = LayerNormalization <axis = -1> (r, gain, shift)
    """
    made = proven(*tokens(body, {"y": ("B", "S", N)}, w=normal(N, N)))
    then = linear_then(*made)
    assert (then.bias, then.activation, then.residual, then.sum) == (("shift",), "gelu", "x", None)
    assert then.norm is not None
    assert [type(each) for each in made] == [ops.Embed, ops.Linear, ops.Unpack]


def test_a_sum_that_others_read_keeps_a_register() -> None:
    body = """
        p = MatMul (x, w)
        r = Add (p, x)
        n = LayerNormalization <axis = -1> (r, gain, shift)
        y = Add (n, r)
    """
    made = proven(*tokens(body, {"y": ("B", "S", N)}, w=normal(N, N)))
    then = linear_then(*made)
    assert (then.residual, then.sum, then.out) == ("x", "r", "n")
    assert isinstance(made[2], ops.Select)  # n + r: nothing makes a row there that it could follow
    assert (made[2].rule, made[2].then.residual) == (ops.EVERY, "r")


def test_a_second_norm_of_one_value_is_a_copy() -> None:
    body = """
        a = LayerNormalization <axis = -1> (x, gain, shift)
        b = LayerNormalization <axis = -1> (x, shift, gain)
        y = Add (a, b)
    """
    made = proven(*tokens(body, {"y": ("B", "S", N)}))
    assert [type(each) for each in made] == [ops.Embed, ops.Select, ops.Select, ops.Unpack]  # a norm ends an epilogue
    assert isinstance(made[0], ops.Embed)
    assert (made[0].then.sum, made[0].then.out) == ("x", "a")
    assert isinstance(made[1], ops.Select)
    assert made[1].source == "x"


def test_a_bias_behind_an_activation_is_no_bias_of_the_product() -> None:
    body = """
        p = MatMul (x, w)
        a = Relu (p)
        y = Add (a, shift)
    """
    made = proven(*tokens(body, {"y": ("B", "S", N)}, w=normal(N, N)))
    assert linear_then(*made).activation == "relu"
    assert linear_then(*made).bias == ()
    assert isinstance(made[2], ops.Select)
    assert made[2].then.bias == ("shift",)


def test_an_output_that_is_an_output_twice_is_copied() -> None:
    body = """
        first = Gather <axis = 1> (x, zero)
        y = LayerNormalization <axis = -1> (first, gain, shift)
        z = Identity (y)
    """
    model, graph = tokens(body, {"y": ("B", N), "z": ("B", N)}, zero=0)
    zero = model.graph.initializers["zero"]
    zero.const_value, zero.type = ir.Tensor(np.array(0, np.int64)), ir.TensorType(ir.DataType.INT64)
    made = lowered(model, graph)
    assert sorted(made.operators.outputs.values()) == ["y", "z"]
    assert worst_error(model, graph, made, random_feeds(graph, {"B": 2, "S": 3})) < 1e-5


def test_an_activation_of_a_part_of_the_columns_is_refused() -> None:
    body = """
        p, q = Split <axis = -1, num_outputs = 2> (x)
        a = Relu (p)
        y = Concat <axis = -1> (a, q)
    """
    with pytest.raises(CannotLowerError, match="it computes with some of the columns of 'x' alone"):
        lowered(*tokens(body, {"y": ("B", "S", N)}))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("y = Softmax (x)", "Softmax node .*: no operator of a list computes it"),
        ("y = MatMul (x, x)", "MatMul node .*: it is a product of two activations"),
        ("y = LayerNormalization <axis = 1> (x, gain, shift)", "it normalises other axes than the last"),
        ("s = Sigmoid (x)\nm = Mul (x, s)\ny = Mul (m, s)", "it multiplies two activations"),
        ("y = Transpose <perm = [1, 0, 2]> (x)", "the output 'y' has its rows in another order"),
    ],
)
def test_refusals_name_the_node_and_why(body: str, words: str) -> None:
    with pytest.raises(CannotLowerError, match=words):
        lowered(*tokens(body, {"y": ("B", "S", N)}))
