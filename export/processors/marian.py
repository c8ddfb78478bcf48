"""Marian's tokenizer: two .spm files, and one vocab.json or two; ``models.marian.tokenization_marian``.

transformers 5.23 cuts sources with source.spm and numbers the pieces by vocab.json. It decodes what was generated
with source.spm, too, unless ``separate_vocabs``, when target.spm and target_vocab.json do that. sacremoses'
normaliser of punctuation, which it asks for, is never called when a text is tokenized.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.export.processors.spm import read_spm
from transom.export.processors.tokenizer_settings import names
from transom.export.processors.vocabulary import read_vocabulary
from transom.runtime.text.marian import MarianAddedToken, MarianSpec

if TYPE_CHECKING:
    from tokenizers import AddedToken

MARIAN_TOKENS = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}


@dataclass(frozen=True)
class Side:
    """What a language's pieces and ids are read from, and the bundle's file that they go to."""

    spm: str
    vocabulary: str
    file: str


SOURCE = Side("source.spm", "vocab.json", "marian.json")
TARGET = Side("target.spm", "target_vocab.json", "marian_target.json")


def marian_special_tokens(given: Mapping[str, Any]) -> dict[str, Any]:
    """Named special tokens; ValueError where one that is needed is null."""
    named = names({**MARIAN_TOKENS, **given})
    for needed in ("unk_token", "eos_token"):
        if needed not in named:
            raise ValueError(f"{needed} is null, which Marian's tokenizer cannot do without")
    return named


def marian_bytes(
    folder: Path,
    side: Side,
    given: Mapping[str, Any],
    added: Mapping[int, AddedToken],
    named: Mapping[str, Any],
    rows: int | None,
) -> tuple[bytes, dict[str, int]]:
    """The JSON file of one side, and the ids of its tokens. ValueError says which file cannot be used, and why."""
    for name in ("vocab.json", "source.spm", "target.spm", side.vocabulary):
        if not (folder / name).is_file():
            raise ValueError(f"MarianTokenizer takes source.spm, target.spm and vocab.json; {name} is missing")
    if given.get("sp_model_kwargs"):
        raise ValueError(
            f"sp_model_kwargs is {given['sp_model_kwargs']!r:.60}; only SentencePiece's defaults are known"
        )
    models = {name: read_spm(folder / name) for name in ("source.spm", "target.spm")}  # both must be sound
    model = models[side.spm]
    vocabulary = read_vocabulary(folder / side.vocabulary, rows)
    unknown = str(named["unk_token"])
    if unknown not in vocabulary:
        raise ValueError(f"{side.vocabulary} has no {unknown!r}, the unknown token")
    first = vocabulary if side is SOURCE else read_vocabulary(folder / SOURCE.vocabulary, None)
    found = added_tokens(added, named, given.get("extra_special_tokens") or [], first)
    spec = MarianSpec(
        unigram=model.unigram,
        vocabulary=vocabulary,
        added=found,
        surfaces=model.surfaces,
        unk_token=unknown,
        eos_token=str(named["eos_token"]),
    )
    data = json.dumps(spec.to_json(), ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    return data, {**vocabulary, **{token.content: token.id for token in found}}


def added_tokens(
    added: Mapping[int, AddedToken], named: Mapping[str, Any], extra: list[Any], vocabulary: Mapping[str, int]
) -> tuple[MarianAddedToken, ...]:
    """Tokens that are found before SentencePiece sees the text: special ones that have no id yet get the next.

    Their ids are the source's, on both sides.
    """
    special = list(dict.fromkeys([*map(str, named.values()), *map(str, extra)]))
    found = {
        token.content: MarianAddedToken(
            token.content, number, token.lstrip, token.rstrip, token.single_word, token.content in special
        )
        for number, token in added.items()
    }
    known = {**vocabulary, **{token.content: token.id for token in found.values()}}
    for content in special:
        if content and content not in found:
            number = known.setdefault(content, len(known))
            found[content] = MarianAddedToken(content, number, False, False, False, True)
    return tuple(found.values())
