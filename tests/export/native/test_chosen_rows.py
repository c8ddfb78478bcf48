"""Rows that are chosen by what an input holds: CLIP's text ends at the first token of its id, wherever that stands."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from lowered_graphs import lowered
from tiny_graphs import graph_of, normal
from transom.export.native.index_values import IndexValues
from transom.export.native.row_program import CannotLowerError
from transom.runtime.graph_spec import Graph, Tensor
from transom.runtime.native.operators import Select

N, VOCABULARY, END = 4, 5000, 4321
GRAPH = Graph("g", (Tensor("ids", "int64", ("B", "S"), exclusive_max=VOCABULARY),), (Tensor("y", "float32", ("B", N)),))
END_OF_TEXT = """
    equal = Equal (short, end)
    marked = Cast <to = 6> (equal)
    place = ArgMax <axis = 1, keepdims = 1> (marked)
"""


def text_graph(place: str = END_OF_TEXT) -> ir.Model:
    """A graph of token ids whose row at ``place``, int64 (B, 1), is its output."""
    body = f"""
        x = Gather (table, ids)
        short = Cast <to = 6> (ids)
        {place}
        sizes = Shape (ids)
        B = Gather (sizes, zero)
        S = Gather (sizes, one)
        rows = Range (zero, B, one)
        column = Unsqueeze (rows, axis)
        first = Mul (column, S)
        at = Add (first, place)
        index = Unsqueeze (at, last)
        flat = Reshape (x, shape)
        chosen = GatherND (flat, index)
        y = Squeeze (chosen, axis)
    """
    integers = f"""
        int32 end = {{{END}}}, int32 less = {{{END - 1}}}, int32 unit = {{1}},
        int64 zero = {{0}}, int64 one = {{1}}, int64[1] axis = {{1}}, int64[1] last = {{2}},
        int64[2] shape = {{-1, {N}}}
    """
    text = f"g (int64[B, S] ids) => (float[B, {N}] y) <{integers}> {{ {body} }}"
    return graph_of(text, {"table": normal(VOCABULARY, N)})


def add_zero_points(model: ir.Model) -> None:
    """Add what a quantised graph has for each of its layers: a scalar of uint8."""
    for number in range(250):
        value = ir.val(f"zero_point.{number}", const_value=ir.tensor(np.array(number, np.uint8), name=f"z{number}"))
        model.graph.initializers[value.name or ""] = value


@pytest.mark.parametrize("quantised", [False, True])
def test_the_row_of_the_first_token_of_an_id(quantised: bool) -> None:
    model = text_graph()
    if quantised:
        add_zero_points(model)
    made = lowered(model, GRAPH)
    (select,) = [each for each in made.operators.operators if isinstance(each, Select)]
    assert (select.rule, select.input, select.value) == ("first_equal", "ids", END)


def test_a_choice_that_no_sample_shows_is_refused() -> None:
    """The id is computed: no sample has it, and all of them choose the first row."""
    model = text_graph("computed = Add (less, unit)\n" + END_OF_TEXT.replace("end", "computed"))
    del model.graph.initializers["end"]
    with pytest.raises(CannotLowerError, match="by what an input holds, and the samples do not show how"):
        lowered(model, GRAPH)


def test_samples_have_each_id_that_a_graph_compares_with() -> None:
    model = text_graph()
    add_zero_points(model)
    index = IndexValues(model, GRAPH, lambda value, sample: None)
    assert index.special == [0, 1, 2, END - 1, END]
    for sample in index.inputs["ids"]:
        assert set(index.special) <= set(sample.reshape(-1).tolist())
