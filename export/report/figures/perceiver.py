"""Draw what each latent of a Perceiver reads: the weights of its cross-attention, over an image or a text.

Jaegle et al. (2021, arXiv:2103.03206), figure 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from transom.export.bundle_graphs import graph_file
from transom.export.reference_models import examples_for
from transom.export.report.figures.attention import SHADES, ExposedAttention, require_few_tokens
from transom.export.report.figures.bert import example_text
from transom.export.report.figures.show_attend_tell import tint
from transom.export.report.images import data_uri, image_from_pixels, is_small
from transom.export.report.rendering import render
from transom.export.report.svg import Matrix, heatmap
from transom.models.perceiver_config import conv_grid
from transom.runtime.bundle import Bundle
from transom.runtime.errors import BundleError
from transom.runtime.feeds import checked_feeds
from transom.runtime.image_preprocess import ImagePreprocess
from transom.runtime.tasks.perceiver import PerceiverOfBytes, PerceiverOfImages, byte_text

if TYPE_CHECKING:
    from transom.runtime.image_loading import ImageSource

MODULE = "encoder.cross_attention.attention.self"
MOST_IMAGES = 3
MOST_LATENTS, MOST_ROWS = 16, 32  # that are drawn over an image, and beside a text
MOST_SIDE = 28  # squares on a side over an image; of a finer grid each covers several points
CELL = 15  # pixels of a heat map's square

Grid = tuple[int, int]  # rows and columns


def draw_latents_over_images(bundle: Bundle, images: Sequence[str]) -> Markup:
    """Draw each of ``images``, or a few examples, once for each latent with its weights over it."""
    found = list(examples_for(bundle.manifest.source.get("checkpoint")).images)[:MOST_IMAGES]
    sources: Sequence[ImageSource] = images or found
    with PerceiverOfImages(bundle) as model:
        preprocess = model.preprocess()
        exposed = ExposedAttention(bundle, graph_file(bundle, "model"), MODULE)
        drawn = [image_figure(exposed, preprocess, source) for source in sources]
    return render("figures/perceiver", images=drawn, texts=[], shades=SHADES)


def image_figure(exposed: ExposedAttention, preprocess: ImagePreprocess, source: ImageSource) -> dict[str, Any]:
    """Draw an image as the model sees it, and once for each of MOST_LATENTS latents, mean of the heads."""
    pixels = preprocess([source])
    weights = exposed.weights({"pixel_values": pixels})[0].mean(0)  # (N, M)
    grid = grid_of((preprocess.height, preprocess.width), weights.shape[1])
    chosen = evenly(len(weights), MOST_LATENTS)
    image = image_from_pixels(pixels[0], preprocess)
    maps = [coarser(weights[latent].reshape(grid)) for latent in chosen]
    rows, columns = maps[0].shape
    return {
        "uri": data_uri(image),
        "small": is_small(image),
        "rows": rows,
        "columns": columns,
        "points": weights.shape[1],
        "latents": len(weights),
        "drawn": [
            {"latent": latent, "largest": float(weights[latent].max()), "tint": tint(shares)}
            for latent, shares in zip(chosen, maps, strict=True)
        ],
    }


def draw_latents_over_bytes(bundle: Bundle, texts: Sequence[str]) -> Markup:
    """Draw the weights of the latents over each of ``texts``, or over an example, as one heat map."""
    with PerceiverOfBytes(bundle) as model:
        exposed = ExposedAttention(bundle, graph_file(bundle, "model"), MODULE)
        most = model.tokenizer().max_tokens - 2  # beside the special tokens
        drawn = [text_figure(model, exposed, text) for text in texts or [shortened(example_text(bundle), most)]]
    return render("figures/perceiver", images=[], texts=drawn, shades=SHADES)


def shortened(text: str, most: int) -> str:
    """Cut an example to ``most`` bytes, and to what can be drawn."""
    return text.encode()[: max(1, min(most, 60))].decode(errors="ignore")


def text_figure(model: PerceiverOfBytes, exposed: ExposedAttention, text: str) -> dict[str, Any]:
    """Draw the latents, ordered by the place that they read on the whole, against the bytes; mean of the heads."""
    batch = model.tokenizer().encode([text], truncate=False)
    ids = batch.rows[0].ids
    require_few_tokens(text, len(ids))
    given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    feeds, _ = checked_feeds(model.backend("model").graph, model.manifest.axes, given)
    weights = exposed.weights(feeds)[0].mean(0)  # (N, S)
    places = weights @ np.arange(weights.shape[1])
    order = np.argsort(places, kind="stable")
    chosen = order[evenly(len(order), MOST_ROWS)]
    return {
        "text": text,
        "latents": len(weights),
        "rows": len(chosen),
        "heatmap": heatmap(
            weights[chosen],
            [str(latent) for latent in chosen],
            [byte_text(model.tokenizer(), token) for token in ids],
            "what each latent reads",
            cell=CELL,
            verb="reads",
        ),
    }


def grid_of(image_size: Grid, points: int) -> Grid:
    """Return the grid whose points are read: the pixels, or those behind the convolution."""
    for grid in (image_size, conv_grid(image_size)):
        if grid[0] * grid[1] == points:
            return grid
    raise BundleError(f"the latents read {points} points of an image {image_size}; expected its pixels. Export again.")


def coarser(shares: Matrix) -> Matrix:
    """Add up the weights of neighbouring points, so that no side has more than MOST_SIDE squares."""
    for axis in (0, 1):
        if shares.shape[axis] > MOST_SIDE:
            starts = np.linspace(0, shares.shape[axis], MOST_SIDE, endpoint=False).astype(int)
            shares = np.add.reduceat(shares, starts, axis=axis)
    return shares


def evenly(count: int, most: int) -> list[int]:
    """Return at most ``most`` of ``count`` places, evenly spaced."""
    return [int(place) for place in np.linspace(0, count - 1, min(count, most)).round()]
