"""Draw where Show, Attend and Tell looked for each word of a caption.

Xu et al. (2015, arXiv:1502.03044), figures 2 and 3; here every place of the grid is one square.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from transom.export.reference_models import examples_for
from transom.export.report.figures.decoder_steps import GREEDY, weights_along
from transom.export.report.images import data_uri, image_from_pixels, is_small
from transom.export.report.rendering import render
from transom.export.report.svg import LEVELS, Matrix, squares
from transom.runtime.bundle import Bundle
from transom.runtime.errors import BundleError
from transom.runtime.image_preprocess import ImagePreprocess
from transom.runtime.tasks.image_prompts import Pixels
from transom.runtime.tasks.show_attend_tell import PIXELS, ShowAttendTell

if TYPE_CHECKING:
    from transom.runtime.image_loading import ImageSource

MOST_WORDS = 32  # tokens of a caption that are drawn, the first
DENSEST = 0.8  # opacity over the place of the largest weight: the image stays visible below


@dataclass(frozen=True)
class Caption:
    """A caption, its tokens, and the ``weights`` of token t on place l of the grid, float32 (T, L)."""

    text: str
    tokens: list[str]
    weights: Matrix


def draw_captions(bundle: Bundle, images: Sequence[str]) -> Markup:
    """Caption each of ``images``, or a few examples, greedily, and draw the attention of each step over it."""
    sources: Sequence[ImageSource] = images or list(examples_for(bundle.manifest.source.get("checkpoint")).images)
    with ShowAttendTell(bundle) as model:
        preprocess = model.preprocess()
        drawn = []
        for source in sources:
            (pixels,) = preprocess([source])
            drawn.append(figure_of(caption_of(model, pixels), pixels, preprocess))
    return render("figures/show_attend_tell", images=drawn)


def caption_of(model: ShowAttendTell, pixels: Pixels) -> Caption:
    """Caption ``pixels`` (C, H, W) greedily; tokens are ids where the bundle has no tokenizer."""
    ids = model.generate(pixels, **GREEDY)
    weights = weights_along(model, {PIXELS: pixels[None]}, ids)
    if model.manifest.target_tokenizer is None:
        tokens = [str(token) for token in ids]
        return Caption(" ".join(tokens), tokens, weights)
    tokenizer = model.target_tokenizer()
    return Caption(tokenizer.decode(ids), [tokenizer.token(token) or str(token) for token in ids], weights)


def figure_of(caption: Caption, pixels: Pixels, preprocess: ImagePreprocess) -> dict[str, Any]:
    """Draw an image as the model sees it, and once for each of the first tokens with its attention over it."""
    image = image_from_pixels(pixels, preprocess)
    rows, columns = grid_of(image.height, image.width, caption.weights.shape[1])
    words = zip(caption.tokens[:MOST_WORDS], caption.weights, strict=False)
    return {
        "uri": data_uri(image),
        "small": is_small(image),
        "rows": rows,
        "columns": columns,
        "text": caption.text,
        "tokens": len(caption.tokens),
        "words": [
            {"token": token, "largest": float(shares.max()), "tint": tint(shares.reshape(rows, columns))}
            for token, shares in words
        ],
    }


def grid_of(height: int, width: int, places: int) -> tuple[int, int]:
    """Return rows and columns of square places that cover an image of that many pixels."""
    side = math.isqrt(height * width // places)
    if side * side * places != height * width or height % side or width % side:
        raise BundleError(f"the graph attends to {places} places of an image {height}x{width}; expected squares.")
    return height // side, width // side


def tint(shares: Matrix) -> Markup:
    """Draw a square per place (rows, columns), the denser the larger its share of the largest weight."""
    opacity = DENSEST * shares / (float(shares.max()) or 1.0)
    levels = np.round(opacity * LEVELS).astype(int)
    drawn = [squares(np.argwhere(levels == level).tolist(), "warm", level) for level in range(1, LEVELS + 1)]
    return Markup("").join(drawn)
