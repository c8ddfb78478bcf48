"""The list of guards that `make mutate` breaks is up to date, and it sees what no test notices."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from mutate import GUARDS, Guard, Outcome, page, problem_of, read_guards
from paths import REPO
from time_limits import PATIENCE_S

KNOWN = read_guards()


@pytest.mark.parametrize("guard", KNOWN, ids=lambda guard: f"{guard.subject}: {guard.name}")
def test_what_a_guard_replaces_is_there_once(guard: Guard) -> None:
    assert problem_of(guard, REPO) is None


def test_every_subject_has_guards_and_no_guard_is_listed_twice() -> None:
    subjects = Counter(guard.subject for guard in KNOWN)
    assert subjects.keys() == {path.stem for path in GUARDS.glob("*.toml")}
    assert {"parity", "selftest", "gate", "manifest", "runtime"} <= subjects.keys()
    names = Counter((guard.subject, guard.file, guard.name) for guard in KNOWN)
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"file": "runtime/nothing.py"}, r"runtime/nothing\.py is not there"),
        ({"code": "nothing like this"}, "its code is 0 times in runtime/golden_reference.py"),
        ({"broken": "BELOW_ALL_ZEROS = 0.95"}, "expected once, and another text in its place"),
        ({"tests": ("tests/test_nothing.py::test_it",)}, r"tests/test_nothing\.py::test_it is not there"),
    ],
)
def test_a_guard_that_cannot_be_broken_is_told(fields: dict[str, str], said: str) -> None:
    import re

    whole = {
        "name": "zeros",
        "file": "runtime/golden_reference.py",
        "code": "BELOW_ALL_ZEROS = 0.95",
        "broken": "BELOW_ALL_ZEROS = 2.0",
        "tests": ("tests/project/test_mutate.py",),
        "subject": "selftest",
    }
    assert problem_of(Guard(**whole), REPO) is None  # type: ignore[arg-type]
    assert re.search(said, str(problem_of(Guard(**{**whole, **fields}), REPO)))  # type: ignore[arg-type]


def test_an_entry_that_is_not_complete_is_refused(tmp_path: Path) -> None:
    (tmp_path / "some.toml").write_text('[[guard]]\nname = "half"\nfile = "x.py"\n')
    with pytest.raises(ValueError, match="half has"):
        read_guards(tmp_path)


ENTRY = """[[guard]]
name = "{name}"
file = "runtime/manifest_sections.py"
code = "    return error if isinstance(error, float) and error >= 0 else None"
broken = "{broken}"
tests = ["tests/runtime/test_manifest_sections.py"]
"""


@pytest.mark.skipif("TRANSOM_TEST_WHEEL" in os.environ, reason="breaks the sources, which a wheel's tests do not have")
def test_a_guard_that_no_test_notices_fails_the_run(tmp_path: Path) -> None:
    """One change that a test sees, one that changes nothing."""
    seen = ENTRY.format(name="seen", broken="    return None")
    unseen = ENTRY.format(
        name="unseen", broken="    return error if isinstance(error, float) and not error < 0 else None"
    )
    (tmp_path / "records.toml").write_text(seen + unseen)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mutate",
            "--guards",
            tmp_path,
            "--work",
            tmp_path / "work",
            "--out",
            tmp_path / "page.md",
        ],
        env={**os.environ, "PYTHONPATH": str(REPO / "tests/support")},
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 1, done.stderr
    assert (
        "noticed      records: seen  <-  tests/runtime/test_manifest_sections.py::test_the_worst_error_that_is_recorded"
        in done.stdout
    )
    assert "NOT NOTICED  records: unseen  <-  every test passed" in done.stdout
    assert done.stdout.endswith("1 of 2 broken guards were noticed\n")
    assert (
        "| unseen | `runtime/manifest_sections.py` | **nothing: every test passed** |"
        in (tmp_path / "page.md").read_text()
    )


def test_the_page_lists_every_subject() -> None:
    guard = Guard("zeros", "runtime/golden_reference.py", "a", "b", ("tests/test_x.py",), "selftest")
    assert page([Outcome(guard, "tests/test_x.py::test_y")]).endswith(
        "## selftest\n\n| guard | file | noticed by |\n| --- | --- | --- |\n"
        "| zeros | `runtime/golden_reference.py` | `test_x.py::test_y` |\n"
    )
