"""Draw what a ViT looks at: attention rollout over images, and the similarity of its position embeddings.

Rollout: Abnar and Zuidema (2020, arXiv:2005.00928), section 3: attention is averaged over heads, mixed half and half
with the identity for the residual connection, and multiplied through the layers. Positions: Dosovitskiy et al. (2020,
arXiv:2010.11929), figure 7, centre.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from markupsafe import Markup
from numpy.typing import NDArray

from transom.export.bundle_graphs import graph_file, load_external, parse_graph
from transom.export.reference_models import examples_for
from transom.export.report.figures.attention import ExposedAttention
from transom.export.report.graphs import DEVICE
from transom.export.report.images import SMALL, data_uri, image_from_pixels, is_small
from transom.export.report.rendering import render
from transom.export.report.svg import shade, thumbnail
from transom.runtime.bundle import Bundle
from transom.runtime.errors import BundleError
from transom.runtime.image_preprocess import ImagePreprocess
from transom.runtime.manifest_graphs import GraphFile
from transom.runtime.tasks.postprocess import label_scores, ranked

if TYPE_CHECKING:
    from transom.runtime.image_loading import ImageSource

TOP = 3  # labels under an image
VEIL = 0.92  # opacity over the patch that contributes least
NAMES = ("embeddings.position_embeddings", "embeddings.position_embedding.weight")  # of ViT, and of CLIP's image tower
MOST_SIDE = 8  # maps in a row: of more patches every second or third is drawn
COSINES = tuple((cosine, shade(abs(cosine))) for cosine in (-1.0, -0.5, 0.1, 0.5, 1.0))  # of the legend

Grid = tuple[int, int]  # rows and columns of patches


def draw_attention_rollout(bundle: Bundle, images: Sequence[str]) -> Markup:
    """Draw the similarity of positions, and each of ``images``, or a few examples, with its rollout over it."""
    file = graph_file(bundle, "model")
    grid = patch_grid(file, bundle.manifest.config)
    positions = None if grid is None else position_similarity(bundle, file, grid)
    large, drawn = False, []
    if bundle.manifest.preprocess is not None and grid is not None:
        preprocess = ImagePreprocess.from_json(bundle.manifest.preprocess)
        exposed = ExposedAttention(bundle, file)
        sources: Sequence[ImageSource] = images or list(examples_for(bundle.manifest.source.get("checkpoint")).images)
        drawn = [image_with_rollout(bundle, exposed, preprocess, grid, source) for source in sources]
        large = preprocess.width > SMALL
    if positions is None and not drawn:
        return Markup("")
    return render("figures/vit", positions=positions, images=drawn, large=large)


def patch_grid(file: GraphFile, config: Any) -> Grid | None:
    """Return rows and columns of patches of a graph that takes images; None where bundle.json does not say.

    What is cut into patches is the image, or the ``feature_map`` of a hybrid ViT.
    """
    shape = next((t.shape for t in file.graph.inputs if t.name == "pixel_values"), ())
    patch = config.get("patch_size") if isinstance(config, dict) else None
    if len(shape) != 4 or not isinstance(patch, list | tuple) or len(patch) != 2:
        return None
    cut = config.get("feature_map", shape[2:])
    if not isinstance(cut, list | tuple) or len(cut) != 2:
        return None
    sides = [
        size // side for size, side in zip(cut, patch, strict=True) if type(size) is type(side) is int and side > 0
    ]
    return (sides[0], sides[1]) if len(sides) == 2 and min(sides) > 0 else None


# Attention rollout


def image_with_rollout(
    bundle: Bundle, exposed: ExposedAttention, preprocess: ImagePreprocess, grid: Grid, source: ImageSource
) -> dict[str, Any]:
    """Return one image as the model sees it, the rollout over it, and the model's answers."""
    pixels = preprocess([source])
    outputs = [tensor.name for tensor in exposed.graph.outputs if tensor.name == "logits"]
    weights, arrays = exposed.with_outputs({"pixel_values": pixels}, outputs)
    if weights.shape[-1] != grid[0] * grid[1] + 1:
        raise BundleError(
            f"the graph attends to {weights.shape[-1]} tokens; expected a class token and {grid} patches."
        )
    image = image_from_pixels(pixels[0], preprocess)
    return {
        "uri": data_uri(image),
        "small": is_small(image),
        "width": image.width,
        "height": image.height,
        "overlay": overlay(rollout(weights)[0, 1:].reshape(grid), image.width, image.height),
        "answers": answers(bundle, arrays["logits"]) if outputs else [],
    }


