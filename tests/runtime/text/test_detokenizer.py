"""A stream's pieces together are exactly what ``decode`` gives, whatever the tokens; characters come whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from transom.runtime.text.detokenizer import LastStream, byte_of_character, clean_up, stream_of
from transom.runtime.text.marian import Added, MarianSpec
from transom.runtime.text.tokenizer import TextEncoder, TextSpec
from transom.runtime.text.unigram import UnigramSpec

SPEC = TextSpec("t.json", 1000, None, 0, None, None)
BYTE = {byte: character for character, byte in byte_of_character().items()}


def written(data: bytes) -> str:
    return "".join(BYTE[byte] for byte in data)


def byte_level() -> Tokenizer:
    """All bytes, tokens that end or begin within a character, and added tokens of every kind."""
    parts = [b"\xe2\x82", b"\xf0\x9f", b"\x98\x80", b"\xed\xa0", b"\x80", b" the", b" n", b"'t", b" .", "é".encode()]
    texts = [*BYTE.values(), *(written(part) for part in parts if len(part) > 1)]
    tokenizer = Tokenizer(models.BPE({text: number for number, text in enumerate(texts)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(["<|plain|>", AddedToken("漢字 x"), "é", " "])
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


def words(decoder: Any, *more: str) -> Tokenizer:
    texts = [
        "<unk>", "the", "##s", "##", "n't", "'", "'s", ".", "?", ",", "!", "▁", "▁a", "a▁b", "漢", "👩", " ", "x", "",
        *more,
    ]  # fmt: skip
    tokenizer = Tokenizer(models.WordLevel({text: number for number, text in enumerate(texts)}, "<unk>"))
    if decoder is not None:
        tokenizer.decoder = decoder
    tokenizer.add_tokens(["<plain>"])
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
BYTES = [f"<0x{byte:02X}>" for byte in (0x41, 0xE2, 0x82, 0xAC, 0xF0, 0xFF)]
TOKENIZERS: dict[str, Tokenizer] = {
    "ByteLevel": byte_level(),
    "WordPiece": words(decoders.WordPiece("##")),
    "WordPiece without clean-up": words(decoders.WordPiece("##", False)),
    "Metaspace": words(decoders.Metaspace()),
    "ByteFallback": words(decoders.Sequence(LLAMA), *BYTES),
    "spaces between tokens": words(None),
    "CTC": words(decoders.CTC()),
    "BPE": words(decoders.BPEDecoder("s")),
}


def marian() -> TextEncoder:
    texts = ["</s>", "<unk>", "▁", "▁a", "b", "▁▁", "s▁", "漢", "👩", "\u3000", "<s>", ".", "n't", " ", "<pad>"]
    scores = dict.fromkeys(texts[2:10], -1.0)
    spec = MarianSpec(
        unigram=UnigramSpec(scores, -11.0, "", True, True, True, False),
        vocabulary={text: number for number, text in enumerate(texts)},
        added=tuple(Added(texts[number], number, False, False, False, number != 11) for number in (0, 1, 11, 14)),
        surfaces={"<s>": "", "<unk>": " ⁇ "},
        unk_token="<unk>",
        eos_token="</s>",
    )
    return TextEncoder(json.dumps(spec.to_json()).encode(), replace(SPEC, kind="marian"), 1000)


ENCODERS: dict[str, TextEncoder] = {
    **{name: TextEncoder(tokenizer.to_str().encode(), SPEC, 1000) for name, tokenizer in TOKENIZERS.items()},
    "Marian": marian(),
}


@pytest.mark.parametrize("cleaned", [False, True])
@pytest.mark.parametrize("name", ENCODERS)
def test_the_pieces_together_are_the_text(name: str, cleaned: bool) -> None:
    encoder = ENCODERS[name]
    if cleaned:
        encoder = TextEncoder(encoder_bytes(name), replace(encoder.spec, clean_up_spaces=True), 1000)
    most = encoder.vocab_size + 1  # ids that no token has
    tokens = st.integers(0, most) | st.integers(max(0, most - 20), most)

    @settings(max_examples=200, deadline=None, database=None)
    @given(ids=st.lists(tokens, max_size=30))
    def holds(ids: list[int]) -> None:
        stream = encoder.stream()
        pieces = [*map(stream.add, ids), stream.end()]
        assert "".join(pieces) == encoder.decode(ids)

    holds()


def test_an_empty_token_behind_bytes_is_no_beginning() -> None:
    encoder = ENCODERS["ByteFallback"]
    ids = [encoder.token_id(token) for token in ("<0x41>", "", "▁")]
    stream = encoder.stream()
    assert "".join([*map(stream.add, ids), stream.end()]) == encoder.decode(ids) == "A "


def encoder_bytes(name: str) -> bytes:
    if name in TOKENIZERS:
        return TOKENIZERS[name].to_str().encode()
    return json.dumps(ENCODERS[name]._tokenizer.spec.to_json()).encode()


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=20))
def test_a_text_byte_by_byte_never_shows_half_a_character(text: str) -> None:
    encoder = ENCODERS["ByteLevel"]
    stream = encoder.stream()
    pieces: list[str] = []
    for count, byte in enumerate(text.encode(), 1):
        pieces.append(stream.add(encoder.token_id(BYTE[byte]) or 0))
        whole = text.encode()[:count].decode(errors="ignore")
        assert "".join(pieces) == whole  # at once, as soon as the last byte is there
    assert stream.end() == ""


def test_an_unfinished_character_comes_at_the_end_and_a_broken_one_at_once() -> None:
    encoder = ENCODERS["ByteLevel"]
    token = {text: encoder.token_id(written(text)) or 0 for text in (b"\xe2\x82", b"\xac", b"a", b"\xff")}
    stream = encoder.stream()
    assert [stream.add(token[b"\xe2\x82"]), stream.add(token[b"\xac"])] == ["", "€"]
    assert [stream.add(token[b"\xe2\x82"]), stream.add(token[b"a"])] == ["", "\ufffda"]
    assert [stream.add(token[b"\xff"]), stream.add(token[b"\xe2\x82"]), stream.end()] == ["\ufffd", "", "\ufffd"]


@pytest.mark.parametrize(
    ("name", "texts", "pieces"),
    [
        ("WordPiece", ["the", "##s", "<end>", "x", "."], ["the", "s", "", " x", "."]),
        ("Metaspace", ["▁a", "▁a", "x"], ["a", " a", "x"]),
        ("ByteFallback", ["▁a", "<0xE2>", "<0x82>", "<0xAC>", "▁a", "<0xFF>"], ["a", "", "", "", "€ a", "", "\ufffd"]),
        ("Marian", ["▁", "▁a", "▁▁", "b", "</s>", "▁"], ["", "a", "", "  b", "", ""]),
        ("CTC", ["the", "the", "x"], ["", "", "", "thex"]),
    ],
)
def test_pieces_come_as_soon_as_they_are_settled(name: str, texts: list[str], pieces: list[str]) -> None:
    encoder = ENCODERS[name]
    stream = encoder.stream()
    found = [stream.add(encoder.token_id(text) or 0) for text in texts] + [stream.end()]
    assert found == [*pieces, *[""] * (len(found) - len(pieces))]


def test_cleaning_up_holds_back_what_may_still_change() -> None:
    encoder = TextEncoder(encoder_bytes("spaces between tokens"), replace(SPEC, clean_up_spaces=True), 1000)
    stream = encoder.stream()
    pieces = [stream.add(encoder.token_id(text) or 0) for text in ("x", "n't", "漢", "'", "x", ".")]
    assert [*pieces, stream.end()] == ["x", "", "n't 漢", "", "'x", "", "."]
    assert clean_up("do n't ; I 'm , ' it ' s . ?!") == "don't ; I'm,'it's.?!"


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name not in ("CTC", "BPE")])
def test_a_token_costs_the_same_however_long_the_text(name: str) -> None:
    lengths: list[int] = []

    class Counting:
        """The tokenizer, but for how many ids it is asked to decode."""

        def __init__(self, inner: Tokenizer) -> None:
            self.inner = inner

        def decode(self, ids: list[int]) -> str:
            lengths.append(len(ids))
            return self.inner.decode(ids)

        def __getattr__(self, attribute: str) -> Any:
            return getattr(self.inner, attribute)

    stream = stream_of(Counting(TOKENIZERS[name]))  # type: ignore[arg-type]
    for number in range(3000):
        stream.add(1 + number % 17)
    assert max(lengths, default=0) <= 2


def test_an_unknown_decoder_gives_everything_at_the_end() -> None:
    assert isinstance(stream_of(TOKENIZERS["CTC"]), LastStream)
    assert isinstance(stream_of(words(decoders.Strip(" ", 0, 1))), LastStream)


def test_the_bytes_of_gpt2() -> None:
    table: Callable[[str], int] = byte_of_character().__getitem__
    assert [table(character) for character in "aĠĊ¡ÿĀ"] == [0x61, 0x20, 0x0A, 0xA1, 0xFF, 0x00]
    assert sorted(byte_of_character().values()) == list(range(256))
