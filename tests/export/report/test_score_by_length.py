"""The chart of a score against the length of its inputs, as bundle.json records it."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from report_pages import Page
from transom.export.metrics import Accuracy, LengthAccuracy
from transom.export.report.score_by_length import points, score_by_length_section


def recorded(*right: int, n: int = 10) -> dict[str, Any]:
    """Return a score as an export records it: ``right`` of ``n`` for each length of 20 characters more."""
    answers = [[case < count for case in range(n)] for count in right]
    parts = tuple(
        LengthAccuracy(f"{k} dates", (18 * k, 20.0 * k, 25 * k), Accuracy.of_each("exact match", "lists", each))
        for k, each in enumerate(answers, 1)
    )
    every = [case for each in answers for case in each]
    accuracy = replace(Accuracy.of_each("exact match", "lists", every), by_length=parts)
    side = accuracy.side_fields()
    return {**accuracy.shared_fields(), "pytorch": side, "bundle": side}


def test_points_are_what_was_recorded() -> None:
    found = points(recorded(10, 9, 2), "bundle")
    assert [(point.name, point.characters, point.value, point.n) for point in found] == [
        ("1 dates", 20.0, 1.0, 10), ("2 dates", 40.0, 0.9, 10), ("3 dates", 60.0, 0.2, 10)
    ]  # fmt: skip
    low, high = found[1].interval or (0.0, 0.0)
    assert 0.5 < low < 0.9 < high < 1


def test_the_chart_by_pencil() -> None:
    """Points at 20 and 40 of an axis from 19 to 41, 88 % of the width from 9 % on; heights 24 for 1 and 107 for 0.5."""
    html = str(score_by_length_section(recorded(10, 5)))
    page = Page(html)
    assert page.headings == ["Score against length"]
    assert re.findall(r'<circle cx="([\d.]+)%" cy="([\d.]+)"', html) == [("13.00", "24.0"), ("93.00", "107.0")]
    assert page.titles == ["1 dates, 20.0 characters: 1.0000", "2 dates, 40.0 characters: 0.5000"]
    assert re.findall(r"<text[^>]*>([^<]*)</text>", html) == [
        "0", "0.2", "0.4", "0.6", "0.8", "1", "1.000", "1 dates", "20", "0.500", "2 dates", "40"
    ]  # fmt: skip
    text = "".join(page.text)
    assert "exact match on lists, the inputs of each length apart, n = 10 for each." in text
    assert "the dashed line is PyTorch's" in text


def test_one_side_one_length_or_different_counts() -> None:
    one = recorded(7)
    del one["pytorch"]
    html = str(score_by_length_section(one))
    assert html.count("<circle") == 1
    assert "PyTorch" not in html
    several = recorded(7, 8)
    several["bundle"]["by_length"][1]["n"] = 12
    assert "n = 10 to 12 for each" in str(score_by_length_section(several))


@pytest.mark.parametrize("score", [None, {}, {"bundle": {"value": 0.5}}, {"bundle": {"by_length": "x"}}])
def test_a_score_without_lengths_has_no_chart(score: Any) -> None:
    assert score_by_length_section(score) == ""


def test_what_is_no_score_is_left_out() -> None:
    good = {"name": "1 date", "characters": [1, 2.0, 3], "value": 0.5, "n": 4}
    bad = [
        {**good, "value": 1.5}, {**good, "value": float("nan")}, {**good, "value": None}, {**good, "n": -1},
        {**good, "characters": [1, 2]}, {**good, "characters": [1, "2", 3]}, {**good, "characters": 2.0}, 7, None,
    ]  # fmt: skip
    html = str(score_by_length_section({"bundle": {"by_length": [*bad, {**good, "name": "<b>\u202e"}]}}))
    assert html.count("<circle") == 1
    assert "&lt;b&gt;U+202E" in html
    assert "<b>" not in html.replace("<b></b>", "")
    assert str(score_by_length_section({"bundle": {"by_length": [good] * 500}})).count("<circle") == 12
