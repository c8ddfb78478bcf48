"""Statistics of a small graph while it runs: padding, caches, NaN, memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from transom.calib.collector import ROWS, CollectingBackend
from transom.runtime.errors import CalibrationError
from transom.runtime.graph_spec import Graph, Tensor


def model_of(text: str, paths: Sequence[str] = ()) -> ir.Model:
    """A graph in ONNX's own textual form; the nodes in order come from the modules ``paths``."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23]>\n{text}')
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    for node, path in zip(model.graph, paths, strict=False):
        node.metadata_props["module"] = path
    return model


# y = x W doubles the first channel and negates the second; z is its positive part
SMALL = """
small (float[B, S, 2] x, int64[B, S] attention_mask) => (float[B, S, 2] z)
<float[2, 2] W = {2, 0, 0, -1}> { y = MatMul (x, W)  z = Relu (y) }
"""
GRAPH = Graph(
    "small",
    (Tensor("x", "float32", ("B", "S", 2)), Tensor("attention_mask", "int64", ("B", "S"))),
    (Tensor("z", "float32", ("B", "S", 2)),),
)


def small(tensors: Sequence[str] = ("x", "y", "z"), **options: Any) -> CollectingBackend:
    return CollectingBackend(model_of(SMALL, ["block.linear", "block.act"]), GRAPH, tensors, **options)


def put(backend: CollectingBackend, x: Any, mask: Any = None) -> NDArray[Any]:
    x = np.asarray(x, np.float32)
    mask = np.ones(x.shape[:2], np.int64) if mask is None else np.array(mask)
    found: NDArray[Any] = backend.run({"x": x, "attention_mask": mask}, {"z": x.shape})["z"]
    return found


def test_ranges_of_an_input_an_intermediate_and_an_output() -> None:
    backend = small(channels=["y"])
    np.testing.assert_array_equal(put(backend, [[[1, 3], [-2, 5]]]), [[[2, 0], [0, 0]]])
    put(backend, [[[0.5, -7]]])  # another shape
    ranges = backend.ranges
    assert list(ranges) == ["x", "y", "z"]
    seen = {name: (r.histogram.minimum, r.histogram.maximum, r.histogram.count) for name, r in ranges.items()}
    assert seen == {"x": (-7, 5, 6), "y": (-5, 7, 6), "z": (0, 7, 6)}
    assert ranges["x"].channels is None
    channels = ranges["y"].channels
    assert channels is not None
    np.testing.assert_array_equal([channels.minimum, channels.maximum], [[-4, -5], [2, 7]])
    assert channels.minimum.dtype == channels.maximum.dtype == np.float32


def test_padding_is_counted_nowhere() -> None:
    backend = small(channels=["x", "y"], rows=ROWS)
    put(backend, [[[1, 1], [900, np.nan]], [[2, 2], [3, 3]]], mask=[[1, 0], [1, 1]])
    found = backend.ranges["x"]
    assert (found.histogram.maximum, found.histogram.count) == (3, 6)
    assert found.channels is not None
    np.testing.assert_array_equal(found.channels.maximum, [3, 3])
    np.testing.assert_array_equal(backend.kept_rows("x"), [[1, 1], [2, 2], [3, 3]])
    assert backend.ranges["z"].histogram.maximum == 6


def test_a_mask_of_other_positions_hides_nothing() -> None:
    """A decoder's own positions T are not those S that the mask speaks of, though there are as many."""
    text = "d (float[B, T, 2] x, int64[B, S] attention_mask) => (float[B, T, 2] z) { z = Relu (x) }"
    tensors = (Tensor("x", "float32", ("B", "T", 2)), GRAPH.inputs[1])
    backend = CollectingBackend(model_of(text), Graph("d", tensors, GRAPH.outputs), ["x"])
    put(backend, [[[1, 1], [9, 9]]], mask=[[1, 0]])
    assert backend.ranges["x"].histogram.maximum == 9


def test_a_mask_counts_where_names_of_axes_are_lost() -> None:
    model = model_of(SMALL)
    for node in model.graph:
        for value in node.outputs:
            value.shape = None
    backend = CollectingBackend(model, GRAPH, ["y"])
    put(backend, [[[1, 1], [9, 9]]], mask=[[1, 0]])
    assert backend.ranges["y"].histogram.maximum == 2


@pytest.mark.parametrize(("bad", "message"), [(np.nan, "NaN"), (3e38, "an infinite value")])
def test_what_is_not_finite_names_tensor_module_and_sample(bad: float, message: str) -> None:
    backend = small(["y", "z"])
    backend.sample = "review.txt:17"
    put(backend, [[[1, 2]]])
    with pytest.raises(
        CalibrationError, match=rf"^y \(module block\.linear\) .*'small' has {message} in .*review\.txt:17"
    ):
        put(backend, [[[bad, 1]]])


def test_a_sample_that_does_not_fit_is_named() -> None:
    backend = small()
    backend.sample = "photo.png"
    with pytest.raises(CalibrationError, match=r"failed on sample photo\.png in the graph 'small'"):
        put(backend, np.zeros((1, 2, 3)))


