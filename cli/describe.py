"""A bundle in words and as JSON, from its manifest alone: what inspect, export and table share."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from math import exp
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.cli.output import bytes_text, folder_bytes

if TYPE_CHECKING:
    from transom.runtime.graph_spec import Tensor
    from transom.runtime.manifest import Manifest

GPU_FORMATS = ("fp16", "bf16")
GPU_NOTE = "GPU format: on a CPU its files are smaller, nothing is faster"
FP16_MAX = 65504.0  # IEEE 754 binary16


def manifest_json(path: Path, manifest: Manifest) -> dict[str, Any]:
    """Return the manifest as plain data, with where the bundle lies and its size on disk in bytes."""
    fields = manifest.to_json()
    first = {key: fields[key] for key in ("name", "family", "task", "precision")}
    return {"bundle": str(path), **first, "size_bytes": folder_bytes(path), **fields}


def precision_text(precision: str) -> str:
    return f"{precision} (GPU format)" if precision in GPU_FORMATS else precision


def tensor_texts(tensors: Sequence[Tensor]) -> list[str]:
    """A line for each tensor; state, of which each layer has the same, is one line for all layers."""
    layers: dict[tuple[str, str], list[str]] = {}  # what stands around the layer's number -> all the numbers
    for tensor in tensors:
        if tensor.state:
            name, number, rest = layer_of(tensor)
            layers.setdefault((name, rest), []).append(number)
    texts = {}
    for tensor in tensors:
        name, number, rest = layer_of(tensor)
        numbers = layers.get((name, rest), []) if tensor.state else []
        if len(numbers) > 1:
            name, number = f"{name}{numbers[0]}..{numbers[-1]}", ""
        texts[f"{name}{number}{rest}"] = tensor_text(tensor, f"{name}{number}{rest}")
    return list(texts.values())


def layer_of(tensor: Tensor) -> tuple[str, str, str]:
    """``key_cache.3.written`` -> ("key_cache.", "3", ".written"); a name without a number is all name."""
    found = re.fullmatch(r"(.*?\.)(\d+)(.*)", tensor.name)
    return (found[1], found[2], found[3]) if found else (tensor.name, "", "")


def tensor_text(tensor: Tensor, name: str) -> str:
    """``input_ids int64 (B, S), values below 30522``."""
    from transom.runtime.graph_spec import ARANGE

    text = f"{name} {tensor.dtype} ({', '.join(map(str, tensor.shape))})"
    if tensor.exclusive_max is not None:
        text += f", values below {tensor.exclusive_max}"
    if tensor.default is not None:
        text += f", {'0, 1, 2, ...' if tensor.default == ARANGE else tensor.default} if left out"
    return text + (", in place" if tensor.aliases else "")


def generation_text(manifest: Manifest) -> str | None:
    """``num_beams 4, eos_token_id [0]``, the settings that a call may change; None for what generates nothing."""
    if manifest.generation is None:
        return None
    said = ", ".join(f"{name} {json.dumps(value):.80}" for name, value in manifest.generation.items())
    return said or "as transformers' defaults"


def near_ties(parity: Mapping[str, Any]) -> list[str]:
    """Where the export's greedy generation left PyTorch's, both sides being nearly undecided."""
    return [
        f"greedy token {tie['step']} of row {tie['row']} is {tie['ours']}, PyTorch's is {tie['theirs']}: "
        f"its margin is {tie['margin']:.2e}, a near tie"
        for tie in parity.get("greedy_near_ties", ())
    ]


def parity_text(parity: Mapping[str, Any], quantized: bool = False) -> str:
    """The worst error that the export measured, against what its precision allows; quantised ones have a gate."""
    from transom.runtime.manifest_sections import worst_error

    worst, tolerance = worst_error(parity), parity.get("tolerance")
    if worst is None:
        return "not recorded"
    told = f"{worst:.2e} of {tolerance:g} allowed"
    return f"{told}; the gate judges accuracy" if quantized else told


def fp16_fields(parity: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """How near an FP16 bundle comes to the end of FP16: its largest tensor, and what its sums may pass on their way."""
    for key, name in (("fp16_largest", "largest value"), ("fp16_largest_sum", "largest sum")):
        found = parity.get(key)
        value = at(found, "value")
        if type(value) is not float:
            continue
        said = f"{figure(value)} in {figure(at(found, 'tensor'))} (module {figure(at(found, 'module')) or 'top'})"
        if name == "largest value":
            yield name, f"{said}; fp16 ends at {FP16_MAX:g}"
        elif value <= FP16_MAX:
            yield name, f"no sum of products passes {said}, in whatever order it is added"
        else:
            yield (
                name,
                f"up to {said} on the way: a target that adds in half precision could overflow there. On a CPU this "
                "bundle adds in float32; how TensorRT's kernels add is not known",
            )


def score_value(score: Mapping[str, Any] | None, side: str) -> str:
    """``0.9889``, the task score of one side, "pytorch" or "bundle"; a dash where there is none."""
    return digits(at(score, side, "value"))


def score_data(score: Mapping[str, Any]) -> str:
    """``top-1 accuracy on the held-out digits, n = 360``; says so where lower is better."""
    name, data, n = (figure(at(score, key)) for key in ("name", "data", "n"))
    return f"{name}{' (lower is better)' if at(score, 'lower_is_better') else ''} on {data}, n = {n}"


def score_line(score: Mapping[str, Any]) -> str:
    """What was scored, and both sides: with how many they had right, or with the interval where none are counted."""
    sides = (f"{score_value(score, side)} ({score_detail(at(score, side))})" for side in ("bundle", "pytorch"))
    return f"{score_data(score)}: {', in PyTorch '.join(sides)}"


def score_detail(figures: Any) -> str:
    """``535`` right answers, or ``1.5012 to 1.5833`` for a rate."""
    if at(figures, "correct") is not None:
        return figure(at(figures, "correct"))
    return " to ".join(map(digits, list_of(at(figures, "interval"))[:2])) or "–"


def digits(value: Any) -> str:
    """``0.9889``; a dash for what is no number of a sane size."""
    return f"{value:.4f}" if isinstance(value, float) or (type(value) is int and abs(value) < 10**15) else "–"


MOST_KEPT = 20  # layers that are told one by one
MOST_NATS = 700.0  # exp of more is no float


def quantization_fields(quantization: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """How a bundle was quantised, on what, which layers it keeps, and what its gate found, as ``inspect`` prints it."""
    modes = ", ".join(f"{mode} in {graph}" for graph, mode in quantization["activations"].items())
    block, data = quantization.get("block_size"), quantization.get("data")
    yield "weights", f"{quantization['weight_bits']} bits" + ("" if block is None else f" in blocks of {figure(block)}")
    yield "activations", f"{modes}; ranges by {figure(quantization.get('method'))}"
    if data is not None:
        yield "calibrated on", f"{figure(at(data, 'name'))}, {figure(at(data, 'samples'))} samples"
    yield "built with", built_with(quantization)
    layers = list_of(quantization.get("layers"))
    kept = [layer for layer in layers if at(layer, "kept") is True]
    yield "kept layers", f"{len(kept)} of {len(layers)}"
    for layer in kept[:MOST_KEPT]:
        yield "kept", f"{figure(at(layer, 'name'))}: {figure(at(layer, 'why'))}"
    for variant, verdict in verdicts(quantization):
        yield f"gate {variant}", verdict_text(verdict)


def built_with(quantization: Mapping[str, Any]) -> str:
    """``AMD EPYC, avx512_vnni, exact sums``: what the export measured on, as far as bundle.json tells."""
    sums = quantization.get("integer_sums")
    known = (quantization.get("processor"), quantization.get("instruction_set"), sums and f"{figure(sums)} sums")
    return ", ".join(figure(each) for each in known if isinstance(each, str)) or "–"


def gate_line(quantization: Mapping[str, Any]) -> str:
    """``accuracy gate: cpu holds (0.0037 of 0.01 allowed, judged by top-1 accuracy, n = 540), ...; default ...``."""
    told = "; ".join(f"{variant} {verdict_text(verdict)}" for variant, verdict in verdicts(quantization))
    return f"accuracy gate: {told or 'not recorded'}"


def verdicts(quantization: Mapping[str, Any]) -> list[tuple[str, Any]]:
    gate = quantization.get("gate")
    return list(gate.items()) if isinstance(gate, Mapping) else []


def verdict_text(verdict: Any) -> str:
    """One variant's verdict: what was measured, what is allowed, and how else it differs from FP32."""
    holds = "holds" if at(verdict, "holds") is True else "FAILS"
    measure, found, allowed, n = (figure(at(verdict, key)) for key in ("measure", "found", "allowed", "n"))
    said = [f"{holds} ({found} of {allowed} allowed, judged by {measure}, n = {n})"]
    score = at(verdict, "score")
    if score is not None:
        nats = at(score, "lower_is_better") is True  # per token
        what, sides = "perplexity" if nats else "score", (at(score, side, "value") for side in ("int8", "fp32"))
        ours, fp32 = (figure(exponential(value) if nats else value) for value in sides)
        said.append(f"{what} {ours}, in FP32 {fp32}")
    for key, what in (("agreement", "same top-1"), ("relative_error", "relative error")):
        if at(verdict, key) is not None:
            said.append(f"{what} {figure(at(verdict, key))}")
    repeated = at(verdict, "repeated")
    if repeated is not None:
        calibrations, found, n = (figure(at(repeated, key)) for key in ("calibrations", "found", "n"))
        said.append(f"over {calibrations} calibrations {found}, n = {n}")
    return ", ".join(said)


