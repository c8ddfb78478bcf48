"""ViT's learned positions: how alike the embedding of each patch's place is to those of all others.

Dosovitskiy et al. (2020, arXiv:2010.11929), figure 7, centre.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from transom.export.bundle_graphs import load_external, parse_graph
from transom.export.report.drawing.heatmap import shade, thumbnail
from transom.export.report.drawing.markup import figure
from transom.export.report.graphs import DEVICE
from transom.runtime.bundle import Bundle
from transom.runtime.errors import BundleError
from transom.runtime.manifest_graphs import GraphFile

NAMES = ("embeddings.position_embeddings", "embeddings.position_embedding.weight")  # of ViT, and of CLIP's image tower
MOST_SIDE = 8  # maps in a row: of more patches every second or third is drawn

Grid = tuple[int, int]  # rows and columns of patches


def patch_grid(file: GraphFile, config: Any) -> Grid | None:
    """Rows and columns of patches of a graph that takes images; None where bundle.json does not tell."""
    shape = next((t.shape for t in file.graph.inputs if t.name == "pixel_values"), ())
    patch = config.get("patch_size") if isinstance(config, dict) else None
    if len(shape) != 4 or not isinstance(patch, list | tuple) or len(patch) != 2:
        return None
    sides = [
        size // side
        for size, side in zip(shape[2:], patch, strict=True)
        if type(size) is type(side) is int and side > 0
    ]
    return (sides[0], sides[1]) if len(sides) == 2 and min(sides) > 0 else None


def position_embeddings(bundle: Bundle, file: GraphFile, grid: Grid) -> NDArray[np.float32] | None:
    """Return the learned positions of the patches, (rows * columns, E), as the bundle stores them; None if it has none.

    None as well where its bytes are not of its shape.
    """
    name = file.file_for(DEVICE)
    patches = grid[0] * grid[1]
    for weight in parse_graph(bundle.read(name), name).graph.initializers.values():
        tensor = weight.const_value
        if tensor is None or not str(weight.name).endswith(NAMES) or len(tensor.shape) < 2:
            continue
        if tensor.shape[-2] != patches + 1:
            continue
        try:
            if isinstance(tensor, ir.ExternalTensor):
                tensor = load_external(tensor, bundle.read(file.weights) if file.weights else b"")
            values = tensor.numpy().astype(np.float32)
        except (ValueError, BundleError):
            return None
        return values.reshape(patches + 1, -1)[1:]  # without the class token's
    return None


def similarities(positions: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cosine of each row of (P, E) with each: (P, P)."""
    unit = positions / np.maximum(np.linalg.norm(positions, axis=1, keepdims=True), 1e-12)
    return np.asarray(unit @ unit.T, np.float32)


def draw_positions(bundle: Bundle, file: GraphFile, config: Any) -> str:
    """A map per patch, laid out as the patches are; nothing where no positions are found."""
    grid = patch_grid(file, config)
    positions = None if grid is None else position_embeddings(bundle, file, grid)
    if grid is None or positions is None or not np.isfinite(positions).all():
        return ""
    cosines = similarities(positions).reshape(*grid, *grid)
    rows, columns = (chosen(count) for count in grid)
    maps = "".join(
        thumbnail(cosines[r, c], f"positions like that of row {r + 1}, column {c + 1}") for r in rows for c in columns
    )
    every = (
        "" if len(rows) * len(columns) == grid[0] * grid[1] else f" {len(rows)} by {len(columns)} of them are drawn."
    )
    key = "".join(
        f'<i{kind} style="--p:{shade(abs(cosine)):.2f}"></i>{cosine:g}'
        for cosine in (-1.0, -0.5, 0.1, 0.5, 1.0)
        for kind in [' class="w"' if cosine < 0 else ""]
    )
    return figure(
        f"<b>What the model learned about places.</b> One small map for each of the {grid[0]} by {grid[1]} patches, "
        "laid out as they lie in the image: how alike its position embedding is to that of every other patch (cosine). "
        "In a trained model places near by, or in one row or column, come out alike, though nobody told it of rows."
        f"{every}",
        f'<div class="tiled" style="--n:{len(columns)}">{maps}</div><div class="key">cosine {key}</div>',
    )


def chosen(count: int) -> list[int]:
    """At most MOST_SIDE of ``count`` places, evenly."""
    step = -(-count // MOST_SIDE)
    return list(range((count - 1) % step // 2, count, step))
