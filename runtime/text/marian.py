"""Marian's tokenizer: SentencePiece encodes a text as pieces, vocab.json gives their ids.

``MarianTokenizer`` has the methods of the tokenizers library's ``Tokenizer`` that ``text.tokenizer`` calls. The
behaviour followed is that of transformers 5.23, ``models.marian.tokenization_marian`` and ``tokenization_python``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transom.runtime.json_reader import Fields, parse_json
from transom.runtime.text.tokenizer_spec import MAX_ID
from transom.runtime.text.unigram import SPACE, Unigram, UnigramSpec, is_text


@dataclass(frozen=True)
class MarianAddedToken:
    """An added token: it is split off the text before SentencePiece encodes the rest.

    ``lstrip`` and ``rstrip`` remove the blanks beside it, ``single_word`` requires spaces there; ``special`` ones are
    left out of decoded text.
    """

    content: str
    id: int
    lstrip: bool
    rstrip: bool
    single_word: bool
    special: bool

    @classmethod
    def from_json(cls, obj: object, where: str, problems: list[str]) -> MarianAddedToken:
        fields = Fields(obj, where, problems)
        token = cls(
            content=fields.take("content", is_text, "a token"),
            id=fields.integer("id", 0, MAX_ID),
            lstrip=fields.boolean("lstrip"),
            rstrip=fields.boolean("rstrip"),
            single_word=fields.boolean("single_word"),
            special=fields.boolean("special"),
        )
        fields.done()
        return token


@dataclass(frozen=True)
class MarianSpec:
    """One side of a Marian tokenizer, source or target, as a bundle stores it.

    vocabulary   piece -> id
    surfaces     pieces that do not decode to their own text -> the text they decode to
    """

    unigram: UnigramSpec
    vocabulary: Mapping[str, int]
    added: tuple[MarianAddedToken, ...]
    surfaces: Mapping[str, str]
    unk_token: str
    eos_token: str

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> MarianSpec:
        """Read and check the JSON file ``name``; BundleError lists everything that is wrong with it."""
        fields = Fields(parse_json(data, name), name)
        spec = cls(
            unigram=UnigramSpec.from_json(fields.mapping("unigram"), f"{name}: unigram", fields.problems),
            vocabulary=fields.take("vocabulary", _is_vocabulary, f"an object of ids 0..{MAX_ID} by token"),
            added=tuple(
                MarianAddedToken.from_json(token, f"{name}: added[{index}]", fields.problems)
                for index, token in enumerate(fields.sequence("added"))
            ),
            surfaces=fields.take("surfaces", _is_surfaces, "an object of texts by token"),
            unk_token=fields.take("unk_token", is_text, "a token"),
            eos_token=fields.take("eos_token", is_text, "a token"),
        )
        if not fields.problems:
            known = {*spec.vocabulary, *(token.content for token in spec.added)}
            fields.problems += [
                f"{name}: {what} {token!r} is not in the vocabulary"
                for what, token in (("unk_token", spec.unk_token), ("eos_token", spec.eos_token))
                if token not in known
            ]
        fields.done()
        return spec

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "unigram": self.unigram.to_json(),
            "added": [asdict(token) for token in self.added],
        }


@dataclass(frozen=True)
class MarianEncoding:
    """The ids of one text, with the methods of the tokenizers library's ``Encoding`` that concern ids."""

    ids: list[int]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def type_ids(self) -> list[int]:
        return [0] * len(self.ids)

    def truncate(self, length: int, *, direction: str) -> None:
        """Keep ``length`` ids of the beginning, or of the end with the direction "left"."""
        self.ids[:] = self.ids[:length] if direction == "right" else self.ids[len(self.ids) - length :]


