"""Every head of every layer as one grid of small pictures."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from transom.export.report.drawing.heatmap import thumbnail
from transom.runtime.errors import InputError

MOST_TOKENS = 64  # of a text whose attention is drawn: a matrix of more is no picture any more


def need_few(text: str, tokens: int, verb: str = "has") -> None:
    """Raise InputError for a text that has, or gets, more tokens than can be drawn."""
    if tokens > MOST_TOKENS:
        raise InputError(
            f"the text {text[:40]!r} {verb} {tokens} tokens; attention over at most {MOST_TOKENS} is drawn. Shorten it."
        )


def small_multiples(weights: NDArray[np.float32], chosen: tuple[int, int] | None = None) -> str:
    """``weights`` (layers, H, queries, keys): a row per layer, a column per head, ``chosen`` (layer, head) outlined."""
    layers, heads = weights.shape[:2]
    cells = ["<span></span>", *(f"<span>{head + 1}</span>" for head in range(heads))]
    for layer in range(layers):
        cells.append(f'<span class="l"><span class="wide">layer </span>{layer + 1}</span>')
        cells += [
            thumbnail(
                weights[layer, head],
                f"layer {layer + 1}, head {head + 1}",
                "chosen" if (layer, head) == chosen else "",
            )
            for head in range(heads)
        ]
    return f'<div class="heads" style="--n:{heads}">{"".join(cells)}</div>'