ENGINE_COLUMNS = ("target", "library", "graph", "plan", "size", "takes", "fused")
MOST_PROFILES = 8  # of a graph


def engine_rows(manifest: Manifest) -> list[tuple[str, ...]]:
    """ENGINE_COLUMNS of every plan: for what, by what, of which graph, its sizes, and what fused in each profile."""
    return [
        (
            target,
            f"{engine['library']} {engine['version']}",
            graph,
            plan,
            bytes_text(manifest.files[plan].size),
            bounds_text(engine.get("axes", {})),
            "; ".join(map(fusion_text, list_of(at(engine, "graphs", graph, "profiles"))[:MOST_PROFILES])) or "–",
        )
        for target, engine in manifest.engines.items()
        for graph, plan in engine["plans"].items()
    ]


def bounds_text(axes: Mapping[str, Mapping[str, int]]) -> str:
    """``B=1..4, S=1..128``; a dash for an engine of a version that did not record them."""
    return ", ".join(f"{name}={bounds['min']}..{bounds['max']}" for name, bounds in axes.items()) or "–"


def fusion_text(profile: Any) -> str:
    """``decode: attention 4 of 4, GELU 4 of 4, INT8 13 of 17, 54 kernels``, with what is not there left out."""
    parts = [
        f"{name} {figure(at(profile, key, some))} of {figure(at(profile, key, 'of'))}{strange_text(profile, key)}"
        for name, key, some in (
            ("attention", "attention", "fused"),
            ("GELU", "gelu", "fused"),
            ("INT8", "int8", "products"),
        )
        if at(profile, key, "of")
    ]
    return f"{figure(at(profile, 'profile'))}: {', '.join([*parts, figure(at(profile, 'kernels')) + ' kernels'])}"


