"""``transom table``: compare several bundles in one table, as at the end of ``make export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from transom.cli.describe import (
    GPU_FORMATS,
    GPU_NOTE,
    built_with,
    gate_line,
    precision_text,
    score_data,
    score_value,
)
from transom.cli.failures import FAILED
from transom.cli.options import Json
from transom.cli.output import print_json, print_table, printable, say
from transom.cli.progress import progress
from transom.runtime.errors import TransomError
from transom.runtime.format import bytes_text, folder_bytes, sizes_text

RUNS, WARMUP, SECONDS = 30, 5, 10.0  # of the p50 column: enough for a median
COLUMNS = ("bundle", "family", "precision", "size", "worst error", "allowed", "score PyTorch", "score bundle", "p50 ms")


def table(
    bundles: Annotated[
        list[Path], typer.Argument(metavar="BUNDLE", help="Folders that `transom export` made.", show_default=False)
    ],
    as_json: Json = False,
) -> None:
    """Print one table over several bundles.

    Its columns are size, worst error, score in PyTorch and in the bundle, and p50. That median latency is
    measured now, on this machine's CPU, at the sizes that each bundle is tuned for; for a bundle that
    generates it is that of one token, for a CLIP that of one image. Quantised bundles are judged by their
    accuracy gate, printed below the table with the processor that it was measured on.
    Exit status 1 when a bundle cannot be loaded; its row has the reason.
    """
    with progress(quiet=as_json) as report:
        rows = []
        for done, path in enumerate(bundles):
            report(f"measuring {path}", done, len(bundles))
            rows.append(row_of(path))
    if as_json:
        print_json({"bundles": rows})
    else:
        show(rows)
    if any("error" in row for row in rows):
        raise typer.Exit(FAILED)


def row_of(path: Path) -> dict[str, Any]:
    """Measure one bundle and return its row, or an ``error`` where it cannot be loaded or run."""
    from transom.runtime import load
    from transom.runtime.backends.ort_library import onnxruntime
    from transom.runtime.bench import Effort, measurements
    from transom.runtime.host import instruction_set, processor
    from transom.runtime.manifest_sections import worst_error
    from transom.runtime.tasks.generator import Generator

    try:
        with load(path) as loaded:
            manifest = loaded.manifest
            effort = Effort(RUNS, WARMUP, SECONDS)
            timings = [timing for measurement in measurements(loaded, {}) for timing in measurement(effort)]
            timing = timings[-1 if isinstance(loaded, Generator) else 0]  # a token; an image, where texts are known
    except TransomError as error:
        return {"bundle": path, "error": {"type": type(error).__name__, "message": str(error)}}
    return {
        "bundle": path,
        "name": manifest.name,
        "family": manifest.family,
        "task": manifest.task,
        "precision": manifest.precision,
        "gpu_format": manifest.precision in GPU_FORMATS,
        "quantized": manifest.quantization is not None,
        "gate": manifest.quantization and manifest.quantization.get("gate"),
        "built_with": manifest.quantization and built_with(manifest.quantization),
        "processor": processor(),
        "instruction_set": instruction_set(),
        "onnxruntime": str(onnxruntime().__version__),
        "size_bytes": folder_bytes(path),
        "worst_error": worst_error(manifest.parity),
        "tolerance": manifest.parity.get("tolerance"),
        "score": manifest.score,
        "p50_ms": timing.p50_ms,
        "p50_of": timing.name,
        "sizes": timing.sizes,
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table, and below it what its columns mean for these bundles."""
    good = [row for row in rows if "error" not in row]
    print_table(COLUMNS, map(cells, rows), right=COLUMNS[3:])
    for found in dict.fromkeys(f"{row['processor']}, onnxruntime {row['onnxruntime']}" for row in good):
        print(printable(f"p50 measured here, on {found}"))
    for data in dict.fromkeys(score_data(row["score"]) for row in good if row["score"]):
        print(printable(f"score: {data}"))
    for row in good:
        if row["p50_of"] != "model":  # of several graphs or steps, one
            what = "each new token" if row["p50_of"] == "decode" else f"the graph {row['p50_of']}"
            print(printable(f"p50 of {row['bundle']}: {what}, {sizes_text(row['sizes'])}"))
    if any(row["gpu_format"] for row in good):
        print(GPU_NOTE)
    for row in good:
        if row["quantized"]:
            print(printable(f"{row['bundle']}, built with {row['built_with']}; {gate_line({'gate': row['gate']})}"))
    for row in rows:
        if "error" in row:
            say(f"transom.runtime.errors.{row['error']['type']}: {row['error']['message']}")


def cells(row: dict[str, Any]) -> list[str]:
    """Return the cells of one row, in the order of COLUMNS."""
    if "error" in row:
        return [str(row["bundle"]), "cannot be loaded", *["–"] * (len(COLUMNS) - 2)]
    return [
        str(row["bundle"]),
        row["family"],
        precision_text(row["precision"]),
        bytes_text(row["size_bytes"]),
        "–" if row["worst_error"] is None else f"{row['worst_error']:.1e}",
        "gate" if row["quantized"] else "–" if row["tolerance"] is None else f"{row['tolerance']:g}",
        score_value(row["score"], "pytorch"),
        score_value(row["score"], "bundle"),
        f"{row['p50_ms']:.2f}",
    ]
