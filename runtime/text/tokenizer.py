"""From text to ``input_ids`` and back: a tokenizer of either kind, padded and cut here.

The tokenizers library carries truncation and padding as settings of its own; they are switched off once
and never touched again, so that threads can share one encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from transom.runtime.errors import BundleError, InputError, ShapeError, one_line
from transom.runtime.json_reader import Fields
from transom.runtime.text.detokenizer import CleanUpDetokenizer, Detokenizer, clean_up, detokenizer_for
from transom.runtime.text.marian import MarianDetokenizer, MarianSpec, MarianTokenizer
from transom.runtime.text.tokenizer_json import parse_tokenizer, raise_unless_tokenizers

if TYPE_CHECKING:
    from tokenizers import Encoding

MAX_ID = 2**31 - 1  # ids are int64 in the graph, but no embedding table is longer than this
MAX_LENGTH = 1_000_000  # tokens; far past any position table
ROW_STEP = 4  # tokens: kernels add up what is along a row four by four, and the rest of a row otherwise
DOC_STRIDE = 128  # tokens two neighbouring windows of a long context share, as in transformers' pipeline
KINDS = ("tokenizers", "marian")


@dataclass(frozen=True)
class TokenizerSpec:
    """The object ``tokenizer`` of bundle.json: what the file itself does not say.

    file         name of the tokenizer's JSON file, beside bundle.json
    max_length   tokens of the longest row the checkpoint was made for, special ones included, whatever the bundle's S
    pad_token    fills a shorter row, on the right, under an attention mask of zeros; None: id 0 does
    mask_token   what ``fill_mask`` replaces, or None
    truncation_side       "right" or "left": the end that is cut off
    split_special_tokens  True: "[MASK]" within a text is ordinary text
    token_types           False: token_type_ids are 0 in a pair's second text too, because the
                          checkpoint's own tokenizer hands none to the model
    kind                  what ``file`` is: "tokenizers" (that library's own format) or "marian"
                          (``runtime.text.marian.MarianSpec``)
    clean_up_spaces       decoded text loses the spaces before punctuation, as in transformers'
                          clean_up_tokenization_spaces
    """

    file: str
    max_length: int
    pad_token: str | None
    pad_id: int
    mask_token: str | None
    mask_id: int | None
    truncation_side: str = "right"
    split_special_tokens: bool = False
    token_types: bool = True
    kind: str = "tokenizers"
    clean_up_spaces: bool = False

    @classmethod
    def from_json(cls, obj: object) -> TokenizerSpec:
        """Read and check the JSON object; BundleError lists everything that is wrong with it."""
        fields = Fields(obj, "tokenizer")
        made = cls(
            file=fields.take("file", _is_file_name, "the name of a file beside bundle.json"),
            max_length=fields.integer("max_length", 1, MAX_LENGTH),
            pad_token=fields.take("pad_token", _is_token, "a str, or null"),
            pad_id=fields.integer("pad_id", 0, MAX_ID),
            mask_token=fields.take("mask_token", _is_token, "a str, or null"),
            mask_id=fields.take("mask_id", _is_id, f"0..{MAX_ID}, or null"),
            truncation_side=fields.text("truncation_side", among=("right", "left")),
            split_special_tokens=fields.boolean("split_special_tokens"),
            token_types=fields.boolean("token_types"),
            kind=fields.text("kind", "tokenizers", among=KINDS),
            clean_up_spaces=fields.boolean("clean_up_spaces", False),
        )
        if not fields.problems and (made.mask_token is None) != (made.mask_id is None):
            fields.problems.append(
                "one of tokenizer.mask_token and tokenizer.mask_id is null, expected both or neither"
            )
        fields.done()
        return made

    def to_json(self) -> dict[str, Any]:
        """The JSON object that ``from_json`` reads back to an equal value."""
        return asdict(self)


@dataclass(frozen=True)
class EncodedBatch:
    """B rows of S tokens: int64 (B, S) arrays named as the graph's inputs.

    ``rows`` are the tokenizers library's encodings without padding: ``offsets`` into the text in
    characters, ``special_tokens_mask``, ``sequence_ids``, ``word_ids``, ``tokens``. Those of a Marian
    tokenizer have ``ids`` alone, a ``CompactRow`` ``ids`` and ``type_ids``.
    """

    input_ids: NDArray[np.int64]
    attention_mask: NDArray[np.int64]
    token_type_ids: NDArray[np.int64]
    rows: tuple[Any, ...]


@dataclass(frozen=True)
class CompactRow:
    """What a graph reads of one encoding, int32: a tenth of the memory, for rows that wait for their batch."""

    ids: NDArray[np.int32]
    type_ids: NDArray[np.int32]

    @classmethod
    def of(cls, encoding: Encoding) -> CompactRow:
        return cls(*np.array([encoding.ids, encoding.type_ids], np.int32))

    def __len__(self) -> int:
        return len(self.ids)


def export_again(tokens: int) -> str:
    return f"Export again with --max S={tokens}"


class TextTokenizer:
    """A tokenizer and its limits; may be shared by threads.

    ``data`` are the bytes of the file, ``max_tokens`` is the maximum of the bundle's axis S, and ``wider`` says what to
    do for more of them.
    Raises BundleError when the file is damaged or hostile, or disagrees with ``spec``.
    """

    def __init__(
        self, data: bytes, spec: TokenizerSpec, max_tokens: int, wider: Callable[[int], str] = export_again
    ) -> None:
        self.spec, self._wider = spec, wider
        self.max_tokens = min(max_tokens, spec.max_length)
        self._axis = max_tokens
        self._tokenizer: Any  # MarianTokenizer has those of Tokenizer's methods that are called here
        if spec.kind == "marian":
            self._tokenizer = MarianTokenizer(MarianSpec.from_bytes(data, spec.file))
        else:
            self._tokenizer = parse_tokenizer(data)
        self._tokenizer.encode_special_tokens = spec.split_special_tokens
        self._processor = self._tokenizer.post_processor
        self._tokenizer.post_processor = None  # applied by hand, after the cut
        for name, token, number in (
            ("pad_token", spec.pad_token, spec.pad_id),
            ("mask_token", spec.mask_token, spec.mask_id),
        ):
            if token is not None and self.token_id(token) != number:
                raise BundleError(
                    f"{spec.file} gives {name} {token!r} the id {self.token_id(token)}, bundle.json says {number}. "
                    "Export the bundle again."
                )

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def token_id(self, token: str) -> int | None:
        """The id of a token as it stands in the vocabulary, or None."""
        number: int | None = self._tokenizer.token_to_id(token)
        return number

    def token(self, number: int) -> str | None:
        """The token of an id as it stands in the vocabulary, or None."""
        token: str | None = self._tokenizer.id_to_token(number) if 0 <= number <= MAX_ID else None
        return token

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids, as transformers' ``decode`` gives it; ids that no token has are left out."""
        known = [int(number) for number in ids if 0 <= number <= MAX_ID]
        text: str = self._tokenizer.decode(known, skip_special_tokens=skip_special_tokens)
        return clean_up(text) if self.spec.clean_up_spaces else text

    def detokenizer(self) -> Detokenizer:
        """The text of tokens that come one by one; its pieces together are what ``decode`` gives for all."""
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

        Too long a row is cut with ``truncate``, a pair from its longer side first ('longest_first' in
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
                raise ShapeError(self._too_long(name, length + added, added, can_cut=room >= least))
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
        """The question with as many overlapping pieces of the context as it takes, one row each.

        ``max_length`` bounds a row in tokens, as many as the bundle allows by default; ``stride`` is the overlap of
        two pieces, by default that of transformers' pipeline: DOC_STRIDE, or half a short row. The rows are those of
        transformers' ``truncation="only_second", return_overflowing_tokens=True``. Raises as ``row`` does, and
        InputError where the question leaves no room for the context, or the context needs several rows and the room
        is no larger than the overlap. ``place`` tells the question from others in errors.
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
        """Rows of ``row`` as one batch, padded to the longest of them."""
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
        """The encoding, without special tokens, of a text that is checked first."""
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

    def _too_long(self, name: str, length: int, added: int, *, can_cut: bool) -> str:
        said = f"{name} is {length} tokens, {added} of them special; at most {self.max_tokens} fit."
        longest = min(length, self.spec.max_length)  # of any export of this checkpoint
        more = longest > self.max_tokens
        if not can_cut:  # not to one token of each text
            return f"{said} {self._wider(longest) if more else 'This model reads no such text'}."
        if more and longest == length:
            return f"{said} Pass truncate=True, or {lowered(self._wider(length))}."
        made = f"{longest} at most" if more else "no more"
        return f"{said} The checkpoint was made for {made}: pass truncate=True, or split the text."

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


def row_length(longest: int, most: int) -> int:
    """To how many tokens the rows of a batch are padded, the longest of which has ``longest``; ``most`` are allowed.

    A multiple of ROW_STEP: what follows a row's own tokens, of which its neighbours decide, then changes no bit of it.
    """
    return max(longest, min(-(-longest // ROW_STEP) * ROW_STEP, most))


def lowered(sentence: str) -> str:
    """The sentence as the end of another one."""
    return f"{sentence[0].lower()}{sentence[1:]}"


def longest_first(first: int, second: int, room: int) -> tuple[int, int]:
    """Tokens to keep of a pair of lengths so that both fit into ``room``: the longer one gives first.

    As ``truncate_encodings`` in tokenizers' Rust source, src/utils/truncation.rs.
    """
    short, long = min(first, second), max(first, second)
    long = max(short, room - short)
    if short + long > room:
        short = room // 2
        long = short + room % 2
    return (long, short) if first > second else (short, long)


def _is_file_name(value: object) -> bool:
    """Printable ASCII without a separator: no path that leaves the folder, on any system."""
    if not isinstance(value, str) or value in ("", ".", ".."):
        return False
    return value.isascii() and value.isprintable() and not set(value) & set("/\\:")


def _is_id(value: object) -> bool:
    return value is None or (type(value) is int and 0 <= value <= MAX_ID)


def _is_token(value: object) -> bool:
    """A str that is Unicode: JSON can smuggle in a lone surrogate."""
    if value is None or not isinstance(value, str):
        return value is None
    return value != "" and not any("\ud800" <= character <= "\udfff" for character in value)
