"""How far the bundle's outputs are from PyTorch's: all elements, the worst ones, and shape by shape."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from transom.export.passes.half_precision import FP16_MAX
from transom.export.report.drawing.chart import LogAxis, bar, drawing, tick_label, upright
from transom.export.report.drawing.markup import folded, numeric, section, table, words
from transom.export.report.drawing.numbers import (
    at,
    count_text,
    error_text,
    items,
    number,
    positive,
    short,
    sizes_text,
    whole,
)
from transom.runtime.manifest import Manifest

MOST_OUTPUTS, MOST_CASES, MOST_BINS = 80, 2000, 256
SANE = 1e-12, 1e3  # the least and the largest tolerance that is drawn
OPENED = 12  # cases whose table is unfolded
LOWEST = 1e-7  # of the tolerance: where the axis of errors begins at the latest
BELOW = 1e-4  # of the tolerance: where the colours of the strips begin
HEIGHT, RUG = 46, 10  # pixels of a histogram, and of the marks under it
STRIP = 18
WIDEST = 6.0  # percent of the width: of a cell of a strip


@dataclass(frozen=True)
class Output:
    """One output's figures; ``bins`` are (lower edge on the output's scale, elements), each twice the one before."""

    name: str
    state: bool
    cases: list[tuple[str, float]]  # sizes, error
    worst: Mapping[str, Any]
    equal: int
    bins: list[tuple[float, int]]

    @property
    def elements(self) -> int:
        return self.equal + sum(count for _, count in self.bins)


def outputs_of(manifest: Manifest) -> list[Output]:
    """What bundle.json tells of each output, those a user reads first. Exports before histograms have none."""
    state = {t.name for file in manifest.graphs for t in file.graph.outputs if t.state}
    cases: dict[str, list[tuple[str, float]]] = {}
    for case in case_list(manifest.parity):
        for name, error in items(at(case, "errors")).items():
            found = number(error)
            if found is not None:
                cases.setdefault(name, []).append((case_name(case), found))
    told = items(manifest.parity.get("outputs"))
    names = sorted(dict.fromkeys([*cases, *told]), key=lambda name: name in state)[:MOST_OUTPUTS]
    return [
        Output(
            name,
            name in state,
            cases.get(name, []),
            items(at(told.get(name), "worst")),
            whole(at(told.get(name), "equal")) or 0,
            bins_of(told.get(name), positive(at(manifest.parity, "scales", name)) or 1.0),
        )
        for name in names
    ]


def tolerance_of(manifest: Manifest) -> float | None:
    """The error allowed; None where bundle.json says what nobody would allow."""
    found = positive(manifest.parity.get("tolerance"))
    return found if found is not None and SANE[0] <= found <= SANE[1] else None


def case_list(parity: Mapping[str, Any]) -> list[Any]:
    found = parity.get("cases")
    return found[:MOST_CASES] if isinstance(found, list) else []


def case_name(case: Any) -> str:
    rounded = ", as a GPU rounds" if at(case, "emulated") is True else ""
    return sizes_text(at(case, "sizes")) + rounded


def bins_of(told: Any, scale: float) -> list[tuple[float, int]]:
    """The histogram with its edges on the output's scale."""
    counts, exponent = at(told, "counts"), at(told, "exponent")
    if not isinstance(counts, list) or type(exponent) is not int or not -200 <= exponent <= 200:
        return []
    edges = [2.0 ** (exponent + i) / scale for i in range(len(counts[:MOST_BINS]))]
    return [(edge, whole(count) or 0) for edge, count in zip(edges, counts, strict=False)]