def rollout(weights: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return how much of each input token is in each token after the last layer: (layers, H, S, S) -> (S, S)."""
    S = weights.shape[-1]
    product = np.eye(S)
    for layer in weights.astype(np.float64).mean(1):
        mixed = 0.5 * layer + 0.5 * np.eye(S)
        product = mixed / mixed.sum(-1, keepdims=True) @ product
    return product


def overlay(shares: NDArray[np.float64], width: int, height: int) -> Markup:
    """Draw a grey square per patch over an image of that many pixels, the denser the less the patch contributes."""
    rows, columns = shares.shape
    across, down = width / columns, height / rows
    least, most = float(shares.min()), float(shares.max())
    patches = []
    for (r, c), share in np.ndenumerate(shares):
        opacity = VEIL * (most - float(share)) / (most - least or 1.0)
        place = f'x="{c * across:.2f}" y="{r * down:.2f}" width="{across:.2f}" height="{down:.2f}"'
        tooltip = f"<title>{share:.1%}</title>"
        patches.append(Markup(f'<rect {place} class="veil" fill-opacity="{opacity:.2f}">{tooltip}</rect>'))
    return Markup("").join(patches)


def answers(bundle: Bundle, logits: NDArray[np.float32]) -> list[tuple[str, float]]:
    """Return the best labels and their scores; none where bundle.json names other classes than the graph has."""
    labels = bundle.manifest.labels
    scores = label_scores(logits, bundle.manifest.options.get("problem_type"))[0]
    return list(ranked(scores, labels, TOP)) if len(labels) == len(scores) else []


# Position embeddings


def position_similarity(bundle: Bundle, file: GraphFile, grid: Grid) -> dict[str, Any] | None:
    """Draw a map per patch, laid out as the patches are; None where the graph has no learned positions."""
    positions = position_embeddings(bundle, file, grid)
    if positions is None or not np.isfinite(positions).all():
        return None
    cosines = similarities(positions).reshape(*grid, *grid)
    rows, columns = (evenly_chosen(count) for count in grid)
    return {
        "grid": grid,
        "rows": len(rows),
        "columns": len(columns),
        "cut": len(rows) * len(columns) != grid[0] * grid[1],
        "maps": [
            thumbnail(cosines[r, c], f"positions like that of row {r + 1}, column {c + 1}")
            for r in rows
            for c in columns
        ],
        "key": COSINES,
    }


def position_embeddings(bundle: Bundle, file: GraphFile, grid: Grid) -> NDArray[np.float32] | None:
    """Return the learned positions of the patches as stored, (rows * columns, E); None where there are none."""
    name, patches = file.file_for(DEVICE), grid[0] * grid[1]
    for weight_name, weight in parse_graph(bundle.read(name), name).graph.initializers.items():
        value = weight.const_value
        if value is None or not weight_name.endswith(NAMES):
            continue
        shape = value.shape.numpy()
        if len(shape) < 2 or shape[-2] != patches + 1:
            continue
        try:
            if isinstance(value, ir.ExternalTensor):
                value = load_external(value, bundle.read(file.weights) if file.weights else b"")
            values = value.numpy().astype(np.float32)
        except (ValueError, BundleError):  # bytes that are not of this shape
            return None
        return values.reshape(patches + 1, -1)[1:]  # without the class token's
    return None


def similarities(positions: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the cosine of each row of (P, E) with each other: (P, P)."""
    unit = positions / np.maximum(np.linalg.norm(positions, axis=1, keepdims=True), 1e-12)
    return np.asarray(unit @ unit.T, np.float32)


def evenly_chosen(count: int) -> list[int]:
    """Return at most MOST_SIDE of ``count`` places, evenly spaced."""
    step = -(-count // MOST_SIDE)
    return list(range((count - 1) % step // 2, count, step))
