"""The report of a bundle: one HTML file that needs nothing else, neither network nor script."""

from __future__ import annotations

from transom.export.bundle_graphs import open_graphs
from transom.export.report.drawing.markup import words
from transom.export.report.drawing.style import STYLE
from transom.export.report.engines import engines_section
from transom.export.report.latency import latency_section
from transom.export.report.operators import operators_section
from transom.export.report.overview import headline
from transom.export.report.parity import parity_section
from transom.export.report.provenance import making_section
from transom.export.report.quantization import quantization_section
from transom.export.report.score import score_section
from transom.export.report.sizes import parameters_of, sizes_section, weights_of
from transom.runtime.bench import BenchReport
from transom.runtime.bundle import Bundle


def page(bundle: Bundle, pictures: str, timed: BenchReport) -> str:
    """The report as one string of HTML; ``pictures`` is HTML too."""
    manifest = bundle.manifest
    models = open_graphs(bundle)
    parameters = parameters_of(bundle, models)
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{words(manifest.name, 80)} in {manifest.precision}</title><style>{STYLE}</style></head><body>",
            headline(bundle, parameters, timed),
            "<main>",
            pictures,
            parity_section(manifest),
            score_section(manifest.score),
            quantization_section(manifest),
            engines_section(manifest),
            sizes_section(bundle, weights_of(bundle, models), parameters),
            latency_section(timed),
            operators_section(bundle, models),
            making_section(manifest),
            "</main>",
            "<footer>Made by <code>transom report</code> from bundle.json, the bundle's graphs and a short run on this "
            "machine. The file needs nothing else.</footer></body></html>",
        ]
    )
