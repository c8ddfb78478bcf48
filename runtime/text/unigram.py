"""SentencePiece's unigram model: normalise a text, then encode it as the pieces of the best total score.

The tokenizers library has a Unigram model and a Precompiled normaliser too, but neither gives these pieces
exactly: its normaliser works by grapheme clusters where SentencePiece applies the longest matching rule, and its
sums are float64 where SentencePiece rounds each to float32, which decides between equal scores ("!!!!!!!").
The source followed is SentencePiece's ``normalizer.cc`` and ``EncodeOptimized`` in ``unigram_model.cc``.
"""

from __future__ import annotations

import base64
import binascii
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from transom.runtime.json_reader import Fields
from transom.runtime.text.charsmap import Charsmap

SPACE = "\u2581"  # how a space is written within pieces
FLOAT32 = struct.Struct("f")
MAX_SCORE = 1e30  # of a piece; sums over any text stay finite in float32


@dataclass(frozen=True)
class UnigramSpec:
    """The fields of an .spm file that decide the pieces.

    pieces              text of a piece -> its log probability
    unknown_score       of a character that no piece covers
    charsmap            rules of the normaliser (``runtime.text.charsmap``), in base64
    add_dummy_prefix    a space is added before the text (behind it with ``whitespace_as_suffix``)
    remove_extra_whitespaces   spaces at both ends are removed, runs become one
    escape_whitespaces  pieces have U+2581 for a space
    """

    pieces: Mapping[str, float]
    unknown_score: float
    charsmap: str
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool
    escape_whitespaces: bool
    whitespace_as_suffix: bool

    @classmethod
    def from_json(cls, obj: object, where: str, problems: list[str]) -> UnigramSpec:
        """Read the JSON object; problems found in it are appended to ``problems``."""
        fields = Fields(obj, where, problems)
        spec = cls(
            pieces=fields.take("pieces", _is_scores, f"an object of scores within ±{MAX_SCORE:g}"),
            unknown_score=fields.take("unknown_score", _is_score, f"a number within ±{MAX_SCORE:g}"),
            charsmap=fields.take("charsmap", _is_base64, "base64"),
            add_dummy_prefix=fields.boolean("add_dummy_prefix"),
            remove_extra_whitespaces=fields.boolean("remove_extra_whitespaces"),
            escape_whitespaces=fields.boolean("escape_whitespaces"),
            whitespace_as_suffix=fields.boolean("whitespace_as_suffix"),
        )
        fields.done()
        return spec

    def to_json(self) -> dict[str, Any]:
        """Return the JSON object that ``from_json`` reads back to an equal value."""
        return asdict(self)


class Unigram:
    """A unigram model that encodes texts; may be shared by threads. BundleError where its charsmap is damaged."""

    def __init__(self, spec: UnigramSpec) -> None:
        self.spec = spec
        self._space = (SPACE if spec.escape_whitespaces else " ").encode()
        self._charsmap = Charsmap(base64.b64decode(spec.charsmap))
        self._lengths = lengths_by_first_character(spec.pieces)

    def encode(self, text: str) -> list[str]:
        """Return the pieces of a text in order; neighbouring characters that no piece covers are one piece."""
        normalized = self.normalize(text)
        starts, known = self._best_path(normalized)
        pieces: list[str] = []
        end = len(normalized)
        while end > 0:
            start = starts[end]
            while start > 0 and not known[end] and not known[start]:
                start = starts[start]
            pieces.append(normalized[start:end])
            end = start
        return pieces[::-1]

    def normalize(self, text: str) -> str:
        """Return the text with the rules applied, spaces trimmed and escaped, and a space added in front."""
        data, spec, position = text.encode(), self.spec, 0
        if spec.remove_extra_whitespaces:
            while position < len(data):
                replaced, width = self._rewrite(data, position)
                if replaced != b" ":
                    break
                position += width
        if position == len(data):
            return ""
        found = [self._space] if spec.add_dummy_prefix and not spec.whitespace_as_suffix else []
        after_space = spec.remove_extra_whitespaces
        while position < len(data):
            replaced, width = self._rewrite(data, position)
            position += width
            if after_space:
                replaced = replaced.lstrip(b" ")
            if replaced:
                found.append(replaced.replace(b" ", self._space))
                after_space = replaced.endswith(b" ") and spec.remove_extra_whitespaces
        normalized = b"".join(found)
        if spec.remove_extra_whitespaces:
            while normalized.endswith(self._space):
                normalized = normalized.removesuffix(self._space)
        if spec.add_dummy_prefix and spec.whitespace_as_suffix:
            normalized += self._space
        return normalized.decode(errors="replace")  # damaged rules could make anything

    def _rewrite(self, data: bytes, start: int) -> tuple[bytes, int]:
        """Return the replacement of the bytes at ``start``, and how many they are: at least one character."""
        found = self._charsmap.rewrite(data, start)
        if found is not None:
            return found
        first = data[start]
        width = 1 if first < 0x80 else 2 if first < 0xE0 else 3 if first < 0xF0 else 4
        return data[start : start + width], width

    def _best_path(self, text: str) -> tuple[list[int], list[bool]]:
        """Find for each end in the text where its best last piece starts, and whether that is a known piece (Viterbi).

        Of two equal sums, in float32, the first one found is kept.
        """
        size, pieces, unknown = len(text), self.spec.pieces, self.spec.unknown_score
        scores, starts, known = [0.0] * (size + 1), [-1] * (size + 1), [False] * (size + 1)
        for start in range(size):
            here, has_single = scores[start], False
            for length in self._lengths.get(text[start], ()):
                end = start + length
                score = pieces.get(text[start:end]) if end <= size else None
                if score is None:
                    continue
                has_single |= length == 1
                total = float32(here + score)
                if starts[end] < 0 or total > scores[end]:
                    scores[end], starts[end], known[end] = total, start, True
            if not has_single:
                end, total = start + 1, float32(here + unknown)
                if starts[end] < 0 or total > scores[end]:
                    scores[end], starts[end], known[end] = total, start, False
        return starts, known


def float32(value: float) -> float:
    """Round to the nearest float32."""
    rounded: float = FLOAT32.unpack(FLOAT32.pack(value))[0]
    return rounded


def lengths_by_first_character(texts: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Return for each character the lengths of the texts that start with it, shortest first."""
    found: dict[str, set[int]] = {}
    for text in texts:
        found.setdefault(text[0], set()).add(len(text))
    return {first: tuple(sorted(lengths)) for first, lengths in found.items()}


def is_text(value: object) -> bool:
    """Return whether it is a non-empty str of Unicode: JSON can hold a lone surrogate."""
    return isinstance(value, str) and value != "" and not any("\ud800" <= character <= "\udfff" for character in value)


def _is_score(value: object) -> bool:
    return (
        isinstance(value, (int, float)) and type(value) is not bool and math.isfinite(value) and abs(value) <= MAX_SCORE
    )


def _is_scores(value: object) -> bool:
    return isinstance(value, dict) and all(is_text(piece) and _is_score(score) for piece, score in value.items())


def _is_base64(value: object) -> bool:
    try:
        return isinstance(value, str) and base64.b64decode(value, validate=True) is not None
    except (binascii.Error, ValueError):
        return False