def parity_section(manifest: Manifest) -> str:
    """Histograms over one axis, strips of cases, the worst elements, and every number behind a fold."""
    outputs = outputs_of(manifest)
    tolerance = tolerance_of(manifest)
    if tolerance is None or not outputs:
        return section("Against PyTorch", '<p class="soft">No figures were recorded.</p>')
    shown, states = ([each for each in outputs if each.state == state] for state in (False, True))
    axis = error_axis(outputs, tolerance)
    told = (
        f"Every element is held against PyTorch in FP32, in {len(case_list(manifest.parity))} runs of many shapes; its "
        "error is |bundle − PyTorch| over the output's largest value (for logits at least 1), "
        f"and {short(tolerance)} is allowed."
    )
    if manifest.quantization is not None:
        told += " Of a quantised bundle that catches what is broken; its accuracy is judged by the gate below."
    told += fp16_range(manifest.parity)
    parts = [f"<p>{told}</p>", histograms(shown or outputs, axis, tolerance)]
    if shown and states:
        parts.append(
            folded(f"{len(states)} tensors that pass from graph to graph", histograms(states, axis, tolerance))
        )
    return section("Against PyTorch", *parts, strips(outputs, tolerance), worst_elements(outputs), case_table(manifest))


def fp16_range(parity: Mapping[str, Any]) -> str:
    """How near FP16 comes to its end: the largest tensor, and the largest sum on its way; empty where not recorded."""
    said = ""
    tensor, total = (at(parity, key) for key in ("fp16_largest", "fp16_largest_sum"))
    if number(at(tensor, "value")) is not None:
        said += f" FP16 ends at {short(FP16_MAX)}; the largest value of any tensor is {place_of(tensor)}."
    value = number(at(total, "value"))
    if value is not None and value <= FP16_MAX:
        said += f" No sum of products passes {place_of(total)}, in whatever order it is added."
    elif value is not None:
        said += (
            f' <b class="limit">A sum of products may reach {place_of(total)} on its way:</b> a target that adds in '
            "half precision could overflow there. On a CPU this bundle adds in FP32; how TensorRT's kernels add is not "
            "known."
        )
    return said


def place_of(found: Any) -> str:
    module = words(at(found, "module"), 120) or "top"
    return f"{short(at(found, 'value'))} in {words(at(found, 'tensor'), 80)} (module {module})"


def error_axis(outputs: Iterable[Output], tolerance: float) -> LogAxis:
    """From the smallest error that is not zero to past the tolerance, at least four decades."""
    drawn = [edge for output in outputs for edge, count in output.bins if count] + [
        error for output in outputs for _, error in output.cases if error > 0
    ]
    low = max(min([tolerance * 1e-3, *drawn]), tolerance * LOWEST)
    high = min(max([tolerance, *drawn]), tolerance * 1e6) * 2.5
    return LogAxis(10 ** math.floor(math.log10(low)), high)


def histograms(outputs: Iterable[Output], axis: LogAxis, tolerance: float) -> str:
    """One row per output, the axis under the last."""
    rows = []
    for output in outputs:
        equal = f", {output.equal / output.elements:.0%} equal to the bit" if output.elements else ""
        elements = f"{output.elements:,} elements{equal}" if output.elements else "no histogram recorded"
        worst = max((error for _, error in output.cases), default=None)
        rows.append(
            f"<div>{words(output.name, 60)}<small>{elements}; worst {error_text(worst)}</small></div>"
            f"<div>{histogram(output, axis, tolerance)}</div>"
        )
    ticks = [tick_label(axis.at(tick), 12, f"{tick:.0e}") for tick in axis.decades(6)]
    scale = drawing(30, "axis of errors", [*ticks, tick_label(axis.at(tolerance), 27, "allowed", "end")])
    return (
        '<p class="soft">How many elements have which error: each bar counts errors up to twice those of the bar '
        "before, and its height is the logarithm of the count. A mark under the bars is the worst element of one "
        "run.</p>"
        f'<div class="rows">{"".join(rows)}<div></div><div>{scale}</div></div>'
    )


