"""Draw the task's score of both sides, and what INT8 or INT4 costs: the gate, curves over layers, sensitive layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from transom.export.report.rendering import render, visible
from transom.export.report.svg import (
    LinearAxis,
    axis_around,
    bar,
    chart,
    dot,
    horizontal,
    line,
    tick_label,
    vertical,
)
from transom.runtime.format import at, count_text, finite, list_of, natural, object_of, short
from transom.runtime.manifest import Manifest
from transom.runtime.manifest_sections import unquantized_operators

MOST_SCORE = 1e12  # fractions and rates are far below
MOST_POINTS, MOST_LAYERS, MOST_VARIANTS, MOST_GRAPHS = 300, 2000, 8, 8
MOST_BARS = 24  # layers with a bar, and the kept ones besides
SIDES = (("pytorch", "PyTorch"), ("bundle", "this bundle"))
MEASURES = (  # of a curve's points
    ("score", "task score"),
    ("agreement", "same top-1 as FP32"),
    ("relative_error", "relative error of the output"),
)
ROW, BAR = 22, 12  # pixels of a score's row, and of a layer's bar
HEIGHT, LABELS, TOP = 150, 30, 14  # pixels of a plot, of the numbers below it, and above the highest value
LINE = 15  # pixels between two lines of text
LEFT, RIGHT = 9.0, 3.0  # percent beside the points: the numbers of the axis are on the left


def bounded(value: Any) -> float | None:
    """Return a number of at most MOST_SCORE in size; None for anything else."""
    number = finite(value)
    return number if number is not None and abs(number) <= MOST_SCORE else None


def value_of(recorded: Any) -> float | None:
    """Return a figure that stands alone, or under ``value`` beside its interval."""
    return bounded(at(recorded, "value")) if isinstance(recorded, Mapping) else bounded(recorded)


# The score


def score_value(score: Any, side: str) -> float | None:
    return bounded(at(score, side, "value"))


def interval_of(figures: Any) -> tuple[float, float] | None:
    """Return (low, high) of the 95 % interval of one side's figures; None where it is not two numbers in order."""
    ends = at(figures, "interval")
    low, high = (bounded(end) for end in ends) if isinstance(ends, list) and len(ends) == 2 else (None, None)
    return None if low is None or high is None or high < low else (low, high)


def score_text(value: float | None) -> str:
    """Return ``0.9907``, in as many digits as the command line prints."""
    return "–" if value is None else f"{value:.4f}" if abs(value) < 1000 else short(value)


def score_section(score: Mapping[str, Any] | None) -> Markup:
    """Draw PyTorch's score and the bundle's as dots on lines over one axis; nothing for a bundle without a score."""
    sides = [(key, label, value) for key, label in SIDES if (value := score_value(score, key)) is not None]
    if score is None or not sides:
        return Markup("")
    ends = [end for key, _, _ in sides for end in interval_of(at(score, key)) or ()]
    axis = axis_around([*(value for _, _, value in sides), *ends])
    ticks = [tick_label(axis.at(tick), 12, short(tick)) for tick in axis.ticks()]
    return render(
        "score",
        name=at(score, "name"),
        data=at(score, "data"),
        n=at(score, "n"),
        better="lower is better" if at(score, "lower_is_better") is True else "higher is better",
        sides=[side_row(score, key, label, value, axis) for key, label, value in sides],
        scale=chart(16, "axis of the score", ticks, role="presentation"),
    )


def side_row(score: Mapping[str, Any], key: str, label: str, value: float, axis: LinearAxis) -> dict[str, Any]:
    ends, correct = interval_of(at(score, key)), at(score, key, "correct")
    within = f"95 % {score_text(ends[0])} to {score_text(ends[1])}" if ends else "no interval"
    parts = [vertical(axis.at(tick), 0, ROW, "rule") for tick in axis.ticks()]
    if ends:
        parts.append(horizontal(axis.at(ends[0]), axis.at(ends[1]), ROW / 2, "reach"))
    parts.append(dot(axis.at(value), ROW / 2, "mark", radius=5))
    return {
        "label": label,
        "value": score_text(value),
        "within": within,
        "correct": f", {count_text(correct)} right" if correct is not None else "",
        "drawing": chart(ROW, f"{label}: {score_text(value)}, {within}", parts),
    }


# The accuracy gate


