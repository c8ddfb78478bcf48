"""Draw the bundle's parity: the errors of all elements, the worst ones, and the errors shape by shape."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from transom.export.passes.half_precision import FP16_MAX
from transom.export.report.rendering import render, sizes_text, visible
from transom.export.report.svg import LogAxis, bar, chart, tick_label, vertical
from transom.runtime.format import at, count_text, error_text, finite, list_of, natural, object_of, positive, short
from transom.runtime.manifest import Manifest

MOST_OUTPUTS, MOST_CASES, MOST_BINS = 80, 2000, 256
DRAWN = 1e-12, 1e3  # the least and the largest tolerance that is drawn
MOST_OPENED = 12  # cases up to which their table is unfolded
LOWEST = 1e-7  # of the tolerance: the lowest error on the axis
FAINTEST = 1e-4  # of the tolerance: the error of the faintest colour of the strips
HEIGHT, RUG = 46, 10  # pixels of a histogram, and of the marks under it
STRIP = 18  # pixels
WIDEST = 6.0  # percent of the width: a cell of a strip at most


@dataclass(frozen=True)
class Output:
    """One output's errors; ``bins`` are (lower edge on the output's scale, elements), the edges powers of two."""

    name: str
    state: bool
    cases: list[tuple[str, float]]  # sizes, error
    worst: Mapping[str, Any]
    equal: int
    bins: list[tuple[float, int]]

    @property
    def elements(self) -> int:
        return self.equal + sum(count for _, count in self.bins)

    @property
    def title(self) -> str:
        return visible(self.name, 60)


def outputs_of(manifest: Manifest) -> list[Output]:
    """Return the outputs in bundle.json, state tensors last. Exports before histograms have none."""
    state = {t.name for file in manifest.graphs for t in file.graph.outputs if t.state}
    cases: dict[str, list[tuple[str, float]]] = {}
    for case in case_list(manifest.parity):
        for name, value in object_of(at(case, "errors")).items():
            error = finite(value)
            if error is not None:
                cases.setdefault(name, []).append((case_name(case), error))
    recorded = object_of(manifest.parity.get("outputs"))
    names = sorted(dict.fromkeys([*cases, *recorded]), key=lambda name: name in state)[:MOST_OUTPUTS]
    return [
        Output(
            name,
            name in state,
            cases.get(name, []),
            object_of(at(recorded.get(name), "worst")),
            natural(at(recorded.get(name), "equal")) or 0,
            bins_of(recorded.get(name), positive(at(manifest.parity, "scales", name)) or 1.0),
        )
        for name in names
    ]


def tolerance_of(manifest: Manifest) -> float | None:
    """Return the tolerance; None where bundle.json has none that can be drawn."""
    tolerance = positive(manifest.parity.get("tolerance"))
    return tolerance if tolerance is not None and DRAWN[0] <= tolerance <= DRAWN[1] else None


def case_list(parity: Mapping[str, Any]) -> list[Any]:
    return list(list_of(parity.get("cases"))[:MOST_CASES])


def case_name(case: Any) -> str:
    rounded = ", as a GPU rounds" if at(case, "emulated") is True else ""
    fused = ", by fused operators" if at(case, "native") is True else ""
    return sizes_text(at(case, "sizes")) + rounded + fused


def bins_of(recorded: Any, scale: float) -> list[tuple[float, int]]:
    """Return the histogram with its edges on the output's scale."""
    counts, exponent = at(recorded, "counts"), at(recorded, "exponent")
    if not isinstance(counts, list) or type(exponent) is not int or not -200 <= exponent <= 200:
        return []
    edges = [2.0 ** (exponent + i) / scale for i in range(len(counts[:MOST_BINS]))]
    return [(edge, natural(count) or 0) for edge, count in zip(edges, counts, strict=False)]


def parity_section(manifest: Manifest) -> Markup:
    """Draw histograms over one axis, strips of cases, the worst elements, and every number folded away."""
    outputs, tolerance = outputs_of(manifest), tolerance_of(manifest)
    if tolerance is None or not outputs:
        return render("parity", outputs=[])
    axis = error_axis(outputs, tolerance)
    shown, states = (
        [histogram_row(each, axis, tolerance) for each in outputs if each.state == state] for state in (False, True)
    )
    ticks = [tick_label(axis.at(tick), 12, f"{tick:.0e}") for tick in axis.decades(6)]
    cases = case_rows(manifest)
    return render(
        "parity",
        runs=len(case_list(manifest.parity)),
        tolerance=tolerance,
        quantized=manifest.quantization is not None,
        fp16=fp16_range(manifest.parity),
        outputs=shown or states,
        states=states if shown else [],
        scale=chart(30, "axis of errors", [*ticks, tick_label(axis.at(tolerance), 27, "allowed", "end")]),
        strips=[(each.title, strip(each, tolerance)) for each in outputs if each.cases],
        key=[(tolerance * part, strip_shade(tolerance * part, tolerance)) for part in (1e-4, 1e-3, 1e-2, 1e-1, 1)],
        worst=worst_rows(outputs),
        cases=cases,
        most_cases=MOST_CASES,
        opened=len(cases) <= MOST_OPENED,
    )


