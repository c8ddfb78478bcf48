"""Attention reads projections as they are: Reshape and Transpose around it go, everything else stays."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tiny_graphs import graph_of, normal, operators, run
from transom.export.passes.cpu import optimize_for_cpu

# Two heads of 4 for queries, keys and values; five tokens of keys and values.
TEXT = """g (float[B, S, 8] q, float[B, C, 8] k, float[B, C, 8] v, float[B, 1, S, C] mask) => (float[B, S, 8] y) {
    heads = Constant <value = int64[4] {0, 0, 2, 4}> ()
    merged = Constant <value = int64[3] {0, 0, 8}> ()
    q4 = Reshape (q, heads)
    k4 = Reshape (k, heads)
    v4 = Reshape (v, heads)
    qt = Transpose <perm = [0, 2, 1, 3]> (q4)
    kt = Transpose <perm = [0, 2, 1, 3]> (k4)
    vt = Transpose <perm = [0, 2, 1, 3]> (v4)
    a = Attention (qt, kt, vt, mask)
    at = Transpose <perm = [0, 2, 1, 3]> (a)
    y = Reshape (at, merged)
}"""
PATHS = [""] * 8 + ["self"]
FEEDS = {"q": normal(2, 3, 8), "k": normal(2, 5, 8, seed=1), "v": normal(2, 5, 8, seed=2)}
MASK = np.where(normal(2, 1, 3, 5, seed=3) > 0.3, np.float32(0), np.finfo(np.float32).min)
MASK[0, 0, 1] = np.finfo(np.float32).min  # a token that sees none


def rewritten(text: str) -> tuple[ir.Model, int]:
    model = graph_of(text, paths=PATHS)
    return model, optimize_for_cpu(model)["attention_layout"]


@pytest.mark.parametrize("attributes", ["", "<is_causal = 1>", "<scale = 0.25, softcap = 2.0>"])
def test_heads_are_read_where_they_lie(attributes: str) -> None:
    text = TEXT.replace("Attention (", f"Attention {attributes} (")
    model, count = rewritten(text)
    assert (count, operators(model)) == (1, {"Attention": 1})
    (attention,) = model.graph
    assert attention.metadata_props["module"] == "self"
    assert [attention.attributes[name].as_int() for name in ("q_num_heads", "kv_num_heads")] == [2, 2]
    expected = run(graph_of(text), **FEEDS, mask=MASK)["y"]
    np.testing.assert_array_equal(run(model, **FEEDS, mask=MASK)["y"], expected)


def test_values_may_be_wider_and_keys_fewer() -> None:
    """One head of keys for two of queries, of four channels; its values have six."""
    text = TEXT.replace("[B, C, 8] k", "[B, C, 4] k").replace("[B, C, 8] v", "[B, C, 6] v")
    text = text.replace("[B, S, 8] y", "[B, S, 12] y").replace("{0, 0, 8}", "{0, 0, 12}")
    text = text.replace("(k, heads)", "(k, key_heads)").replace("(v, heads)", "(v, value_heads)")
    text = text.replace("q4 =", "key_heads = Constant <value = int64[4] {0, 0, 1, 4}> () q4 =", 1)
    text = text.replace("q4 =", "value_heads = Constant <value = int64[4] {0, 0, 1, 6}> () q4 =", 1)
    model, count = rewritten(text)
    assert (count, operators(model)) == (1, {"Attention": 1})
    feeds = FEEDS | {"k": normal(2, 5, 4, seed=4), "v": normal(2, 5, 6, seed=5), "mask": MASK}
    np.testing.assert_array_equal(run(model, **feeds)["y"], run(graph_of(text), **feeds)["y"])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(float[B, S, 8] y)", "(float[B, S, 8] y, float[B, 2, S, 4] a)"),  # something else reads the heads
        ("kt = Transpose <perm = [0, 2, 1, 3]>", "kt = Transpose <perm = [0, 2, 3, 1]>"),
        ("at = Transpose <perm = [0, 2, 1, 3]>", "at = Transpose <perm = [0, 1, 2, 3]>"),
    ],
)
def test_other_layouts_stay(old: str, new: str) -> None:
    assert old in TEXT
    text = TEXT.replace(old, new)
    model = graph_of(text)
    before = operators(model)
    assert optimize_for_cpu(model)["attention_layout"] == 0
    assert operators(model) == before


def test_a_reshape_that_does_more_than_split_stays() -> None:
    """Windows of Swin: rows and tokens are cut otherwise in the same step, for queries, keys, values and the result."""
    text = TEXT.replace("{0, 0, 2, 4}", "{-1, 3, 2, 4}").replace("{0, 0, 8}", "{2, -1, 8}")
    text = text.replace("1, S, C] mask", "1, 3, 3] mask").replace("[B, S, 8] y", "[2, S, 8] y")
    model, count = rewritten(text)
    assert (count, operators(model)["Transpose"]) == (1, 0)
    feeds = {name: normal(2, 6, 8, seed=seed) for seed, name in enumerate("qkv")}
    feeds["mask"] = normal(4, 1, 3, 3, seed=9)
    np.testing.assert_array_equal(run(model, **feeds)["y"], run(graph_of(text), **feeds)["y"])


def test_something_else_may_read_the_merged_heads() -> None:
    text = TEXT.replace("[B, S, 8] y)", "[B, S, 8] y, float[B, S, 2, 4] at)")
    model, count = rewritten(text)
    assert (count, operators(model)["Transpose"]) == (1, 0)
    ours, theirs = run(model, **FEEDS, mask=MASK), run(graph_of(text), **FEEDS, mask=MASK)
    assert {*ours} == {"y", "at"}
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(("rows", "count"), [("B", 1), ("1", 0)])
def test_an_expand_to_the_same_shape_goes(rows: str, count: int) -> None:
    """As Perceiver's latents are expanded in each of its layers; one that repeats its value stays."""
    text = TEXT.replace("a = Attention (qt,", "sizes = Shape (at) qe = Expand (qt, sizes) a = Attention (qe,")
    text = text.replace("[B, S, 8] q", f"[{rows}, S, 8] q").replace("Shape (at)", "Shape (shaped)")
    text = text.replace("] mask)", "] mask, float[B, 2, S, 4] shaped)")
    model = graph_of(text)
    expanded = next(node.outputs[0] for node in model.graph if node.op_type == "Expand")
    expanded.shape = ir.Shape(["B", 2, "S", 4])  # which shape inference alone does not find
    assert optimize_for_cpu(model)["attention_layout"] == count
    assert operators(model)["Expand"] == 1 - count
    feeds = FEEDS | {"q": FEEDS["q"][: 2 if count else 1], "shaped": np.zeros((2, 2, 3, 4)), "mask": MASK}
    np.testing.assert_array_equal(run(model, **feeds)["y"], run(graph_of(text), **feeds)["y"])


def test_a_cache_stays_in_front_of_the_heads() -> None:
    """Keys and values of earlier steps have their heads in front already."""
    text = TEXT.replace("[B, 1, S, C] mask", "[B, 1, S, T] mask, float[B, 2, P, 4] pk, float[B, 2, P, 4] pv")
    text = text.replace("[B, S, 8] y)", "[B, S, 8] y, float[B, 2, T, 4] nk, float[B, 2, T, 4] nv)")
    text = text.replace("a = Attention (qt, kt, vt, mask)", "a, nk, nv = Attention (qt, kt, vt, mask, pk, pv)")
    model, count = rewritten(text)
    assert (count, operators(model)["Transpose"]) == (0, 4)
