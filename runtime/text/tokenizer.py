"""Encode texts to ``input_ids`` and decode them, with a tokenizer of either kind; truncation and padding happen here.

The tokenizers library stores truncation and padding in its tokenizer; they are switched off once
and never set again, so that threads can share one tokenizer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from transom.runtime.errors import BundleError, InputError, ShapeError, one_line
from transom.runtime.text.batch import CompactRow, EncodedBatch
from transom.runtime.text.detokenizer import CleanUpDetokenizer, Detokenizer, clean_up, detokenizer_for
from transom.runtime.text.marian import MarianDetokenizer, MarianSpec, MarianTokenizer
from transom.runtime.text.tokenizer_json import parse_tokenizer, raise_unless_tokenizers
from transom.runtime.text.tokenizer_spec import MAX_ID, TokenizerSpec

if TYPE_CHECKING:
    from tokenizers import Encoding

DOC_STRIDE = 128  # tokens that neighbouring windows of a long context share, as in transformers' pipeline


def export_again(tokens: int) -> str:
    """Return the advice for a text of ``tokens`` tokens that the bundle's axis S does not hold."""
    return f"Export again with --max S={tokens}"


class TextTokenizer:
    """A tokenizer and its limits; may be shared by threads.

    ``data`` are the bytes of the file, ``max_tokens`` is the maximum of the bundle's axis S, and ``wider`` returns the
    advice for more of them. Raises BundleError when the file is damaged or hostile, or disagrees with ``spec``.
    """

    def __init__(
        self, data: bytes, spec: TokenizerSpec, max_tokens: int, wider: Callable[[int], str] = export_again
    ) -> None:
        self._limit(spec, max_tokens, wider)
        self._tokenizer: Any  # MarianTokenizer has the methods of the library's Tokenizer that are called here
        if spec.kind == "marian":
            self._tokenizer = MarianTokenizer(MarianSpec.from_bytes(data, spec.file))
        else:
            self._tokenizer = parse_tokenizer(data)
        self._tokenizer.encode_special_tokens = spec.split_special_tokens
        self._processor = self._tokenizer.post_processor
        self._tokenizer.post_processor = None  # applied here, after truncation
        for name, token, number in (
            ("pad_token", spec.pad_token, spec.pad_id),
            ("mask_token", spec.mask_token, spec.mask_id),
        ):
            if token is not None and self.token_id(token) != number:
                raise BundleError(
                    f"{spec.file} gives {name} {token!r} the id {self.token_id(token)}, bundle.json says {number}. "
                    "Export the bundle again."
                )

    def _limit(self, spec: TokenizerSpec, max_tokens: int, wider: Callable[[int], str]) -> None:
        self.spec, self._wider = spec, wider
        self.max_tokens = min(max_tokens, spec.max_length)
        self._axis = max_tokens

    def with_limits(
        self, spec: TokenizerSpec, max_tokens: int, wider: Callable[[int], str] = export_again
    ) -> TextTokenizer:
        """Return the same tokenizer with other limits, without parsing its file again.

        ``spec`` may differ in the limit and the padding token; the rest of it is that of the same file.
        """
        other = copy.copy(self)
        other._limit(spec, max_tokens, wider)
        return other

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added ones included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def token_id(self, token: str) -> int | None:
        """Return the id of a token of the vocabulary, or None."""
        number: int | None = self._tokenizer.token_to_id(token)
        return number

    def token(self, number: int) -> str | None:
        """Return the token of an id as the vocabulary spells it, or None."""
        token: str | None = self._tokenizer.id_to_token(number) if 0 <= number <= MAX_ID else None
        return token

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of token ids as transformers' ``decode`` does; ids that no token has are left out."""
        known = [int(number) for number in ids if 0 <= number <= MAX_ID]
        text: str = self._tokenizer.decode(known, skip_special_tokens=skip_special_tokens)
        return clean_up(text) if self.spec.clean_up_spaces else text

    def detokenizer(self) -> Detokenizer:
        """Return a detokenizer of one text; its pieces joined equal ``decode`` of all its tokens."""
        marian = isinstance(self._tokenizer, MarianTokenizer)
        detokenizer: Detokenizer = MarianDetokenizer(self._tokenizer) if marian else detokenizer_for(self._tokenizer)
        return CleanUpDetokenizer(detokenizer) if self.spec.clean_up_spaces else detokenizer

    def encode(self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, truncate: bool) -> EncodedBatch:
        """Encode texts, or texts with their pairs, each to one row padded to the longest.

        Raises as ``check`` and ``row`` do.
        """
        self.check(texts, pairs)
        seconds: Sequence[str | None] = [None] * len(texts) if pairs is None else pairs
        rows = [
            self.row(text, pair, truncate=truncate, name=f"text {index}", pair_name=f"pair {index}")
            for index, (text, pair) in enumerate(zip(texts, seconds, strict=True))
        ]
        return self.padded(rows)

    def check(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> None:
        """Raise InputError unless these are lists, of at least one text, and of equal length."""
        for what, given in (("text", texts), ("pair", pairs)):
            if given is None:
                continue
            if isinstance(given, str) or not isinstance(given, Sequence):
                raise InputError(f"{what}s is a {type(given).__name__}, expected a list of str. Put it into a list.")
            if not given:
                raise InputError(f"{what}s is empty, expected a list of at least one str.")
        if pairs is not None and len(texts) != len(pairs):
            raise InputError(f"{len(texts)} texts and {len(pairs)} pairs; expected as many of each.")

    def row(
        self, text: str, pair: str | None = None, *, truncate: bool, name: str = "text 0", pair_name: str = "pair 0"
    ) -> Encoding:
        """Encode one text, or a text with its pair, special tokens included.

        Too long a row is truncated with ``truncate``, a pair from its longer side first ('longest_first' in
        transformers), else it is a ShapeError. InputError: no str, no Unicode, or not a single token. Errors call
        the text ``name`` and its pair ``pair_name``.
        """
        first = self._tokens(text, name)
        second = None if pair is None else self._tokens(pair, pair_name)
        added = self._processor.num_special_tokens_to_add(second is not None)
        room = self.max_tokens - added
        length = len(first) + (0 if second is None else len(second))
        if length > room:
            least = 1 if second is None else 2
            if not truncate or room < least:
                raise ShapeError(self._too_long(name, length + added, added, can_truncate=room >= least))
            keep_first, keep_second = longest_first(len(first), length - len(first), room)
            first.truncate(keep_first, direction=self.spec.truncation_side)
            if second is not None:
                second.truncate(keep_second, direction=self.spec.truncation_side)
        framed: Encoding = self._processor.process(first, second, True)
        return framed

    def windows(
        self,
        question: str,
        context: str,
        max_length: int | None = None,
        stride: int | None = None,
        *,
        place: str = "",
    ) -> EncodedBatch:
        """Encode a question with overlapping windows of its context, one row each.

        ``max_length`` bounds a row in tokens, as many as the bundle allows by default; ``stride`` is the overlap of
        two pieces, by default that of transformers' pipeline: DOC_STRIDE, or half a short row. The rows are those of
        transformers' ``truncation="only_second", return_overflowing_tokens=True``. Raises as ``row`` does, and
        InputError where the question leaves no room for the context, or the context needs several rows and the room
        is no larger than the overlap. ``place`` numbers the question in errors.
        """
        asked, given = self._tokens(question, f"question{place}"), self._tokens(context, f"context{place}")
        length = self.max_tokens if max_length is None else max_length
        if not 0 < length <= self.max_tokens:
            raise ShapeError(f"max_length is {length}, expected 1..{self.max_tokens}, the most a row holds.")
        overlap = min(length // 2, DOC_STRIDE) if stride is None else stride
        added = self._processor.num_special_tokens_to_add(True)
        room = length - len(asked) - added
        if room < 1 or (stride is None and room <= overlap and room < len(given)):
            taken = len(asked) + added
            raise InputError(
                f"the question{place} {self._question_too_long(taken, added, len(given), length, overlap)}"
            )
        if overlap < 0 or (overlap >= room and len(given) > room):
            raise InputError(
                f"stride is {stride}, expected 0..{room - 1}: a row has room for {room} tokens of the context "
                "beside this question. Choose a smaller one."
            )
        if len(given) > room:
            given.truncate(room, stride=overlap, direction=self.spec.truncation_side)
        row = self._processor.process(asked, given, True)
        if 1 not in row.sequence_ids:
            raise BundleError(f"{self.spec.file} leaves out the second text of a pair; export the bundle again.")
        batch = self.padded([row, *row.overflowing])
        if self.spec.token_types:  # the template sets the context's type in the first piece only
            context_type = row.type_ids[row.sequence_ids.index(1)]
            for index, piece in enumerate(batch.rows):
                of_context = [k for k, sequence in enumerate(piece.sequence_ids) if sequence == 1]
                batch.token_type_ids[index, of_context] = context_type
        return batch

    def padded(self, rows: Sequence[Encoding | CompactRow]) -> EncodedBatch:
        """Pad rows of ``row`` to the longest of them, as one batch."""
        shape = (len(rows), max(len(row) for row in rows))
        ids = np.full(shape, self.spec.pad_id, dtype=np.int64)
        mask, types = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = row.ids
            mask[index, : len(row)] = 1
            if self.spec.token_types:
                types[index, : len(row)] = row.type_ids
        return EncodedBatch(ids, mask, types, tuple(rows))

    def _tokens(self, text: str, name: str) -> Encoding:
        """Check a text, and return its encoding without special tokens."""
        if not isinstance(text, str):
            raise InputError(f"{name} is a {type(text).__name__}, expected a str.")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{name} has a lone surrogate, {text[error.start]!r}, at character {error.start}, which is no "
                "Unicode text. Decode the bytes it came from with errors='replace'."
            ) from None
        try:
            encoding: Encoding = self._tokenizer.encode(text)  # alone: encode_batch starts threads of its own
        except BaseException as error:
            raise_unless_tokenizers(error)
            raise InputError(f"{name} cannot be tokenized ({one_line(error)}). Shorten it.") from None
        if len(encoding) == 0:
            raise InputError(
                f"{name}, {text[:40]!r}, has no tokens: it is empty, or all blank or control characters. Leave it out."
            )
        return encoding

    def _too_long(self, name: str, length: int, added: int, *, can_truncate: bool) -> str:
        """Explain that a text is too long, and what to do about it."""
        said = f"{name} is {length} tokens, {added} of them special; at most {self.max_tokens} fit."
        longest = min(length, self.spec.max_length)  # of any export of this checkpoint
        more = longest > self.max_tokens
        if not can_truncate:  # not to one token of each text
            return f"{said} {self._wider(longest) if more else 'This model reads no such text'}."
        if more and longest == length:
            return f"{said} Pass truncate=True, or {lowered(self._wider(length))}."
        trained = f"{longest} at most" if more else "no more"
        return f"{said} The checkpoint was trained for {trained}: pass truncate=True, or split the text."

    def _question_too_long(self, taken: int, added: int, context: int, length: int, overlap: int) -> str:
        """Explain that a question, ``taken`` tokens with the ``added`` ones, leaves too little room for a context."""
        room = length - taken
        left = f"{room} of the {length}" if room > 0 else f"none of the {length}"
        why = f", which is {context}; windows over it share {overlap}" if room > 0 else ""
        shortest = length - added - min(context, overlap + 1)
        longest = taken + min(context, taken + 1, DOC_STRIDE + 1)  # of a row that would do
        ways = [f"Shorten it to {shortest}"] if shortest > 0 else []
        if longest <= self.spec.max_length:
            wider = self._wider(longest)
            ways.append(f"or {lowered(wider)}" if ways else wider)
        said = f"is {taken - added} tokens and leaves {left} of a row for the context{why}."
        return f"{said} {', '.join(ways) or 'Ask a model that reads longer texts'}."


def lowered(sentence: str) -> str:
    """Return the sentence with its first letter in lower case, as the end of another one."""
    return f"{sentence[0].lower()}{sentence[1:]}"


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Return how many tokens to keep of each of a pair so that both fit into ``room``: the longer one loses first.

    As ``truncate_encodings`` in tokenizers' Rust source, src/utils/truncation.rs.
    """
    short, long = min(first, second), max(first, second)
    long = max(short, room - short)
    if short + long > room:
        short = room // 2
        long = short + room % 2
    return (long, short) if first > second else (short, long)