class MarianTokenizer:
    """Encodes texts to ids and decodes them; may be shared by threads.

    With ``encode_special_tokens`` the added tokens are not split off a text.
    """

    def __init__(self, spec: MarianSpec) -> None:
        self.spec = spec
        self.encode_special_tokens = False
        self._unigram = Unigram(spec.unigram)
        self._added = {token.content: token for token in spec.added}
        self._ids = {**spec.vocabulary, **{token.content: token.id for token in spec.added}}
        self._tokens = {number: token for token, number in spec.vocabulary.items()}
        self._tokens |= {token.id: token.content for token in spec.added}
        self.special_ids = frozenset(token.id for token in spec.added if token.special)
        longest_first = sorted(map(re.escape, self._added), key=len, reverse=True)
        self._search = re.compile(f"({'|'.join(longest_first)})") if longest_first else None
        self.post_processor: EosProcessor | None = EosProcessor(self._ids[spec.eos_token])

    def encode(self, text: str) -> MarianEncoding:
        """Return the ids of a text, without the end-of-sequence token."""
        unknown = self.spec.vocabulary.get(self.spec.unk_token, self._ids[self.spec.unk_token])
        return MarianEncoding([self._ids.get(token, unknown) for token in self._tokenize(text)])

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of ids, without blanks at its ends; ids that no token has are left out."""
        detokenizer = MarianDetokenizer(self, skip_special_tokens=skip_special_tokens)
        return "".join([*map(detokenizer.add, ids), detokenizer.end()])

    def token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def id_to_token(self, number: int) -> str | None:
        return self._tokens.get(number)

    def get_vocab_size(self, with_added_tokens: bool = True) -> int:
        return len(self._ids) if with_added_tokens else len(self.spec.vocabulary)

    def surface(self, piece: str, *, first: bool) -> tuple[str, bool]:
        """Return the text of a piece, and whether its leading space was dropped as that of the text's beginning."""
        if piece in self.spec.surfaces:
            return self.spec.surfaces[piece], False
        rules, taken = self.spec.unigram, False
        if first and piece in rules.pieces and (rules.add_dummy_prefix or rules.remove_extra_whitespaces):
            taken = piece.startswith(SPACE)
            piece = piece.removeprefix(SPACE)
        return piece.replace(SPACE, " "), taken and not rules.remove_extra_whitespaces

    def _tokenize(self, text: str) -> list[str]:
        """Split off the added tokens, and return them with SentencePiece's pieces between them."""
        if self.encode_special_tokens or self._search is None:
            return self._pieces(text)
        found: list[str] = []
        for part in self._strip_around(self._search.split(text)):
            found += [part] if part in self._added else self._pieces(part) if part else []
        return found

    def _strip_around(self, parts: Sequence[str]) -> list[str]:
        """Apply ``lstrip``, ``rstrip`` and ``single_word`` of the added tokens to the parts beside them."""
        parts = [part for part in parts if part]
        for index, part in enumerate(parts):
            token = self._added.get(part)
            if token is None:
                continue
            left = parts[index - 1] if index > 0 else ""
            right = parts[index + 1] if index + 1 < len(parts) else ""
            if token.rstrip and right:
                parts[index + 1] = right.lstrip()
            if token.lstrip and left:
                parts[index - 1] = left.rstrip()
            if token.single_word and left and left[-1] != " ":
                parts[index - 1] += part
                parts[index] = ""
            elif token.single_word and right and right[0] != " ":
                parts[index + 1] = part + parts[index + 1]
                parts[index] = ""
        return parts

    def _pieces(self, text: str) -> list[str]:
        """Return SentencePiece's pieces; a language code such as ">>fr<<" at the beginning is one token."""
        end = text.find("<<") + 2 if text.startswith(">>") else 1
        codes = [text[:end]] if end > 1 else []
        return codes + self._unigram.encode(text[end:] if codes else text)


class EosProcessor:
    """Appends the end-of-sequence token, with the methods of the tokenizers library's post-processors."""

    def __init__(self, eos_id: int) -> None:
        self._eos_id = eos_id

    def num_special_tokens_to_add(self, is_pair: bool) -> int:
        return 1

    def process(self, first: MarianEncoding, second: MarianEncoding | None, add_special_tokens: bool) -> MarianEncoding:
        ids = first.ids + ([] if second is None else second.ids)
        return MarianEncoding([*ids, self._eos_id] if add_special_tokens else ids)


class MarianDetokenizer:
    """Detokenizer of one text: the pieces of ``add`` and ``end`` joined equal ``MarianTokenizer.decode``."""

    def __init__(self, text: MarianTokenizer, *, skip_special_tokens: bool = True) -> None:
        self._text = text
        self._skip = text.special_ids if skip_special_tokens else frozenset()
        self._special = {token.content for token in text.spec.added if token.special}
        self._first = True  # no text yet since the beginning or the last special token
        self._blanks: str | None = None  # held back, in case they are the last; None: before the first character

    def add(self, token: int) -> str:
        """Return the characters that this token makes final."""
        piece = None if token in self._skip else self._text.id_to_token(token)
        if piece is None:
            return ""
        if piece in self._special:
            self._first = True
            return self._final(f"{piece} ")
        surface, taken = self._text.surface(piece, first=self._first)
        self._first = self._first and not taken and surface == ""
        return self._final(surface)

    def end(self) -> str:
        """Return "": what was held back are blanks, which a decoded text does not end with."""
        return ""

    def _final(self, added: str) -> str:
        solid = added.rstrip()
        if self._blanks is None:
            self._blanks, solid, added = ("", solid.lstrip(), added.lstrip()) if solid else (None, "", "")
        if not solid:
            self._blanks = None if self._blanks is None else self._blanks + added
            return ""
        final, self._blanks = (self._blanks or "") + solid, added[len(solid) :]
        return final


def _is_vocabulary(value: object) -> bool:
    if not isinstance(value, dict) or not value:
        return False
    return all(is_text(token) and type(number) is int and 0 <= number <= MAX_ID for token, number in value.items())


def _is_surfaces(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
