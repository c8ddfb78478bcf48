"""Text that grows token by token: whole characters only, and in the end exactly what ``decode`` gives.

What a token adds depends on what was before it (a word piece takes no space at the beginning) and on what is
to come (bytes of an unfinished character, a space before a full stop). Each decoder below looks back no
further than one token and holds back what is not settled, so that a token costs the same however long the text.
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
AFFECTED = frozenset("".join(before for before, _ in CLEAN_UP))  # a clean-up never reaches across other characters
# Decoders that look at one token at a time, and whether it is the first; ByteFallback at runs of bytes
ALONE = {None, "WordPiece", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}
BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # a token of ByteFallback


class Detokenizer(Protocol):
    """One text in the making; for one thread, and one text."""

    def add(self, token: int) -> str:
        """The whole characters that this token settles; "" if none."""
        ...

    def end(self) -> str:
        """What was held back. Nothing may be added after it."""
        ...


def detokenizer_for(tokenizer: Tokenizer) -> Detokenizer:
    """A stream whose pieces together are ``tokenizer.decode(tokens, skip_special_tokens=True)``.

    A decoder that this file does not know gets one that gives everything at the end.
    """
    steps = decoder_steps(tokenizer)
    kinds = {step.get("type") for step in steps}
    if kinds == {"ByteLevel"}:
        return ByteDetokenizer(tokenizer)
    if kinds <= ALONE and not any(step.get("stop") for step in steps):  # Strip's "stop" are characters at the end
        return NeighbourDetokenizer(tokenizer, runs="ByteFallback" in kinds)
    return BufferedDetokenizer(tokenizer)


class ByteDetokenizer:
    """Byte-level BPE: a token is some bytes, a character is complete when its last byte is there."""

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
    """Decoders that go token by token: decoding a token behind another one shows what it adds.

    With ``runs``, byte tokens wait for the end of their run: as a whole it is characters, or none of it is.
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
    """Gives everything at the end."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []

    def add(self, token: int) -> str:
        self._tokens.append(token)
        return ""

    def end(self) -> str:
        return self._tokenizer.decode(self._tokens)


class CleanUpDetokenizer:
    """``clean_up`` over another stream; holds back from the last character that no clean-up can touch."""

    def __init__(self, inner: Detokenizer) -> None:
        self._inner = inner
        self._held: list[str] = []

    def add(self, token: int) -> str:
        added = self._inner.add(token)
        settled = next((place for place in range(len(added), 0, -1) if added[place - 1] not in AFFECTED), 0)
        if settled == 0:
            self._held.append(added)
            return ""
        text = "".join([*self._held, added[:settled]])
        self._held = [added[settled:]]
        return clean_up(text)

    def end(self) -> str:
        text = "".join([*self._held, self._inner.end()])
        self._held = []
        return clean_up(text)


def clean_up(text: str) -> str:
    """Without the spaces that an English tokenizer leaves before punctuation and contractions."""
    for before, after in CLEAN_UP:
        text = text.replace(before, after)
    return text


def byte_of_character() -> dict[str, int]:
    """GPT-2's way to write bytes as characters: printable ones as themselves, the others from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(0x100 + index): byte for index, byte in enumerate(others)}
