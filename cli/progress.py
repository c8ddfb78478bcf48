"""Show progress on stderr: a bar on a terminal, one line per stage elsewhere, nothing with ``--json``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from transom.cli.output import printable, say
from transom.runtime.progress import Progress, silent


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


def lines() -> Progress:
    """Return a function that prints a line whenever another stage begins."""
    last = ""

    def report(what: str, done: int, total: int) -> None:
        nonlocal last
        if what != last and done < total:
            say(f"{what} ...")
        last = what

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
    with Bar(*columns, console=console, transient=True) as shown:
        task = shown.add_task("starting", total=None)
        yield lambda what, done, total: shown.update(task, description=printable(what), completed=done, total=total)
