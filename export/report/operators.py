"""What the graphs are made of: operators as exported, as shipped, and as ONNX Runtime executes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from transom.export.bundle_graphs import operator_counts
from transom.export.report.drawing.markup import numeric, section, table, words
from transom.export.report.drawing.numbers import at, items, whole
from transom.export.report.graphs import DEVICE, executed_operators
from transom.runtime.bundle import Bundle
from transom.runtime.manifest_graphs import GraphFile

MOST_ROWS = 60

NOTE = (
    '<p class="soft">Exported: the FP32 graph before any pass. Shipped: after ours, in the file for this device. '
    "Executed: after ONNX Runtime's own passes on this CPU, where it fuses operators into its own (marked "
    "with their domain) and folds constants.</p>"
)


def operators_section(bundle: Bundle, models: Mapping[str, ir.Model]) -> str:
    """A table for each graph."""
    tables = []
    for file in bundle.manifest.graphs:
        title = f"<h3>Graph {words(file.graph.name, 60)}</h3>" if len(bundle.manifest.graphs) > 1 else ""
        exported = at(bundle.manifest.operators, file.graph.name)
        tables.append(title + operator_table(exported, shipped(file, models), executed_operators(bundle, file)))
    return section("Operators", NOTE, *tables)


def shipped(file: GraphFile, models: Mapping[str, ir.Model]) -> Mapping[str, int]:
    return operator_counts(models[file.file_for(DEVICE)])


def operator_table(exported: Any, shipped: Mapping[str, int], executed: Mapping[str, int]) -> str:
    """One row per operator, the most frequent first; a stage that nobody recorded is a column of dashes."""
    stages = [{name: whole(count) or 0 for name, count in items(exported).items()}, dict(shipped), dict(executed)]
    names = sorted(set().union(*stages), key=lambda name: (-max(stage.get(name, 0) for stage in stages), name))
    rows = [[operator_name(name), *(cell(stage, name) for stage in stages)] for name in names[:MOST_ROWS]]
    total = "".join(f'<td class="n">{sum(stage.values()) if stage else "–"}</td>' for stage in stages)
    last = f'<tr class="sum"><td>all {len(names)} operators</td>{total}</tr>'
    return table(("operator", "exported", "shipped", "executed"), rows, numeric(1, 2, 3), last)


def operator_name(name: str) -> str:
    domain, separator, own = name.rpartition("::")
    return f'{words(own, 60)} <span class="soft">{words(domain, 60)}</span>' if separator else words(name, 60)


def cell(stage: Mapping[str, int], name: str) -> str:
    """A count; a dot where the operator is not there, a dash where nothing was recorded."""
    count = stage.get(name, 0)
    return "–" if not stage else f"{count:,}" if count else '<span class="soft">·</span>'
