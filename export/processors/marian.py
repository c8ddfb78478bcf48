"""Marian's tokenizer of two .spm files of SentencePiece and one vocab.json or two: ``models.marian``.

transformers 5.23 encodes sources with source.spm and numbers the pieces by vocab.json. It decodes generated text
with source.spm, too, unless ``separate_vocabs``, when target.spm and target_vocab.json do that. sacremoses'
normaliser of punctuation, which it asks for, is never called when a text is tokenized.

Fields of .spm files as in SentencePiece's ``sentencepiece_model.proto``.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from transom.export.processors.byte_bpe import read_vocabulary
from transom.export.processors.tokenizer_settings import special_tokens
from transom.runtime.errors import one_line
from transom.runtime.text.marian import MarianAddedToken, MarianSpec
from transom.runtime.text.unigram import MAX_SCORE, Unigram, UnigramSpec, float32

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken

MARIAN_TOKENS = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<pad>"}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # ModelProto.SentencePiece.Type
KINDS = {1: "unigram", 2: "BPE", 3: "word", 4: "character"}  # TrainerSpec.ModelType
UNKNOWN_PENALTY = 10.0  # below the least likely piece; kUnkPenalty in unigram_model.cc
PROBES = (
    "Hello, world! 1979-05-03",
    " e\u0301 \u1100\u1161\u11a8 ﬁ ½ Ⅷ 漢字  \u00a0x\u3000\u200d👩\u200d👧 ",
    "!!!!!!!!!!!!!!!!! aaaaaaaaaaaaaaa 1111111111111111",
)


@dataclass(frozen=True)
class Side:
    """The files of one language: its pieces, its ids, and the bundle's file that both are written to."""

    spm: str
    vocabulary: str
    file: str


SOURCE = Side("source.spm", "vocab.json", "marian.json")
TARGET = Side("target.spm", "target_vocab.json", "marian_target.json")


def marian_special_tokens(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the named special tokens; ValueError where one that is needed is null."""
    named = special_tokens({**MARIAN_TOKENS, **given})
    for needed in ("unk_token", "eos_token"):
        if needed not in named:
            raise ValueError(f"{needed} is null, which Marian's tokenizer cannot do without")
    return named


def require_files(folder: Path, *names: str) -> None:
    """Raise ValueError for a file that Marian's tokenizer is made of and the folder lacks."""
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"MarianTokenizer takes source.spm, target.spm and vocab.json; {name} is missing")


def read_models(folder: Path) -> dict[str, SentencePieceModel]:
    """Read both .spm files, by name: each must be valid, whichever side is used."""
    require_files(folder, SOURCE.vocabulary, SOURCE.spm, TARGET.spm)
    return {side.spm: read_spm(folder / side.spm) for side in (SOURCE, TARGET)}


def marian_bytes(
    folder: Path,
    models: Mapping[str, SentencePieceModel],
    side: Side,
    given: Mapping[str, Any],
    added: Mapping[int, AddedToken],
    named: Mapping[str, Any],
    rows: int | None,
) -> tuple[bytes, dict[str, int]]:
    """Return the JSON file of one side, and the ids of its tokens.

    ``models`` are the two .spm files by name. ValueError names the file that cannot be used, and why.
    """
    if given.get("sp_model_kwargs"):
        raise ValueError(
            f"sp_model_kwargs is {given['sp_model_kwargs']!r:.60}; only SentencePiece's defaults are known"
        )
    require_files(folder, side.vocabulary)
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
    """Return the tokens that are matched before SentencePiece; special ones that have no id yet get the next.

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


@dataclass(frozen=True)
class SentencePieceModel:
    """A parsed .spm file.

    ``surfaces`` are the pieces that decode to something else than their own text: "<s>" -> "", "<unk>" -> " ⁇ ".
    """

    unigram: UnigramSpec
    surfaces: dict[str, str]
    processor: SentencePieceProcessor


def read_spm(path: Path) -> SentencePieceModel:
    """Read an .spm file; ValueError says why one cannot be used.

    The pieces of a few texts are compared with the sentencepiece library's.
    """
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    data, messages = path.read_bytes(), cast(Any, sentencepiece_model_pb2)
    try:
        processor = SentencePieceProcessor(model_proto=data)
        model = messages.ModelProto.FromString(data)
    except Exception as error:  # the two libraries have errors of their own for "damaged"
        raise ValueError(f"{path.name} is no SentencePiece model ({one_line(error)})") from None
    if not model.pieces:
        raise ValueError(f"{path.name} is no SentencePiece model: it has no pieces")
    if not all(isinstance(piece.piece, str) and abs(piece.score) <= MAX_SCORE for piece in model.pieces):
        raise ValueError(f"{path.name} is damaged: it has a piece that is no UTF-8, or a score that is no number")
    of_type: dict[int, list[Any]] = {kind: [p for p in model.pieces if p.type == kind] for kind in range(1, 7)}
    kind = model.trainer_spec.model_type
    if KINDS.get(kind) != "unigram":
        raise ValueError(f"{path.name} is a {KINDS.get(kind, kind)} model, expected a unigram model as Marian's are")
    for strange, what in ((BYTE, "bytes for unknown characters"), (USER_DEFINED, "user-defined pieces")):
        if of_type[strange]:
            raise ValueError(f"{path.name} has {what}, which Marian's models have not")
    if model.denormalizer_spec.precompiled_charsmap:
        raise ValueError(f"{path.name} rewrites decoded text by rules, which Marian's models do not")
    if not of_type[NORMAL]:
        raise ValueError(f"{path.name} has no pieces but special ones")
    spec = unigram_spec(model, of_type)
    ours = Unigram(spec)
    for probe in PROBES:
        if ours.encode(probe) != processor.encode(probe, out_type=str):
            raise ValueError(f"{path.name}: sentencepiece cuts {probe!r} into other pieces than we do")
    surfaces = {piece.piece: "" for piece in of_type[CONTROL]}
    surfaces |= {piece.piece: model.trainer_spec.unk_surface for piece in of_type[UNKNOWN]}
    return SentencePieceModel(spec, surfaces, processor)


def unigram_spec(model: Any, of_type: dict[int, list[Any]]) -> UnigramSpec:
    """Return the pieces, scores and normaliser that the runtime needs."""
    scores = {piece.piece: float(piece.score) for piece in of_type[NORMAL]}
    rules = model.normalizer_spec
    return UnigramSpec(
        pieces=scores,
        unknown_score=float32(min(scores.values()) - UNKNOWN_PENALTY),
        charsmap=base64.b64encode(rules.precompiled_charsmap).decode(),
        add_dummy_prefix=rules.add_dummy_prefix,
        remove_extra_whitespaces=rules.remove_extra_whitespaces,
        escape_whitespaces=rules.escape_whitespaces,
        whitespace_as_suffix=model.trainer_spec.treat_whitespace_as_suffix,
    )
