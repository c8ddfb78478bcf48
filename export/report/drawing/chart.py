"""Charts as wide as the reader's window: x in percent, y in pixels, so that letters keep their size on a phone."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class LogAxis:
    """From ``low`` to ``high``, both above zero, on a logarithmic scale."""

    low: float
    high: float

    def at(self, value: float) -> float:
        """Where a value lies, in percent of the width; what is outside lies at the end."""
        if value <= self.low:
            return 0.0
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return 100 * min(share, 1.0)

    def decades(self, most: int = 8) -> list[float]:
        """Powers of ten on the axis, at most ``most`` of them."""
        first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
        step = max(1, math.ceil((last - first + 1) / most))
        return [10.0**power for power in range(last, first - 1, -step)]


@dataclass(frozen=True)
class LinearAxis:
    """From ``low`` to ``high``."""

    low: float
    high: float

    def at(self, value: float) -> float:
        """Where a value lies, in percent of the width; what is outside lies at the end."""
        return 100 * min(max((value - self.low) / (self.high - self.low), 0.0), 1.0)

    def ticks(self, about: int = 4) -> list[float]:
        """Round numbers on the axis, some ``about`` of them."""
        step = 10 ** math.floor(math.log10((self.high - self.low) / about))
        step = next(step * times for times in (1, 2, 5, 10) if (self.high - self.low) / (step * times) <= about + 1e-9)
        return [step * k for k in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]


def drawing(height: int, label: str, parts: Iterable[str], *, role: str = "img") -> str:
    """An ``<svg>`` of full width; ``label`` is escaped already."""
    return (
        f'<svg width="100%" height="{height}" role="{role}" aria-label="{label}" overflow="visible">'
        f"{''.join(parts)}</svg>"
    )


def bar(x: float, width: float, y: float, height: float, kind: str, title: str = "", shade: float | None = None) -> str:
    """A rectangle, x and width in percent; ``title`` is escaped already and shown when pointed at."""
    opacity = "" if shade is None else f' fill-opacity="{shade:.3f}"'
    told = f"><title>{title}</title></rect>" if title else "/>"
    place = f'x="{x:.2f}%" width="{width:.2f}%" y="{y:.1f}" height="{height:.1f}"'
    return f'<rect {place} class="{kind}"{opacity}{told}'


def upright(x: float, top: float, bottom: float, kind: str) -> str:
    """A vertical line at ``x`` percent."""
    return f'<line x1="{x:.2f}%" x2="{x:.2f}%" y1="{top:.1f}" y2="{bottom:.1f}" class="{kind}"/>'


def level(x1: float, x2: float, y: float, kind: str) -> str:
    """A horizontal line from ``x1`` to ``x2`` percent."""
    return f'<line x1="{x1:.2f}%" x2="{x2:.2f}%" y1="{y:.1f}" y2="{y:.1f}" class="{kind}"/>'


def slope(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A line from one point to another, x in percent, y in pixels."""
    return f'<line x1="{x1:.2f}%" x2="{x2:.2f}%" y1="{y1:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def dot(x: float, y: float, kind: str, title: str) -> str:
    """A point; ``title`` is escaped already and shown when pointed at."""
    return f'<circle cx="{x:.2f}%" cy="{y:.1f}" r="4" class="{kind}"><title>{title}</title></circle>'


def tick_label(x: float, y: float, text: str, kind: str = "") -> str:
    """Text under ``x`` percent; near the ends of the axis it stays inside."""
    anchor = "start" if x < 4 else "end" if x > 96 else "middle"
    return f'<text x="{x:.2f}%" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{text}</text>'.replace(
        ' class=""', ""
    )