def strange_text(profile: Any, key: str) -> str:
    """`` (2 not understood)`` where the builder's log did not tell of some nodes."""
    nodes = at(profile, key, "not_understood")
    return f" ({len(nodes)} not understood)" if isinstance(nodes, Mapping) and nodes else ""


def exponential(nats: Any) -> float | None:
    return exp(nats) if isinstance(nats, float) and nats < MOST_NATS else None


def at(value: Any, *keys: str) -> Any:
    """What lies under ``keys``; None where there is nothing. For figures that nobody checked."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def list_of(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else []


def figure(value: Any) -> str:
    """A number in four digits, or that of an object's ``value``; counts and words as they are, a dash for the rest."""
    value = at(value, "value") if isinstance(value, Mapping) else value
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else f"{value!s:.160}"


EXAMPLE_IDS = "'1 2 3'"  # for a bundle that generates without a tokenizer


def next_commands(path: Path, manifest: Manifest) -> list[str]:
    """Return the commands to try on a bundle, ready to be pasted into a shell."""
    from transom.runtime.families import FAMILIES
    from transom.runtime.tasks import family_tasks

    bundle = shlex.quote(str(path))
    task = family_tasks(manifest.family).tasks.get(manifest.task) if manifest.family in FAMILIES else None
    inputs = task and task.example
    reads = {tensor.name for file in manifest.graphs for tensor in file.graph.inputs}
    if ("input_ids" in reads and manifest.tokenizer is None) or ("pixel_values" in reads and not manifest.preprocess):
        inputs = None if manifest.generation is None else EXAMPLE_IDS
    return [f"transom run {bundle} {inputs or 'inputs.npz'}", f"transom selftest {bundle}", f"transom bench {bundle}"]
