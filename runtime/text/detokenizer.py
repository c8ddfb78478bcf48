"""Detokenizers: decode tokens one by one, whole characters only, to exactly what ``decode`` returns in the end.

What a token adds depends on the tokens before it (a word piece takes no space at the beginning) and after it
(bytes of an unfinished character, a space before a full stop). Each detokenizer looks back no further than
one token and holds back text that is not final yet, so that a token costs the same however long the text is.
"""

from __future__ import annotations

import codecs
import re
from typing import TYPE_CHECKING, Protocol

from transom.runtime.text.tokenizer_json import decoder_steps, special_ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# As transformers' clean_up_tokenization: in this order, each over the whole text
CLEAN_UP = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"),
    (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip
AFFECTED = frozenset("".join(before for before, _ in CLEAN_UP))  # a clean-up never changes other characters
# Decoders that look at one token at a time, and whether it is the first; ByteFallback at runs of bytes
PER_TOKEN = {None, "WordPiece", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}
BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # a token of ByteFallback


class Detokenizer(Protocol):
    """Decodes one text token by token; for one thread, and one text."""

    def add(self, token: int) -> str:
        """Add a token; return the whole characters that it makes final, "" if none."""
        ...

    def end(self) -> str:
        """Return the text that was held back. No token may be added after it."""
        ...


def detokenizer_for(tokenizer: Tokenizer) -> Detokenizer:
    """Return a detokenizer whose pieces joined equal ``tokenizer.decode(tokens, skip_special_tokens=True)``.

    For a decoder that this file does not know it returns the whole text at the end.
    """
    steps = decoder_steps(tokenizer)
    kinds = {step.get("type") for step in steps}
    if kinds == {"ByteLevel"}:
        return ByteDetokenizer(tokenizer)
    if kinds <= PER_TOKEN and not any(step.get("stop") for step in steps):  # Strip's "stop" are characters at the end
        return NeighbourDetokenizer(tokenizer, runs="ByteFallback" in kinds)
    return BufferedDetokenizer(tokenizer)


class ByteDetokenizer:
    """Detokenizer of byte-level BPE: a token is some bytes, a character is final when its last byte has come."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._skip = tokenizer, special_ids(tokenizer)
        self._bytes = byte_of_character()
        self._characters = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        text = None if token in self._skip else self._tokenizer.id_to_token(token)
        if text is None:
            return ""
        try:
            data = bytes(self._bytes[character] for character in text)
        except KeyError:  # an added token that is plain text
            data = text.encode()
        return self._characters.decode(data)

    def end(self) -> str:
        return self._characters.decode(b"", final=True)


class NeighbourDetokenizer:
    """Detokenizer of decoders that work token by token: decoding a token behind another one shows what it adds.

    With ``runs``, byte tokens wait for the end of their run: all of it is characters, or none of it is.
    """

    def __init__(self, tokenizer: Tokenizer, *, runs: bool) -> None:
        self._tokenizer, self._skip, self._runs = tokenizer, special_ids(tokenizer), runs
        self._before: list[int] = []  # a token from before, once there is one
        self._run: list[int] = []

    def add(self, token: int) -> str:
        text = None if token in self._skip else self._tokenizer.id_to_token(token)
        if text is None:
            return ""
        self._run.append(token)
        if self._runs and BYTE.fullmatch(text):
            return ""
        run = self._run
        added = self.end()
        if text:
            self._before = [token]
        elif not self._before:
            self._before = run  # an empty token alone would make what follows the beginning of a text
        return added

    def end(self) -> str:
        run, self._run = self._run, []
        return self._tokenizer.decode([*self._before, *run])[len(self._tokenizer.decode(self._before)) :]


class BufferedDetokenizer:
    """Detokenizer that returns the whole text at the end."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []

    def add(self, token: int) -> str:
        self._tokens.append(token)
        return ""

    def end(self) -> str:
        return self._tokenizer.decode(self._tokens)


class CleanUpDetokenizer:
    """Applies ``clean_up`` to another detokenizer; holds back text from where a clean-up could still change it."""

    def __init__(self, inner: Detokenizer) -> None:
        self._inner = inner
        self._held: list[str] = []

    def add(self, token: int) -> str:
        added = self._inner.add(token)
        final = next((place for place in range(len(added), 0, -1) if added[place - 1] not in AFFECTED), 0)
        if final == 0:
            self._held.append(added)
            return ""
        text = "".join([*self._held, added[:final]])
        self._held = [added[final:]]
        return clean_up(text)

    def end(self) -> str:
        text = "".join([*self._held, self._inner.end()])
        self._held = []
        return clean_up(text)


def clean_up(text: str) -> str:
    """Remove the spaces that an English tokenizer leaves before punctuation and contractions."""
    for before, after in CLEAN_UP:
        text = text.replace(before, after)
    return text


def byte_of_character() -> dict[str, int]:
    """Return the byte of each character in GPT-2's byte alphabet: printable bytes as themselves, others from U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + index): byte for index, byte in enumerate(others)}
