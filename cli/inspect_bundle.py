"""``transom inspect``: show what a bundle holds. (A file inspect.py would shadow Python's own.)"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.cli.describe import (
    GPU_FORMATS,
    GPU_NOTE,
    kernel_fields,
    manifest_json,
    near_ties,
    parity_text,
    quantization_fields,
    score_line,
)
from transom.cli.options import BundlePath, Json
from transom.cli.output import print_fields, print_json, print_table, printable
from transom.runtime.format import at, bytes_text, figure, folder_bytes, list_of, loops_text

if TYPE_CHECKING:
    from transom.runtime.graph_spec import Tensor
    from transom.runtime.manifest import Manifest

FP16_MAX = 65504.0  # IEEE 754 binary16
ENGINE_COLUMNS = ("target", "library", "graph", "plan", "size", "takes", "fused")
MADE_FOR_TEXTS = {
    "both": "CPU and TensorRT",
    "cpu": "CPU alone: no graph for TensorRT, so `transom build` refuses it",
    "tensorrt": "TensorRT alone: a CPU computes its graph in float32",
}
MOST_PROFILES = 8  # of a graph
MOST_EVIDENCE, MOST_LINE = 8, 200  # lines about a graph, and characters of one


def inspect(bundle: BundlePath, as_json: Json = False) -> None:
    """Show what a bundle holds.

    Prints tensors, axes, the generation config, quantization, parity, score, source and tools, files, and engines
    with what fused in them. Every file's size and SHA-256 are checked; a damaged bundle is an error.
    """
    from transom.runtime.bundle import Bundle

    manifest = Bundle(bundle).manifest
    if as_json:
        print_json(manifest_json(bundle, manifest))
        return
    print_fields(summary(bundle, manifest))
    print()
    columns = ("file", "size", "sha256")
    rows = [(name, bytes_text(file.size), file.sha256) for name, file in manifest.files.items()]
    print_table(columns, rows, right=("size",))
    if manifest.engines:
        print()
        print_table(ENGINE_COLUMNS, engine_rows(manifest), right=("size",))
        for line in evidence_lines(manifest):
            print(printable(line))


def summary(path: Path, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Yield the name and the text of each field, files and engines left out."""
    note = f", a {GPU_NOTE}" if manifest.precision in GPU_FORMATS else ""
    yield "name", manifest.name
    yield "family", manifest.family
    yield "task", manifest.task
    yield "precision", manifest.precision + note
    yield "made for", MADE_FOR_TEXTS[manifest.made_for]
    yield "size", bytes_text(folder_bytes(path))
    for name, axis in manifest.axes.items():
        yield f"axis {name}", f"{axis.min}..{axis.max}, tuned for {axis.opt}"
    for file in manifest.graphs:
        for text in tensor_texts(file.graph.inputs):
            yield f"{file.graph.name} input", text
        for text in tensor_texts(file.graph.outputs):
            yield f"{file.graph.name} output", text
    if manifest.labels:
        more = ", ..." if len(manifest.labels) > 8 else ""
        yield "labels", f"{len(manifest.labels)}: {', '.join(manifest.labels[:8])}{more}"
    generation = generation_text(manifest)
    if generation is not None:
        from transom.runtime.feeds import IMAGE_INDICES

        reads = {tensor.name for file in manifest.graphs for tensor in file.graph.inputs}
        among = " with images among them" if IMAGE_INDICES in reads else ""
        yield "prompts", f"texts{among}" if manifest.tokenizer else f"token ids{among}: the checkpoint had no tokenizer"
        yield "generation", generation
    if manifest.quantization is not None:
        yield from quantization_fields(manifest.quantization, manifest.operators)
    yield from kernel_fields(manifest)
    yield "parity", f"worst error {parity_text(manifest.parity, manifest.quantization is not None)}"
    yield from fp16_fields(manifest.parity)
    for tie in near_ties(manifest.parity):
        yield "near tie", tie
    if manifest.score:
        yield "score", score_line(manifest.score)
    for name, value in manifest.source.items():
        yield f"source {name}", source_text(value)
    if "licence" not in manifest.source:
        yield "source licence", "not said by the checkpoint's folder"
    yield "tools", ", ".join(f"{name} {value}" for name, value in manifest.tools.items())


def source_text(value: Any) -> str:
    """Return a field of ``source``: of weights left out their number, of a licence ``apache-2.0, file LICENSE``."""
    if isinstance(value, Mapping):
        return ", ".join(str(text) if key == "id" else f"{key} {text}" for key, text in value.items())
    return str(len(value)) if isinstance(value, list) else str(value)


