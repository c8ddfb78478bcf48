"""Compare seq2seq with attention and without by the length of the source, as the scores of two bundles record it.

    python benchmarks/list_lengths.py bundles/seq2seq bundles/seq2seq-fixed            print the table
    python benchmarks/list_lengths.py bundles/seq2seq bundles/seq2seq-fixed --write    ... and renew docs/

Nothing is measured here: exporting a reference model scores it, and bundle.json has the score of each number of dates.
The same scores give the same bytes of the image.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from scaling_plot import FAINT, INK, PAPER, STYLE

from transom.export.report.score_by_length import Point, points
from transom.runtime.bundle import Bundle

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE, PICTURE = DOCS / "reference_models.md", DOCS / "images" / "list_lengths.svg"
MARKERS = "<!-- list lengths: begin -->", "<!-- list lengths: end -->"
COLOURS = ("#0072b2", "#d55e00")  # after Okabe and Ito (2008), whom colour-blind readers can tell apart
MARKS = ("o", "s")


def form_of(bundle: Bundle) -> str:
    """Return what the bundle's config says of its decoder."""
    return "with attention" if bundle.manifest.config.get("attention") else "one vector for the whole source"


def lines_of(folders: Sequence[Path]) -> dict[str, list[Point]]:
    """Return the points of each bundle by its form; SystemExit for one without a score by length, or for two alike."""
    lines: dict[str, list[Point]] = {}
    for folder in folders:
        bundle = Bundle(folder)
        found, form = points(bundle.manifest.score, "bundle"), form_of(bundle)
        if not found:
            raise SystemExit(f"{folder} has no score by length. Export seq2seq or seq2seq-fixed by its name.")
        if form in lines:
            raise SystemExit(f"{folder} is another bundle {form}. Give one of each form.")
        lines[form] = found
    return lines


def table(lines: Mapping[str, Sequence[Point]]) -> str:
    """Return the scores as Markdown: a row per length, a column per form."""
    rows = [
        f"| list of | characters, mean | cases | {' | '.join(lines)} |",
        f"| --- | --- | --- |{' --- |' * len(lines)}",
    ]
    for each in zip(*lines.values(), strict=True):
        first = each[0]
        cells = " | ".join(f"{100 * point.value:.1f} %{interval(point)}" for point in each)
        rows.append(f"| {first.name} | {first.characters:.0f} | {first.n} | {cells} |")
    return "\n".join(rows)


def interval(point: Point) -> str:
    if point.interval is None:
        return ""
    low, high = (100 * end for end in point.interval)
    return f" ({low:.1f} to {high:.1f})"


def at(line: Sequence[Point], characters: float) -> float:
    """Return the line's value at this length, or -1 if it has none there."""
    return next((point.value for point in line if point.characters == characters), -1.0)


def draw(lines: Mapping[str, Sequence[Point]], path: Path) -> None:
    """Write the SVG: a line per form, its numbers at the points, its 95 % intervals upright."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(7.6, 3.9), layout="constrained", facecolor=PAPER)
        for (form, found), colour, mark in zip(lines.items(), COLOURS, MARKS, strict=False):
            sizes, values = [point.characters for point in found], [point.value for point in found]
            ends = [point.interval or (point.value, point.value) for point in found]
            below = [max(value - low, 0.0) for value, (low, _) in zip(values, ends, strict=True)]
            above = [max(high - value, 0.0) for value, (_, high) in zip(values, ends, strict=True)]
            axes.errorbar(sizes, values, (below, above), color=colour, marker=mark, markersize=5, linewidth=1.8,
                          elinewidth=1.1, label=form)  # fmt: skip
            for size, value, (low, high) in zip(sizes, values, ends, strict=True):
                best = form == max(lines, key=lambda name: at(lines[name], size))  # the first of equal ones
                axes.annotate(f"{value:.3f}", (size, high if best else low), xytext=(0, 3 if best else -3),
                              textcoords="offset points", ha="center", va="bottom" if best else "top", color=colour,
                              fontsize=8.5)  # fmt: skip
        first = next(iter(lines.values()))
        axes.set_xticks(
            [point.characters for point in first], [f"{point.name}\n{point.characters:.0f}" for point in first]
        )
        axes.set_xlabel("dates in a list, and characters of the source on average")
        axes.set_ylabel("exact match")
        axes.set_ylim(-0.09, 1.09)
        axes.grid(axis="y", color="#e4e8ec", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="center right", frameon=False, labelcolor=INK)
        axes.set_title(
            f"held-out lists of dates, greedy, n = {first[0].n} for each length; 95 % intervals",
            loc="right", fontsize=8.5, color=FAINT,
        )  # fmt: skip
        figure.savefig(path, metadata={"Date": None, "Creator": None}, facecolor=PAPER)
        pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    parser.add_argument("--write", action="store_true", help="renew the table and the image in docs/")
    options = parser.parse_args()
    lines = lines_of(options.bundles)
    print(table(lines))
    if options.write:
        draw(lines, PICTURE)
        begin, end = map(re.escape, MARKERS)
        block = f"{MARKERS[0]}\n{table(lines)}\n{MARKERS[1]}"
        page, count = re.subn(f"{begin}.*?{end}", lambda _: block, PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"{PAGE} has {count} blocks between {MARKERS[0]} and {MARKERS[1]}, expected one.")
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
