"""Plot the results of scaling.py: milliseconds of a layer, log-log, texts on the left and images on the right.

The same figures give the same bytes: no date in the file, identifiers from a fixed salt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, FAINT, PAPER = "#1f2933", "#8a949e", "#ffffff"
COLOURS = {  # after Okabe and Ito (2008), whom colour-blind readers can tell apart; darker, to stand on white
    "BERT-base": "#0072b2",
    "Transformer base, encoder": "#007f5f",
    "GPT-2 124M, prompt": "#d55e00",
    "GPT-2 124M, one token": "#a8497a",
    "ViT-B/16": "#0072b2",
    "CLIP ViT-B/32, image": "#b07900",
    "ViT": "#0072b2",
    "Perceiver": "#d55e00",
}
MARKS = {"encoder": "o", "prefill": "s", "decode": "D", "image": "o", "latents": "s"}
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "transom",
    "svg.fonttype": "path",  # the same letters everywhere
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def draw(results: Mapping[str, Any], series: Sequence[Any], path: Path) -> None:
    """Write the SVG from scaling.py's ``series`` and ``results``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        figure, (texts, images) = pyplot.subplots(
            1, 2, figsize=(10.4, 4.9), width_ratios=(3, 2), sharey=True, layout="constrained", facecolor=PAPER
        )
        for axes, kind in ((texts, False), (images, True)):
            chosen = [one for one in series if (one.kind == "image") == kind]
            panel(axes, chosen, results["ms_of_one_layer"])
        texts.set_ylabel("one layer, milliseconds")
        texts.set_xlabel("S: tokens of a text, or in the cache")
        images.set_xlabel("side of the image, pixels")
        reference(texts, *anchor(results, "Transformer base, encoder", 0.36), across=(16, 4096), per=1)
        reference(images, *anchor(results, "CLIP ViT-B/32, image", 0.4), across=(64, 512), per=2)
        crossings(texts, series)
        figure.suptitle(
            f"FP32, one row, threads: {results['threads']}, {results['cpu']}, onnxruntime {results['onnxruntime']}, "
            f"{results['date']}",
            x=0.995, ha="right", fontsize=8.5, color=FAINT,
        )  # fmt: skip
        figure.savefig(path, metadata={"Date": None, "Creator": None}, facecolor=PAPER)
        pyplot.close(figure)


def panel(axes: Axes, series: Sequence[Any], figures: Mapping[str, Any]) -> None:
    """Draw lines with the quartiles of the rounds behind them, each named at its right end."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    ends = []
    for one in series:
        points = figures[one.name]
        sizes, ms = [point["size"] for point in points], [point["ms"] for point in points]
        low, high = zip(*(point["quartiles_ms"] for point in points), strict=True)
        colour = COLOURS[one.name]
        axes.fill_between(sizes, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(sizes, ms, color=colour, marker=MARKS[one.kind], markersize=4.5, linewidth=1.8, label=one.name)
        ends.append(sizes)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted({size for sizes in ends for size in sizes})))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
    axes.grid(color="#e4e8ec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", frameon=False, handlelength=1.6, labelspacing=0.35, borderaxespad=0.2)


def anchor(results: Mapping[str, Any], name: str, share: float) -> tuple[float, float]:
    """Return where both reference lines start: below the first point of a series."""
    first = results["ms_of_one_layer"][name][0]
    return first["size"], first["ms"] * share


def reference(axes: Axes, size: float, ms: float, across: tuple[float, float], per: int) -> None:
    """Draw dashed lines of O(S) and O(S²), where S grows with the ``per``-th power of the axis's value."""
    top = axes.get_ylim()[1]
    for power, name in ((1, "O(S)"), (2, "O(S²)")):
        degree = power * per
        end = min(across[1], size * (top / ms) ** (1 / degree))
        axes.plot([size, end], [ms, ms * (end / size) ** degree], color=FAINT, linewidth=1.1, linestyle=(0, (4, 3)))
        x = size * (end / size) ** 0.8
        y = ms * (x / size) ** degree
        axes.annotate(
            name, (x, y), xytext=(5, -4), textcoords="offset points", ha="left", va="top", color="#5f6b76", fontsize=9
        )
    axes.set_ylim(top=top)


def crossings(axes: Axes, series: Sequence[Any]) -> None:
    """Draw a tick at S = 6 E for each width, from where attention is the larger part by count."""
    low, high = axes.get_ylim()
    for width in sorted({one.width for one in series if one.kind == "encoder"}):
        axes.axvline(6 * width, color=FAINT, linewidth=0.9, linestyle=(0, (1, 2)))
        axes.annotate(
            f"6 E, E = {width}", (6 * width, low), xytext=(-3, 6), textcoords="offset points", rotation=90,
            ha="right", va="bottom", color="#5f6b76", fontsize=8,
        )  # fmt: skip
    axes.set_ylim(low, high)
