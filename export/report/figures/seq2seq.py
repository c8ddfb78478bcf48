"""Draw seq2seq's alignment: where in the source the decoder looked for each token of the output.

Bahdanau et al. (2015, arXiv:1409.0473), figure 3. Without attention nothing is aligned: source and output alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from transom.export.report.figures.attention import SHADES
from transom.export.report.figures.decoder_steps import GREEDY, has_weights, weights_along
from transom.export.report.figures.translations import Translation, example_texts, translation
from transom.export.report.rendering import render, visible
from transom.export.report.svg import Matrix, heatmap
from transom.runtime.bundle import Bundle
from transom.runtime.tasks.seq2seq import Seq2Seq

EXAMPLES = 3  # texts drawn where none are given
CONTEXT = "context"  # the input of a decoder without attention: one vector for the whole source


def draw_alignments(bundle: Bundle, texts: Sequence[str]) -> Markup:
    """Translate ``texts``, or a few examples, greedily, and draw the attention of each step."""
    chosen = texts or example_texts(bundle, EXAMPLES)
    with Seq2Seq(bundle) as model:
        if not has_weights(model):
            rows = [translation(model, text, GREEDY, drawn=False) for text in chosen]
            return render("figures/seq2seq", translations=rows, vector=context_size(model), figures=(), shades=())
        figures = [figure_of(*alignment(model, text)) for text in chosen]
    return render("figures/seq2seq", figures=figures, shades=SHADES, translations=(), vector=None)


def alignment(model: Seq2Seq, text: str) -> tuple[Translation, Matrix]:
    """Return the greedy translation, and the weights of its T tokens on those of the source, float32 (T, S)."""
    found = translation(model, text, GREEDY)
    ids = np.array([found.source_ids])
    return found, weights_along(model, {"input_ids": ids, "attention_mask": np.ones_like(ids)}, found.target_ids)


def context_size(model: Seq2Seq) -> int | None:
    """Return how many numbers the decoder reads of the whole source; None where bundle.json does not say."""
    inputs = model.backend("decoder").graph.inputs
    size = next((tensor.shape[-1] for tensor in inputs if tensor.name == CONTEXT), None)
    return size if isinstance(size, int) else None


def figure_of(found: Translation, weights: Matrix) -> dict[str, Any]:
    label = f"attention over {visible(found.text, 80)}"
    return {
        "text": found.text,
        "answer": found.answer,
        "heatmap": heatmap(weights, found.target, found.source, label),
    }
