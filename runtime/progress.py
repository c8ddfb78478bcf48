"""Report how far a long piece of work is: what is being done, steps done, steps in all."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # what is being done, how much of it is done, of how much


def silent(what: str, done: int, total: int) -> None:
    """Report nothing, as a ``Progress``."""


class Counter:
    """Counts the parts of one stage: reports ``what (k of n)`` before each."""

    def __init__(self, report: Callable[[str], None], what: str, total: int) -> None:
        self._report, self._what, self._total = report, what, total
        self.done = 0

    def next(self, which: str = "") -> None:
        """Report that the next part begins; ``which`` says more of it."""
        self.done += 1
        self._report(f"{self._what}{which} ({self.done} of {self._total})")

    def skip(self, parts: int) -> None:
        """Count parts that are known already."""
        self.done += parts


class ProgressReporter:
    """Counts steps and reports each to ``progress`` when it begins; ``total`` are expected."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._done, self._total = progress, -1, total

    def next(self, what: str) -> None:
        """Report that the next step begins."""
        self._done += 1
        self._progress(what, self._done, max(self._total, self._done))

    def expect(self, more: int) -> None:
        """Add to the number of steps in all."""
        self._total += more

    def more(self, what: str) -> None:
        """Report a step that was not expected."""
        self.expect(1)
        self.next(what)
