"""Dates as people write them, beside their ISO 8601 form: what the reference Transformer reads and writes.

    python examples/dates.py export/data/dates_heldout.tsv

writes 1,000 dates, of days that never train, in forms that do.

Rules for ambiguous numeric forms: dots separate day.month.year, slashes month/day/year, and whatever
begins with a year of four digits goes on with month and day. A year of two digits is POSIX's: 69 to 99 mean 1969 to
1999, 00 to 68 mean 2000 to 2068. Days are those of 1900 to 2099.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path

import numpy as np

FIRST, LAST = date(1900, 1, 1), date(2099, 12, 31)
PIVOT = 1969  # two digits are a year of this one's hundred from here on
DAYS = (LAST - FIRST).days + 1  # 73,049
HELD_OUT_DAYS, DEV_DAYS = 7305, 1000  # never in training, in no form; of those that train, what --dev keeps back
CASES = 1000
SEED = 20

MONTHS = ["January", "February", "March", "April", "May", "June", "July"]
MONTHS += ["August", "September", "October", "November", "December"]
WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


def month(day: date) -> str:
    return MONTHS[day.month - 1]


def mon(day: date) -> str:
    return month(day)[:3]


def weekday(day: date) -> str:
    return WEEKDAYS[day.weekday()]


def nth(day: date) -> str:
    """1st, 2nd, 3rd, 4th, 11th, 21st."""
    last = 0 if day.day in (11, 12, 13) else day.day % 10
    return f"{day.day}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(last, 'th') }"


Form = Callable[[date], str]
FORMS: tuple[Form, ...] = (
    lambda d: f"{d.day} {month(d)} {d.year}",
    lambda d: f"{d.day:02} {month(d)} {d.year}",
    lambda d: f"{d.day} {mon(d)} {d.year}",
    lambda d: f"{nth(d)} {month(d)} {d.year}",
    lambda d: f"{nth(d)} of {month(d)} {d.year}",
    lambda d: f"the {nth(d)} of {month(d)}, {d.year}",
    lambda d: f"{month(d)} {d.day}, {d.year}",
    lambda d: f"{month(d)} {nth(d)}, {d.year}",
    lambda d: f"{mon(d)} {d.day}, {d.year}",
    lambda d: f"{mon(d)}. {d.day}, {d.year}",
    lambda d: f"{month(d)} {d.day} {d.year}",
    lambda d: f"{weekday(d)}, {d.day} {month(d)} {d.year}",
    lambda d: f"{weekday(d)}, the {nth(d)} of {month(d)} {d.year}",
    lambda d: f"{weekday(d)}, {month(d)} {d.day}, {d.year}",
    lambda d: f"{weekday(d)[:3]}, {d.day:02} {mon(d)} {d.year}",
    lambda d: f"{weekday(d)[:3]} {mon(d)} {d.day} {d.year}",
    lambda d: f"{d.day}. {month(d)} {d.year}",
    lambda d: f"{d.day}-{mon(d)}-{d.year}",
    lambda d: f"{d.day}-{mon(d)}-{d.year % 100:02}",
    lambda d: f"{d.day:02}.{d.month:02}.{d.year}",
    lambda d: f"{d.day}.{d.month}.{d.year}",
    lambda d: f"{d.day:02}.{d.month:02}.{d.year % 100:02}",
    lambda d: f"{d.month:02}/{d.day:02}/{d.year}",
    lambda d: f"{d.month}/{d.day}/{d.year}",
    lambda d: f"{d.month}/{d.day}/{d.year % 100:02}",
    lambda d: f"{d.year}/{d.month}/{d.day}",
    lambda d: f"{d.year}/{d.month:02}/{d.day:02}",
    lambda d: f"{d.year}-{d.month:02}-{d.day:02}",
)
HELD_OUT_FORMS: tuple[Form, ...] = (  # never in training: known parts in other places
    lambda d: f"{weekday(d)} {nth(d)} {month(d)} {d.year}",
    lambda d: f"{month(d)} the {nth(d)}, {d.year}",
    lambda d: f"{weekday(d)[:3]}, {mon(d)} {d.day}, {d.year}",
    lambda d: f"{d.day:02}-{mon(d)}-{d.year}",
    lambda d: f"{d.year} {month(d)} {d.day}",
    lambda d: f"{d.year}.{d.month:02}.{d.day:02}",
)


def split(*, dev: bool = False) -> tuple[list[date], list[date]]:
    """The days that train, and those that score; with ``dev`` the latter are taken from the former."""
    order = [FIRST + timedelta(days=int(number)) for number in np.random.RandomState(SEED).permutation(DAYS)]
    train, held_out = order[HELD_OUT_DAYS:], order[:HELD_OUT_DAYS]
    return (train[DEV_DAYS:], train[:DEV_DAYS]) if dev else (train, held_out)


def written(day: date, form: Form) -> str | None:
    """The day in that form; None where two digits would mean another year."""
    text = form(day)
    two_digits = str(day.year) not in text
    return None if two_digits and not PIVOT <= day.year < PIVOT + 100 else text


def pairs(days: list[date], forms: tuple[Form, ...], n: int, rng: np.random.RandomState) -> list[tuple[str, str]]:
    """``n`` pairs (as written, ISO), days and forms drawn at random."""
    found: list[tuple[str, str]] = []
    while len(found) < n:
        day, form = days[rng.randint(len(days))], forms[rng.randint(len(forms))]
        text = written(day, form)
        if text is not None:
            found.append((text, day.isoformat()))
    return found


def held_out_pairs(forms: tuple[Form, ...] = FORMS, *, dev: bool = False) -> list[tuple[str, str]]:
    _, days = split(dev=dev)
    return pairs(days, forms, CASES, np.random.RandomState(SEED))


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    rows = [f"{text}\t{iso}\n" for text, iso in held_out_pairs()]
    Path(sys.argv[1]).write_text("".join(rows), encoding="ascii")


if __name__ == "__main__":
    main()
