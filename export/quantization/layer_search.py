"""Search the layers that have to stay in high precision: ranked by the error that each adds, until the gate holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import exp
from typing import Any

from transom.export.metrics import Rate
from transom.export.quantization.candidate import Candidate
from transom.export.quantization.fidelity import Fp32Outputs
from transom.export.quantization.gate_result import MOST_NATS, GateResult, pooled
from transom.export.quantization.quantizer import Layer
from transom.runtime.errors import AccuracyError

MAX_HIGH_PRECISION = 0.5  # of the weights in linear layers: with more in high precision it is no quantised model
SHOWN = 5  # layers in a message
CURVE = (0.25, 0.5, 0.75)  # of the layers quantised, between none and all


@dataclass(frozen=True)
class LayerSearchResult:
    """The layers that stay in high precision, and the gate results of the graphs that ship.

    why            why each of them does
    sensitivities  of all layers: relative output error where that layer alone is quantised
    results        by variant
    curve          error and score by how many layers are quantised, as bundle.json records it
    """

    high_precision: tuple[Layer, ...]
    why: Mapping[Layer, str]
    sensitivities: Mapping[Layer, float]
    results: Mapping[str, GateResult]
    curve: Sequence[Mapping[str, Any]] = field(default_factory=list)


def search_layers(
    candidates: Sequence[Candidate],
    fp32_outputs: Fp32Outputs,
    *,
    gate: bool,
    same_inputs: bool,
    report: Callable[[str], None],
) -> LayerSearchResult:
    """Rank the layers of the first candidate, which ships; leave as few in high precision as the gate allows.

    The gate has to hold for what ships and, where there are other candidates, for all of them pooled; ``same_inputs``
    says whether they are measured on the same inputs. Without ``gate`` all layers are quantised, and the result is
    recorded all the same. Raises AccuracyError where half of the weights are in high precision and the gate still does
    not hold.
    """
    first, quantizer = candidates[0], candidates[0].quantizer
    sensitivities = {}
    for layer, error in first.layer_errors(fp32_outputs):
        report("ranking layers by what quantising each costs")
        sensitivities[layer] = error
    order = sorted(quantizer.layers, key=lambda layer: -sensitivities[layer])
    budget = MAX_HIGH_PRECISION * sum(quantizer.sizes.values())
    high_precision: list[Layer] = []
    why: dict[Layer, str] = {}
    while True:
        results = {
            variant: evaluate_all(candidates, variant, high_precision, report, same_inputs=same_inputs)
            for variant in first.gate_modes
        }
        broken = [result.broken for result in results.values() if not result.holds]
        if not broken or not gate:
            break
        tried = len(high_precision)
        budget -= quantizer.sizes[order[tried]] if tried < len(order) else budget + 1
        if budget < 0:
            raise AccuracyError(refusal(broken[0], order, sensitivities, tried))
        high_precision.append(order[tried])
        why[order[tried]] = f"{broken[0].measure}: {broken[0].found:.3g} lost without it, {broken[0].allowed:g} allowed"
    curve = error_curve(first, order, high_precision, results[first.variant], report)
    return LayerSearchResult(tuple(high_precision), why, sensitivities, results, curve)


def evaluate_all(
    candidates: Sequence[Candidate],
    variant: str,
    high_precision: Sequence[Layer],
    report: Callable[[str], None],
    *,
    same_inputs: bool,
) -> GateResult:
    """Return the gate result of the first candidate, with that of all candidates pooled as its ``repeated``."""
    results = []
    for candidate in candidates:
        kept = len(high_precision)
        report(f"measuring accuracy, {kept} layers in high precision" if kept else "measuring accuracy")
        results.append(candidate.evaluate(variant, high_precision))
    if len(results) == 1:
        return results[0]
    return replace(results[0], repeated=pooled(results, same_inputs=same_inputs))


def error_curve(
    candidate: Candidate,
    order: Sequence[Layer],
    high_precision: Sequence[Layer],
    final: GateResult,
    report: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Measure error and score by how many layers are quantised, the least sensitive first."""
    layers, shipped = len(order), len(order) - len(high_precision)
    points: list[dict[str, Any]] = [
        {"quantized": 0, "layers": layers, "relative_error": 0.0, "score": score_of(final.score_fp32)}
    ]
    for count in sorted({round(share * layers) for share in CURVE} - {0, layers, shipped}):
        report("measuring the curve")
        points.append(curve_point(candidate.evaluate(candidate.variant, order[: layers - count]), count, layers))
    points.append(curve_point(final, shipped, layers))
    if high_precision:
        report("measuring the curve")
        points.append(curve_point(candidate.evaluate(candidate.variant, ()), layers, layers))
    return sorted(points, key=lambda each: each["quantized"])


def curve_point(result: GateResult, quantized: int, layers: int) -> dict[str, Any]:
    return {
        "quantized": quantized,
        "layers": layers,
        "relative_error": result.relative_error,
        "score": score_of(result.score_int8),
    }


def score_of(measured: Any) -> float | None:
    """Return a score as the gate reports it: a fraction, or a perplexity."""
    if measured is None:
        return None
    return exp(min(measured.value, MOST_NATS)) if isinstance(measured, Rate) else float(measured.value)


def refusal(result: GateResult, order: Sequence[Layer], sensitivities: Mapping[Layer, float], tried: int) -> str:
    """Return the message of the AccuracyError: what was lost, with how many layers, and the most sensitive ones."""
    worst = ", ".join(f"{name} ({sensitivities[graph, name]:.2g})" for graph, name in order[:SHOWN])
    return (
        f"{result.summary()}, with {tried} of {len(order)} layers in high precision; more than half of the "
        f"weights would have to be. Most sensitive: {worst}. Nothing was written. Try more calibration data like what "
        "the model will see, another --method, --activations dynamic, or a wider precision."
    )
