"""What INT8 or INT4 costs: the accuracy gate, scores against the number of quantised layers, the layers that hurt."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from transom.export.report.drawing.chart import LinearAxis, bar, dot, drawing, level, slope, tick_label, upright
from transom.export.report.drawing.markup import figure, numeric, section, table, words
from transom.export.report.drawing.numbers import at, count_text, items, number, short, whole
from transom.export.report.score import MOST, around, sane
from transom.runtime.manifest import Manifest

MOST_POINTS, MOST_LAYERS, MOST_VARIANTS = 300, 2000, 8
MOST_GRAPHS = 8
DRAWN = 24  # layers with a bar, and those that are kept besides
BAR = 12  # pixels
HEIGHT, LABELS = 150, 30  # pixels of a plot, and of the numbers below it
TOP = 14  # pixels above the highest value
LETTERS = 15  # pixels that the words of one line take from another's
LEFT, RIGHT = 9.0, 3.0  # percent beside the points: the numbers of the axis stand on the left
MEASURES = (  # what a curve's points may have, and where the bound comes from
    ("score", "task score"),
    ("agreement", "same top-1 as FP32"),
    ("relative_error", "relative error of the output"),
)


def value_of(told: Any) -> float | None:
    """A figure that stands alone, or under ``value`` beside its interval."""
    return sane(at(told, "value")) if isinstance(told, Mapping) else sane(told)


@dataclass(frozen=True)
class GateResult:
    """One variant's gate, as far as bundle.json tells it."""

    variant: str
    measure: str
    found: float | None
    allowed: float | None
    n: str
    holds: bool
    score: float | None
    score_fp32: float | None
    perplexity: bool  # what the scores are: the gate allows it to grow by a share
    agreement: float | None
    relative_error: float | None
    repeated: str  # what was found over several calibrations

    def bound(self, measure: str) -> float | None:
        """The value of ``measure`` at which the gate would not hold any more; None where the gate judges another."""
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
        """What FP32 has of ``measure``."""
        return self.score_fp32 if measure == "score" else None


