"""The run: every case in turn until the time is up, results written after each, earlier ones of the same pack kept."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gpu_check.cases import AIMS, Case, tuned_cases
from gpu_check.pack import write_beside
from gpu_check.sides import TOLERANCE, Side, Sides, reason_of
from gpu_check.tables import Roofline, markdown, number, ratio_of, row_of
from gpu_check.timing import fastest, measure, roofline, try_tiles
from transom.runtime.errors import TransomError

SPARE = 1.5  # times the longest case so far have to be left before another is begun


@dataclass
class Budget:
    """Time until which cases are begun, in seconds of ``clock``."""

    until: float
    clock: Callable[[], float] = time.monotonic
    longest: float = 0.0
    began: float = field(default=0.0)

    def begin(self) -> bool:
        """Return whether another case fits, and start its time."""
        self.began = self.clock()
        return self.began + SPARE * self.longest < self.until

    def end(self) -> None:
        self.longest = max(self.longest, self.clock() - self.began)


def check(
    sides: Sides, measured: Sequence[Case], path: Path, about: Mapping[str, Any], budget: Budget, *, fresh: bool
) -> dict[str, Any]:
    """Run the cases; write ``path`` with .json and .md after each, and return the report.

    ``about`` names machine, pack and versions: results of the same ones are kept, and their cases not run again,
    unless ``fresh``. A case without a right result of ours is run again.
    """
    report: dict[str, Any] = {**about, "date": time.strftime("%Y-%m-%d"), "timed": sides.machine.timed, "aims": AIMS}
    known = {} if fresh else earlier(path, report)
    report |= {"roofline": None, "cases": list(known.values()), "tiles": {}, "left": []}
    order = {case.name: place for place, case in enumerate(measured)}

    def write() -> None:
        report["cases"].sort(key=lambda each: order.get(each["name"], len(order)))
        write_beside(path.with_suffix(".json"), json.dumps(report, indent=1) + "\n")
        write_beside(path.with_suffix(".md"), markdown(report))

    peaks = roofline(sides) if sides.machine.timed else None
    report["roofline"] = None if peaks is None else asdict(peaks)
    todo = [case for case in measured if case.name not in known]
    for index, case in enumerate(todo):
        if not budget.begin():
            report["left"] = [left.name for left in todo[index:]]
            break
        found = run_case(sides, case, peaks)
        budget.end()
        report["cases"].append(found)
        write()
        print(line_of(found), flush=True)
    for case in tuned_cases(measured) if sides.machine.timed and not report["left"] else []:
        if not budget.begin():
            break
        report["tiles"][case.name] = try_tiles(sides, case)
        budget.end()
        write()
    write()
    return report


def earlier(path: Path, report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the cases of an earlier run of the same machine, pack and versions, by name."""
    try:
        found = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        if any(found[key] != report[key] for key in ("machine", "sm", "pack", "versions", "timed")):
            return {}
        return {each["name"]: each for each in found["cases"] if not failed(each)}
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # none, or none of this check's


def failed(found: Mapping[str, Any]) -> bool:
    """Return whether a case has no right result of our kernel."""
    return not any(row["side"] == "ours" and not row["wrong"] for row in found["rows"])


def run_case(sides: Sides, case: Case, peaks: Roofline | None) -> dict[str, Any]:
    """Return one case's rows for the sides that compute it, and the reasons of those that do not."""
    sides.precise(case.precision)
    sides.machine.free()
    refused: dict[str, str] = {}
    running: list[Side] = []
    try:
        tensors = sides.tensors(case)
        expected = sides.expected(case, tensors)
        for name, make in sides.makers(case, tensors):
            if name != "ours" and not sides.machine.timed:
                continue  # a dry run is of our kernel
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                try:
                    running.append(one_side(sides, case, make(), expected))
                except (
                    TransomError,
                    RuntimeError,
                    AttributeError,
                ) as error:  # AttributeError: a backend unknown to torch
                    refused[name] = reason_of(error, [str(each.message) for each in warned])
        if peaks is not None:
            measure(sides, running)
    except (TransomError, RuntimeError) as error:  # not even its tensors have room
        refused["ours"] = reason_of(error, [])
        running = [side for side in running if side.times]
    rows = []
    for side in running:
        row: dict[str, Any] = {"side": side.name, "about": side.about}
        if peaks is not None:
            row = row_of(case, side.name, side.times, peaks, side.about)
        assert side.error is not None
        units = side.error.units
        rows.append({**row, "units": round(units, 3) if units < float("inf") else None, "wrong": side.error.wrong})
    ratio, best = ratio_of(rows)
    found = {"name": case.name, "flops": case.flops, "bytes": case.bytes, "most": TOLERANCE[case.precision][1]}
    found |= {"aim": case.aim, "ratio": ratio, "best_backend": best, "rows": rows, "refused": refused}
    return {**asdict(case), **found}


def one_side(sides: Sides, case: Case, tried: Sequence[Side], expected: Any) -> Side:
    """Return the fastest of ``tried``, each compared with float64; the worst where one is wrong."""
    for side in tried:
        side.run()
        side.error = sides.compare(case, side.output(), expected)
    sides.machine.wait()
    wrong = [side for side in tried if side.error and side.error.wrong]
    if wrong or not sides.machine.timed:
        return max(tried, key=lambda side: side.error.units if side.error else 0.0)
    return fastest(sides, tried)


def line_of(found: Mapping[str, Any]) -> str:
    """Return one line of the progress."""
    ours = next((row for row in found["rows"] if row["side"] == "ours"), None)
    if ours is None:
        return f"{found['name']}: refused: {found['refused'].get('ours', 'no reason')}"
    time_ms = (
        f"{ours['p50_ms']:.4f} ms, {number(found['ratio'])} of {found['best_backend']}, " if "p50_ms" in ours else ""
    )
    return f"{found['name']}: {time_ms}" + (ours["wrong"] or f"{number(ours['units'])} units of roundoff")