def histogram(output: Output, axis: LogAxis, tolerance: float) -> str:
    tallest = math.log1p(max((count for _, count in output.bins), default=1)) or 1.0
    parts = [upright(axis.at(tick), 0, HEIGHT, "rule") for tick in axis.decades(6)]
    smaller = sum(count for edge, count in output.bins if 2 * edge <= axis.low)
    bins = [(0.0, axis.low, smaller), *((edge, 2 * edge, count) for edge, count in output.bins if 2 * edge > axis.low)]
    for low, high, count in bins:
        if count:
            left, right = axis.at(low), max(axis.at(high), 0.6)
            height = HEIGHT * math.log1p(count) / tallest
            title = f"{count:,} elements of {error_text(low)} to {error_text(high)}"
            parts.append(bar(left, right - left - 0.15, HEIGHT - height, height, "mark", title))
    for name, error in output.cases:
        if error > 0:
            title = f"{name}: {error_text(error)}"
            parts.append(bar(axis.at(error), 0.3, HEIGHT + 3, RUG - 3, "warm", title))
    parts.append(upright(axis.at(tolerance), 0, HEIGHT + RUG, "end"))
    return drawing(HEIGHT + RUG, f"errors of {words(output.name, 60)}", parts)


def strips(outputs: Iterable[Output], tolerance: float) -> str:
    """One cell per shape, stronger the nearer to the tolerance."""
    rows = []
    for output in outputs:
        if not output.cases:
            continue
        width = min(100 / len(output.cases), WIDEST)
        cells = [
            bar(index * width, width - min(0.3, width / 4), 0, STRIP, "mark", f"{name}: {error_text(error)}", shade)
            for index, (name, error) in enumerate(output.cases)
            for shade in [strip_shade(error, tolerance)]
        ]
        label = f"errors of {words(output.name, 60)} at {len(output.cases)} shapes"

        rows.append(f"<div>{words(output.name, 60)}</div><div>{drawing(STRIP, label, cells)}</div>")
    key = "".join(
        f'<i style="--p:{strip_shade(tolerance * part, tolerance):.2f}"></i>{error_text(tolerance * part)}'
        for part in (1e-4, 1e-3, 1e-2, 1e-1, 1)
    )
    caption = (
        '<p class="soft">A cell is one run, in the order they were made; the stronger the colour, the nearer to what '
        "is allowed.</p>"
    )
    return f'<h3>Shape by shape</h3>{caption}<div class="rows">{"".join(rows)}</div><div class="key">{key}</div>'


def strip_shade(error: float, tolerance: float) -> float:
    """0.06 for a ten-thousandth of the tolerance or less, 1 for all of it."""
    if error <= 0:
        return 0.0
    share = LogAxis(BELOW * tolerance, tolerance).at(error) / 100
    return 0.06 + 0.94 * share


def worst_elements(outputs: Iterable[Output]) -> str:
    """Where each output is furthest off."""
    rows = [
        [
            words(output.name, 60),
            error_text(output.worst.get("error")),
            sizes_text(output.worst.get("sizes")),
            index_text(output.worst.get("index")),
            short(output.worst.get("ours"), 9),
            short(output.worst.get("theirs"), 9),
        ]
        for output in outputs
        if output.worst
    ]
    head = ("output", "error", "at", "element", "bundle", "PyTorch")
    return f"<h3>The worst element of each</h3>{table(head, rows, numeric(1, 4, 5))}" if rows else ""


def index_text(index: Any) -> str:
    places = index if isinstance(index, list) else []
    return f"[{', '.join(count_text(place) for place in places[:8])}]"


def case_table(manifest: Manifest) -> str:
    """Every number, one row per case."""
    cases = case_list(manifest.parity)
    rows = [
        [case_name(case), words(name, 60), error_text(error)]
        for case in cases
        for name, error in items(at(case, "errors")).items()
    ]
    told = f"all {len(rows)} numbers"
    return folded(told, table(("shape", "output", "error"), rows[:MOST_CASES], numeric(2)), opened=len(rows) <= OPENED)
