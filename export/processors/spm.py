"""From an .spm file of SentencePiece to what the runtime needs of it.

Fields as in SentencePiece's ``sentencepiece_model.proto``.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from transom.runtime.errors import one_line
from transom.runtime.text.unigram import MAX_SCORE, Unigram, UnigramSpec, float32

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # ModelProto.SentencePiece.Type
KINDS = {1: "unigram", 2: "BPE", 3: "word", 4: "character"}  # TrainerSpec.ModelType
UNKNOWN_PENALTY = 10.0  # below the least likely piece; kUnkPenalty in unigram_model.cc
PROBES = (
    "Hello, world! 1979-05-03",
    " e\u0301 \u1100\u1161\u11a8 ﬁ ½ Ⅷ 漢字  \u00a0x\u3000\u200d👩\u200d👧 ",
    "!!!!!!!!!!!!!!!!! aaaaaaaaaaaaaaa 1111111111111111",
)


@dataclass(frozen=True)
class SentencePieceModel:
    """An .spm file, read.

    ``surfaces`` are the pieces that decode to something else than their own text: "<s>" -> "", "<unk>" -> " ⁇ ".
    """

    unigram: UnigramSpec
    surfaces: dict[str, str]
    processor: SentencePieceProcessor


def read_spm(path: Path) -> SentencePieceModel:
    """Read an .spm file; ValueError says why one cannot be used.

    The pieces of a few texts are held against the sentencepiece library's own.
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
