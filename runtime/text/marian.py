"""Marian's tokenizer: SentencePiece cuts the text, vocab.json numbers the pieces.

``MarianTokenizer`` has the methods of the tokenizers library's ``Tokenizer`` that ``text.tokenizer`` calls. The
behaviour followed is that of transformers 5.23, ``models.marian.tokenization_marian`` and ``tokenization_python``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transom.runtime.json_reader import Fields, parse_json
from transom.runtime.text.unigram import SPACE, Unigram, UnigramSpec, is_text

MAX_ID = 2**31 - 1


@dataclass(frozen=True)
class Added:
    """A token that is found in the text before anything else is done with it.

    ``lstrip`` and ``rstrip`` eat the blanks beside it, ``single_word`` wants spaces there; ``special`` ones are
    left out of decoded text.
    """

    content: str
    id: int
    lstrip: bool
    rstrip: bool
    single_word: bool
    special: bool

    @classmethod
    def from_json(cls, obj: object, where: str, problems: list[str]) -> Added:
        fields = Fields(obj, where, problems)
        made = cls(
            content=fields.take("content", is_text, "a token"),
            id=fields.integer("id", 0, MAX_ID),
            lstrip=fields.boolean("lstrip"),
            rstrip=fields.boolean("rstrip"),
            single_word=fields.boolean("single_word"),
            special=fields.boolean("special"),
        )
        fields.done()
        return made


@dataclass(frozen=True)
class MarianSpec:
    """One side of a Marian tokenizer, as a bundle stores it.

    vocabulary   piece -> id
    surfaces     pieces that decode to something else than their own text
    """

    unigram: UnigramSpec
    vocabulary: Mapping[str, int]
    added: tuple[Added, ...]
    surfaces: Mapping[str, str]
    unk_token: str
    eos_token: str

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> MarianSpec:
        """Read and check the JSON file ``name``; BundleError lists everything that is wrong with it."""
        fields = Fields(parse_json(data, name), name)
        made = cls(
            unigram=UnigramSpec.from_json(fields.mapping("unigram"), f"{name}: unigram", fields.problems),
            vocabulary=fields.take("vocabulary", _is_vocabulary, f"an object of ids 0..{MAX_ID} by token"),
            added=tuple(
                Added.from_json(token, f"{name}: added[{index}]", fields.problems)
                for index, token in enumerate(fields.sequence("added"))
            ),
            surfaces=fields.take("surfaces", _is_surfaces, "an object of texts by token"),
            unk_token=fields.take("unk_token", is_text, "a token"),
            eos_token=fields.take("eos_token", is_text, "a token"),
        )
        if not fields.problems:
            known = {*made.vocabulary, *(token.content for token in made.added)}
            fields.problems += [
                f"{name}: {what} {token!r} is not in the vocabulary"
                for what, token in (("unk_token", made.unk_token), ("eos_token", made.eos_token))
                if token not in known
            ]
        fields.done()
        return made

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "unigram": self.unigram.to_json(),
            "added": [asdict(token) for token in self.added],
        }


@dataclass(frozen=True)
class Row:
    """Ids of one text; like the tokenizers library's ``Encoding`` as far as ids go."""

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
    """Texts to ids and back; may be shared by threads.

    With ``encode_special_tokens`` the tokens that were added are not looked for in a text.
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
        self.post_processor: EndOfText | None = EndOfText(self._ids[spec.eos_token])

    def encode(self, text: str) -> Row:
        """Ids without the end-of-text token."""
        unknown = self.spec.vocabulary.get(self.spec.unk_token, self._ids[self.spec.unk_token])
        return Row([self._ids.get(token, unknown) for token in self._cut(text)])

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids, without blanks at its ends; ids that nothing has are left out."""
        shown = MarianDetokenizer(self, skip_special_tokens=skip_special_tokens)
        return "".join([*map(shown.add, ids), shown.end()])

    def token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def id_to_token(self, number: int) -> str | None:
        return self._tokens.get(number)

    def get_vocab_size(self, with_added_tokens: bool = True) -> int:
        return len(self._ids) if with_added_tokens else len(self.spec.vocabulary)

    def surface(self, piece: str, *, first: bool) -> tuple[str, bool]:
        """What a piece looks like in text, and whether its mark of a space was taken as the text's beginning."""
        if piece in self.spec.surfaces:
            return self.spec.surfaces[piece], False
        rules, taken = self.spec.unigram, False
        if first and piece in rules.pieces and (rules.add_dummy_prefix or rules.remove_extra_whitespaces):
            taken = piece.startswith(SPACE)
            piece = piece.removeprefix(SPACE)
        return piece.replace(SPACE, " "), taken and not rules.remove_extra_whitespaces

    def _cut(self, text: str) -> list[str]:
        """Added tokens where they stand, SentencePiece's pieces between them."""
        if self.encode_special_tokens or self._search is None:
            return self._pieces(text)
        found: list[str] = []
        for part in self._apart(self._search.split(text)):
            found += [part] if part in self._added else self._pieces(part) if part else []
        return found

    def _apart(self, parts: Sequence[str]) -> list[str]:
        """The text's parts with what ``lstrip``, ``rstrip`` and ``single_word`` of the tokens among them do."""
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
        """A language code such as ">>fr<<" at the beginning is one token."""
        end = text.find("<<") + 2 if text.startswith(">>") else 1
        codes = [text[:end]] if end > 1 else []
        return codes + self._unigram.cut(text[end:] if codes else text)


class EndOfText:
    """Appends the end-of-text token; as the tokenizers library's post-processors are called."""

    def __init__(self, eos_id: int) -> None:
        self._eos_id = eos_id

    def num_special_tokens_to_add(self, is_pair: bool) -> int:
        return 1

    def process(self, first: Row, second: Row | None, add_special_tokens: bool) -> Row:
        ids = first.ids + ([] if second is None else second.ids)
        return Row([*ids, self._eos_id] if add_special_tokens else ids)


class MarianDetokenizer:
    """One text in the making: the pieces of ``add`` and ``end`` together are what ``MarianTokenizer.decode`` gives."""

    def __init__(self, text: MarianTokenizer, *, skip_special_tokens: bool = True) -> None:
        self._text = text
        self._skip = text.special_ids if skip_special_tokens else frozenset()
        self._special = {token.content for token in text.spec.added if token.special}
        self._first = True  # nothing decoded yet since the beginning or the last special token
        self._blanks: str | None = None  # held back, in case they are the last; None: before the first character

    def add(self, token: int) -> str:
        """The characters that this token settles."""
        piece = None if token in self._skip else self._text.id_to_token(token)
        if piece is None:
            return ""
        if piece in self._special:
            self._first = True
            return self._settled(f"{piece} ")
        surface, taken = self._text.surface(piece, first=self._first)
        self._first = self._first and not taken and surface == ""
        return self._settled(surface)

    def end(self) -> str:
        """What was held back: nothing but blanks, which a decoded text does not end with."""
        return ""

    def _settled(self, added: str) -> str:
        solid = added.rstrip()
        if self._blanks is None:
            self._blanks, solid, added = ("", solid.lstrip(), added.lstrip()) if solid else (None, "", "")
        if not solid:
            self._blanks = None if self._blanks is None else self._blanks + added
            return ""
        settled, self._blanks = (self._blanks or "") + solid, added[len(solid) :]
        return settled


def _is_vocabulary(value: object) -> bool:
    if not isinstance(value, dict) or not value:
        return False
    return all(is_text(token) and type(number) is int and 0 <= number <= MAX_ID for token, number in value.items())


def _is_surfaces(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
