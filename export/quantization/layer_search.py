"""Which layers can be integers: ranked by what each costs, kept in higher precision one by one until the gate holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import exp
from typing import Any

from transom.export.metrics import Rate
from transom.export.quantization.candidate import CPU, Candidate
from transom.export.quantization.fidelity import Fp32Outputs
from transom.export.quantization.gate_result import MOST_NATS, GateResult, pooled
from transom.export.quantization.quantizer import Layer
from transom.runtime.errors import AccuracyError

MOST_KEPT = 0.5  # of the weights in linear layers: with more in higher precision it is no quantised model
SHOWN = 5  # layers in a message
CURVE = (0.25, 0.5, 0.75)  # of the layers quantised, between none and all


@dataclass(frozen=True)
class LayerSearchResult:
    """``kept`` stay in higher precision; ``results`` are those of what ships, by variant."""

    kept: tuple[Layer, ...]
    why: Mapping[Layer, str]
    sensitivities: Mapping[Layer, float]
    results: Mapping[str, GateResult]
    curve: Sequence[Mapping[str, Any]] = field(default_factory=list)


def search_layers(
    candidates: Sequence[Candidate],
    reference: Fp32Outputs,
    *,
    gate: bool,
    same_inputs: bool,
    tell: Callable[[str], None],
) -> LayerSearchResult:
    """Rank the layers of the first candidate, which ships, and keep as few as the gate allows.

    The gate has to hold for what ships and, where there are other candidates, for all of them pooled; ``same_inputs``
    says whether they are measured on the same inputs. Without ``gate`` nothing is kept and the result is recorded all
    the same.
    Raises AccuracyError when half of the weights are kept and the gate still does not hold.
    """
    quantizer = candidates[0].quantizer
    sensitivities = {}
    for layer, error in candidates[0].errors_alone(reference):
        tell("ranking layers by what quantising each costs")
        sensitivities[layer] = error
    order = sorted(quantizer.layers, key=lambda layer: -sensitivities[layer])
    budget = MOST_KEPT * sum(quantizer.sizes.values())
    kept: list[Layer] = []
    why: dict[Layer, str] = {}
    while True:
        results = {
            kind: evaluate_candidates(candidates, kind, kept, tell, same_inputs=same_inputs)
            for kind in candidates[0].kinds
        }
        broken = [result.broken for result in results.values() if not result.holds]
        if not broken or not gate:
            break
        budget -= quantizer.sizes[order[len(kept)]] if len(kept) < len(order) else budget + 1
        if budget < 0:
            raise AccuracyError(refusal(broken[0], order, sensitivities, len(kept)))
        kept.append(order[len(kept)])
        why[kept[-1]] = f"{broken[0].measure}: {broken[0].found:.3g} lost without it, {broken[0].allowed:g} allowed"
    return LayerSearchResult(
        tuple(kept), why, sensitivities, results, curve(candidates[0], order, kept, results[CPU], tell)
    )


def evaluate_candidates(
    candidates: Sequence[Candidate], kind: str, kept: Sequence[Layer], tell: Callable[[str], None], *, same_inputs: bool
) -> GateResult:
    """The verdict of the first candidate, beside it what it is together with the others."""
    results = []
    for candidate in candidates:
        tell(f"measuring accuracy, {len(kept)} layers kept" if kept else "measuring accuracy")
        results.append(candidate.evaluate(kind, kept))
    if len(results) == 1:
        return results[0]
    return replace(results[0], repeated=pooled(results, same_inputs=same_inputs))


def curve(
    candidate: Candidate, order: Sequence[Layer], kept: Sequence[Layer], final: GateResult, tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Error and score against how many layers are quantised, the least sensitive first."""
    counts = sorted({round(share * len(order)) for share in CURVE} - {0, len(order), len(order) - len(kept)})
    points: list[dict[str, Any]] = [
        {"quantized": 0, "layers": len(order), "relative_error": 0.0, "score": score_of(final.score_fp32)}
    ]
    for count in counts:
        tell("measuring the curve")
        points.append(point(candidate.evaluate(CPU, order[: len(order) - count]), count, len(order)))
    points.append(point(final, len(order) - len(kept), len(order)))
    if kept:
        tell("measuring the curve")
        points.append(point(candidate.evaluate(CPU, ()), len(order), len(order)))
    return sorted(points, key=lambda each: each["quantized"])


def point(result: GateResult, quantized: int, layers: int) -> dict[str, Any]:
    return {
        "quantized": quantized,
        "layers": layers,
        "relative_error": result.relative_error,
        "score": score_of(result.score_int8),
    }


def score_of(measured: Any) -> float | None:
    """As the gate tells it: a fraction, or a perplexity."""
    if measured is None:
        return None
    return exp(min(measured.value, MOST_NATS)) if isinstance(measured, Rate) else float(measured.value)


def refusal(result: GateResult, order: Sequence[Layer], sensitivities: Mapping[Layer, float], kept: int) -> str:
    worst = ", ".join(f"{name} ({sensitivities[graph, name]:.2g})" for graph, name in order[:SHOWN])
    return (
        f"{result.summary()}, with {kept} of {len(order)} layers kept in higher precision; more than half of the "
        f"weights would have to be. Most sensitive: {worst}. Nothing was written. Try more calibration data like what "
        "the model will see, another --method, --activations dynamic, or a wider precision."
    )
