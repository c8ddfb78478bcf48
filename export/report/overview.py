"""Draw the header of a report: parity, score, size, latency; and the sections on latency, tensors and origin."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from transom.export.families.base import export_family
from transom.export.report.accuracy import gate_records, interval_of, score_text, score_value
from transom.export.report.graphs import running_bytes
from transom.export.report.parity import tolerance_of
from transom.export.report.rendering import render, sizes_text, visible
from transom.runtime.bench import BenchReport, Timing
from transom.runtime.bundle import Bundle
from transom.runtime.families import FAMILIES
from transom.runtime.format import at, bytes_text, count_text, error_text, finite, milliseconds, object_of, short
from transom.runtime.graph_spec import Tensor
from transom.runtime.manifest import Manifest

RUNS, WARMUP, SECONDS = 60, 3, 1.5  # of the benchmark, per graph: an indication, no comparison
MOST_ROWS = 40  # graphs, tensors of each, axes and libraries in the page


@dataclass(frozen=True)
class Result:
    """Parity, or the accuracy gate, in one line: ``lead before error between allowed after``."""

    lead: str
    before: str
    error: str = ""
    between: str = ""
    allowed: str = ""
    after: str = ""
    failed: bool = False


@dataclass(frozen=True)
class Tile:
    """One figure with its name above and a note below."""

    name: str
    figure: str
    note: str


def overview_section(bundle: Bundle, parameters: int, bench: BenchReport) -> Markup:
    """Draw the header: name, result and four figures."""
    manifest = bundle.manifest
    family = export_family(manifest.family).title if manifest.family in FAMILIES else manifest.family
    quantization = manifest.quantization
    result = parity_result(manifest) if quantization is None else gate_result(quantization)
    tiles = tiles_of(bundle, parameters, bench)
    return render("overview", manifest=manifest, family=family, result=result, tiles=tiles)


def parity_result(manifest: Manifest) -> Result:
    """Return the worst error beside the tolerance."""
    error, tolerance = finite(at(manifest.parity, "worst", "error")), tolerance_of(manifest)
    if error is None or tolerance is None:
        return Result("Not compared with PyTorch:", "no error was recorded.", failed=True)
    failed = error > tolerance
    margin = ""
    if tolerance * 1e-9 <= error <= tolerance / 2:  # beyond that the factor says nothing
        margin = f", {short(math.floor(tolerance / error))} times as much"
    lead = "Differs from PyTorch:" if failed else "Agrees with PyTorch:"
    after = f" is allowed{margin}."
    return Result(lead, "worst error ", error_text(error), "; ", short(tolerance), after, failed)


def gate_result(quantization: Mapping[str, Any]) -> Result:
    """Return the gate's result for the variant that fails it, else for the CPU's."""
    results = sorted(gate_records(quantization), key=lambda result: result.holds)
    if not results:
        return Result("Not compared with FP32:", "no accuracy gate was recorded.", failed=True)
    gate = results[0]
    lead = "As accurate as its gate asks:" if gate.holds else "Less accurate than allowed:"
    after = f" allowed, judged by {gate.measure}, n = {gate.n} ({gate.variant})."
    return Result(lead, "", short(gate.found), " of ", short(gate.allowed), after, not gate.holds)


def tiles_of(bundle: Bundle, parameters: int, bench: BenchReport) -> list[Tile]:
    """Return worst error, score where there is one, size and latency."""
    manifest = bundle.manifest
    worst, score, timing = at(manifest.parity, "worst"), manifest.score, main_timing(bench)
    note = f"{visible(at(worst, 'tensor'), 40)} at {sizes_text(at(worst, 'sizes'))}"
    tiles = [Tile("worst error", error_text(at(worst, "error")), note)]
    value = score_value(score, "bundle")
    if value is not None:
        within = interval_of(at(score, "bundle"))
        ends = f"95 % {score_text(within[0])} to {score_text(within[1])}, " if within else ""
        note = f"{ends}n = {count_text(at(score, 'n'))}; PyTorch {score_text(score_value(score, 'pytorch'))}"
        tiles.append(Tile(visible(at(score, "name"), 60), score_text(value), note))
    tiles.append(Tile("size", bytes_text(running_bytes(bundle)), f"to run it; {parameters:,} weights"))
    note = f"{call_of(timing)} at {sizes_text(timing.sizes)}, median here"
    return [*tiles, Tile("latency", milliseconds(timing.p50_ms), note)]


def main_timing(bench: BenchReport) -> Timing:
    """Return the timing that a user notices: of one more token where text is generated."""
    return next((timing for timing in bench.timings if timing.name == "decode"), bench.timings[0])


def call_of(timing: Timing) -> str:
    return "one token" if timing.name == "decode" else f"one call of {visible(timing.name, 60)}"


def latency_section(bench: BenchReport) -> Markup:
    """Draw a row of times per graph, measured on the machine that makes the report."""
    threads = f"{bench.threads} threads" if bench.threads else "one thread per core"
    rows = [
        [
            call_of(timing),
            sizes_text(timing.sizes),
            *(milliseconds(value) for value in (timing.p50_ms, timing.p95_ms, timing.p99_ms)),
            f"{short(timing.items_per_s, 3)} {visible(timing.items)}/s",
            timing.runs,
        ]
        for timing in bench.timings
    ]
    return render("latency", bench=bench, threads=threads, rows=rows)


def provenance_section(manifest: Manifest) -> Markup:
    """Draw tensors and axes of each graph, then the source and the libraries."""
    graphs = [file.graph for file in manifest.graphs]
    tensors = [
        [visible(graph.name, 40), kind, visible(tensor.name, 60), visible(tensor.dtype), shape_text(tensor)]
        for graph in graphs[:MOST_ROWS]
        for kind, given in (("in", graph.inputs), ("out", graph.outputs))
        for tensor in [each for each in given if not each.state][:MOST_ROWS]
    ]
    return render(
        "provenance",
        tensors=tensors,
        axes=list(manifest.axes.items())[:MOST_ROWS],
        state_tensors=sum(tensor.state for graph in graphs for tensor in (*graph.inputs, *graph.outputs)),
        checkpoint_sha256=manifest.source.get("sha256"),
        tools=list(object_of(manifest.tools).items())[:MOST_ROWS],
    )


def shape_text(tensor: Tensor) -> str:
    return f"({', '.join(visible(size, 20) for size in tensor.shape)})"