@dataclass(frozen=True)
class GateRecord:
    """One variant's gate result as bundle.json records it; texts are cut and visible."""

    variant: str
    measure: str
    found: float | None
    allowed: float | None
    n: str
    holds: bool
    score: float | None
    score_fp32: float | None
    perplexity: bool  # the scores are perplexities, which the gate allows to grow by a fraction
    agreement: float | None
    relative_error: float | None
    repeated: str  # the result over several calibrations

    def bound(self, measure: str) -> float | None:
        """Return the value of ``measure`` at the gate's limit; None where the gate judges another measure."""
        if self.allowed is None or self.found is None or not 0 < self.allowed < 1e3:
            return None
        if measure == "score" and self.score is not None and self.score_fp32 is not None:
            return self.score_fp32 * (1 + self.allowed) if self.perplexity else self.score_fp32 - self.allowed
        if measure == "agreement" and self.agreement is not None and near(self.found, 1 - self.agreement):
            return 1 - self.allowed
        if measure == "relative_error" and self.relative_error is not None and near(self.found, self.relative_error):
            return self.allowed
        return None

    def fp32(self, measure: str) -> float | None:
        """Return FP32's value of ``measure``, as far as it is recorded."""
        return self.score_fp32 if measure == "score" else None


def near(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-9 * max(1.0, abs(a))


def gate_records(quantization: Mapping[str, Any]) -> list[GateRecord]:
    """Return the gate's records, the CPU's first."""
    gate = sorted(object_of(quantization.get("gate")).items(), key=lambda item: item[0] != "cpu")
    return [gate_record_from_json(variant, recorded) for variant, recorded in gate[:MOST_VARIANTS]]


def gate_record_from_json(variant: str, recorded: Any) -> GateRecord:
    """Read one variant's result. Scores of texts are nats per token, and are shown as perplexity."""
    perplexity = at(recorded, "score", "lower_is_better") is True
    scores = [value_of(at(recorded, "score", side)) for side in ("int8", "fp32")]
    score, score_fp32 = (exponential(each) if perplexity else each for each in scores)
    return GateRecord(
        variant=visible(variant, 40),
        measure=visible(at(recorded, "measure"), 80),
        found=bounded(at(recorded, "found")),
        allowed=bounded(at(recorded, "allowed")),
        n=count_text(at(recorded, "n")),
        holds=at(recorded, "holds") is True,
        score=score,
        score_fp32=score_fp32,
        perplexity=perplexity,
        agreement=value_of(at(recorded, "agreement")),
        relative_error=value_of(at(recorded, "relative_error")),
        repeated=repeated_text(at(recorded, "repeated")),
    )


def repeated_text(repeated: Any) -> str:
    if repeated is None:
        return "–"
    calibrations, n = (count_text(at(repeated, key)) for key in ("calibrations", "n"))
    return f"{short(bounded(at(repeated, 'found')))} over {calibrations}, n = {n}"


def exponential(nats: float | None) -> float | None:
    return None if nats is None or nats > math.log(MOST_SCORE) else math.exp(nats)


def quantization_section(manifest: Manifest) -> Markup:
    """Draw the configuration, the gate, the curves and the layers; nothing for a bundle that is not quantised."""
    quantization = manifest.quantization
    if quantization is None:
        return Markup("")
    results = gate_records(quantization)
    block, data = natural(quantization.get("block_size")), quantization.get("data")
    method = quantization.get("method")
    return render(
        "quantization",
        weights=quantization.get("weight_bits"),
        blocks=f" in blocks of {block}" if block is not None else "",
        activations=list(object_of(quantization.get("activations")).items())[:MOST_GRAPHS],
        ranges=f"; ranges by {visible(method, 40)}" if method is not None else "",
        observed=f" from {count_text(at(data, 'samples'))} samples of {visible(at(data, 'name'), 80)}" if data else "",
        measured_with=[quantization[key] for key in ("processor", "instruction_set") if key in quantization],
        exact=quantization.get("integer_sums") == "exact",
        others=unquantized_operators(manifest.operators, quantization),
        results=results,
        curves=curves(quantization, results[0] if results else None),
        sensitivity=sensitivity(quantization),
    )


def curves(quantization: Mapping[str, Any], result: GateRecord | None) -> list[dict[str, Any]]:
    """Draw a plot of each measure over the number of quantised layers."""
    points = list_of(quantization.get("curve"))[:MOST_POINTS]
    layers = max((natural(at(point, "layers")) or 0 for point in points), default=0)
    plots = []
    for key, title in MEASURES:
        values = sorted(
            (quantized, value)
            for point in points
            for quantized, value in [(natural(at(point, "quantized")), value_of(at(point, key)))]
            if quantized is not None and quantized <= layers and value is not None
        )
        if values:
            name = result.measure if key == "score" and result is not None else title
            bound, fp32 = (result.bound(key), result.fp32(key)) if result is not None else (None, None)
            plots.append({"name": name, "layers": layers, "drawing": plot(name, values, layers, bound, fp32)})
    return plots


def plot(
    name: str, points: Sequence[tuple[int, float]], layers: int, bound: float | None, fp32: float | None
) -> Markup:
    """Draw ``points`` (quantised layers, value), sorted, as dots joined by lines, with the bound and FP32's value."""
    lines = [each for each in (bound, fp32) if each is not None]
    up, across = axis_around([*(value for _, value in points), *lines]), LinearAxis(0, max(layers, 1))

    def x(quantized: float) -> float:
        return LEFT + across.at(quantized) * (100 - LEFT - RIGHT) / 100

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP) * (1 - up.at(value) / 100)

    parts = [horizontal(0, 100, y(tick), "rule") for tick in up.ticks()]
    clear = [tick for tick in up.ticks() if all(abs(y(tick) - y(each)) > LINE for each in lines)]
    parts += [tick_label(0, y(tick) - 3, short(tick)) for tick in clear]
    if fp32 is not None:  # its label on the other side than the curve, the bound's where the curve begins
        parts.append(horizontal(0, 100, y(fp32), "average"))
        rises = bound is not None and bound > fp32
        parts.append(tick_label(100, y(fp32) + (13 if rises else -4), f"FP32 {short(fp32)}"))
    if bound is not None:
        parts.append(horizontal(0, 100, y(bound), "end"))
        parts.append(tick_label(0, y(bound) - 4, f"allowed {short(bound)}", "end"))
    for (before, first), (after, second) in pairwise(points):
        parts.append(line(x(before), y(first), x(after), y(second), "reach"))
    parts += [dot(x(count), y(value), "mark", f"{count} of {layers} layers: {short(value)}") for count, value in points]
    for tick in across.ticks():
        if tick == int(tick):
            parts += [vertical(x(tick), HEIGHT, HEIGHT + 4, "rule"), tick_label(x(tick), HEIGHT + 17, short(tick))]
    return chart(HEIGHT + LABELS, f"{name} against quantised layers, {len(points)} points", parts)


