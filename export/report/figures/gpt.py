"""Draw GPT's token surprisal: how probable each token of a text was, and which tokens the model expected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from transom.export.reference_models import examples_for
from transom.export.report.rendering import render, visible, visible_token
from transom.export.report.svg import bar, chart, horizontal
from transom.runtime.bundle import Bundle
from transom.runtime.errors import InputError
from transom.runtime.numeric import log_softmax
from transom.runtime.tasks.gpt import GPT

MOST_TOKENS = 512  # of a text that is drawn
ALTERNATIVES = 5  # tokens that the model expected instead
CONTEXT = 8  # tokens shown before a surprising one
MOST_SURPRISING = 6  # rows of the table
STRIP = 70  # pixels
FULL = 12.0  # bits at which the colour is full
EXAMPLE_CHARACTERS = (180, 420)


@dataclass(frozen=True)
class TokenSurprisal:
    """A token and its surprisal; ``likeliest`` are (text, probability), best first."""

    text: str
    bits: float | None  # None: the first, which nothing predicts
    likeliest: list[tuple[str, float]]

    @property
    def shown(self) -> str:
        return "".join(c if c == "\n" else visible(c, 8) for c in self.text)

    @property
    def tint(self) -> float:
        """Opacity of its background."""
        return tint(self.bits or 0.0)

    @property
    def tooltip(self) -> str:
        """``p = 0.031, 5.0 bits; likeliest: ␣the 0.21, ...``."""
        if self.bits is None:
            return "the first token"
        likeliest = ", ".join(f"{visible_token(text, 20)} {probability:.2f}" for text, probability in self.likeliest)
        return f"p = {2**-self.bits:.3g}, {self.bits:.1f} bits; likeliest: {likeliest}"


def draw_token_surprisal(bundle: Bundle, texts: Sequence[str]) -> Markup:
    """Draw each of ``texts``, or an example, token by token."""
    with GPT(bundle) as model:
        examples = [example_text(bundle)[: model.context]]
        figures = [figure_of(text, token_surprisal(model, text)) for text in texts or examples]
    return render("figures/gpt", figures=figures, key=[(bits, tint(bits)) for bits in (1, 4, 8, 12)])


def example_text(bundle: Bundle) -> str:
    """Return a paragraph of the model's domain."""
    lines = examples_for(bundle.manifest.source.get("checkpoint")).texts
    low, high = EXAMPLE_CHARACTERS
    return next((line for line in lines if low <= len(line) <= high), lines[0][:high])


def token_surprisal(model: GPT, text: str) -> list[TokenSurprisal]:
    """Score each token of a text by the bundle's graph; InputError for a text that does not fit into its context."""
    encoder = model.tokenizer()
    ids = encoder.encode([text], truncate=False).rows[0].ids
    most = min(model.context, MOST_TOKENS)
    if not 2 <= len(ids) <= most or max(ids) >= model.vocabulary:
        raise InputError(f"the text {text[:40]!r} has {len(ids)} tokens; 2 to {most} can be drawn. Give another.")
    log_probabilities = log_softmax(model.new_decoder(1).forward_logits(np.array([ids]))[0, :-1])  # (tokens - 1, V)

    def decoded(token: int) -> str:
        return encoder.decode([token], skip_special_tokens=False)

    tokens = [TokenSurprisal(decoded(ids[0]), None, [])]
    for token, row in zip(ids[1:], log_probabilities, strict=True):
        best = np.argsort(-row, kind="stable")[:ALTERNATIVES]
        likeliest = [(decoded(int(each)), math.exp(row[each])) for each in best]
        tokens.append(TokenSurprisal(decoded(token), -float(row[token]) / math.log(2), likeliest))
    return tokens


def figure_of(text: str, tokens: Sequence[TokenSurprisal]) -> dict[str, Any]:
    """Draw the tinted text, its bits as bars, and the most surprising tokens."""
    known = [token.bits for token in tokens if token.bits is not None]
    mean = sum(known) / len(known)
    return {
        "tokens": tokens,
        "scored": len(known),
        "mean": mean,
        "bits_per_byte": sum(known) / len(text.encode()),
        "strip": strip(tokens, mean),
        "surprising": most_surprising(tokens),
    }


def tint(bits: float) -> float:
    """Return the opacity of a token's background."""
    return 0.75 * min(bits / FULL, 1.0)


def strip(tokens: Sequence[TokenSurprisal], mean: float) -> Markup:
    """Draw a bar of bits per token, and their mean."""
    highest = max(token.bits or 0.0 for token in tokens) or 1.0
    width = 100 / len(tokens)
    bars = [
        bar(
            index * width,
            width * 0.85,
            STRIP * (1 - token.bits / highest),
            STRIP * token.bits / highest,
            "warm",
            f"{visible_token(token.text, 20)}: {token.tooltip}",
        )
        for index, token in enumerate(tokens)
        if token.bits is not None
    ]
    line = horizontal(0, 100, STRIP * (1 - mean / highest), "average")
    return chart(STRIP + 2, f"bits per token, {mean:.2f} on average", [*bars, line])


def most_surprising(tokens: Sequence[TokenSurprisal]) -> list[tuple[str, TokenSurprisal]]:
    """Return the tokens of the most bits, each with the text before it."""
    order = sorted(range(len(tokens)), key=lambda index: -(tokens[index].bits or 0.0))[:MOST_SURPRISING]
    return [
        ("".join(each.text for each in tokens[max(0, index - CONTEXT) : index]), tokens[index])
        for index in order
        if tokens[index].bits is not None
    ]
