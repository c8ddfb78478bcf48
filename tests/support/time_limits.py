"""How long tests wait before they call something hung: limits for a machine several times as busy as ours.

A test function has pyproject.toml's ``timeout``, which fixtures do not count towards. A fixture has MAKING_S, and so
has what ``once`` makes for several tests: the clock of the test that asked first stands still meanwhile.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest

PATIENCE_S = 600  # for a process or a thread that takes some seconds: below the ``timeout`` of a test
MAKING_S = 1800  # for what tests share, the longest of which takes a minute; another worker may be making it


@contextmanager
def within(seconds: float, what: str) -> Iterator[None]:
    """Fail where the block takes longer; the timer that was running before goes on behind it.

    Only where pytest-timeout works by signals: not on Windows, and in the main thread alone.
    """
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        pytest.fail(f"{what} took more than {seconds:g} s")

    left, _ = signal.setitimer(signal.ITIMER_REAL, 0)
    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Generator[None, object, object]:
    """pytest's hook; conftest.py imports it."""
    with within(MAKING_S, f"the fixture {fixturedef.argname}"):
        return (yield)
