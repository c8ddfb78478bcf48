"""Write the report of a bundle: one HTML file that needs nothing else, neither network nor script."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from transom.export.bundle_graphs import open_graphs
from transom.export.families.base import Figure, export_family
from transom.export.report.accuracy import quantization_section, score_section
from transom.export.report.engines import engines_section
from transom.export.report.graphs import operators_section, parameters_of, sizes_section, weights_of
from transom.export.report.overview import (
    RUNS,
    SECONDS,
    WARMUP,
    latency_section,
    overview_section,
    provenance_section,
)
from transom.export.report.parity import parity_section
from transom.export.report.rendering import render
from transom.export.report.score_by_length import score_by_length_section
from transom.runtime.atomic_write import write_bytes
from transom.runtime.bench import BenchReport, bench
from transom.runtime.bundle import Bundle
from transom.runtime.errors import ExportError, InputError, TransomError
from transom.runtime.families import FAMILIES


def write_report(folder: Path, inputs: Sequence[str], out: Path, prompts: Sequence[str] = ()) -> None:
    """Write the report of the bundle in ``folder`` to ``out``, whole or not at all.

    ``inputs`` are the texts or image files of its figure, ``prompts`` the texts that CLIP compares its images with, or
    questions about them; examples where there are none. Raises BundleError for a bundle that cannot be loaded,
    InputError for inputs that cannot be drawn, ExportError where ``out`` cannot be written.
    """
    bundle = Bundle(folder)
    figure = draw_figure(bundle, inputs, prompts)
    measured = bench(folder, runs=RUNS, warmup=WARMUP, seconds=SECONDS)
    try:
        write_bytes(out, page(bundle, figure, measured).encode())
    except OSError as error:
        raise ExportError(f"cannot write {out}: {error.strerror}. Check the folder and its permissions.") from None


def page(bundle: Bundle, figure: Markup, measured: BenchReport) -> str:
    """Return the report as HTML."""
    manifest, models = bundle.manifest, open_graphs(bundle)
    parameters = parameters_of(bundle, models)
    sections = [
        figure,
        parity_section(manifest),
        score_section(manifest.score),
        score_by_length_section(manifest.score),
        quantization_section(manifest),
        engines_section(manifest),
        sizes_section(bundle, weights_of(bundle, models), parameters),
        latency_section(measured),
        operators_section(bundle, models),
        provenance_section(manifest),
    ]
    overview = overview_section(bundle, parameters, measured)
    return render("report", name=manifest.name, precision=manifest.precision, overview=overview, sections=sections)


def draw_figure(bundle: Bundle, inputs: Sequence[str], prompts: Sequence[str]) -> Markup:
    """Draw the figure of the bundle's family from ``inputs``, texts or image files, or from examples.

    Raises InputError for inputs that this bundle cannot draw. A bundle whose examples cannot be drawn gets a section
    with the reason, and one of an unknown family nothing.
    """
    family = bundle.manifest.family
    figure: Figure | None = export_family(family, bundle.manifest.task).figure if family in FAMILIES else None
    missing = "picture of its family" if figure is None else figure.missing(bundle)
    if prompts and not (figure and figure.prompts):
        raise InputError(
            "--prompt is for CLIP, whose images are compared with texts, and for Flamingo, which is asked about them; "
            f"this is a {family[:40]} bundle."
        )
    if (inputs or prompts) and missing:
        raise InputError(f"inputs are given, but there is nothing to draw of them: this bundle has no {missing}.")
    if figure is None:
        return Markup("")
    try:
        return Markup(figure.bare(bundle) if missing else figure.draw(bundle, inputs, prompts))
    except TransomError as error:
        if inputs or prompts:
            raise
        return render("no_figure", error=error)
