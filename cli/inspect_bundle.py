"""``transom inspect``: what a bundle holds, from its manifest. (A file inspect.py would shadow Python's own.)"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from transom.cli.describe import (
    ENGINE_COLUMNS,
    GPU_FORMATS,
    GPU_NOTE,
    engine_rows,
    fp16_fields,
    generation_text,
    manifest_json,
    near_ties,
    parity_text,
    quantization_fields,
    score_line,
    tensor_texts,
)
from transom.cli.options import BundlePath, Json
from transom.cli.output import bytes_text, folder_bytes, print_fields, print_json, print_table

if TYPE_CHECKING:
    from transom.runtime.manifest import Manifest


def inspect(bundle: BundlePath, as_json: Json = False) -> None:
    """Show what a bundle holds.

    Tensors, axes, settings of generation, how it was quantised, parity, score, source and tools, files, and engines
    with what fused in them.
    Every file's size and SHA-256 are checked; a damaged bundle is an error.
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


def summary(path: Path, manifest: Manifest) -> Iterator[tuple[str, str]]:
    note = f", a {GPU_NOTE}" if manifest.precision in GPU_FORMATS else ""
    yield "name", manifest.name
    yield "family", manifest.family
    yield "task", manifest.task
    yield "precision", manifest.precision + note
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
        yield "prompts", "texts" if manifest.tokenizer else "token ids: the checkpoint had no tokenizer"
        yield "generation", generation
    if manifest.quantization is not None:
        yield from quantization_fields(manifest.quantization)
    yield "parity", f"worst error {parity_text(manifest.parity, manifest.quantization is not None)}"
    yield from fp16_fields(manifest.parity)
    for tie in near_ties(manifest.parity):
        yield "near tie", tie
    if manifest.score:
        yield "score", score_line(manifest.score)
    for name, value in manifest.source.items():
        yield f"source {name}", str(len(value)) if isinstance(value, list) else str(value)
    yield "tools", ", ".join(f"{name} {value}" for name, value in manifest.tools.items())
