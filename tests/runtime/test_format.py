"""Figures out of JSON that nothing has checked, and their texts."""

from __future__ import annotations

from transom.runtime.format import (
    bytes_text,
    count_text,
    error_text,
    finite,
    milliseconds,
    natural,
    object_of,
    positive,
    short,
)


def test_numbers_that_are_none() -> None:
    assert [finite(each) for each in (True, "1", None, float("nan"), 10**400, [1], 2)] == [None] * 6 + [2.0]
    assert [natural(each) for each in (True, 1.0, -1, 2**63, 7)] == [None] * 4 + [7]
    assert [short(each) for each in (0.99074, 12345.0, 3e-7, None, 1e300)] == [
        "0.9907",
        "12,345",
        "3e-07",
        "–",
        "1e+300",
    ]


def test_values_of_other_types_are_none() -> None:
    assert [positive(each) for each in (0, -1.0, "1", 2)] == [None] * 3 + [2.0]
    assert (object_of({1: "a"}), object_of([1]), object_of(None)) == ({"1": "a"}, {}, {})


def test_units() -> None:
    assert [error_text(each) for each in (1.7e-6, None)] == ["1.70e-06", "–"]
    assert [count_text(each) for each in (12345, -1)] == ["12,345", "–"]
    assert [bytes_text(each) for each in (1023, 16 << 20, 3 << 30)] == ["1023 B", "16.0 MiB", "3.0 GiB"]
    assert [milliseconds(each) for each in (0.3123, 12.44, 1234.0)] == ["0.312 ms", "12.4 ms", "1.23 s"]
