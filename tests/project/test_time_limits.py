"""The limits themselves: a hung test, fixture or process ends, and a slow fixture costs no test its time."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from paths import TESTS
from time_limits import MAKING_S, PATIENCE_S, within

HUNG = """
import time
import pytest

@pytest.fixture(scope="session")
def hung():
    time.sleep(3600)

def test_hung(hung):
    pass
"""


def limit_of(config: pytest.Config) -> float:
    return float(config.getini("timeout"))


def test_fixtures_have_limits_of_their_own(pytestconfig: pytest.Config) -> None:
    """What a process may take is less, so that the failure names the process."""
    assert pytestconfig.getini("timeout_func_only") is True
    assert 0 < PATIENCE_S < limit_of(pytestconfig) < MAKING_S


def test_a_test_that_hangs_is_ended(pytestconfig: pytest.Config) -> None:
    """pytest-timeout's timer runs."""
    left, _ = signal.getitimer(signal.ITIMER_REAL)
    assert 0 < left <= limit_of(pytestconfig)


def test_the_clock_stands_still_while_something_is_made(pytestconfig: pytest.Config) -> None:
    handler = signal.getsignal(signal.SIGALRM)
    before, _ = signal.getitimer(signal.ITIMER_REAL)
    with within(10 * limit_of(pytestconfig), "the outer"):
        with within(20 * limit_of(pytestconfig), "the inner"):
            assert signal.getitimer(signal.ITIMER_REAL)[0] > 10 * limit_of(pytestconfig)
        assert limit_of(pytestconfig) < signal.getitimer(signal.ITIMER_REAL)[0] <= 10 * limit_of(pytestconfig)
    assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= before
    assert signal.getsignal(signal.SIGALRM) is handler


def test_what_hangs_while_it_is_made_is_ended() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"the bundle took more than 0\.01 s"), within(0.01, "the bundle"):
        time.sleep(3600)
    assert signal.getitimer(signal.ITIMER_REAL)[0] > 0


def test_a_fixture_that_hangs_is_ended(tmp_path: Path) -> None:
    """In a run of its own, by the hook that conftest.py has from here."""
    hook = "import time_limits\nfrom time_limits import pytest_fixture_setup\ntime_limits.MAKING_S = 0.1\n"
    (tmp_path / "conftest.py").write_text(hook)
    (tmp_path / "test_hung.py").write_text(HUNG)
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {TESTS / 'support'}\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_hung.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 1, done.stdout
    assert "the fixture hung took more than 0.1 s" in done.stdout


def test_conftest_has_the_hook(pytestconfig: pytest.Config) -> None:
    owners = [impl.function.__module__ for impl in pytestconfig.hook.pytest_fixture_setup.get_hookimpls()]
    assert "time_limits" in owners
