"""Results of the GPU check as Markdown: rows, ratios, tables by kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_check.cases import Case

PEERS = ("torch flash", "torch cudnn", "torch efficient", "torch math")
KINDS = {
    "prompt": "Prompts",
    "step": "Decode steps, one query a row, split-KV",
    "masked": "Padding",
    "biased": "A bias per head",
    "windows": "Windows of Swin, the bias as an added mask",
}


@dataclass(frozen=True)
class Roofline:
    """The GPU's measured peaks: FLOP/s by precision, bytes/s."""

    flops: Mapping[str, float]
    bytes: float

    def least_ms(self, case: Case) -> float:
        return 1e3 * max(case.flops / self.flops[case.precision], case.bytes / self.bytes)


def row_of(case: Case, name: str, times: Sequence[float], peaks: Roofline, about: str = "") -> dict[str, Any]:
    """Return a row of the result: percentiles in ms, TFLOP/s, GB/s, and the fraction of the GPU's peak."""
    p10, p50, p90 = np.percentile(times, (10, 50, 90)).tolist()
    return {
        "side": name,
        "about": about,
        "p10_ms": round(p10, 5),
        "p50_ms": round(p50, 5),
        "p90_ms": round(p90, 5),
        "tflops": round(case.flops / p50 / 1e9, 2),
        "gb_per_s": round(case.bytes / p50 / 1e6, 1),
        "of_roofline": round(peaks.least_ms(case) / p50, 3),
    }


def ratio_of(rows: Sequence[Mapping[str, Any]]) -> tuple[float | None, str]:
    """Return the time of the best backend that computes right over ours, and its name; None where either is missing."""
    ours = [row["p50_ms"] for row in rows if row["side"] == "ours" and "p50_ms" in row]
    right = [row for row in rows if row["side"] != "ours" and "p50_ms" in row and not row.get("wrong")]
    theirs = sorted((row["p50_ms"], row["side"]) for row in right)
    if not ours or not theirs:
        return None, "none"
    return round(theirs[0][0] / ours[0], 3), str(theirs[0][1])


def markdown(report: Mapping[str, Any]) -> str:
    lines = [f"# The attention kernel on {report['machine']}", "", *provenance(report), ""]
    for kind, title in KINDS.items():
        found = [each for each in report["cases"] if each["kind"] == kind]
        if found:
            table = timed_table if report["timed"] else parity_table
            lines += [f"## {title}", "", *table(found), ""]
    lines += refused(report["cases"]) + tiles_table(report["tiles"])
    if report["left"]:
        lines += [f"Not run, for the time was up ({len(report['left'])} cases): {', '.join(report['left'])}.", ""]
    return "\n".join(lines)


def provenance(report: Mapping[str, Any]) -> list[str]:
    about = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [f"{report['date']}; {about}; PTX for SM{report['sm']}, compiled beforehand."]
    if not report["timed"]:
        return [*lines, "", "**A dry run: tiny shapes in Triton's interpreter on a CPU. No GPU, no times.**"]
    peaks = ", ".join(f"{flops / 1e12:.1f} TFLOP/s in {name}" for name, flops in report["roofline"]["flops"].items())
    lines += [
        "",
        f"Reached in this run by PyTorch's product and copy: {peaks}, {report['roofline']['bytes'] / 1e9:.0f} GB/s.",
    ]
    lines += [
        "Milliseconds are medians by CUDA events, caches flushed; *of roofline* is the time that these would need,"
    ]
    lines += [
        "over the time it took. *Ratio* is the best right backend's time over ours: more than 1 is faster. *Error* is"
    ]
    lines += [
        "the largest difference from float64, in units of roundoff of the query's largest value; a side beyond the"
    ]
    lines += ["tolerance is marked **wrong**."]
    aimed = [each for each in report["cases"] if each["ratio"] is not None and each["aim"] is not None]
    met = sum(each["ratio"] >= each["aim"] for each in aimed)
    return [*lines, "", f"The aim is met in {met} of {len(aimed)} cases."]


def timed_table(found: Sequence[Mapping[str, Any]]) -> list[str]:
    columns = ("case", "ours", "error, at most", *PEERS, "ratio", "aim", "TFLOP/s", "GB/s", "of roofline")
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    for each in found:
        rows = {row["side"]: row for row in each["rows"]}
        ours = rows.get("ours", {})
        error = f"{number(ours.get('units'))}, {each['most']:g}"
        cells = [milliseconds(ours), error, *(milliseconds(rows.get(peer, {})) for peer in PEERS)]
        cells += [
            number(each["ratio"]),
            number(each["aim"]),
            number(ours.get("tflops"), 1),
            number(ours.get("gb_per_s"), 0),
        ]
        share = "–" if "of_roofline" not in ours else f"{ours['of_roofline']:.0%}"
        lines.append(f"| {each['name']} | " + " | ".join([*cells, share]) + " |")
    return lines


def parity_table(found: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["| case | tile sizes | error | at most |", "| --- " * 4 + "|"]
    for each in found:
        ours = next((row for row in each["rows"] if row["side"] == "ours"), {})
        units = number(ours.get("units"))
        lines.append(f"| {each['name']} | {ours.get('about', '–')} | {units} | {each['most']:g} |")
    return lines


def milliseconds(row: Mapping[str, Any]) -> str:
    if "p50_ms" not in row:
        return "**wrong**" if row.get("wrong") else "–"
    about = f" ({row['about']})" if row["about"] else ""
    return f"{row['p50_ms']:.4f}{about}" + (" **wrong**" if row.get("wrong") else "")


def refused(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the reasons of sides that did not run, or are wrong, each with the number of its cases."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for each in found:
        wrong = {row["side"]: row["wrong"] for row in each["rows"] if row.get("wrong")}
        for side, reason in {**each["refused"], **wrong}.items():
            reasons.setdefault((side, reason), []).append(each["name"])
    lines = [f"- {side}, {len(names)} cases, as {names[0]}: {reason}" for (side, reason), names in reasons.items()]
    return ["## Refused or wrong", "", *lines, ""] if lines else []


def tiles_table(tiles: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return the times by tile sizes; the table's are the first of each case."""
    if not tiles:
        return []
    lines = ["## Tile sizes", "", "| case | the table's, ms | fastest, ms | all |", "| --- " * 4 + "|"]
    for case, times in tiles.items():
        if times:
            entry, best = next(iter(times)), min(times, key=lambda each: times[each])
            every = "; ".join(f"{each}: {ms:.4f}" for each, ms in times.items())
            lines.append(f"| {case} | {entry}: {times[entry]:.4f} | {best}: {times[best]:.4f} | {every} |")
    return [*lines, ""]


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
