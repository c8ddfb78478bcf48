"""Histograms compared with numbers made by hand, and statistics of a small graph: padding, caches, NaN, memory."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from transom.calib.collector import ROWS, CollectingBackend
from transom.calib.histogram import BINS, HALF, MIN_LIMIT, Histogram
from transom.runtime.errors import CalibrationError
from transom.runtime.graph_spec import Graph, Tensor


def histogram(*arrays: Any) -> Histogram:
    found = Histogram()
    for array in arrays:
        found.update(np.asarray(array, np.float32))
    return found


def bins(found: Histogram) -> dict[int, int]:
    """Bin -> how many, of those that are not empty; bin 0 starts at zero."""
    return {int(i) - HALF: int(found.counts[i]) for i in np.flatnonzero(found.counts)}


def test_values_fall_where_a_pencil_puts_them() -> None:
    """The limit is 2, the first power of two above 1.5, and 2048 bins lie on either side: each is 1/1024 wide."""
    found = histogram([[1.5, 0.0, 0.25], [-0.25, 0.001, -0.001]])
    assert (found.limit, found.width, found.count) == (2.0, 1 / 1024, 6)
    assert (found.minimum, found.maximum) == (-0.25, 1.5)
    # 0.001 * 1024 = 1.024 lies in bin 1, -1.024 in bin -2
    assert bins(found) == {1536: 1, 0: 1, 256: 1, -256: 1, 1: 1, -2: 1}
    assert found.edges[[0, HALF, -1]].tolist() == [-2, 0, 2]
    assert found.centres[HALF] == 1 / 2048


def test_an_edge_belongs_to_the_bin_above_it() -> None:
    """0.25 makes the limit 0.5 and bins of 1/4096: it is the edge between bins 1023 and 1024."""
    edge = np.float32(0.25)
    assert bins(histogram([edge, np.nextafter(edge, np.float32(0))])) == {1024: 1, 1023: 1}
    assert bins(histogram([-edge, np.nextafter(-edge, np.float32(-1))])) == {-1024: 1, -1025: 1}
    assert bins(histogram([edge, 1e-45, -1e-45, 0.0, -0.0])) == {1024: 1, 0: 3, -1: 1}


def test_a_doubled_limit_merges_pairs_of_bins() -> None:
    """0.6 is in bin 1228 of width 1/2048; when 1.0 arrives, in bin 614 of width 1/1024."""
    found = histogram([0.6, 0.6001, -0.6])
    assert (found.limit, bins(found)) == (1.0, {1228: 1, 1229: 1, -1229: 1})
    found.update(np.array([1.0], np.float32))
    assert (found.limit, bins(found)) == (2.0, {614: 2, -615: 1, 1024: 1})


@pytest.mark.parametrize("largest", [1e-30, 0.7, 3.0, 1e5, 3e38])
def test_neither_order_nor_batches_matter(largest: float) -> None:
    """Every order agrees with whole arithmetic in float64 over the final limit, denormals and signed zeros too."""
    rng = np.random.default_rng(0)
    magnitudes = np.exp(rng.uniform(np.log(1e-44), np.log(largest), 3000))
    values = (rng.choice([-1, 1], 3000) * magnitudes).astype(np.float32)
    values = np.concatenate([values, np.array([0.0, -0.0, 1e-45, -1e-45, largest], np.float32)])
    for order in (np.arange(len(values)), np.argsort(values), np.argsort(np.abs(values)), rng.permutation(len(values))):
        found = histogram(*np.array_split(values[order], 7))
        assert found.limit == 2.0 ** math.floor(math.log2(float(np.float32(largest))) + 1) or found.limit == MIN_LIMIT
        expected = np.floor(values.astype(np.float64) / found.width).astype(np.int64) + HALF
        np.testing.assert_array_equal(found.counts, np.bincount(expected, minlength=BINS))


def test_long_arrays_are_counted_whole() -> None:
    values = np.random.default_rng(1).standard_normal(200_001).astype(np.float32)
    found = histogram(values)
    expected = np.histogram(values.astype(np.float64), found.edges)[0]
    np.testing.assert_array_equal(found.counts, expected)
    assert found.count == found.counts.sum() == 200_001


def test_zeros_have_a_histogram_and_then_other_values_too() -> None:
    found = histogram(np.zeros((2, 3)))
    assert (found.limit, found.minimum, found.maximum, bins(found)) == (MIN_LIMIT, 0.0, 0.0, {0: 6})
    found.update(np.array([-4.0], np.float32))
    assert (found.limit, bins(found)) == (8.0, {0: 6, -1024: 1})


@pytest.mark.parametrize(("bad", "message"), [(np.nan, "NaN"), (np.inf, "infinite"), (-np.inf, "infinite")])
def test_what_is_not_finite_is_refused_and_counted_nowhere(bad: float, message: str) -> None:
    found = histogram([1.0])
    with pytest.raises(CalibrationError, match=message):
        found.update(np.array([3.0, bad, 5.0], np.float32))
    assert (found.count, found.maximum, found.limit) == (1, 1.0, 2.0)


def test_json_brings_a_histogram_back() -> None:
    found = histogram([0.0, 0.0, 0.001, -1.5, 1e-3])
    text = found.to_json()
    assert text == {"min": -1.5, "max": float(np.float32(0.001)), "limit": 2.0, "bins": [-512, 1, -1535, 2, 2, -2046]}
    problems: list[str] = []
    back = Histogram.from_json(text, "h", problems)
    assert problems == []
    np.testing.assert_array_equal(back.counts, found.counts)
    assert (back.minimum, back.maximum, back.limit, back.count) == (found.minimum, found.maximum, 2.0, 5)


GOOD = {"min": -1.5, "max": 0.001, "limit": 2.0, "bins": [-512, 1, -1535, 2, 2, -2046]}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("bins", [-512, 1, -1535, 2, 2, -2045], "4096 bins"),  # one too few
        ("bins", [-512, 1, -1535, 2, 2, -(10**12)], "4096 bins"),
        ("bins", [-512, 1.0, -1535, 2, 2, -2046], "4096 bins"),
        ("bins", [-512, True, -1535, 2, 2, -2046], "4096 bins"),
        ("bins", [-512, 10**30, -1535, 2, 2, -2046], "4096 bins"),
        ("bins", [0] * 4096, "4096 bins"),
        ("bins", [-4096], "its bins end elsewhere"),
        ("limit", 0.0, "power of two"),
        ("limit", -2.0, "power of two"),
        ("limit", 3.0, "power of two"),
        ("limit", 2.0**200, "power of two"),
        ("limit", 4.0, "its bins end elsewhere"),
        ("limit", "2", "power of two"),
        ("min", -1.6, "its bins end elsewhere"),
        ("min", 10**400, "finite"),
        ("max", None, "finite"),
        ("max", 1.9, "its bins end elsewhere"),
        ("more", 1, "unknown key"),
    ],
)
def test_json_of_no_histogram_is_refused(field: str, value: Any, message: str) -> None:
    problems: list[str] = []
    Histogram.from_json(GOOD | {field: value}, "h", problems)
    assert len(problems) == 1
    assert message in problems[0]


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
