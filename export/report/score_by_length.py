"""Draw a task's score against the length of its inputs, as far as bundle.json records it by length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from transom.export.report.accuracy import LABELS, LEFT, LINE, RIGHT, bounded, interval_of
from transom.export.report.rendering import render, visible
from transom.export.report.svg import LinearAxis, chart, dot, horizontal, line, text, tick_label, vertical
from transom.runtime.format import at, count_text, list_of, natural, short

MOST_LENGTHS = 12  # points of a line
HEIGHT, TOP = 190, 24  # pixels of the plot, and above a score of 1
UP = LinearAxis(0, 1)  # a fraction's, whole: a line that begins elsewhere looks steeper than it is


@dataclass(frozen=True)
class Point:
    """The score on inputs of one length; ``characters`` are their mean."""

    name: str
    characters: float
    value: float
    interval: tuple[float, float] | None
    n: int


def points(score: Any, side: str) -> list[Point]:
    """Return one side's points, the shortest first; what is no fraction of a number of inputs is left out."""
    found = [point_from_json(entry) for entry in list_of(at(score, side, "by_length"))[:MOST_LENGTHS]]
    return sorted((point for point in found if point is not None), key=lambda point: point.characters)


def point_from_json(entry: Any) -> Point | None:
    sizes = list_of(at(entry, "characters"))
    characters = bounded(sizes[1]) if len(sizes) == 3 else None
    value, n = bounded(at(entry, "value")), natural(at(entry, "n"))
    if characters is None or value is None or n is None or not 0 <= value <= 1:
        return None
    return Point(visible(at(entry, "name"), 20), characters, value, interval_of(entry), n)


def score_by_length_section(score: Mapping[str, Any] | None) -> Markup:
    """Draw both sides' scores as lines over the length of the inputs; nothing where they are not recorded."""
    ours, theirs = points(score, "bundle"), points(score, "pytorch")
    if not ours:
        return Markup("")
    counts = sorted({point.n for point in ours})
    each = f"n = {count_text(counts[0])}{f' to {count_text(counts[-1])}' if len(counts) > 1 else ''} for each"
    return render(
        "score_by_length",
        name=at(score, "name"),
        data=at(score, "data"),
        each=each,
        both=bool(theirs),
        drawing=plot(ours, theirs, f"score against characters: {len(ours)} lengths, {each}"),
    )


def plot(ours: Sequence[Point], theirs: Sequence[Point], label: str) -> Markup:
    """Draw our points with their numbers, intervals and lengths, joined by lines, over theirs as a dashed line."""
    sizes = [point.characters for point in (*ours, *theirs)]
    margin = 0.05 * (max(sizes) - min(sizes)) or 1.0
    across = LinearAxis(min(sizes) - margin, max(sizes) + margin)

    def x(characters: float) -> float:
        return LEFT + across.at(characters) * (100 - LEFT - RIGHT) / 100

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP) * (1 - UP.at(value) / 100)

    parts = [horizontal(0, 100, y(tick), "rule") for tick in UP.ticks(5)]
    parts += [tick_label(0, y(tick) - 3, short(tick)) for tick in UP.ticks(5)]
    for points, kind in ((theirs, "average"), (ours, "reach")):
        for a, b in pairwise(points):
            parts.append(line(x(a.characters), y(a.value), x(b.characters), y(b.value), kind))
    for point in ours:
        place, above = x(point.characters), y(point.value) - 4
        if point.interval is not None:
            low, high = point.interval
            parts.append(vertical(place, y(high), y(low), "reach"))
            above = min(above, y(high))
        title = f"{point.name}, {point.characters:.1f} characters: {point.value:.4f}"
        parts += [
            dot(place, y(point.value), "mark", title),
            text(place, above - 5, f"{point.value:.3f}", "in"),
            text(place, HEIGHT + 2 + LINE, point.name, "in"),
            text(place, HEIGHT + 2 + 2 * LINE, short(round(point.characters))),
        ]
    return chart(HEIGHT + LABELS + LINE, label, parts)
