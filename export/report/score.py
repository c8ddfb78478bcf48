"""The task's score of both sides, each with its 95 % interval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transom.export.report.drawing.chart import LinearAxis, drawing, level, tick_label, upright
from transom.export.report.drawing.markup import section, words
from transom.export.report.drawing.numbers import at, count_text, number, short

SIDES = (("pytorch", "PyTorch"), ("bundle", "this bundle"))
MOST = 1e12  # of a score: fractions and rates are far below
HEIGHT = 22  # pixels of a side's row


def sane(value: Any) -> float | None:
    """A number that a score can be, or None."""
    found = number(value)
    return found if found is not None and abs(found) <= MOST else None


def score_value(score: Any, side: str) -> float | None:
    return sane(at(score, side, "value"))


def interval(score: Any, side: str) -> tuple[float, float] | None:
    """(low, high) of the 95 % interval, or None where it is not two numbers in order."""
    ends = at(score, side, "interval")
    low, high = (sane(end) for end in ends) if isinstance(ends, list) and len(ends) == 2 else (None, None)
    return None if low is None or high is None or high < low else (low, high)


def score_text(value: float | None) -> str:
    """``0.9907``, with as many digits as the command line tells."""
    return "–" if value is None else f"{value:.4f}" if abs(value) < 1000 else short(value)


def score_section(score: Mapping[str, Any] | None) -> str:
    """Two dots on lines, over one axis."""
    sides = [(label, score_value(score, key), interval(score, key), at(score, key, "correct")) for key, label in SIDES]
    values = [value for _, value, _, _ in sides if value is not None]
    if score is None or not values:
        return ""
    ends = [end for _, _, found, _ in sides for end in found or ()]
    axis = around([*values, *ends])
    rows = []
    for label, value, found, correct in sides:
        if value is None:
            continue
        right = f", {count_text(correct)} right" if correct is not None else ""
        within = f"95 % {score_text(found[0])} to {score_text(found[1])}" if found else "no interval"
        rows.append(
            f"<div>{label} <b>{score_text(value)}</b><small>{within}{right}</small></div>"
            f"<div>{dot_and_line(axis, value, found, f'{label}: {score_text(value)}, {within}')}</div>"
        )
    ticks = "".join(tick_label(axis.at(tick), 12, short(tick)) for tick in axis.ticks())
    scale = drawing(16, "axis of the score", [ticks], role="presentation")
    better = "lower is better" if at(score, "lower_is_better") is True else "higher is better"
    return section(
        "Score",
        f"<p>{words(at(score, 'name'))} on {words(at(score, 'data'))}, n = {count_text(at(score, 'n'))}; {better}. "
        '<span class="soft">Both sides run the same code on the same data; the dot is the score, the line its 95 % '
        "interval: what other data of this kind might have given.</span></p>",
        f'<div class="rows">{"".join(rows)}<div></div><div>{scale}</div></div>',
    )


def around(values: list[float]) -> LinearAxis:
    """An axis that holds all the values with some room at either side."""
    low, high = min(values), max(values)
    room = 0.25 * (high - low) or max(abs(high) * 0.01, 1e-9)
    return LinearAxis(low - room, high + room)


def dot_and_line(axis: LinearAxis, value: float, found: tuple[float, float] | None, label: str) -> str:
    middle = HEIGHT / 2
    parts = [upright(axis.at(tick), 0, HEIGHT, "rule") for tick in axis.ticks()]
    if found:
        parts.append(level(axis.at(found[0]), axis.at(found[1]), middle, "reach"))
    parts.append(f'<circle cx="{axis.at(value):.2f}%" cy="{middle:.0f}" r="5" class="mark"/>')
    return drawing(HEIGHT, label, parts)
