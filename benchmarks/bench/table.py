"""Format results as Markdown: a summary for the README, every figure for docs/results/."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench.run import limits_line

Row = Mapping[str, Any]
Results = Mapping[str, Any]
NONE = "–"
WIDTH = 140  # characters of a line of prose
PART_TITLES = {"run": "", "prefill": ", prefill", "step": ", one step"}
FORMATS = (("fp32", "FP32"), ("bf16", "BF16"), ("int8", "INT8"), ("int4", "INT4"))
TIE = 0.03  # ratios closer to 1 are not called faster or slower


def cells(results: Results) -> Iterator[tuple[str, str, Sequence[Row], Mapping[str, float]]]:
    """Yield (workload's and part's title, part, rows, least milliseconds by format) of everything that was timed."""
    for entry in results["workloads"].values():
        parts = dict.fromkeys(part for row in entry["rows"] for part in row.get("ms", {}))
        for part in parts:
            yield entry["title"] + PART_TITLES[part], part, entry["rows"], entry.get("least_ms", {}).get(part, {})


def best(rows: Sequence[Row], part: str, precision: str, *, ours: bool) -> Row | None:
    """Return the fastest right row of a format: this project's, or the peers' (an earlier installation is none)."""
    found = [
        row
        for row in rows
        if row["precision"] == precision and part in row.get("ms", {}) and not row["wrong"]
        and row["ours"] == ours and (ours or row["peer"] != "earlier")
    ]  # fmt: skip
    return min(found, key=lambda row: row["ms"][part]["median"], default=None)


def summary(results: Results) -> str:
    """Return the README's table: milliseconds of ours and of the best peer, in each format that was timed.

    A format that this project does not compute on this machine has the peers' column alone.
    """
    timed = list(cells(results))
    columns: list[tuple[str, bool, str]] = []  # format, ours?, head
    for precision, title in FORMATS:
        for ours in (True, False):
            if any(best(rows, part, precision, ours=ours) for _, part, rows, _ in timed):
                named = any(kind == precision for kind, _, _ in columns)
                columns.append((precision, ours, title if ours else "best peer" if named else f"{title}, best peer"))
    lines = ["| milliseconds (of what is possible) | " + " | ".join(head for _, _, head in columns) + " |"]
    lines.append("|---" * (1 + len(columns)) + "|")
    for title, part, rows, _ in timed:
        found = [figure(best(rows, part, kind, ours=ours), part, named=not ours) for kind, ours, _ in columns]
        lines.append(f"| {title} | " + " | ".join(found) + " |")
    return "\n".join(lines)


def figure(row: Row | None, part: str, *, named: bool = False) -> str:
    """Return a time and its fraction of what is possible, with the peer's name."""
    if row is None:
        return NONE
    ms = row["ms"][part]
    fraction = f" ({percent(ms['of_possible'])})" if "of_possible" in ms else ""
    return (f"{name_of(row)} " if named else "") + shown(ms["median"]) + fraction


def name_of(row: Row) -> str:
    return f"{row['title']}, {row['label']}:"


def shown(ms: float) -> str:
    """Return milliseconds with three digits that count."""
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"


def percent(fraction: float) -> str:
    return f"{100 * fraction:.0f} %"


def circumstances(results: Results) -> str:
    """Return on what and how was measured."""
    minutes = results["seconds"] / 60
    return wrapped(
        f"{results['cpu']}, `{results['instruction_set']}`, {results['threads']} threads, {results['date']}; medians "
        f"of {results['rounds']} rounds, variants alternating, one computing at a time; {minutes:.0f} minutes. "
        f"8-bit sums: {results['sums']}. Limits in the same run: {limits_line(results['limits'])}."
    )


def wrapped(text: str) -> str:
    """Return a paragraph in lines of at most WIDTH characters."""
    return "\n".join(textwrap.wrap(" ".join(text.split()), WIDTH, break_long_words=False, break_on_hyphens=False))


