"""Matrices as SVG pictures: one square per element, of a stronger colour where it is larger.

Colours come from the page: class ``mark`` for what is positive, ``warm`` for what is negative.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from transom.export.report.drawing.markup import token_words

LABEL = 12  # pixels of a label's type
LETTER = LABEL * 0.62  # width of one
SHOWN = 0.004  # weights below leave no trace at 8 bits per colour
LEVELS = 12  # shades of a thumbnail

Matrix = NDArray[np.float32]


def shade(weight: float) -> float:
    """Opacity of a weight in 0..1: its square root, so that a twentieth, spread over twenty tokens, is still seen."""
    return float(min(max(weight, 0.0), 1.0) ** 0.5)


def shades_key() -> str:
    """A legend of ``shade``."""
    marks = "".join(f'<i style="--p:{shade(weight):.2f}"></i>{weight:g}' for weight in (0.01, 0.1, 0.25, 0.5, 1))
    return f'<div class="key">weight {marks}</div>'


def heatmap(
    weights: Matrix, rows: Sequence[str], columns: Sequence[str], label: str, *, cell: int = 20, verb: str = "looks at"
) -> str:
    """``weights`` (R, C) in 0..1 with a name per row and column, as an ``<svg>`` element.

    Every square says its numbers when pointed at. ``label`` is escaped already.
    """
    rows, columns = [token_words(name, 20) for name in rows], [token_words(name, 20) for name in columns]
    left = 8 + max(map(len, rows)) * LETTER
    top = 8 + max(LABEL, max(map(len, columns)) * LETTER)
    width, height = left + cell * len(columns) + 1, top + cell * len(rows) + 1
    parts = [
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}" role="img" '
        f'aria-label="{label}">',
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{cell * len(columns)}" height="{cell * len(rows)}" class="frame"/>',
    ]
    for c, name in enumerate(columns):
        x = left + cell * (c + 0.5)
        place = f"translate({x + LABEL * 0.35:.1f} {top - 5:.1f}) rotate(-90)"
        if len(name) == 1:  # single letters stand upright
            place = f"translate({x - LABEL * 0.3:.1f} {top - 5:.1f})"
        parts.append(f'<text transform="{place}" class="mono">{name}</text>')
    for r, name in enumerate(rows):
        y = top + cell * (r + 0.5) + LABEL * 0.35
        parts.append(f'<text x="{left - 5:.1f}" y="{y:.1f}" text-anchor="end" class="mono">{name}</text>')
    for r, c in np.argwhere(weights >= SHOWN).tolist():
        value = float(weights[r, c])
        parts.append(
            f'<rect x="{left + cell * c:.1f}" y="{top + cell * r:.1f}" width="{cell}" height="{cell}" class="mark" '
            f'fill-opacity="{shade(value):.3f}"><title>{rows[r]} {verb} {columns[c]}: {value:.3f}</title></rect>'
        )
    return f'<div class="scroll">{"".join([*parts, "</svg>"])}</div>'


def thumbnail(weights: Matrix, label: str, kind: str = "") -> str:
    """``weights`` (R, C) in -1..1 in LEVELS shades, without names: as small as its place, a few bytes a square."""
    R, C = weights.shape
    opacity = np.sqrt(np.clip(np.abs(weights), 0, 1))
    levels = np.round(opacity * LEVELS).astype(int)
    parts = [
        path(np.argwhere((levels == level) & ((weights > 0) == (name == "mark"))).tolist(), name, level)
        for name in ("mark", "warm")
        for level in range(1, LEVELS + 1)
    ]
    chosen = f' class="{kind}"' if kind else ""
    drawn = "".join(filter(None, parts))
    return (
        f'<svg viewBox="0 0 {C} {R}" shape-rendering="crispEdges" role="img" aria-label="{label}"{chosen}>{drawn}</svg>'
    )


def path(places: list[list[int]], name: str, level: int) -> str:
    """All squares of one shade."""
    if not places:
        return ""
    squares = "".join(f"M{c} {r}h1v1h-1z" for r, c in places)
    return f'<path class="{name}" fill-opacity="{level / LEVELS:.2f}" d="{squares}"/>'
