"""Translate the texts of a figure, and keep the tokens of both sides: the names of rows and columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transom.export.reference_models import examples_for
from transom.export.report.figures.attention import require_few_tokens
from transom.runtime.bundle import Bundle
from transom.runtime.tasks.transformer import Transformer

EXAMPLE_CHARACTERS = 60


@dataclass(frozen=True)
class Translation:
    """A text and its translation; ``source`` and ``target`` are the tokens of the ids."""

    text: str
    answer: str
    source_ids: list[int]
    target_ids: list[int]
    source: list[str]
    target: list[str]


def example_texts(bundle: Bundle, count: int) -> list[str]:
    """Return ``count`` lines of the model's domain: held-out ones of a reference model, else prose.

    The first that fit, cut where none does; and to the bundle's sources, of which a character is a token at most.
    """
    lines = examples_for(bundle.manifest.source.get("checkpoint")).texts
    fitting = [line for line in lines if len(line) <= EXAMPLE_CHARACTERS] or lines
    longest = bundle.manifest.axes["S"].max if "S" in bundle.manifest.axes else EXAMPLE_CHARACTERS
    return [line[: min(EXAMPLE_CHARACTERS, max(longest - 1, 1))] for line in fitting[:count]]


def translation(model: Transformer, text: str, keywords: Mapping[str, Any], *, drawn: bool = True) -> Translation:
    """Translate one text; ``keywords`` are ``translate``'s.

    Raises InputError for more tokens than can be read, on either side, where attention between them is to be ``drawn``.
    """
    encoder, target_encoder = model.tokenizer(), model.target_tokenizer()
    source = encoder.encode([text], truncate=False).rows[0].ids
    if drawn:
        require_few_tokens(text, len(source))
    target = model.generate(source, **keywords)
    if drawn:
        require_few_tokens(text, len(target), "is answered with")
    return Translation(
        text,
        target_encoder.decode(target),
        source,
        target,
        [encoder.token(token) or str(token) for token in source],
        [target_encoder.token(token) or str(token) for token in target],
    )
