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
from transom.export.reference_models import examples_for
from transom.export.report.figures.attention import SHADES, ExposedAttention, require_few_tokens, small_multiples
from transom.export.report.rendering import render, visible
from transom.export.report.svg import heatmap
from transom.runtime.bundle import Bundle
from transom.runtime.errors import InputError
from transom.runtime.feeds import checked_feeds
from transom.runtime.tasks.transformer import Transformer

CROSS = "encoder_attn"  # the module of attention over the source in the definitions
EXAMPLES = 2  # texts drawn where none are given
EXAMPLE_CHARACTERS = 60


@dataclass(frozen=True)
class Alignment:
    """A text, its translation and the ``weights`` of target token t on source token s, float32 (layers, H, T, S)."""

    source: list[str]
    target: list[str]
    weights: NDArray[np.float32]
    text: str
    answer: str


def draw_alignments(bundle: Bundle, texts: Sequence[str]) -> Markup:
    """Translate and draw ``texts``, or a few examples."""
    longest = bundle.manifest.axes["S"].max if "S" in bundle.manifest.axes else EXAMPLE_CHARACTERS
    chosen = texts or [text[: max(longest - 1, 1)] for text in example_texts(bundle)]
    return render(
        "figures/transformer", figures=[figure_of(each) for each in alignments(bundle, chosen)], shades=SHADES
    )


def example_texts(bundle: Bundle) -> list[str]:
    """Return a few lines of the model's domain: held-out dates of the reference model, else prose."""
    lines = examples_for(bundle.manifest.source.get("checkpoint")).texts
    return [line[:EXAMPLE_CHARACTERS] for line in lines[:EXAMPLES]]


def alignments(bundle: Bundle, texts: Sequence[str], **keywords: Any) -> list[Alignment]:
    """Translate ``texts`` and return the attention of every token of the answers; ``keywords`` are ``translate``'s."""
    with Transformer(bundle) as model:
        exposed = ExposedAttention(bundle, graph_file(bundle, "decoder"), CROSS)
        return [alignment(model, exposed, text, keywords) for text in texts]


def alignment(model: Transformer, exposed: ExposedAttention, text: str, keywords: Mapping[str, Any]) -> Alignment:
    """Return the weights for one text, with its whole answer fed at once."""
    encoder, target_encoder = model.tokenizer(), model.target_tokenizer()
    source = encoder.encode([text], truncate=False).rows[0].ids
    require_few_tokens(text, len(source))
    target = model.generate(source, **keywords)
    if not target:
        raise InputError(f"the model answers {text[:40]!r} with no token at all. Give another text.")
    require_few_tokens(text, len(target), "is answered with")
    inputs = {"input_ids": np.array([source]), "attention_mask": np.ones((1, len(source)), np.int64)}
    encoded = model.run(inputs)
    graph = model.backend("decoder").graph
    given = {
        "decoder_input_ids": np.array([[*model.start, *target[:-1]]]),
        "attention_mask": inputs["attention_mask"],
        **{tensor.name: encoded[tensor.name] for tensor in graph.inputs if tensor.name in encoded},
    }
    feeds, _ = checked_feeds(graph, model.manifest.axes, given)
    return Alignment(
        [encoder.token(token) or str(token) for token in source],
        [target_encoder.token(token) or str(token) for token in target],
        exposed.weights(feeds),
        text,
        target_encoder.decode(target),
    )


def figure_of(each: Alignment) -> dict[str, Any]:
    """Draw the mean over heads of the last layer, then every head of every layer, small."""
    label = f"attention over {visible(each.text, 80)}"
    return {
        "text": each.text,
        "answer": each.answer,
        "heatmap": heatmap(each.weights[-1].mean(0), each.target, each.source, label),
        "multiples": small_multiples(each.weights),
    }
