"""BERT: which token looks at which, in every head of every layer.

Clark et al. (2019, arXiv:1906.04341) is what such maps are read for: heads that look at the next token, at the
separator, at a verb's object.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from transom.export.bundle_graphs import graph_file
from transom.export.reference_models import examples_for
from transom.export.report.drawing.heatmap import heatmap, shades_key
from transom.export.report.drawing.markup import figure, words
from transom.export.report.figures.attention import Exposed
from transom.export.report.figures.heads import need_few, small_multiples
from transom.runtime.bundle import Bundle
from transom.runtime.feeds import checked_feeds
from transom.runtime.tasks.bert import Bert

EXAMPLE_CHARACTERS = (50, 80)  # of the sentence drawn where none is given


def draw_attention(bundle: Bundle, texts: Sequence[str]) -> str:
    """The attention over each of ``texts``, or over an example."""
    with Bert(bundle) as model:
        exposed = Exposed(bundle, graph_file(bundle, "model"))
        room = model.tokenizer().max_tokens - 2  # a character is a token at most, and there are two special ones
        figures = [draw(model, exposed, text) for text in texts or [example_text(bundle)[: max(room, 1)]]]
    return "<h2>Which token looks at which</h2>" + "".join(figures)


def example_text(bundle: Bundle) -> str:
    """A sentence of the kind the model knows."""
    lines = examples_for(bundle.manifest.source.get("checkpoint")).texts
    low, high = EXAMPLE_CHARACTERS
    return next((line for line in lines if low <= len(line) <= high), lines[0][:high])


def draw(model: Bert, exposed: Exposed, text: str) -> str:
    """One head large, all of them small."""
    batch = model.tokenizer().encode([text], truncate=False)
    row = batch.rows[0]
    need_few(text, len(row.ids))
    graph = model.backend("model").graph
    given = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "token_type_ids": batch.token_type_ids,
    }
    feeds, _ = checked_feeds(
        graph, model.manifest.axes, {t.name: given[t.name] for t in graph.inputs if t.name in given}
    )
    weights = exposed.weights(feeds)
    layer, head = telling_head(weights, np.array(row.special_tokens_mask, bool))
    return figure(
        f"<b>{words(text)}</b> Rows are the tokens that look, columns those they look at; each row adds up to 1. "
        f"Large: layer {layer + 1}, head {head + 1}, chosen as the one that is least explained by distance, "
        "or by a word that all look at.",
        heatmap(weights[layer, head], row.tokens, row.tokens, f"attention in layer {layer + 1}, head {head + 1}"),
        shades_key(),
        f"<h3>All {weights.shape[0]} layers of {weights.shape[1]} heads</h3>",
        small_multiples(weights, (layer, head)),
    )


def telling_head(weights: NDArray[np.float32], special: NDArray[np.bool_]) -> tuple[int, int]:
    """(layer, head) whose attention among words is explained the least by distance, or by a word that all look at.

    From ``weights`` (layers, H, S, S) the mean of each column and of each diagonal is taken away; what is left above
    zero, squared, is what the words themselves say. Special tokens are left out: most heads look at one wherever they
    have nothing to say.
    """
    left = weights[:, :, ~special][:, :, :, ~special].astype(np.float64)
    left -= left.mean(2, keepdims=True)
    place = np.arange(left.shape[-1])
    distance = np.subtract.outer(place, place)
    for each in np.unique(distance):
        left[:, :, distance == each] -= left[:, :, distance == each].mean(-1, keepdims=True)
    told = np.square(np.maximum(left, 0)).sum((2, 3))  # (layers, H)
    layer, head = np.unravel_index(int(told.argmax()), told.shape)
    return int(layer), int(head)
