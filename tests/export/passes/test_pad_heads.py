"""Heads of two widths, padded to one: the same result, in both directions, with a mask and a scale and without."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from tiny_graphs import graph_of
from transom.export.passes.pad_heads import pad_heads


def attention(queries: int, values: int, *, mask: bool, scale: str = "") -> ir.Model:
    inputs = f"float[2, 3, 5, {queries}] q, float[2, 3, 7, {queries}] k, float[2, 3, 7, {values}] v"
    more, last = (", bool[2, 1, 5, 7] m", ", m") if mask else ("", "")
    return graph_of(
        f"model ({inputs}{more}) => (float[2, 3, 5, {values}] y) {{\n    y = Attention{scale} (q, k, v{last})\n}}"
    )


def run(model: ir.Model) -> np.ndarray:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(3)
    feeds = {
        value.name: rng.random(value.shape) < 0.7
        if value.type == "tensor(bool)"
        else rng.standard_normal(value.shape).astype(np.float32)
        for value in session.get_inputs()
    }
    (found,) = session.run(None, feeds)
    return np.asarray(found)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("scale", ["", " <scale: float = 0.7>"])
@pytest.mark.parametrize(("queries", "values"), [(4, 20), (32, 16)])
def test_it_computes_the_same(queries: int, values: int, scale: str, mask: bool) -> None:
    model = attention(queries, values, mask=mask, scale=scale)
    expected = run(model)
    assert pad_heads(model, lambda node: True) == 1
    operators = [node.op_type for node in model.graph]
    assert operators == (["Pad", "Pad", "Attention"] if queries < values else ["Pad", "Attention", "Slice"])
    found = run(model)
    assert found.shape == (2, 3, 5, values)
    assert np.abs(found - expected).max() <= 2e-6 * np.abs(expected).max()


def test_heads_of_one_width_and_those_not_chosen_are_left() -> None:
    assert pad_heads(attention(8, 8, mask=False), lambda node: True) == 0
    model = attention(8, 16, mask=False)
    assert pad_heads(model, lambda node: False) == 0
    assert [node.op_type for node in model.graph] == ["Attention"]
