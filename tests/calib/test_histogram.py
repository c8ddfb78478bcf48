"""Histograms compared with numbers made by hand, and their JSON."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from transom.calib.histogram import BINS, HALF, MIN_LIMIT, Histogram
from transom.runtime.errors import CalibrationError


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


def test_histograms_of_parts_add_up_to_that_of_all_values() -> None:
    """Parts of other limits, one of nothing but zeros and one of nothing: to the last bit, in any order."""
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal(1000), rng.standard_normal(50) * 1e-6, np.zeros(7), np.full(3, -700.0), np.empty(0)]
    whole = histogram(*parts)
    for order in (parts, parts[::-1]):
        merged = Histogram.merged(histogram(part) for part in order)
        assert (merged.to_json(), merged.count) == (whole.to_json(), whole.count)
    assert Histogram.merged([]).to_json() == Histogram().to_json()
