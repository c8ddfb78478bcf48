"""A matrix of weights as an SVG picture: one square per element, darker where it is larger."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

LABEL = 12  # pixels of a label's type
SHOWN = 0.004  # weights below leave no trace at 8 bits per colour


def heatmap(
    weights: NDArray[np.float32], rows: Sequence[str], columns: Sequence[str], *, cell: int = 20, labels: bool = True
) -> str:
    """``weights`` (R, C) in 0..1 with a name per row and column, as an ``<svg>`` element.

    Colours come from the page: ``--mark`` for the squares, ``currentColor`` for the type. Every square says its
    numbers when pointed at.
    """
    left = 8 + max(map(len, rows)) * LABEL * 0.62 if labels else 1
    top = 8 + max(LABEL, max(map(len, columns)) * LABEL * 0.62) if labels else 1
    width, height = left + cell * len(columns) + 1, top + cell * len(rows) + 1
    parts = [
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}" role="img" '
        f'aria-label="attention of {len(rows)} output tokens over {len(columns)} source tokens">',
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{cell * len(columns)}" height="{cell * len(rows)}" class="frame"/>',
    ]
    if labels:
        for c, name in enumerate(columns):
            x = left + cell * (c + 0.5)
            turned = len(name) > 1  # single letters stand upright
            place = (
                f"translate({x + LABEL * 0.35:.1f} {top - 5:.1f}) rotate(-90)"
                if turned
                else (f"translate({x - LABEL * 0.3:.1f} {top - 5:.1f})")
            )
            parts.append(f'<text transform="{place}" font-size="{LABEL}">{shown(name)}</text>')
        for r, name in enumerate(rows):
            y = top + cell * (r + 0.5) + LABEL * 0.35
            parts.append(
                f'<text x="{left - 5:.1f}" y="{y:.1f}" text-anchor="end" font-size="{LABEL}">{shown(name)}</text>'
            )
    for r, c in np.argwhere(weights >= SHOWN).tolist():
        value = float(weights[r, c])
        title = f"{shown(rows[r])} looks at {shown(columns[c])}: {value:.3f}"
        parts.append(
            f'<rect x="{left + cell * c:.1f}" y="{top + cell * r:.1f}" width="{cell}" height="{cell}" class="mark" '
            f'fill-opacity="{value:.3f}"><title>{title}</title></rect>'
        )
    return "".join([*parts, "</svg>"])


def shown(token: str) -> str:
    """A token as a person can see it, escaped for XML: blanks as ␣, what cannot be printed by its code."""
    visible = token.replace(" ", "␣").replace("▁", "␣")
    return escape("".join(c if c.isprintable() else f"U+{ord(c):04X}" for c in visible))