def details(results: Results) -> str:
    """Return a table per workload and part with every variant, fastest first."""
    blocks = []
    for title, part, rows, least in cells(results):
        possible = ", ".join(f"{name} {shown(least[kind])}" for kind, name in FORMATS if kind in least)
        blocks.append(f"### {title}\n\nLeast possible milliseconds: {possible}.\n")
        lines = ["| variant | format | median | min | quartiles | of possible | error | tokens | ours takes | |"]
        lines.append("|---" * 10 + "|")
        timed = [row for row in rows if part in row.get("ms", {})]
        for row in sorted(timed, key=lambda row: row["ms"][part]["median"]):
            lines.append(detail(row, part, best(rows, part, row["precision"], ours=True)))
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def detail(row: Row, part: str, ours: Row | None) -> str:
    """Return one variant's line; ``ours`` is this project's time in the same format."""
    ms = row["ms"][part]
    ratio = f"{ours['ms'][part]['median'] / ms['median']:.2f} ×" if ours is not None else NONE
    error = NONE if row["error"] is None else f"{row['error']:.2g}"
    tokens = NONE if row["tokens"] is None else "{}/{}".format(*row["tokens"])
    wrong = f"**wrong**: {row['wrong']}" if row["wrong"] else ""
    name = f"**{row['title']}**" if row["ours"] else row["title"]
    quartiles = f"{shown(ms['q1'])}–{shown(ms['q3'])}"
    fraction = percent(ms["of_possible"]) if "of_possible" in ms else NONE
    figures = f"{shown(ms['median'])} | {shown(ms['min'])} | {quartiles} | {fraction} | {error} | {tokens} | {ratio}"
    return f"| {name}, {row['label']} | {row['precision'].upper()} | {figures} | {wrong} |"


def missing(results: Results) -> str:
    """Return the list of variants without figures, each with its reason."""
    lines = []
    for entry in results["workloads"].values():
        for row in entry["rows"]:
            if "failure" in row:
                reason = row["failure"].replace("|", "/").replace("\n", " ")
                lines.append(f"| {entry['title']} | {row['title']}, {row['label']} | {reason} |")
    if not lines:
        return "Every variant ran."
    return "\n".join(["| workload | variant | reason |", "|---|---|---|", *lines])


def beside_earlier(results: Results) -> str:
    """Return this project's times beside the earlier installation's, where there is one."""
    lines = []
    for title, part, rows, _ in cells(results):
        for precision, name in FORMATS:
            pair = [
                next(
                    (r for r in rows if r["peer"] == peer and r["variant"] == precision and part in r.get("ms", {})),
                    None,
                )
                for peer in ("earlier", "transom")
            ]
            if pair[0] is not None and pair[1] is not None:
                before, now = (row["ms"][part]["median"] for row in pair if row is not None)
                lines.append(f"| {title} | {name} | {shown(before)} | {shown(now)} | {before / now:.2f} × |")
    head = "| workload | format | earlier | now | times as fast |\n|---|---|---|---|---|\n"
    return head + "\n".join(lines) if lines else ""


def table(results: Results) -> str:
    """Return what a run ends in: the summary, and what is missing."""
    blocks = [circumstances(results), summary(results), beside_earlier(results), missing(results)]
    return "\n\n".join(block for block in blocks if block)


def page(results: Results, picture: str) -> str:
    """Return the whole page of docs/results/."""
    versions = "\n".join(
        f"- {peer}: " + ", ".join(f"{name} {number}" for name, number in found.items())
        for peer, found in results["versions"].items()
    )
    earlier = beside_earlier(results)
    return "\n\n".join(
        [
            f"# Beside other tools on {results['cpu']}, {results['instruction_set']}",
            wrapped(circumstances(results) + f" They are the {results['limits']['method']}."),
            f"![Milliseconds of every variant, by workload]({picture})",
            summary(results),
            *(["## Beside the earlier installation", earlier] if earlier else []),
            "## Every variant",
            "*Of possible*: the least time that the limits allow over the median. *Error*: ‖a − b‖ / ‖b‖ to PyTorch\n"
            "in FP32. *Tokens*: equal to PyTorch's in FP32. *Ours takes*: this project's median in the same format\n"
            "over the variant's.",
            details(results).rstrip(),
            "## Missing",
            missing(results),
            "## Versions",
            versions + "\n",
        ]
    )
