"""GPT: how probable each token of a text was, and what the model would rather have read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from transom.export.reference_models import examples_for
from transom.export.report.drawing.chart import bar, drawing, level
from transom.export.report.drawing.markup import figure, numeric, table, token_words, words
from transom.runtime.bundle import Bundle
from transom.runtime.errors import InputError
from transom.runtime.tasks.gpt import GPT

MOST_TOKENS = 512  # of a text that is drawn
ALTERNATIVES = 5
CONTEXT = 8  # tokens told before a surprising one
STRIP = 70  # pixels
FULL = 12.0  # bits at which the colour is full
EXAMPLE_CHARACTERS = (180, 420)


@dataclass(frozen=True)
class Read:
    """A token as the model met it; ``likeliest`` are (text, probability), best first."""

    text: str
    bits: float | None  # None: the first, which nothing foretells
    likeliest: list[tuple[str, float]]


def draw_surprise(bundle: Bundle, texts: Sequence[str]) -> str:
    """Each of ``texts``, or an example, token by token."""
    with GPT(bundle) as model:
        figures = [draw(text, read(model, text)) for text in texts or [example_text(bundle)[: model.context]]]
    return "<h2>How surprising each token was</h2>" + "".join(figures)


def example_text(bundle: Bundle) -> str:
    """A paragraph of the kind the model knows."""
    lines = examples_for(bundle.manifest.source.get("checkpoint")).texts
    low, high = EXAMPLE_CHARACTERS
    return next((line for line in lines if low <= len(line) <= high), lines[0][:high])


def read(model: GPT, text: str) -> list[Read]:
    """What the bundle's graph gives each token of a text that fits its context; InputError for others."""
    encoder = model.tokenizer()
    ids = encoder.encode([text], truncate=False).rows[0].ids
    most = min(model.context, MOST_TOKENS)
    if not 2 <= len(ids) <= most or max(ids) >= model.vocabulary:
        raise InputError(f"the text {text[:40]!r} has {len(ids)} tokens; 2 to {most} can be drawn. Give another.")
    logits = model.new_decoder(1).forward_logits(np.array([ids]))[0, :-1].astype(np.float64)  # (tokens - 1, V)
    logits -= logits.max(-1, keepdims=True)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)

    def shown(token: int) -> str:
        return encoder.decode([token], skip_special_tokens=False)

    found = [Read(shown(ids[0]), None, [])]
    for token, row in zip(ids[1:], probabilities, strict=True):
        best = np.argsort(-row, kind="stable")[:ALTERNATIVES]
        bits = -math.log2(max(float(row[token]), 1e-300))
        found.append(Read(shown(token), bits, [(shown(int(other)), float(row[other])) for other in best]))
    return found


def draw(text: str, tokens: Sequence[Read]) -> str:
    """The text tinted, its bits as bars, and the tokens nobody would have guessed."""
    known = [token.bits for token in tokens if token.bits is not None]
    mean = sum(known) / len(known)
    key = "".join(f'<i class="w" style="--p:{tint(bits):.2f}"></i>{bits} bits' for bits in (1, 4, 8, 12))
    return figure(
        f"The stronger the colour, the less probable the model held the token that came; each bit is one halving. "
        f"{len(known)} tokens after the first, {mean:.2f} bits each on average, {sum(known) / len(text.encode()):.2f} "
        "per byte. Point at a token for its probability and what the model expected.",
        f'<p class="text">{"".join(map(span, tokens))}</p><div class="key">{key}</div>',
        strip(tokens, mean),
        '<p class="soft">Bits of each token in turn; the line is their mean.</p><h3>The most surprising</h3>',
        surprises(tokens),
    )


def tint(bits: float) -> float:
    """Opacity of a token's background."""
    return 0.75 * min(bits / FULL, 1.0)


def span(token: Read) -> str:
    shown = "".join(c if c == "\n" else words(c, 8) for c in token.text)
    if token.bits is None:
        return f'<span style="--p:0" title="the first token">{shown}</span>'
    return f'<span style="--p:{tint(token.bits):.2f}" title="{told(token)}">{shown}</span>'


def told(token: Read) -> str:
    """``p = 0.031, 5.0 bits; likeliest: ␣the 0.21, ...``."""
    assert token.bits is not None
    return f"p = {2**-token.bits:.3g}, {token.bits:.1f} bits; likeliest: {alternatives(token)}"


def alternatives(token: Read) -> str:
    return ", ".join(f"{token_words(text, 20)} {probability:.2f}" for text, probability in token.likeliest)


def strip(tokens: Sequence[Read], mean: float) -> str:
    """A bar of bits per token, and their mean."""
    highest = max(token.bits or 0.0 for token in tokens) or 1.0
    width = 100 / len(tokens)
    bars = [
        bar(
            index * width,
            width * 0.85,
            STRIP * (1 - token.bits / highest),
            STRIP * token.bits / highest,
            "warm",
            f"{token_words(token.text, 20)}: {told(token)}",
        )
        for index, token in enumerate(tokens)
        if token.bits is not None
    ]
    y = STRIP * (1 - mean / highest)
    return drawing(STRIP + 2, f"bits per token, {mean:.2f} on average", [*bars, level(0, 100, y, "average")])


def surprises(tokens: Sequence[Read], most: int = 6) -> str:
    """The tokens of the most bits, and what the model would rather have read."""
    order = sorted(range(len(tokens)), key=lambda index: -(tokens[index].bits or 0.0))[:most]
    rows = []
    for index in order:
        token, before = tokens[index], "".join(each.text for each in tokens[max(0, index - CONTEXT) : index])
        if token.bits is not None:
            where = f"… {words(before, 60)}<b>{words(token.text, 30)}</b>"
            rows.append([where, f"{token.bits:.1f}", alternatives(token)])
    return table(("token, and what came before", "bits", "what the model expected"), rows, numeric(1))
