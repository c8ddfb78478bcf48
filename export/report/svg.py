"""Draw SVG: axes, the elements of charts, heat maps. Text is escaped; colours are classes of ``templates/style.css``.

Charts are as wide as the window, x in percent and y in pixels, so that letters keep their size on a phone. In a matrix,
class ``mark`` is for positive values and ``warm`` for negative ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from transom.export.report.rendering import visible_token

LABEL = 12  # pixels of a heat map's labels
LETTER = LABEL * 0.62  # width of one letter
SHOWN = 0.004  # weights below are invisible at 8 bits per colour
LEVELS = 12  # shades of a thumbnail

Matrix = NDArray[np.float32]


@dataclass(frozen=True)
class LogAxis:
    """A logarithmic axis from ``low`` to ``high``, both above zero."""

    low: float
    high: float

    def at(self, value: float) -> float:
        """Return the position of a value in percent of the width; values outside are at the ends."""
        if value <= self.low:
            return 0.0
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return 100 * min(share, 1.0)

    def decades(self, most: int = 8) -> list[float]:
        """Return powers of ten on the axis, at most ``most`` of them."""
        first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
        step = max(1, math.ceil((last - first + 1) / most))
        return [10.0**power for power in range(last, first - 1, -step)]


@dataclass(frozen=True)
class LinearAxis:
    """A linear axis from ``low`` to ``high``."""

    low: float
    high: float

    def at(self, value: float) -> float:
        """Return the position of a value in percent of the width; values outside are at the ends."""
        return 100 * min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)

    def ticks(self, about: int = 4) -> list[float]:
        """Return round numbers on the axis, ``about`` that many."""
        step = 10 ** math.floor(math.log10((self.high - self.low) / about))
        step = next(step * times for times in (1, 2, 5, 10) if (self.high - self.low) / (step * times) <= about + 1e-9)
        return [step * k for k in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]


def axis_around(values: Sequence[float]) -> LinearAxis:
    """Return an axis that holds all the values with a margin at either side."""
    low, high = min(values), max(values)
    margin = 0.25 * (high - low) or max(abs(high) * 0.01, 1e-9)
    return LinearAxis(low - margin, high + margin)


def chart(height: int, label: str, parts: Iterable[Markup], *, role: str = "img") -> Markup:
    """Draw an ``<svg>`` of full width."""
    frame = Markup('<svg width="100%" height="{}" role="{}" aria-label="{}" overflow="visible">{}</svg>')
    return frame.format(height, role, label, Markup("").join(parts))


def bar(
    x: float, width: float, y: float, height: float, kind: str, title: str = "", shade: float | None = None
) -> Markup:
    """Draw a rectangle, x and width in percent; ``title`` is its tooltip."""
    opacity = "" if shade is None else f' fill-opacity="{shade:.3f}"'
    place = f'x="{x:.2f}%" width="{width:.2f}%" y="{y:.1f}" height="{height:.1f}"'
    end = Markup("><title>{}</title></rect>").format(title) if title else Markup("/>")
    return Markup(f'<rect {place} class="{kind}"{opacity}') + end


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Markup:
    """Draw a line between two points, x in percent, y in pixels."""
    return Markup(f'<line x1="{x1:.2f}%" x2="{x2:.2f}%" y1="{y1:.1f}" y2="{y2:.1f}" class="{kind}"/>')


def vertical(x: float, top: float, bottom: float, kind: str) -> Markup:
    """Draw a vertical line at ``x`` percent."""
    return line(x, top, x, bottom, kind)


def horizontal(x1: float, x2: float, y: float, kind: str) -> Markup:
    """Draw a horizontal line from ``x1`` to ``x2`` percent."""
    return line(x1, y, x2, y, kind)


def dot(x: float, y: float, kind: str, title: str = "", radius: int = 4) -> Markup:
    """Draw a point; ``title`` is its tooltip."""
    end = Markup("><title>{}</title></circle>").format(title) if title else Markup("/>")
    return Markup(f'<circle cx="{x:.2f}%" cy="{y:.1f}" r="{radius}" class="{kind}"') + end


def text(x: float, y: float, content: str, kind: str = "", anchor: str = "middle") -> Markup:
    """Draw text at ``x`` percent."""
    chosen = f' class="{kind}"' if kind else ""
    start = Markup(f'<text x="{x:.2f}%" y="{y:.1f}" text-anchor="{anchor}"{chosen}>')
    return start + Markup("{}</text>").format(content)


def tick_label(x: float, y: float, content: str, kind: str = "") -> Markup:
    """Draw text under ``x`` percent that stays inside the chart near its ends."""
    return text(x, y, content, kind, "start" if x < 4 else "end" if x > 96 else "middle")


def shade(weight: float) -> float:
    """Return the opacity of a weight in 0..1: its square root, so that a twentieth is still visible."""
    return float(min(max(weight, 0.0), 1.0) ** 0.5)


def heatmap(
    weights: Matrix, rows: Sequence[str], columns: Sequence[str], label: str, *, cell: int = 20, verb: str = "looks at"
) -> Markup:
    """Draw ``weights`` (R, C) in 0..1 with a name per row and column and the numbers as tooltips."""
    rows, columns = [visible_token(name, 20) for name in rows], [visible_token(name, 20) for name in columns]
    left = 8 + max(map(len, rows)) * LETTER
    top = 8 + max(LABEL, max(map(len, columns)) * LETTER)
    width, height = left + cell * len(columns) + 1, top + cell * len(rows) + 1
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    frame = f'x="{left:.1f}" y="{top:.1f}" width="{cell * len(columns)}" height="{cell * len(rows)}"'
    parts = [
        Markup(f'<svg {size} role="img" ') + Markup('aria-label="{}">').format(label),
        Markup(f'<rect {frame} class="frame"/>'),
    ]
    for c, name in enumerate(columns):
        x = left + cell * (c + 0.5)
        place = f"translate({x + LABEL * 0.35:.1f} {top - 5:.1f}) rotate(-90)"
        if len(name) == 1:  # single letters stand upright
            place = f"translate({x - LABEL * 0.3:.1f} {top - 5:.1f})"
        parts.append(Markup('<text transform="{}" class="mono">{}</text>').format(place, name))
    for r, name in enumerate(rows):
        place = f'x="{left - 5:.1f}" y="{top + cell * (r + 0.5) + LABEL * 0.35:.1f}"'
        parts.append(Markup(f'<text {place} text-anchor="end" class="mono">') + Markup("{}</text>").format(name))
    for r, c in np.argwhere(weights >= SHOWN).tolist():
        value = float(weights[r, c])
        place = f'x="{left + cell * c:.1f}" y="{top + cell * r:.1f}" width="{cell}" height="{cell}"'
        tooltip = Markup("<title>{} {} {}: {:.3f}</title></rect>").format(rows[r], verb, columns[c], value)
        parts.append(Markup(f'<rect {place} class="mark" fill-opacity="{shade(value):.3f}">') + tooltip)
    return Markup('<div class="scroll">{}</svg></div>').format(Markup("").join(parts))


def thumbnail(weights: Matrix, label: str, kind: str = "") -> Markup:
    """Draw ``weights`` (R, C) in -1..1 in LEVELS shades, without names: scalable, a few bytes per square."""
    R, C = weights.shape
    opacity = np.sqrt(np.clip(np.abs(weights), 0, 1))
    levels = np.round(opacity * LEVELS).astype(int)
    parts = [
        squares(np.argwhere((levels == level) & ((weights > 0) == (name == "mark"))).tolist(), name, level)
        for name in ("mark", "warm")
        for level in range(1, LEVELS + 1)
    ]
    chosen = Markup(' class="{}"').format(kind) if kind else ""
    start = Markup('<svg viewBox="0 0 {} {}" shape-rendering="crispEdges" role="img" aria-label="{}"{}>{}</svg>')
    return start.format(C, R, label, chosen, Markup("").join(parts))


def squares(places: list[list[int]], name: str, level: int) -> Markup:
    """Draw all squares of one shade as one path."""
    if not places:
        return Markup("")
    path = "".join(f"M{c} {r}h1v1h-1z" for r, c in places)
    return Markup(f'<path class="{name}" fill-opacity="{level / LEVELS:.2f}" d="{path}"/>')