def tensor_texts(tensors: Sequence[Tensor]) -> list[str]:
    """Return a line for each tensor; a state that every layer has is one line for all layers."""
    layers: dict[tuple[str, str], list[str]] = {}  # the name around the layer's number -> all the numbers
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
    """Split ``key_cache.3.written`` into ("key_cache.", "3", ".written"); a name without a number is all name."""
    found = re.fullmatch(r"(.*?\.)(\d+)(.*)", tensor.name)
    return (found[1], found[2], found[3]) if found else (tensor.name, "", "")


def tensor_text(tensor: Tensor, name: str) -> str:
    """Return ``input_ids int64 (B, S), values below 30522``."""
    from transom.runtime.graph_spec import ARANGE, is_cache

    text = f"{name} {tensor.dtype} ({', '.join(map(str, tensor.shape))})"
    if tensor.exclusive_max is not None:
        text += f", values below {tensor.exclusive_max}"
    if tensor.default is not None:
        text += f", {'0, 1, 2, ...' if tensor.default == ARANGE else tensor.default} if left out"
    if tensor.aliases is None:
        return text
    return f"{text}, {'in place' if is_cache(tensor) else f'replaces {layer_of(tensor)[0]}*'}"


def generation_text(manifest: Manifest) -> str | None:
    """Return the generation config that a call may change, ``num_beams 4, eos_token_id [0]``; None without one."""
    if manifest.generation is None:
        return None
    fields = ", ".join(f"{name} {json.dumps(value):.80}" for name, value in manifest.generation.items())
    return fields or "as transformers' defaults"


def fp16_fields(parity: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield how near an FP16 bundle comes to FP16's range: its largest value, and a bound of its partial sums."""
    for key, name in (("fp16_largest", "largest value"), ("fp16_largest_sum", "largest sum")):
        found = parity.get(key)
        value = at(found, "value")
        if type(value) is not float:
            continue
        where = f"{figure(value)} in {figure(at(found, 'tensor'))} (module {figure(at(found, 'module')) or 'top'})"
        if name == "largest value":
            yield name, f"{where}; fp16 ends at {FP16_MAX:g}"
        elif value <= FP16_MAX:
            yield name, f"no sum of products passes {where}, in whatever order it is added"
        else:
            yield (
                name,
                f"up to {where} on the way: a target that adds in half precision could overflow there. On a CPU this "
                "bundle adds in float32; how TensorRT's kernels add is not known",
            )


def engine_rows(manifest: Manifest) -> list[tuple[str, ...]]:
    """Return ENGINE_COLUMNS of every plan: target, library, graph, file, sizes, and what fused in each profile."""
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


def evidence_lines(manifest: Manifest) -> Iterator[str]:
    """Yield what the build of each engine executed and what it compiled only; nothing of an older version's."""
    for target, engine in manifest.engines.items():
        for graph in engine["plans"]:
            for key, what in (("executed", "executed"), ("compiled", "compiled only")):
                for line in list_of(at(engine, "graphs", graph, key))[:MOST_EVIDENCE]:
                    yield f"{target}, {graph}, {what}: {str(line)[:MOST_LINE]}"


def bounds_text(axes: Mapping[str, Mapping[str, int]]) -> str:
    """Return the bounds of axes, ``B=1..4, S=1..128``; a dash for an engine that an older version built."""
    return ", ".join(f"{name}={bounds['min']}..{bounds['max']}" for name, bounds in axes.items()) or "–"


def fusion_text(profile: Any) -> str:
    """Return what fused, ``decode: attention 4 of 4, GELU 4 of 4, INT8 13 of 17, 54 kernels``, less what is absent."""
    parts = [
        f"{name} {figure(at(profile, key, some))} of {figure(at(profile, key, 'of'))}{unrecognized_text(profile, key)}"
        for name, key, some in (
            ("attention", "attention", "fused"),
            ("GELU", "gelu", "fused"),
            ("INT8", "int8", "products"),
        )
        if at(profile, key, "of")
    ]
    parts += filter(None, [loops_text(at(profile, "loops"))])
    return f"{figure(at(profile, 'profile'))}: {', '.join([*parts, figure(at(profile, 'kernels')) + ' kernels'])}"


def unrecognized_text(profile: Any, key: str) -> str:
    """Return `` (2 not understood)`` where the builder's log does not show what became of some nodes."""
    nodes = at(profile, key, "not_understood")
    return f" ({len(nodes)} not understood)" if isinstance(nodes, Mapping) and nodes else ""