def near(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-9 * max(1.0, abs(a))


def verdicts_of(quantization: Mapping[str, Any]) -> list[GateResult]:
    """The gate's verdicts, that of the CPU first."""
    gate = sorted(items(quantization.get("gate")).items(), key=lambda item: item[0] != "cpu")
    return [verdict_from_json(variant, told) for variant, told in gate[:MOST_VARIANTS]]


def verdict_from_json(variant: str, told: Any) -> GateResult:
    """The scores of texts are nats per token; as everywhere else they are shown as perplexity."""
    perplexity = at(told, "score", "lower_is_better") is True
    scores = [value_of(at(told, "score", side)) for side in ("int8", "fp32")]
    score, score_fp32 = (exponential(each) if perplexity else each for each in scores)
    return GateResult(
        variant=words(variant, 40),
        measure=words(at(told, "measure"), 80),
        found=sane(at(told, "found")),
        allowed=sane(at(told, "allowed")),
        n=count_text(at(told, "n")),
        holds=at(told, "holds") is True,
        score=score,
        score_fp32=score_fp32,
        perplexity=perplexity,
        agreement=value_of(at(told, "agreement")),
        relative_error=value_of(at(told, "relative_error")),
        repeated=repeated_text(at(told, "repeated")),
    )


def repeated_text(told: Any) -> str:
    if told is None:
        return "–"
    calibrations, n = (count_text(at(told, key)) for key in ("calibrations", "n"))
    return f"{short(sane(at(told, 'found')))} over {calibrations}, n = {n}"


def exponential(nats: float | None) -> float | None:
    return None if nats is None or nats > math.log(MOST) else math.exp(nats)


def quantization_section(manifest: Manifest) -> str:
    """How it was quantised, the gate, the curves, the bars; nothing for a bundle that is not quantised."""
    quantization = manifest.quantization
    if quantization is None:
        return ""
    verdicts = verdicts_of(quantization)
    return section(
        "Quantisation",
        f"<p>{recipe(quantization)}</p>",
        gate_table(verdicts),
        curves(quantization, verdicts[0] if verdicts else None),
        layer_bars(quantization),
    )


def recipe(quantization: Mapping[str, Any]) -> str:
    """Of what, by what, on what."""
    modes = list(items(quantization.get("activations")).items())[:MOST_GRAPHS]
    activations = ", ".join(f"{words(mode)} in {words(graph, 60)}" for graph, mode in modes)
    block, data = whole(quantization.get("block_size")), quantization.get("data")
    blocks = f" in blocks of {block}" if block is not None else ""
    ranges = f"; ranges by {words(quantization.get('method'), 40)}" if quantization.get("method") is not None else ""
    observed = f" from {count_text(at(data, 'samples'))} samples of {words(at(data, 'name'), 80)}" if data else ""
    measured_with = [quantization[key] for key in ("processor", "instruction_set") if key in quantization]
    sums = " Sums of 8-bit products are the same on every processor." * (quantization.get("integer_sums") == "exact")
    return (
        f"Weights of {words(quantization.get('weight_bits'), 8)} bits{blocks}, activations {activations}{ranges}"
        f'{observed}. <span class="soft">Measured with {", ".join(words(each, 60) for each in measured_with)}.'
        f"{sums}</span>"
    )


def gate_table(verdicts: Sequence[GateResult]) -> str:
    """A row per variant."""
    rows = [
        [
            verdict.variant,
            "holds" if verdict.holds else '<b class="limit">fails</b>',
            verdict.measure,
            short(verdict.found),
            short(verdict.allowed),
            verdict.n,
            f"{short(verdict.score)} / {short(verdict.score_fp32)}" if verdict.score is not None else "–",
            short(verdict.agreement),
            short(verdict.relative_error, 2),
            verdict.repeated,
        ]
        for verdict in verdicts
    ]
    head = (
        "variant",
        "gate",
        "judged by",
        "found",
        "allowed",
        "n",
        "score / FP32",
        "same top-1",
        "error",
        "calibrations",
    )
    if not rows:
        return '<p class="soft">No accuracy gate was recorded.</p>'
    return (
        '<p class="soft">The gate judges each variant on held-out data against FP32 and keeps layers in higher '
        "precision until what is found is no more than what is allowed.</p>"
        f"{table(head, rows, numeric(3, 4, 5, 6, 7, 8, 9))}"
    )


def curves(quantization: Mapping[str, Any], verdict: GateResult | None) -> str:
    """A plot of each measure over the number of quantised layers."""
    told = quantization.get("curve")
    points = told[:MOST_POINTS] if isinstance(told, list) else []
    layers = max((whole(at(point, "layers")) or 0 for point in points), default=0)
    plots = []
    for key, called in MEASURES:
        found = sorted(
            (quantized, value)
            for point in points
            for quantized, value in [(whole(at(point, "quantized")), value_of(at(point, key)))]
            if quantized is not None and quantized <= layers and value is not None
        )
        if found:
            name = verdict.measure if key == "score" and verdict is not None else called
            bound = verdict.bound(key) if verdict is not None else None
            whole_model = verdict.fp32(key) if verdict is not None else None
            drawn = plot(name, found, layers, bound, whole_model)
            plots.append(
                f"<div>{name}<small>of {layers:,} layers that could be quantised</small></div><div>{drawn}</div>"
            )
    if not plots:
        return ""
    return figure(
        "<b>Against the number of quantised layers.</b> Each point is the model with so many of its linear layers "
        "quantised, the least sensitive first, and the rest in higher precision. The red line is what the gate allows, "
        "the dotted one FP32. Where a plot has no red line the gate judges another measure.",
        f'<div class="rows">{"".join(plots)}</div>',
    )


def plot(
    name: str, points: Sequence[tuple[int, float]], layers: int, bound: float | None, whole_model: float | None
) -> str:
    """Dots joined by lines; ``points`` are (quantised layers, value), sorted."""
    lines = [each for each in (bound, whole_model) if each is not None]
    up, across = around([*(value for _, value in points), *lines]), LinearAxis(0, max(layers, 1))

    def x(quantized: float) -> float:
        return LEFT + across.at(quantized) * (100 - LEFT - RIGHT) / 100

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP) * (1 - up.at(value) / 100)

    parts = [level(0, 100, y(tick), "rule") for tick in up.ticks()]
    clear = [tick for tick in up.ticks() if all(abs(y(tick) - y(line)) > LETTERS for line in lines)]
    parts += [tick_label(0, y(tick) - 3, short(tick)) for tick in clear]
    if whole_model is not None:  # its words on the other side than the curve, those of the bound where it begins
        parts.append(level(0, 100, y(whole_model), "average"))
        rises = bound is not None and bound > whole_model
        parts.append(tick_label(100, y(whole_model) + (13 if rises else -4), f"FP32 {short(whole_model)}"))
    if bound is not None:
        parts.append(level(0, 100, y(bound), "end"))
        parts.append(tick_label(0, y(bound) - 4, f"allowed {short(bound)}", "end"))
    for (before, first), (after, second) in pairwise(points):
        parts.append(slope(x(before), y(first), x(after), y(second), "reach"))
    parts += [dot(x(count), y(value), "mark", f"{count} of {layers} layers: {short(value)}") for count, value in points]
    for tick in across.ticks():
        if tick == int(tick):
            parts += [upright(x(tick), HEIGHT, HEIGHT + 4, "rule"), tick_label(x(tick), HEIGHT + 17, short(tick))]
    return drawing(HEIGHT + LABELS, f"{name} against quantised layers, {len(points)} points", parts)


