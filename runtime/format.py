"""Format figures for people, and read them out of JSON whose values nothing has checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp, isfinite
from pathlib import Path
from typing import Any

MOST_NATS = 700.0  # exp of more exceeds a float
MOST_NATURAL = 2**63


def at(value: Any, *keys: str) -> Any:
    """Return the value under nested ``keys``; None where a key is missing or a level is no object."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def list_of(value: Any) -> Sequence[Any]:
    """Return a list as it is, and an empty one for anything else."""
    return value if isinstance(value, list) else []


def figure(value: Any) -> str:
    """Return a float in four digits, an int or str as it is; of an object its "value"; a dash for the rest."""
    value = at(value, "value") if isinstance(value, Mapping) else value
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else f"{value!s:.160}"


def digits(value: Any) -> str:
    """Return a number with four decimals, ``0.9889``; a dash for anything else, and for an int of over 15 digits."""
    return f"{value:.4f}" if isinstance(value, float) or (type(value) is int and abs(value) < 10**15) else "–"


def perplexity(nats: Any) -> float | None:
    """Return the perplexity of a mean negative log-likelihood in nats; None for no float, or one above MOST_NATS."""
    return exp(nats) if isinstance(nats, float) and nats < MOST_NATS else None


def bytes_text(count: float) -> str:
    """Return a size in bytes in the unit that leaves one to four digits before the point: ``16.0 MiB``."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def sizes_text(sizes: Mapping[str, int]) -> str:
    """Return sizes of axes as the options take them: ``B=1,S=128``."""
    return ",".join(f"{name}={size}" for name, size in sizes.items())


def loops_text(recorded: Any) -> str:
    """Return ``2 loops of 2.1 kernels a step`` for an engine's loops as bundle.json has them; nothing for none."""
    passes = [(natural(at(loop, "kernels")), natural(at(loop, "steps"))) for loop in list_of(recorded)]
    loops = [(kernels, steps) for kernels, steps in passes if kernels]
    steps = [number for _, number in loops if number]
    many = f"{len(loops)} loops" if len(loops) > 1 else "a loop"
    if not loops or len(steps) < len(loops):
        return many if loops else ""
    return f"{many} of {sum(kernels for kernels, _ in loops) / sum(steps):.1f} kernels a step"


def folder_bytes(folder: Path) -> int:
    """Return the size of all files of a folder together, in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def object_of(value: Any) -> dict[str, Any]:
    """Return a JSON object as a dict with text keys, and an empty one for anything else."""
    return {str(key): each for key, each in value.items()} if isinstance(value, Mapping) else {}


def finite(value: Any) -> float | None:
    """Return a finite number as a float; None for anything else, booleans too."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if isfinite(number) else None


def positive(value: Any) -> float | None:
    """Return a finite number above zero as a float; None for anything else."""
    number = finite(value)
    return number if number is not None and number > 0 else None


def natural(value: Any) -> int | None:
    """Return an integer from 0 to what 64 bits hold; None for anything else."""
    return value if type(value) is int and 0 <= value < MOST_NATURAL else None


def error_text(value: Any) -> str:
    """Return an error in exponent notation, ``1.70e-06``; a dash for no number."""
    number = finite(value)
    return "–" if number is None else f"{number:.2e}"


def short(value: Any, digits: int = 4) -> str:
    """Return a number in ``digits`` significant digits: ``12,345``, ``0.9907``, ``0.0031``; a dash for no number."""
    number = finite(value)
    if number is None:
        return "–"
    return f"{number:,.0f}" if 1000 <= abs(number) < 1e9 else f"{number:.{digits}g}"


def count_text(value: Any) -> str:
    """Return a natural number with separators, ``12,345``; a dash for anything else."""
    number = natural(value)
    return "–" if number is None else f"{number:,}"


def milliseconds(value: float) -> str:
    """Return a time given in milliseconds in three digits: ``0.312 ms``, ``12.4 ms``, ``1.2 s``."""
    return f"{value:.3g} ms" if value < 1000 else f"{value / 1000:.3g} s"
