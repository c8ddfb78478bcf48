"""ViT: where in an image the class token's information comes from, by attention rollout.

Abnar and Zuidema (2020, arXiv:2005.00928), section 3: attention is averaged over heads, mixed half and half with the
identity for the residual connection, and multiplied through the layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from transom.export.bundle_graphs import graph_file
from transom.export.reference_models import examples_for
from transom.export.report.drawing.markup import figure, words
from transom.export.report.drawing.raster import FEW, data_uri, pixels_class, seen
from transom.export.report.figures.attention import Exposed
from transom.export.report.figures.position_similarity import Grid, draw_positions, patch_grid
from transom.runtime.bundle import Bundle
from transom.runtime.errors import BundleError
from transom.runtime.image_preprocess import ImagePreprocess
from transom.runtime.tasks.postprocess import label_scores, ranked

if TYPE_CHECKING:
    from transom.runtime.image_loading import ImageSource

TOP = 3  # labels told
VEIL = 0.92  # opacity where the least comes from


def draw_sight(bundle: Bundle, images: Sequence[str]) -> str:
    """The map of positions, and each of ``images``, or a few examples, with its rollout over it."""
    file = graph_file(bundle, "model")
    config = bundle.manifest.config
    pictures = [draw_positions(bundle, file, config)]
    grid = patch_grid(file, config)
    if bundle.manifest.preprocess is not None and grid is not None:
        preprocess = ImagePreprocess.from_json(bundle.manifest.preprocess)
        exposed = Exposed(bundle, file)
        sources: Sequence[ImageSource] = images or example_images(bundle)
        drawn = [draw(bundle, exposed, preprocess, grid, source) for source in sources]
        kind = "seen large" if preprocess.width > FEW else "seen"
        pictures.append(
            figure(
                "<b>Where the answer comes from.</b> Left what the model sees, right the same with attention rollout "
                "over it: what fades into grey hardly reaches the class token through all layers; what stays clear is "
                "what it is made of, on each image's own scale.",
                f'<div class="{kind}">{"".join(drawn)}</div>',
            )
        )
    body = "".join(pictures)
    return f"<h2>What it looks at</h2>{body}" if body else ""


def example_images(bundle: Bundle) -> list[Any]:
    """Held-out scans of different digits for the reference model, photographs for others."""
    return list(examples_for(bundle.manifest.source.get("checkpoint")).images)


def draw(bundle: Bundle, exposed: Exposed, preprocess: ImagePreprocess, grid: Grid, source: ImageSource) -> str:
    """One image, alone and with the rollout over it, and what the model takes it for."""
    pixels = preprocess([source])
    outputs = [tensor.name for tensor in exposed.graph.outputs if tensor.name == "logits"]
    weights, found = exposed.with_outputs({"pixel_values": pixels}, outputs)
    if weights.shape[-1] != grid[0] * grid[1] + 1:
        raise BundleError(
            f"the graph attends to {weights.shape[-1]} tokens; expected a class token and {grid} patches."
        )
    rolled = rollout(weights)[0, 1:].reshape(grid)
    image = seen(pixels[0], preprocess)
    uri, kind = data_uri(image), pixels_class(image)
    size = f'width="{image.width}" height="{image.height}"'

    def svg(label: str, over: str) -> str:
        return (
            f'<svg viewBox="0 0 {image.width} {image.height}" role="img" shape-rendering="crispEdges" '
            f'aria-label="{label}"><image href="{uri}" {size}{kind}/>{over}</svg>'
        )

    answer = answer_text(bundle, found["logits"]) if outputs else ""
    pair = svg("what the model sees", "") + svg("attention rollout", overlay(rolled, image.width, image.height))
    return f'<div><div class="pair">{pair}</div><small>{answer}</small></div>'


def rollout(weights: NDArray[np.float32]) -> NDArray[np.float64]:
    """(layers, H, S, S) -> (S, S): how much of each input token is in each token after the last layer."""
    S = weights.shape[-1]
    found = np.eye(S)
    for layer in weights.astype(np.float64).mean(1):
        mixed = 0.5 * layer + 0.5 * np.eye(S)
        found = mixed / mixed.sum(-1, keepdims=True) @ found
    return found


def overlay(shares: NDArray[np.float64], width: int, height: int) -> str:
    """A grey square per patch over an image of that many pixels, the denser the less comes from there."""
    rows, columns = shares.shape
    across, down = width / columns, height / rows
    least, most = float(shares.min()), float(shares.max())
    return "".join(
        f'<rect x="{c * across:.2f}" y="{r * down:.2f}" width="{across:.2f}" height="{down:.2f}" class="veil" '
        f'fill-opacity="{VEIL * (most - float(share)) / (most - least or 1.0):.2f}"><title>{share:.1%}</title></rect>'
        for (r, c), share in np.ndenumerate(shares)
    )


def answer_text(bundle: Bundle, logits: NDArray[np.float32]) -> str:
    """``3 0.98, 8 0.01``; nothing where bundle.json names other classes than the graph has."""
    labels = bundle.manifest.labels
    scores = label_scores(logits, bundle.manifest.options.get("problem_type"))[0]
    if len(labels) != len(scores):
        return ""
    return ", ".join(f"<b>{words(label, 40)}</b> {score:.2f}" for label, score in ranked(scores, labels, TOP))
