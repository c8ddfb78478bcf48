"""Show progress on stderr: a bar on a terminal, lines elsewhere, nothing with ``--json``."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from transom.cli.output import printable, say
from transom.runtime.progress import Progress, silent

COUNT = re.compile(r"(.*) \((\d+) of (\d+)\)")  # as ``runtime.progress.Counter`` reports it
EVERY = 15.0  # seconds: how often a line says how far a long stage is
SOON = 5.0  # seconds of a stage before its end is estimated


class Estimate:
    """Estimates the seconds left of a stage from the pace at which its parts were counted so far.

    ``clock`` returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began, self._done, self._total = 0.0, 0, 0

    def update(self, what: str) -> tuple[str, str]:
        """Return a report's stage, without its count, and the count in words: ``3 of 12, about 40 s left``."""
        found = COUNT.fullmatch(what)
        if found is None:
            self._total = 0
            return what, ""
        stage, done, total = found[1], int(found[2]), int(found[3])
        now = self._clock()
        if total != self._total or done <= self._done:
            self._began, self._total = now, total
        self._done = done
        words = f"{done} of {total}"
        spent = now - self._began
        if done > 1 and spent >= SOON:
            words += f", about {duration(spent / (done - 1) * (total - done + 1))} left"
        return stage, words


def duration(seconds: float) -> str:
    """Return ``40 s``, ``3 min``, ``1.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextmanager
def progress(quiet: bool) -> Iterator[Progress]:
    """Yield the function that a stage reports to; the bar disappears at the end, lines stay."""
    if quiet:
        yield silent
    elif sys.stderr.isatty():
        with bar() as report:
            yield report
    else:
        yield lines()


def lines(clock: Callable[[], float] = time.monotonic) -> Progress:
    """Return a function that prints a line when another stage begins, and every EVERY seconds how far it is."""
    estimate, last, printed = Estimate(clock), "", 0.0

    def report(what: str, done: int, total: int) -> None:
        nonlocal last, printed
        stage, count = estimate.update(what)
        now = clock()
        if done < total and (stage != last or (count and now - printed >= EVERY)):
            say(f"{stage} ..." if stage != last else f"{stage} ({count}) ...")
            printed = now
        last = stage

    return report


@contextmanager
def bar() -> Iterator[Progress]:
    """Yield a function that updates a bar."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True, markup=False, emoji=False, highlight=False)
    text = TextColumn("{task.description}", markup=False)
    columns = (SpinnerColumn(), text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    estimate = Estimate()
    with Bar(*columns, console=console, transient=True) as shown:
        task = shown.add_task("starting", total=None)

        def report(what: str, done: int, total: int) -> None:
            stage, count = estimate.update(what)
            shown.update(
                task, description=printable(f"{stage} ({count})" if count else stage), completed=done, total=total
            )

        yield report
