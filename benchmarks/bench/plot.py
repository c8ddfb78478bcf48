"""Plot results: milliseconds of every variant by workload. The same figures give the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scaling_plot import FAINT, INK, PAPER, STYLE

from bench.table import Results, cells, shown

COLOURS = {"fp32": "#0072b2", "bf16": "#007f5f", "int8": "#d55e00", "int4": "#a8497a"}
COLUMNS, BAR = 3, 0.22  # inches of a bar
MOST = 14  # bars of one panel: the fastest


def draw(results: Results, path: Path) -> None:
    """Write the SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = list(cells(results))
    rows = -(-len(panels) // COLUMNS)
    with pyplot.rc_context({**STYLE, "font.size": 7.5}):
        figure, axes = pyplot.subplots(
            rows, COLUMNS, figsize=(14, rows * (MOST * BAR + 0.7)), layout="constrained", facecolor=PAPER, squeeze=False
        )
        for place, one in enumerate(axes.flat):
            if place < len(panels):
                panel(one, *panels[place])
            else:
                one.set_visible(False)
        figure.suptitle(
            f"milliseconds, {results['threads']} threads, {results['cpu']}, {results['instruction_set']}, "
            f"{results['date']}; hatched: wrong answers; lines: quartiles; ticks: the least possible",
            x=0.995, ha="right", fontsize=8.5, color=FAINT,
        )  # fmt: skip
        figure.savefig(path, metadata={"Date": None, "Creator": None}, format="svg", facecolor=PAPER)
        pyplot.close(figure)


def panel(axes: Any, title: str, part: str, rows: Any, least: Any) -> None:
    """Draw horizontal bars, fastest on top; ours in bold."""
    timed = sorted((row for row in rows if part in row.get("ms", {})), key=lambda row: row["ms"][part]["median"])[:MOST]
    for place, row in enumerate(timed):
        ms, precision = row["ms"][part], row["precision"]
        axes.barh(
            place, ms["median"], color=COLOURS[precision] if not row["wrong"] else PAPER, edgecolor=COLOURS[precision],
            hatch="////" if row["wrong"] else None, height=0.72, alpha=1.0 if row["ours"] else 0.55,
        )  # fmt: skip
        axes.plot([ms["q1"], ms["q3"]], [place, place], color=INK, linewidth=1.2)
        if precision in least:
            axes.plot([least[precision]] * 2, [place - 0.4, place + 0.4], color=INK, linewidth=0.9)
        axes.annotate(
            shown(ms["median"]),
            (ms["median"], place),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            color=INK,
        )
    labels = [f"{row['title']}, {row['label']}" for row in timed]
    axes.set_yticks(range(len(timed)), labels)
    for text, row in zip(axes.get_yticklabels(), timed, strict=True):
        text.set_fontweight("bold" if row["ours"] else "normal")
        text.set_color(COLOURS[row["precision"]])
    axes.set_title(title, loc="left", fontsize=9, color=INK)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
