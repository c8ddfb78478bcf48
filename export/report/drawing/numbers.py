"""Figures out of bundle.json, which may hold anything, and how they are written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transom.export.report.drawing.markup import words

MOST_WHOLE = 2**63


def at(value: Any, *keys: str) -> Any:
    """What lies under ``keys``, one after another; None where there is nothing."""
    for key in keys:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def items(value: Any) -> dict[str, Any]:
    """An object as a dict, empty for anything else."""
    return {str(key): each for key, each in value.items()} if isinstance(value, Mapping) else {}


def number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) else None


def positive(value: Any) -> float | None:
    """A finite number above zero, or None."""
    found = number(value)
    return found if found is not None and found > 0 else None


def whole(value: Any) -> int | None:
    """An integer from 0 to what 64 bits hold, or None."""
    return value if type(value) is int and 0 <= value < MOST_WHOLE else None


def error_text(value: Any) -> str:
    """``1.70e-06``."""
    found = number(value)
    return "–" if found is None else f"{found:.2e}"


def short(value: Any, digits: int = 4) -> str:
    """A number with as many digits as tell something: 12,345, 0.9907, 0.0031."""
    found = number(value)
    if found is None:
        return "–"
    if abs(found) >= 1000 and abs(found) < 1e9:
        return f"{found:,.0f}"
    return f"{found:.{digits}g}"


def count_text(value: Any) -> str:
    found = whole(value)
    return "–" if found is None else f"{found:,}"


def bytes_text(size: float) -> str:
    """Bytes in the unit that leaves one to four digits before the point."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def milliseconds(value: float) -> str:
    """Three digits: 0.312 ms, 12.4 ms."""
    return f"{value:.3g} ms" if value < 1000 else f"{value / 1000:.3g} s"


def sizes_text(sizes: Any) -> str:
    """``B=1 S=128``, escaped."""
    return " ".join(f"{words(name, 20)}={words(size, 12)}" for name, size in list(items(sizes).items())[:8]) or "–"