@pytest.mark.parametrize(("name", "message"), [("w", "no such tensor"), ("attention_mask", "INT64"), ("W", "no such")])
def test_only_float_tensors_of_the_graph_are_observed(name: str, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        small([name])


def test_a_graph_that_no_sample_reached_is_an_error() -> None:
    with pytest.raises(CalibrationError, match=r"no sample reached x .*'small'"):
        _ = small().ranges


def test_the_model_stays_as_it_is() -> None:
    model = model_of(SMALL)
    before = ir.to_proto(model).SerializeToString()
    put(CollectingBackend(model, GRAPH, ["y", "z", "z"]), [[[1, 2]]])
    assert ir.to_proto(model).SerializeToString() == before


def test_large_weights_are_shared_and_right() -> None:
    """Above 1 KB they reach ONNX Runtime beside the model."""
    weight = np.random.default_rng(0).standard_normal((2, 400)).astype(np.float32)
    x, y = ir.val("x", ir.DataType.FLOAT, ["B", "S", 2]), ir.val("y", ir.DataType.FLOAT, ["B", "S", 400])
    w = ir.Value(name="w", const_value=ir.tensor(weight, name="w"))
    w.type, w.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(weight.shape)
    node = ir.node("MatMul", [x, w], outputs=[y])
    model = ir.Model(
        ir.Graph([x], [y], nodes=[node], initializers=[w], name="g", opset_imports={"": 23}), ir_version=10
    )
    backend = CollectingBackend(model, Graph("g", GRAPH.inputs[:1], (Tensor("y", "float32", ("B", "S", 400)),)), ["y"])
    value = np.array([[[1, -3]]], np.float32)
    found = backend.run({"x": value}, {"y": (1, 1, 400)})["y"]
    # 6e-8, the unit roundoff, of 1 |w| + 3 |w| <= 4 x 3.1: with and without fused multiply-add
    np.testing.assert_allclose(found, value @ weight, rtol=0, atol=1e-6)
    assert backend.ranges["y"].histogram.maximum == found.max()


def test_caches_are_written_in_place_and_measured() -> None:
    text = "c (float[B, 2] cache, float[B, 2] x) => (float[B, 2] new, float[B, 2] y)"
    text += "{ new = Add (cache, x)  y = Neg (new) }"
    shape = ("B", 2)
    graph = Graph(
        "c",
        (Tensor("cache", "float32", shape, state=True), Tensor("x", "float32", shape)),
        (Tensor("new", "float32", shape, state=True, aliases="cache"), Tensor("y", "float32", shape)),
    )
    backend = CollectingBackend(model_of(text), graph, ["new", "cache"])
    cache, x = np.zeros((1, 2), np.float32), np.array([[1, -2]], np.float32)
    for _ in range(3):
        found = backend.run({"cache": cache, "x": x}, {"y": (1, 2)})
    assert list(found) == ["y"]
    np.testing.assert_array_equal(cache, [[3, -6]])
    ranges = {name: (r.histogram.minimum, r.histogram.maximum) for name, r in backend.ranges.items()}
    assert ranges == {"new": (-6, 3), "cache": (-4, 2)}


def test_rows_are_a_fair_sample_the_same_every_time() -> None:
    """Of 4,000 positions 100 are kept; how they were batched does not matter, and none of the run's parts is missed."""
    numbers = np.arange(4000, dtype=np.float32)
    positions = np.stack([numbers, -numbers], axis=1)
    kept = []
    for parts in (4, 57, 4000):
        backend = small(["x"], channels=["x"], rows=100)
        for part in np.array_split(positions, parts):
            put(backend, part[None])
        rows = backend.kept_rows("x")
        assert rows.shape == (100, 2)
        np.testing.assert_array_equal(rows[:, 0], -rows[:, 1])
        kept.append(sorted(rows[:, 0].tolist()))
    assert kept[0] == kept[1] == kept[2]
    assert len(set(kept[0])) == 100
    quarters = np.histogram(kept[0], 4, (0, 4000))[0]
    assert quarters.min() >= 12  # 25 expected, 12 is three deviations below
    assert small(channels=["x"], rows=10**9).kept_rows("x").size == 0


def test_never_more_rows_than_the_limit() -> None:
    backend = small(["x"], channels=["x"], rows=10**9)
    put(backend, np.zeros((2, 700, 2)))
    assert backend.kept_rows("x").shape == (ROWS, 2)


def test_memory_does_not_grow_with_the_number_of_samples() -> None:
    """1,000 samples of ever other shapes after 200: not 40 KB more, where keeping them would take 3 MB."""
    backend = small(channels=["x", "y", "z"], rows=ROWS)
    rng = np.random.default_rng(0)

    def feed(samples: int) -> int:
        tracemalloc.reset_peak()
        for _ in range(samples):
            put(backend, rng.standard_normal((1, int(rng.integers(1, 256)), 2)))
        return tracemalloc.get_traced_memory()[1]

    tracemalloc.start()
    try:
        first, rest = feed(200), feed(1000)
    finally:
        tracemalloc.stop()
    assert rest < first + 40_000, f"peaks of {first} and {rest} bytes"
    assert backend.ranges["x"].histogram.count > 1200 * 2 * 100