def layer_bars(quantization: Mapping[str, Any]) -> str:
    """The layers that change the output most when they alone are quantised, and all that are kept."""
    told = quantization.get("layers")
    layers = [layer for layer in (told[:MOST_LAYERS] if isinstance(told, list) else []) if isinstance(layer, Mapping)]
    ranked = sorted(layers, key=lambda layer: -(number(layer.get("sensitivity")) or 0.0))
    shown = [layer for place, layer in enumerate(ranked) if place < DRAWN or layer.get("kept") is True][: 4 * DRAWN]
    if not shown:
        return ""
    axis = LinearAxis(0, max((number(layer.get("sensitivity")) or 0.0 for layer in shown), default=0.0) or 1.0)
    kept = sum(layer.get("kept") is True for layer in layers)
    left = len(ranked) - len(shown)
    rest = f" The {left:,} others are less sensitive." if left else ""
    return (
        f"<h3>The most sensitive of {len(layers):,} layers, {kept:,} of them kept</h3>"
        '<p class="soft">A bar is the relative error of the output when only that layer is quantised; the orange ones '
        f"stay in higher precision.{rest}</p>"
        f'<div class="rows named">{"".join(layer_row(layer, axis) for layer in shown)}</div>'
    )


def layer_row(layer: Mapping[str, Any], axis: LinearAxis) -> str:
    """A layer's name, why it is kept if it is, and its bar."""
    sensitivity = short(layer.get("sensitivity"), 3)
    kept = layer.get("kept") is True
    name, graph = words(layer.get("name"), 100), words(layer.get("graph"), 40)
    why = f", kept: {words(layer.get('why'))}" if layer.get("why") is not None else ", kept"
    drawn = bar(
        0,
        axis.at(number(layer.get("sensitivity")) or 0.0),
        0,
        BAR,
        "warm" if kept else "mark",
        f"{name}: {sensitivity}",
    )
    return (
        f"<div>{name}<small>{sensitivity}, graph {graph}{why if kept else ''}</small></div>"
        f"<div>{drawing(BAR, f'sensitivity of {name}', [drawn])}</div>"
    )
