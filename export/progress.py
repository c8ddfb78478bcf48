"""How far a long piece of work is: what is being done, how many steps are behind, how many there are."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]


class ProgressReporter:
    """Tells ``progress`` what is being done, how many steps are behind and how many there are."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._done, self._total = progress, -1, total

    def next(self, what: str) -> None:
        self._done += 1
        self._progress(what, self._done, max(self._total, self._done))

    def expect(self, more: int) -> None:
        self._total += more

    def more(self, what: str) -> None:
        """A step that nobody expected."""
        self.expect(1)
        self.next(what)


def silent(what: str, done: int, total: int) -> None:
    """A ``Progress`` that tells nobody."""
