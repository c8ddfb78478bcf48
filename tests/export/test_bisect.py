"""Bisection: the layers that cause an error, in few measurements."""

from __future__ import annotations

from math import inf, sqrt

import pytest

from transom.export.bisect import bisect_layers

LAYERS = [f"layer {index}" for index in range(64)]


class Errors:
    """Independent errors: what is not in FP32 adds its square. ``asked`` counts the measurements."""

    def __init__(self, **squares: float) -> None:
        self.squares = {f"layer {name[1:]}": square for name, square in squares.items()}
        self.floor, self.asked = 0.0, 0

    def __call__(self, in_fp32: frozenset[str]) -> float:
        self.asked += 1
        return sqrt(self.floor + sum(square for name, square in self.squares.items() if name not in in_fp32))


def test_search_finds_the_worst_layers_in_their_order_by_halves() -> None:
    error = Errors(_7=4.0, _40=9.0, _63=0.09)
    found = bisect_layers(LAYERS, error, target=0.5, most=10)
    assert [(step.layer, step.before, step.after) for step in found.steps] == [
        ("layer 40", pytest.approx(sqrt(13.09)), pytest.approx(sqrt(4.09))),
        ("layer 7", pytest.approx(sqrt(4.09)), pytest.approx(0.3)),
    ]
    assert (found.shipped, found.everything, found.left) == (pytest.approx(sqrt(13.09)), 0.0, pytest.approx(0.3))
    assert error.asked <= 2 + 2 * (2 * 6)  # nothing, everything, then two halves at each of log2(64) = 6 levels


def test_search_ends_at_a_tenth_of_the_error_or_after_so_many_layers() -> None:
    four = {"_1": 4.0, "_2": 4.0, "_3": 4.0, "_4": 4.0}
    assert len(bisect_layers(LAYERS, Errors(**four), target=None, most=10).steps) == 4
    assert len(bisect_layers(LAYERS, Errors(**four), target=2.0, most=10).steps) == 3
    assert len(bisect_layers(LAYERS, Errors(**four), target=None, most=2).steps) == 2
    assert bisect_layers(LAYERS, Errors(**four), target=4.0, most=10).steps == ()  # it is 4 already


def test_two_layers_that_are_not_finite_are_found_though_each_hides_the_other() -> None:
    error = Errors(_9=inf, _50=inf)
    found = bisect_layers(LAYERS, error, target=None, most=10)
    assert [(step.layer, step.after) for step in found.steps] == [("layer 9", inf), ("layer 50", 0.0)]


def test_search_does_not_look_for_a_fault_that_lies_outside_the_layers() -> None:
    error = Errors()
    error.floor = 4.0
    found = bisect_layers(LAYERS, error, target=None, most=10)
    assert (found.shipped, found.everything, found.steps, error.asked) == (2.0, 2.0, (), 2)


def test_search_gives_up_where_no_layer_lowers_the_error() -> None:
    """Halves do, single layers do not: a pair must be in FP32 together."""
    pair = {"layer 3", "layer 60"}
    found = bisect_layers(LAYERS, lambda in_fp32: 0.0 if pair <= in_fp32 else 1.0, target=None, most=10)
    assert found.steps == ()