def fp16_range(parity: Mapping[str, Any]) -> Markup:
    """Describe an FP16 bundle's largest tensor and sum beside FP16's limit; empty where not recorded."""
    tensor, total = (at(parity, key) for key in ("fp16_largest", "fp16_largest_sum"))
    value = finite(at(total, "value"))
    return render(
        "fp16_range",
        limit=FP16_MAX,
        largest="" if finite(at(tensor, "value")) is None else place_of(tensor),
        sum="" if value is None else place_of(total),
        overflows=value is not None and value > FP16_MAX,
    )


def place_of(extreme: Any) -> str:
    module = visible(at(extreme, "module"), 120) or "top"
    return f"{short(at(extreme, 'value'))} in {visible(at(extreme, 'tensor'), 80)} (module {module})"


def error_axis(outputs: Iterable[Output], tolerance: float) -> LogAxis:
    """Return an axis from the smallest error that is not zero to past the tolerance, at least four decades."""
    drawn = [edge for output in outputs for edge, count in output.bins if count] + [
        error for output in outputs for _, error in output.cases if error > 0
    ]
    low = max(min([tolerance * 1e-3, *drawn]), tolerance * LOWEST)
    high = min(max([tolerance, *drawn]), tolerance * 1e6) * 2.5
    return LogAxis(10 ** math.floor(math.log10(low)), high)


def histogram_row(output: Output, axis: LogAxis, tolerance: float) -> dict[str, Any]:
    equal = f", {output.equal / output.elements:.0%} equal to the bit" if output.elements else ""
    return {
        "name": output.title,
        "elements": f"{output.elements:,} elements{equal}" if output.elements else "no histogram recorded",
        "worst": max((error for _, error in output.cases), default=None),
        "drawing": histogram(output, axis, tolerance),
    }


def histogram(output: Output, axis: LogAxis, tolerance: float) -> Markup:
    """Draw one output's errors as bars, the worst of each run as a mark below, and the tolerance as a line."""
    tallest = math.log1p(max((count for _, count in output.bins), default=1)) or 1.0
    parts = [vertical(axis.at(tick), 0, HEIGHT, "rule") for tick in axis.decades(6)]
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
            parts.append(bar(axis.at(error), 0.3, HEIGHT + 3, RUG - 3, "warm", f"{name}: {error_text(error)}"))
    parts.append(vertical(axis.at(tolerance), 0, HEIGHT + RUG, "end"))
    return chart(HEIGHT + RUG, f"errors of {output.title}", parts)


def strip(output: Output, tolerance: float) -> Markup:
    """Draw one cell per run, stronger the nearer its error is to the tolerance."""
    width = min(100 / len(output.cases), WIDEST)
    cells = []
    for index, (name, error) in enumerate(output.cases):
        title, shade = f"{name}: {error_text(error)}", strip_shade(error, tolerance)
        cells.append(bar(index * width, width - min(0.3, width / 4), 0, STRIP, "mark", title, shade))
    return chart(STRIP, f"errors of {output.title} at {len(output.cases)} shapes", cells)


def strip_shade(error: float, tolerance: float) -> float:
    """Return the opacity of an error: 0.06 for FAINTEST of the tolerance or less, 1 for all of it."""
    if error <= 0:
        return 0.0
    share = LogAxis(FAINTEST * tolerance, tolerance).at(error) / 100
    return 0.06 + 0.94 * share


def worst_rows(outputs: Iterable[Output]) -> list[list[str]]:
    """Return where each output is furthest off."""
    return [
        [
            output.title,
            error_text(output.worst.get("error")),
            sizes_text(output.worst.get("sizes")),
            index_text(output.worst.get("index")),
            short(output.worst.get("ours"), 9),
            short(output.worst.get("theirs"), 9),
        ]
        for output in outputs
        if output.worst
    ]


def index_text(index: Any) -> str:
    return f"[{', '.join(count_text(place) for place in list_of(index)[:8])}]"


def case_rows(manifest: Manifest) -> list[list[str]]:
    """Return every number, one row per case and output."""
    return [
        [case_name(case), visible(name, 60), error_text(error)]
        for case in case_list(manifest.parity)
        for name, error in object_of(at(case, "errors")).items()
    ]
