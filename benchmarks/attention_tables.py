"""Results of the GPU benchmark of attention as Markdown: rows, ratios, better tile sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from attention_cases import COLUMNS, Case

from transom.export.plugins.kernel_spec import TileSizes
from transom.export.plugins.tile_sizes import FAMILIES, tile_sizes_for

BETTER = 0.97  # of the table's time: what is nearer to it is noise


@dataclass(frozen=True)
class Roofline:
    """The GPU's measured peaks: FLOP/s by precision, bytes/s."""

    flops: Mapping[str, float]
    bytes: float

    def least_ms(self, case: Case) -> float:
        return 1e3 * max(case.flops / self.flops[case.precision], case.bytes / self.bytes)


def row_of(case: Case, name: str, times: Sequence[float], roofline: Roofline, about: str = "") -> dict[str, Any]:
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
        "of_roofline": round(roofline.least_ms(case) / p50, 3),
    }


def ratio_of(rows: Sequence[Mapping[str, Any]]) -> tuple[float | None, str]:
    """Return the best backend's time over our best, and its name; None where either is missing."""
    ours = [row["p50_ms"] for row in rows if row["side"].startswith("ours")]
    theirs = sorted((row["p50_ms"], row["side"]) for row in rows if not row["side"].startswith("ours"))
    if not ours or not theirs:
        return None, "none"
    return round(theirs[0][0] / min(ours), 3), str(theirs[0][1])


def better_rows(tuned: Sequence[Mapping[str, Any]], sm: int) -> list[str]:
    """Return lines for the table in tile_sizes.py, where other tile sizes were faster."""
    known = {
        (each["precision"], each["width"], each["column"]): TileSizes(**each["best"])
        for each in tuned
        if each["best_ms"] is not None and (each["entry_ms"] is None or each["best_ms"] < BETTER * each["entry_ms"])
    }
    lines = []
    for precision, row in dict.fromkeys((precision, row) for precision, row, _ in known):
        variants = [Case(kind, precision, 1, 1, 1, 1, row).variant for kind in ("prompt", "biased", "step")]
        now = [tile_sizes_for(sm, variant) for variant in variants]
        best = [known.get((precision, row, COLUMNS[column]), now[column]) for column in COLUMNS]
        if best != now:
            halves = f"HALVES[{FAMILIES[sm]!r}]" if sm in FAMILIES else "TURING"
            table = {"fp32": "FP32_UNITS", "tf32": "TF32"}.get(precision, halves)
            written = ", ".join(f"TileSizes({b.m}, {b.n}, {b.warps}, {b.stages})" for b in best)
            lines.append(f"{table}, from {precision}: {row}: ({written}),")
    return lines


def markdown(report: Mapping[str, Any]) -> str:
    lines = [f"# Attention on {report['gpu']}", ""]
    lines += [
        f"{report['date']}, driver for CUDA {report['driver'] / 1000:g}, " + versions(report["versions"]) + ".",
        "",
    ]
    peaks = ", ".join(f"{flops / 1e12:.1f} TFLOP/s in {name}" for name, flops in report["roofline"]["flops"].items())
    lines += [
        f"Reached in this run by PyTorch's product and copy: {peaks}, {report['roofline']['bytes'] / 1e9:.0f} GB/s."
    ]
    lines += [
        "Milliseconds are medians by CUDA events, caches flushed; *of roofline* is the time that these would need,"
    ]
    lines += ["over the time it took. *Ratio* is the best backend's time over ours: more than 1 is faster.", ""]
    lines += ["| case | ours | best backend | ratio | aim | TFLOP/s | GB/s | of roofline |", "| --- " * 8 + "|"]
    for each in report["cases"]:
        ours = min(
            (row for row in each["rows"] if row["side"].startswith("ours")), key=lambda r: r["p50_ms"], default=None
        )
        theirs = min(
            (row for row in each["rows"] if row["side"] == each["best_backend"]),
            key=lambda r: r["p50_ms"],
            default=None,
        )
        if ours is None:
            lines.append(f"| {each['name']} | {each['refused'].get('ours', 'not measured')} |" + " – |" * 6)
            continue
        against = "–" if theirs is None else f"{theirs['side']} {theirs['p50_ms']:.4f}"
        reached = f"| {each['name']} | {ours['p50_ms']:.4f} ({ours['about']}) | {against} "
        reached += f"| {number(each['ratio'])} | {number(each['aim'])} "
        lines.append(reached + f"| {ours['tflops']:.1f} | {ours['gb_per_s']:.0f} | {ours['of_roofline']:.0%} |")
    lines += ["", *by_side([each for each in report["cases"] if each.get("model")])]
    aimed = [each for each in report["cases"] if each["ratio"] is not None and each["aim"] is not None]
    met = sum(each["ratio"] >= each["aim"] for each in aimed)
    lines += ["", f"The aim is met in {met} of {len(aimed)} cases.", "", "## Refused", ""]
    reasons: dict[tuple[str, str], list[str]] = {}
    for each in report["cases"]:
        for side, reason in each["refused"].items():
            reasons.setdefault((side, reason), []).append(each["name"])
    lines += [f"- {side}, {len(names)} cases, as {names[0]}: {reason}" for (side, reason), names in reasons.items()]
    lines += [
        "",
        "## Blocks",
        "",
        "| precision | head size | column | table, ms | best, ms | best |",
        "| --- " * 6 + "|",
    ]
    for each in report["tuned"]:
        best = "{m}x{n}, {warps}, {stages}".format(**each["best"])
        lines.append(
            f"| {each['precision']} | {each['width']} | {each['column']} | {number(each['entry_ms'], 4)} "
            f"| {number(each['best_ms'], 4)} | {best} |"
        )
    lines += ["", *(f"    {line}" for line in report["better_rows"])]
    left = [f"Not measured, for the time was up: {', '.join(report['left'])}."] if report["left"] else []
    return "\n".join([*lines, "", *left, ""])


SIDES = ("ours", "torch flash", "torch cudnn", "torch efficient", "torch math", "torch eager")


def by_side(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a table of the models' cases: milliseconds of every side, a dash where it refused."""
    if not found:
        return []
    lines = [
        "## Attention of models, ms",
        "",
        "| case | " + " | ".join(SIDES) + " |",
        "| --- " * (len(SIDES) + 1) + "|",
    ]
    for each in found:
        known = {row["side"]: row["p50_ms"] for row in each["rows"]}
        lines.append(f"| {each['name']} | " + " | ".join(number(known.get(side), 4) for side in SIDES) + " |")
    return [*lines, ""]


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def versions(given: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in given.items())
