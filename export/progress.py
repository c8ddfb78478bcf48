"""Progress of a long piece of work: the current step, how many are done, how many there are."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]


class ProgressReporter:
    """Calls ``progress`` with each step, how many are done and how many there are."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._done, self._total = progress, -1, total

    def next(self, what: str) -> None:
        """Begin the step ``what``."""
        self._done += 1
        self._progress(what, self._done, max(self._total, self._done))

    def expect(self, more: int) -> None:
        """Add ``more`` steps to the total."""
        self._total += more

    def more(self, what: str) -> None:
        """Begin the step ``what``, which the total did not count."""
        self.expect(1)
        self.next(what)


def silent(what: str, done: int, total: int) -> None:
    """Report nothing."""
