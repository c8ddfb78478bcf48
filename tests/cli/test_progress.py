"""What stderr shows of a long command: stages, counts, and how long is left."""

from __future__ import annotations

import pytest

from transom.cli.progress import Estimate, duration, lines
from transom.runtime.progress import Counter, ProgressReporter


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_what_is_left_follows_the_pace_of_the_stage() -> None:
    """Two parts in 20 s, eight to go: 80 s."""
    clock = Clock()
    estimate = Estimate(clock)
    assert estimate.update("calibrating (1 of 10)") == ("calibrating", "1 of 10")
    clock.now = 20.0
    assert estimate.update("calibrating (3 of 10)") == ("calibrating", "3 of 10, about 80 s left")
    assert estimate.update("measuring (1 of 10)") == ("measuring", "1 of 10"), "another stage begins anew"
    assert estimate.update("writing") == ("writing", "")


def test_lines_stand_for_stages_and_every_quarter_of_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    counter = Counter(ProgressReporter(lines(clock), 50).next, "calibrating", 40)
    for _ in range(40):
        clock.now += 1.0
        counter.next()
    assert capsys.readouterr().err.splitlines() == [
        "calibrating ...",
        "calibrating (16 of 40, about 25 s left) ...",
        "calibrating (31 of 40, about 10 s left) ...",
    ]


@pytest.mark.parametrize(("seconds", "words"), [(0.4, "0 s"), (89.0, "89 s"), (600.0, "10 min"), (9000.0, "2.5 h")])
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words
