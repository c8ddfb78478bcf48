"""Lists of dates as people write them, beside their ISO 8601 forms: what the reference seq2seq models read and write.

    python examples/date_lists.py export/data/date_lists_heldout.tsv

writes 900 lists of days that never train, 150 of each number of dates from one to six.

"3 May 1921; 12.6.2004; Thu Dec 2 1965" becomes "1921-05-03 2004-06-12 1965-12-02". Days, forms and the rules of numeric
forms are those of dates.py; no form has a semicolon.
"""

from __future__ import annotations

import sys
from datetime import date
from pathlib import Path

import numpy as np
from dates import FORMS, pairs, split

MOST = 6  # dates of a list
SEPARATOR, ISO_SEPARATOR = "; ", " "
CASES = 900  # in equal parts of every number of dates
SEED = 20


def lists(days: list[date], dates: int, n: int, rng: np.random.RandomState) -> list[tuple[str, str]]:
    """``n`` lists of ``dates`` dates (as written, ISO), days and forms drawn at random."""
    drawn = pairs(days, FORMS, n * dates, rng)
    parts = [zip(*drawn[first : first + dates], strict=True) for first in range(0, len(drawn), dates)]
    return [(SEPARATOR.join(texts), ISO_SEPARATOR.join(isos)) for texts, isos in parts]


def even_lists(days: list[date], n: int, rng: np.random.RandomState) -> list[tuple[str, str]]:
    """``n`` lists, a multiple of MOST: one of each number of dates in turn, so that any part in order is even."""
    by_number = [lists(days, dates, n // MOST, rng) for dates in range(1, MOST + 1)]
    return [pair for turn in zip(*by_number, strict=True) for pair in turn]


def held_out_lists(*, dev: bool = False) -> list[tuple[str, str]]:
    _, days = split(dev=dev)
    return even_lists(days, CASES, np.random.RandomState(SEED))


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    rows = [f"{text}\t{isos}\n" for text, isos in held_out_lists()]
    Path(sys.argv[1]).write_text("".join(rows), encoding="ascii")


if __name__ == "__main__":
    main()
