"""Draw BERT's attention: which token looks at which, in every head of every layer.

Clark et al. (2019, arXiv:1906.04341) read such maps: heads that look at the next token, at the separator, at a verb's
object.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from transom.export.bundle_graphs import graph_file
from transom.export.reference_models import examples_for
from transom.export.report.figures.attention import SHADES, ExposedAttention, require_few_tokens, small_multiples
from transom.export.report.rendering import render
from transom.export.report.svg import heatmap
from transom.runtime.bundle import Bundle
from transom.runtime.feeds import checked_feeds
from transom.runtime.tasks.bert import Bert

EXAMPLE_CHARACTERS = (50, 80)  # of the sentence that is drawn where none is given


def draw_attention_heads(bundle: Bundle, texts: Sequence[str]) -> Markup:
    """Draw the attention over each of ``texts``, or over an example."""
    with Bert(bundle) as model:
        exposed = ExposedAttention(bundle, graph_file(bundle, "model"))
        most = model.tokenizer().max_tokens - 2  # a character is a token at most, and there are two special ones
        figures = [figure_of(model, exposed, text) for text in texts or [example_text(bundle)[: max(most, 1)]]]
    return render("figures/bert", figures=figures, shades=SHADES)


def example_text(bundle: Bundle) -> str:
    """Return a sentence of the model's domain."""
    lines = examples_for(bundle.manifest.source.get("checkpoint")).texts
    low, high = EXAMPLE_CHARACTERS
    return next((line for line in lines if low <= len(line) <= high), lines[0][:high])


def figure_of(model: Bert, exposed: ExposedAttention, text: str) -> dict[str, Any]:
    """Draw one head large, all of them small."""
    batch = model.tokenizer().encode([text], truncate=False)
    row = batch.rows[0]
    require_few_tokens(text, len(row.ids))
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
    layer, head = most_specific_head(weights, np.array(row.special_tokens_mask, bool))
    label = f"attention in layer {layer + 1}, head {head + 1}"
    return {
        "text": text,
        "layer": layer + 1,
        "head": head + 1,
        "heatmap": heatmap(weights[layer, head], row.tokens, row.tokens, label),
        "multiples": small_multiples(weights, (layer, head)),
    }


def most_specific_head(weights: NDArray[np.float32], special: NDArray[np.bool_]) -> tuple[int, int]:
    """Return (layer, head) whose attention among words is least explained by distance, or by a word that all look at.

    From ``weights`` (layers, H, S, S) the mean of each column and of each diagonal is subtracted; what is left above
    zero, squared, is specific to the words. Special tokens are left out: most heads look at one by default.
    """
    rest = weights[:, :, ~special][:, :, :, ~special].astype(np.float64)
    rest -= rest.mean(2, keepdims=True)
    place = np.arange(rest.shape[-1])
    distance = np.subtract.outer(place, place)
    for each in np.unique(distance):
        rest[:, :, distance == each] -= rest[:, :, distance == each].mean(-1, keepdims=True)
    specific = np.square(np.maximum(rest, 0)).sum((2, 3))  # (layers, H)
    layer, head = np.unravel_index(int(specific.argmax()), specific.shape)
    return int(layer), int(head)
