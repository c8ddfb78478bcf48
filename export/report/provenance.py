"""What goes in and out of the graphs, and what the bundle was made from and with."""

from __future__ import annotations

from transom.export.report.drawing.markup import section, table, words
from transom.export.report.drawing.numbers import items
from transom.runtime.graph_spec import Tensor
from transom.runtime.manifest import Manifest

MOST_ROWS = 40


def making_section(manifest: Manifest) -> str:
    """Tensors and axes of each graph, then source and libraries."""
    tensors = [
        [words(file.graph.name, 40), kind, words(tensor.name, 60), words(tensor.dtype), shape_text(tensor)]
        for file in manifest.graphs[:MOST_ROWS]
        for kind, found in (("in", file.graph.inputs), ("out", file.graph.outputs))
        for tensor in [each for each in found if not each.state][:MOST_ROWS]
    ]
    state = sum(tensor.state for file in manifest.graphs for tensor in (*file.graph.inputs, *file.graph.outputs))
    axes = ", ".join(
        f"{words(name, 20)} {axis.min} to {axis.max}, tuned for {axis.opt}"
        for name, axis in list(manifest.axes.items())[:MOST_ROWS]
    )
    more = f" {state} more pass state between calls or graphs." if state else ""
    tools = ", ".join(
        f"{words(name, 40)} {words(version, 40)}" for name, version in list(items(manifest.tools).items())[:MOST_ROWS]
    )
    source = words(manifest.source.get("sha256"), 80)
    return section(
        "Tensors and origin",
        table(("graph", "", "tensor", "dtype", "shape"), tensors),
        f"<p>Axes: {axes}.{more}</p>",
        f'<p class="soft">SHA-256 of the checkpoint {source}. Made with {tools}.</p>',
    )


def shape_text(tensor: Tensor) -> str:
    return f"({', '.join(words(size, 20) for size in tensor.shape)})"
