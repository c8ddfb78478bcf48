"""Describe a bundle by its manifest, as text and as JSON: what inspect, export and table print alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from transom.runtime.format import at, digits, figure, folder_bytes, list_of, perplexity

if TYPE_CHECKING:
    from transom.runtime.manifest import Manifest

GPU_FORMATS = ("fp16", "bf16")
GPU_NOTE = "GPU format: on a CPU its files are smaller, nothing is faster"


def manifest_json(path: Path, manifest: Manifest) -> dict[str, Any]:
    """Return the manifest as plain data, with where the bundle lies and its size on disk in bytes."""
    fields = manifest.to_json()
    first = {key: fields[key] for key in ("name", "family", "task", "precision")}
    return {"bundle": str(path), **first, "size_bytes": folder_bytes(path), **fields}


def precision_text(precision: str) -> str:
    """Return the precision, marked where it is a GPU format."""
    return f"{precision} (GPU format)" if precision in GPU_FORMATS else precision


def near_ties(parity: Mapping[str, Any]) -> list[str]:
    """Return a line per token where greedy generation left PyTorch's because two tokens were nearly equal there."""
    return [
        f"greedy token {tie['step']} of row {tie['row']} is {tie['ours']}, PyTorch's is {tie['theirs']}: "
        f"its margin is {tie['margin']:.2e}, a near tie"
        for tie in parity.get("greedy_near_ties", ())
    ]


def parity_text(parity: Mapping[str, Any], quantized: bool = False) -> str:
    """Return the worst error that the export measured, and the tolerance; a quantised bundle is judged by its gate."""
    from transom.runtime.manifest_sections import worst_error

    worst, tolerance = worst_error(parity), parity.get("tolerance")
    if worst is None:
        return "not recorded"
    text = f"{worst:.2e} of {tolerance:g} allowed"
    return f"{text}; the gate judges accuracy" if quantized else text


def score_value(score: Mapping[str, Any] | None, side: str) -> str:
    """Return the task score of one side, "pytorch" or "bundle": ``0.9889``; a dash where there is none."""
    return digits(at(score, side, "value"))


def score_data(score: Mapping[str, Any]) -> str:
    """Return metric, data and size: ``top-1 accuracy on the held-out digits, n = 360``."""
    name, data, n = (figure(at(score, key)) for key in ("name", "data", "n"))
    return f"{name}{' (lower is better)' if at(score, 'lower_is_better') else ''} on {data}, n = {n}"


def score_line(score: Mapping[str, Any]) -> str:
    """Return what was scored and both sides' scores, each with its correct answers or its interval."""
    sides = (f"{score_value(score, side)} ({score_detail(at(score, side))})" for side in ("bundle", "pytorch"))
    return f"{score_data(score)}: {', in PyTorch '.join(sides)}"


def score_detail(figures: Any) -> str:
    """Return the number of correct answers, ``535``, or the interval of a rate, ``1.5012 to 1.5833``."""
    if at(figures, "correct") is not None:
        return figure(at(figures, "correct"))
    return " to ".join(map(digits, list_of(at(figures, "interval"))[:2])) or "–"


MOST_EXCLUDED = 20  # layers that are listed one by one


def quantization_fields(
    quantization: Mapping[str, Any], operators: Mapping[str, Any] = MappingProxyType({})
) -> Iterator[tuple[str, str]]:
    """Yield how a bundle was quantised and calibrated, its layers in higher precision, and its gate results."""
    from transom.runtime.manifest_sections import unquantized_operators

    modes = ", ".join(f"{mode} in {graph}" for graph, mode in quantization["activations"].items())
    block, data = quantization.get("block_size"), quantization.get("data")
    yield "weights", f"{quantization['weight_bits']} bits" + ("" if block is None else f" in blocks of {figure(block)}")
    yield "activations", f"{modes}; ranges by {figure(quantization.get('method'))}"
    if data is not None:
        yield "calibrated on", f"{figure(at(data, 'name'))}, {figure(at(data, 'samples'))} samples"
    yield "built with", built_with(quantization)
    layers = list_of(quantization.get("layers"))
    excluded = [layer for layer in layers if at(layer, "kept") is True]
    yield "excluded layers", f"{len(excluded)} of {len(layers)}"
    for layer in excluded[:MOST_EXCLUDED]:
        yield "excluded", f"{figure(at(layer, 'name'))}: {figure(at(layer, 'why'))}"
    others = unquantized_operators(operators, quantization)
    if others:
        counts = ", ".join(f"{count} {name}" for name, count in others.items())
        yield "not quantised", f"{counts}: no linear layers, nor convolutions that gain"
    for variant, result in gate_results(quantization):
        yield f"gate {variant}", gate_result_text(result)


def built_with(quantization: Mapping[str, Any]) -> str:
    """Return the machine that the export measured on, ``AMD EPYC, avx512_vnni, exact sums``, as far as recorded."""
    sums = quantization.get("integer_sums")
    known = (quantization.get("processor"), quantization.get("instruction_set"), sums and f"{figure(sums)} sums")
    return ", ".join(figure(each) for each in known if isinstance(each, str)) or "–"


def kernel_fields(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Yield of each graph what its list of fused operators has, or why it has none."""
    for name, entry in manifest.native.items():
        fused = at(entry, "fused")
        counts = ", ".join(f"{count} {what}" for what, count in fused.items()) if isinstance(fused, Mapping) else ""
        yield f"{name} kernels", counts or f"ONNX Runtime's alone: {at(entry, 'refused') or 'not recorded'}"


def gate_line(quantization: Mapping[str, Any]) -> str:
    """Return ``accuracy gate: cpu holds (0.0037 of 0.01 allowed, judged by top-1 accuracy, n = 540), ...; ...``."""
    results = "; ".join(f"{variant} {gate_result_text(result)}" for variant, result in gate_results(quantization))
    return f"accuracy gate: {results or 'not recorded'}"


def gate_results(quantization: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the gate result of each variant."""
    gate = quantization.get("gate")
    return list(gate.items()) if isinstance(gate, Mapping) else []


def gate_result_text(result: Any) -> str:
    """Return one variant's gate result: the measure, what is allowed, and how else it differs from FP32."""
    holds = "holds" if at(result, "holds") is True else "FAILS"
    measure, found, allowed, n = (figure(at(result, key)) for key in ("measure", "found", "allowed", "n"))
    parts = [f"{holds} ({found} of {allowed} allowed, judged by {measure}, n = {n})"]
    score = at(result, "score")
    if score is not None:
        nats = at(score, "lower_is_better") is True  # per token
        what, sides = "perplexity" if nats else "score", (at(score, side, "value") for side in ("int8", "fp32"))
        ours, fp32 = (figure(perplexity(value) if nats else value) for value in sides)
        parts.append(f"{what} {ours}, in FP32 {fp32}")
    for key, what in (("agreement", "same top-1"), ("relative_error", "relative error")):
        if at(result, key) is not None:
            parts.append(f"{what} {figure(at(result, key))}")
    repeated = at(result, "repeated")
    if repeated is not None:
        calibrations, found, n = (figure(at(repeated, key)) for key in ("calibrations", "found", "n"))
        parts.append(f"over {calibrations} calibrations {found}, n = {n}")
    return ", ".join(parts)