def sensitivity(quantization: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the layers that change the output most when they alone are quantised, and all that are kept.

    None where no layer was ranked: the gate held with all of them quantised, or there was none.
    """
    recorded = list_of(quantization.get("layers"))[:MOST_LAYERS]
    layers = [layer for layer in recorded if isinstance(layer, Mapping)]
    if all(layer.get("sensitivity") is None and layer.get("kept") is not True for layer in layers):
        return None
    ranked = sorted(layers, key=lambda layer: -(finite(layer.get("sensitivity")) or 0.0))
    shown = [layer for rank, layer in enumerate(ranked) if rank < MOST_BARS or layer.get("kept") is True]
    shown = shown[: 4 * MOST_BARS]
    if not shown:
        return None
    axis = LinearAxis(0, max((finite(layer.get("sensitivity")) or 0.0 for layer in shown), default=0.0) or 1.0)
    return {
        "layers": len(layers),
        "kept": sum(layer.get("kept") is True for layer in layers),
        "others": len(ranked) - len(shown),
        "rows": [layer_row(layer, axis) for layer in shown],
    }


def layer_row(layer: Mapping[str, Any], axis: LinearAxis) -> dict[str, Any]:
    """Return a layer's name, its note and its bar."""
    name, value = visible(layer.get("name"), 100), layer.get("sensitivity")
    note = f"{short(value, 3)}, graph {visible(layer.get('graph'), 40)}"
    kept = layer.get("kept") is True
    if kept:
        note += f", kept: {visible(layer.get('why'))}" if layer.get("why") is not None else ", kept"
    width, title = axis.at(finite(value) or 0.0), f"{name}: {short(value, 3)}"
    drawing = chart(BAR, f"sensitivity of {name}", [bar(0, width, 0, BAR, "warm" if kept else "mark", title)])
    return {"name": name, "note": note, "drawing": drawing}
