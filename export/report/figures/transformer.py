"""Draw a translation's alignment: the cross-attention of each output token over the source.

After Bahdanau et al. (2014, arXiv:1409.0473), figure 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from transom.export.bundle_graphs import graph_file
from transom.export.report.figures.attention import SHADES, ExposedAttention, small_multiples
from transom.export.report.figures.translations import Translation, example_texts, translation
from transom.export.report.rendering import render, visible
from transom.export.report.svg import heatmap
from transom.runtime.bundle import Bundle
from transom.runtime.feeds import checked_feeds
from transom.runtime.tasks.transformer import Transformer

CROSS = "encoder_attn"  # the module of attention over the source in the definitions
EXAMPLES = 2  # texts drawn where none are given


@dataclass(frozen=True)
class Alignment(Translation):
    """A translation, and the ``weights`` of target token t on source token s, float32 (layers, H, T, S)."""

    weights: NDArray[np.float32]


def draw_alignments(bundle: Bundle, texts: Sequence[str]) -> Markup:
    """Translate and draw ``texts``, or a few examples."""
    chosen = texts or example_texts(bundle, EXAMPLES)
    return render(
        "figures/transformer", figures=[figure_of(each) for each in alignments(bundle, chosen)], shades=SHADES
    )


def alignments(bundle: Bundle, texts: Sequence[str], **keywords: Any) -> list[Alignment]:
    """Translate ``texts`` and return the attention of every token of the answers; ``keywords`` are ``translate``'s."""
    with Transformer(bundle) as model:
        exposed = ExposedAttention(bundle, graph_file(bundle, "decoder"), CROSS)
        return [alignment(model, exposed, text, keywords) for text in texts]


def alignment(model: Transformer, exposed: ExposedAttention, text: str, keywords: Mapping[str, Any]) -> Alignment:
    """Return the weights for one text, with its whole answer fed at once."""
    found = translation(model, text, keywords)
    inputs = {"input_ids": np.array([found.source_ids]), "attention_mask": np.ones((1, len(found.source)), np.int64)}
    encoded = model.run(inputs)
    graph = model.backend("decoder").graph
    given = {
        "decoder_input_ids": np.array([[*model.start, *found.target_ids[:-1]]]),
        "attention_mask": inputs["attention_mask"],
        **{tensor.name: encoded[tensor.name] for tensor in graph.inputs if tensor.name in encoded},
    }
    feeds, _ = checked_feeds(graph, model.manifest.axes, given)
    return Alignment(**vars(found), weights=exposed.weights(feeds))


def figure_of(each: Alignment) -> dict[str, Any]:
    """Draw the mean over heads of the last layer, then every head of every layer, small."""
    label = f"attention over {visible(each.text, 80)}"
    return {
        "text": each.text,
        "answer": each.answer,
        "heatmap": heatmap(each.weights[-1].mean(0), each.target, each.source, label),
        "multiples": small_multiples(each.weights),
    }
