"""Write what came of the cases as one page of Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from processors.cases import COMMAND, SELFTEST, TESTS, Case, Outcome, scientific

EMULATED = "Emulated: right numbers, times mean nothing."
SIDES = {"pytorch": "PyTorch", "bundle": "its build", None: "–"}
ABSENT = "–"  # not run on that processor

Outcomes = Mapping[Case, Outcome]


def page(
    title: str,
    outcomes: Outcomes,
    processors: Sequence[str],
    *,
    facts: str,
    built_on: Mapping[str, str],
    tests_here: Outcome | None = None,
) -> str:
    """Return the page: ``facts`` are date and versions, ``built_on`` the processor by a bundle's name.

    ``tests_here`` is what came of the same tests on this machine, not emulated.
    """
    lines = [f"# {title}", "", f"{EMULATED} {facts}"]
    for heading, table in (
        ("Self-tests", selftests(outcomes, processors, built_on)),
        ("Tests of the runtime", tests(outcomes, processors, tests_here)),
        ("The command line", commands(outcomes, processors)),
    ):
        if table:
            lines += ["", f"## {heading}", "", *table]
    lines += failures(outcomes, tests_here)
    return "\n".join(lines) + "\n"


def selftests(outcomes: Outcomes, processors: Sequence[str], built_on: Mapping[str, str]) -> list[str]:
    """Return a row for each bundle: what is allowed, and the largest error on each processor."""
    rows = []
    for name in names_of(SELFTEST, outcomes):
        found = {case.processor: each for case, each in outcomes.items() if (case.part, case.name) == (SELFTEST, name)}
        known = next((each for each in found.values() if each.allowed is not None), None)
        model, _, precision = name.rpartition("-")
        allowed = ABSENT if known is None or known.allowed is None else scientific(known.allowed)
        errors = cells(SELFTEST, name, outcomes, processors)
        side = SIDES[known.side if known else None]
        rows.append([model, precision, side, allowed, *errors, built_on.get(name) or ABSENT])
    head = ["model", "precision", "compared with", "allowed", *processors, "built on"]
    lines = markdown(head, rows)
    return [*lines, "", "The largest error of each; in bold what is beyond the allowed one."] if lines else []


def tests(outcomes: Outcomes, processors: Sequence[str], here: Outcome | None) -> list[str]:
    """Return a row for each file: how many tests passed."""
    rows = [[f"`tests/{name}.py`", *cells(TESTS, name, outcomes, processors)] for name in names_of(TESTS, outcomes)]
    lines = markdown(["passed", *processors], rows)
    return [*lines, "", f"Together, on this machine and not emulated: {here.says}."] if lines and here else lines


def commands(outcomes: Outcomes, processors: Sequence[str]) -> list[str]:
    """Return a row for each command of ``transom``."""
    rows = []
    for name in names_of(COMMAND, outcomes):
        command, comma, what = name.partition(",")
        rows.append([f"`transom {command}`{comma}{what}", *cells(COMMAND, name, outcomes, processors)])
    return markdown(["command", *processors], rows)


def failures(outcomes: Outcomes, here: Outcome | None) -> list[str]:
    """Return a section that says why something failed; nothing where all is well."""
    failed = [f"- {case}: {outcome.reason}" for case, outcome in outcomes.items() if not outcome.ok]
    if here is not None and not here.ok:
        failed.append(f"- this machine, tests: {here.reason}")
    return ["", "## Failed", "", *failed] if failed else []


def names_of(part: str, outcomes: Outcomes) -> list[str]:
    return list(dict.fromkeys(case.name for case in outcomes if case.part == part))


def cells(part: str, name: str, outcomes: Outcomes, processors: Sequence[str]) -> list[str]:
    found = {case.processor: each.says for case, each in outcomes.items() if (case.part, case.name) == (part, name)}
    return [found.get(each, ABSENT) for each in processors]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table; none where there is no row."""
    if not rows:
        return []
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
