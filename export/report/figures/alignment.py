"""Which source position each output token of a translation attends to: the weights of the cross-attention.

Bahdanau et al. (2014, arXiv:1409.0473), figure 3, is where such pictures began.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.export.bundle_graphs import graph_file
from transom.export.reference_models import examples_for
from transom.export.report.drawing.heatmap import heatmap, shades_key
from transom.export.report.drawing.markup import figure, folded, words
from transom.export.report.figures.attention import Exposed
from transom.export.report.figures.heads import need_few, small_multiples
from transom.runtime.bundle import Bundle
from transom.runtime.errors import InputError
from transom.runtime.feeds import checked_feeds
from transom.runtime.tasks.transformer import Transformer

CROSS = "encoder_attn"  # what the definitions call attention over the source
EXAMPLES = 2  # texts drawn where none are given
EXAMPLE_CHARACTERS = 60


@dataclass(frozen=True)
class Alignment:
    """``weights`` float32 (layers, H, T, S): how much of its attention target token t gives to source token s."""

    source: list[str]
    target: list[str]
    weights: NDArray[np.float32]
    text: str
    answer: str


def draw_alignments(bundle: Bundle, texts: Sequence[str]) -> str:
    """Translate and draw ``texts``, or a few examples."""
    longest = bundle.manifest.axes["S"].max if "S" in bundle.manifest.axes else EXAMPLE_CHARACTERS
    pictures = alignments(bundle, texts or [text[: max(longest - 1, 1)] for text in example_texts(bundle)])
    return "<h2>Which source position each output attends to</h2>" + "".join(map(draw, pictures))


def example_texts(bundle: Bundle) -> list[str]:
    """A few lines that the model may have an answer to: held-out dates of the reference model, else prose."""
    lines = examples_for(bundle.manifest.source.get("checkpoint")).texts
    return [line[:EXAMPLE_CHARACTERS] for line in lines[:EXAMPLES]]


def alignments(bundle: Bundle, texts: Sequence[str], **keywords: Any) -> list[Alignment]:
    """Translate ``texts`` and read off the attention behind every token of the answers.

    ``keywords`` are those of ``translate``.
    """
    with Transformer(bundle) as model:
        exposed = Exposed(bundle, graph_file(bundle, "decoder"), CROSS)
        return [alignment(model, exposed, text, keywords) for text in texts]


def alignment(model: Transformer, exposed: Exposed, text: str, keywords: Mapping[str, Any]) -> Alignment:
    """The weights for one text, its answer fed at once."""
    encoder, target_encoder = model.tokenizer(), model.target_tokenizer()
    source = encoder.encode([text], truncate=False).rows[0].ids
    need_few(text, len(source))
    target = model.generate(source, **keywords)
    if not target:
        raise InputError(f"the model answers {text[:40]!r} with no token at all. Give another text.")
    need_few(text, len(target), "is answered with")
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


def draw(picture: Alignment) -> str:
    """The mean over heads of the last layer, then every head of every layer, small."""
    layers, heads = picture.weights.shape[:2]
    text, answer = words(picture.text, 80), words(picture.answer, 80)
    mean = heatmap(picture.weights[-1].mean(0), picture.target, picture.source, f"attention over {text}")
    return figure(
        f"<b>{text}</b> becomes <b>{answer}</b>. Rows are the tokens of the answer, columns those of the source; a row "
        f"tells where its token was read. Layer {layers} of {layers}, mean of its {heads} heads.",
        mean,
        shades_key(),
        folded("every head of every layer", small_multiples(picture.weights)),
    )
