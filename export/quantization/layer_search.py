"""Search the layers that have to stay in high precision where the gate misses: ranked by the error each adds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp
from typing import Any

from transom.export.metrics import Rate
from transom.export.quantization.candidate import Candidate
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
    results        by variant
    sensitivities  relative output error where that layer alone is quantised, of all layers; None where none was ranked
    curve          error and score by how many layers are quantised, as bundle.json records it; None likewise
    """

    high_precision: tuple[Layer, ...]
    why: Mapping[Layer, str]
    results: Mapping[str, GateResult]
    sensitivities: Mapping[Layer, float] | None = None
    curve: Sequence[Mapping[str, Any]] | None = None


def search_layers(
    candidates: Sequence[Candidate],
    rank: Callable[[Candidate], Mapping[Layer, float]],
    *,
    gate: bool,
    always_rank: bool = False,
    same_inputs: bool,
    report: Callable[[str], None],
) -> LayerSearchResult:
    """Quantise all layers; where the gate does not hold, rank them and leave as few in high precision as it allows.

    The gate has to hold for the first candidate, which ships, and, where there are other candidates, for all of them
    pooled; ``same_inputs`` says whether they are measured on the same inputs. ``rank`` measures the sensitivity of each
    layer, the most expensive part of a search: it is called where the gate does not hold, or where ``always_rank`` asks
    for it. Without ``gate`` all layers are quantised, and the result is recorded all the same. Raises AccuracyError
    where half of the weights are in high precision and the gate still does not hold.
    """
    first, sizes = candidates[0], candidates[0].quantizer.sizes
    results = gate_results(candidates, (), report, same_inputs=same_inputs, all_variants=not gate)
    broken = first_broken(results)
    if not (always_rank or (gate and broken)):
        return LayerSearchResult((), {}, results)
    sensitivities = rank(first)
    order = sorted(first.quantizer.layers, key=lambda layer: -sensitivities[layer])
    budget = MAX_HIGH_PRECISION * sum(sizes.values())
    high_precision: list[Layer] = []
    why: dict[Layer, str] = {}
    while gate and broken:
        tried = len(high_precision)
        budget -= sizes[order[tried]] if tried < len(order) else budget + 1
        if budget < 0:
            raise AccuracyError(refusal(broken, order, sensitivities, tried))
        high_precision.append(order[tried])
        why[order[tried]] = f"{broken.measure}: {broken.found:.3g} lost without it, {broken.allowed:g} allowed"
        results = gate_results(candidates, high_precision, report, same_inputs=same_inputs, all_variants=False)
        broken = first_broken(results)
    curve = error_curve(first, order, high_precision, results, report, between=always_rank)
    return LayerSearchResult(tuple(high_precision), why, results, sensitivities, curve)


def first_broken(results: Mapping[str, GateResult]) -> GateResult | None:
    """Return the part that does not hold of the first result that does not; None where all hold."""
    return next((result.broken for result in results.values() if not result.holds), None)


def gate_results(
    candidates: Sequence[Candidate],
    high_precision: Sequence[Layer],
    report: Callable[[str], None],
    *,
    same_inputs: bool,
    all_variants: bool,
) -> dict[str, GateResult]:
    """Return the gate result of each variant; unless ``all_variants``, none behind the first that does not hold."""
    results: dict[str, GateResult] = {}
    for variant in candidates[0].gate_modes:
        results[variant] = evaluate_all(candidates, variant, high_precision, report, same_inputs=same_inputs)
        if not (all_variants or results[variant].holds):
            break
    return results


def evaluate_all(
    candidates: Sequence[Candidate],
    variant: str,
    high_precision: Sequence[Layer],
    report: Callable[[str], None],
    *,
    same_inputs: bool,
) -> GateResult:
    """Return the gate result of the first candidate, with that of all candidates pooled as its ``repeated``.

    Where the first does not hold alone the others are not measured.
    """
    results: list[GateResult] = []
    for candidate in candidates:
        kept = len(high_precision)
        report(f"measuring accuracy, {kept} layers in high precision" if kept else "measuring accuracy")
        results.append(candidate.evaluate(variant, high_precision))
        if not results[0].holds:
            break
    if len(results) == 1:
        return results[0]
    return replace(results[0], repeated=pooled(results, same_inputs=same_inputs))


def error_curve(
    candidate: Candidate,
    order: Sequence[Layer],
    high_precision: Sequence[Layer],
    results: Mapping[str, GateResult],
    report: Callable[[str], None],
    *,
    between: bool,
) -> list[dict[str, Any]]:
    """Return error and score of the first variant by how many layers are quantised, the least sensitive first.

    At none, at each number that the search measured, and at all of them; where ``between`` also at CURVE's shares.
    """
    (variant, final), *_ = results.items()
    layers, shipped = len(order), len(order) - len(high_precision)
    counts = {*range(shipped + 1, layers + 1)} | ({round(share * layers) for share in CURVE} if between else set())
    points = [
        {"quantized": 0, "layers": layers, "relative_error": 0.0, "score": score_of(final.score_fp32)},
        curve_point(final, shipped, layers),
    ]
    for count in counts - {0, shipped}:
        report("measuring the curve")
        points.append(curve_point(candidate.evaluate(variant, order[: layers - count]), count, layers))
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
