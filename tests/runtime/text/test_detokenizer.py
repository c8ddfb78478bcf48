"""Test detokenizers: their pieces joined equal ``decode`` for any tokens, and characters come whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from transom.runtime.text.detokenizer import BufferedDetokenizer, byte_of_character, clean_up, detokenizer_for
from transom.runtime.text.marian import MarianAddedToken, MarianSpec
from transom.runtime.text.tokenizer import TextTokenizer
from transom.runtime.text.tokenizer_spec import TokenizerSpec
from transom.runtime.text.unigram import UnigramSpec

SPEC = TokenizerSpec("t.json", 1000, None, 0, None, None)
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
LIBRARY_TOKENIZERS: dict[str, Tokenizer] = {
    "ByteLevel": byte_level(),
    "WordPiece": words(decoders.WordPiece("##")),
    "WordPiece without clean-up": words(decoders.WordPiece("##", False)),
    "Metaspace": words(decoders.Metaspace()),
    "ByteFallback": words(decoders.Sequence(LLAMA), *BYTES),
    "spaces between tokens": words(None),
    "CTC": words(decoders.CTC()),
    "BPE": words(decoders.BPEDecoder("s")),
}


def marian() -> TextTokenizer:
    texts = ["</s>", "<unk>", "▁", "▁a", "b", "▁▁", "s▁", "漢", "👩", "\u3000", "<s>", ".", "n't", " ", "<pad>"]
    scores = dict.fromkeys(texts[2:10], -1.0)
    spec = MarianSpec(
        unigram=UnigramSpec(scores, -11.0, "", True, True, True, False),
        vocabulary={text: number for number, text in enumerate(texts)},
        added=tuple(
            MarianAddedToken(texts[number], number, False, False, False, number != 11) for number in (0, 1, 11, 14)
        ),
        surfaces={"<s>": "", "<unk>": " ⁇ "},
        unk_token="<unk>",
        eos_token="</s>",
    )
    return TextTokenizer(json.dumps(spec.to_json()).encode(), replace(SPEC, kind="marian"), 1000)


TEXT_TOKENIZERS: dict[str, TextTokenizer] = {
    **{name: TextTokenizer(tokenizer.to_str().encode(), SPEC, 1000) for name, tokenizer in LIBRARY_TOKENIZERS.items()},
    "Marian": marian(),
}


@pytest.mark.parametrize("cleaned", [False, True])
@pytest.mark.parametrize("name", TEXT_TOKENIZERS)
def test_the_pieces_together_are_the_text(name: str, cleaned: bool) -> None:
    tokenizer = TEXT_TOKENIZERS[name]
    if cleaned:
        tokenizer = TextTokenizer(tokenizer_bytes(name), replace(tokenizer.spec, clean_up_spaces=True), 1000)
    most = tokenizer.vocab_size + 1  # ids that no token has
    tokens = st.integers(0, most) | st.integers(max(0, most - 20), most)

    @settings(max_examples=200, deadline=None, database=None)
    @given(ids=st.lists(tokens, max_size=30))
    def holds(ids: list[int]) -> None:
        detokenizer = tokenizer.detokenizer()
        pieces = [*map(detokenizer.add, ids), detokenizer.end()]
        assert "".join(pieces) == tokenizer.decode(ids)

    holds()


def test_an_empty_token_behind_bytes_is_no_beginning() -> None:
    tokenizer = TEXT_TOKENIZERS["ByteFallback"]
    ids = [tokenizer.token_id(token) for token in ("<0x41>", "", "▁")]
    detokenizer = tokenizer.detokenizer()
    assert "".join([*map(detokenizer.add, ids), detokenizer.end()]) == tokenizer.decode(ids) == "A "


def tokenizer_bytes(name: str) -> bytes:
    if name in LIBRARY_TOKENIZERS:
        return LIBRARY_TOKENIZERS[name].to_str().encode()
    return json.dumps(TEXT_TOKENIZERS[name]._tokenizer.spec.to_json()).encode()


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=20))
def test_a_text_byte_by_byte_never_shows_half_a_character(text: str) -> None:
    tokenizer = TEXT_TOKENIZERS["ByteLevel"]
    detokenizer = tokenizer.detokenizer()
    pieces: list[str] = []
    for count, byte in enumerate(text.encode(), 1):
        pieces.append(detokenizer.add(tokenizer.token_id(BYTE[byte]) or 0))
        whole = text.encode()[:count].decode(errors="ignore")
        assert "".join(pieces) == whole  # at once, as soon as the last byte is there
    assert detokenizer.end() == ""


def test_an_unfinished_character_comes_at_the_end_and_a_broken_one_at_once() -> None:
    tokenizer = TEXT_TOKENIZERS["ByteLevel"]
    token = {text: tokenizer.token_id(written(text)) or 0 for text in (b"\xe2\x82", b"\xac", b"a", b"\xff")}
    detokenizer = tokenizer.detokenizer()
    assert [detokenizer.add(token[b"\xe2\x82"]), detokenizer.add(token[b"\xac"])] == ["", "€"]
    assert [detokenizer.add(token[b"\xe2\x82"]), detokenizer.add(token[b"a"])] == ["", "\ufffda"]
    assert [detokenizer.add(token[b"\xff"]), detokenizer.add(token[b"\xe2\x82"]), detokenizer.end()] == [
        "\ufffd",
        "",
        "\ufffd",
    ]


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
    tokenizer = TEXT_TOKENIZERS[name]
    detokenizer = tokenizer.detokenizer()
    found = [detokenizer.add(tokenizer.token_id(text) or 0) for text in texts] + [detokenizer.end()]
    assert found == [*pieces, *[""] * (len(found) - len(pieces))]


def test_cleaning_up_holds_back_what_may_still_change() -> None:
    tokenizer = TextTokenizer(tokenizer_bytes("spaces between tokens"), replace(SPEC, clean_up_spaces=True), 1000)
    detokenizer = tokenizer.detokenizer()
    pieces = [detokenizer.add(tokenizer.token_id(text) or 0) for text in ("x", "n't", "漢", "'", "x", ".")]
    assert [*pieces, detokenizer.end()] == ["x", "", "n't 漢", "", "'x", "", "."]
    assert clean_up("do n't ; I 'm , ' it ' s . ?!") == "don't ; I'm,'it's.?!"


@pytest.mark.parametrize("name", [name for name in LIBRARY_TOKENIZERS if name not in ("CTC", "BPE")])
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

    detokenizer = detokenizer_for(Counting(LIBRARY_TOKENIZERS[name]))  # type: ignore[arg-type]
    for number in range(3000):
        detokenizer.add(1 + number % 17)
    assert max(lengths, default=0) <= 2


def test_an_unknown_decoder_gives_everything_at_the_end() -> None:
    assert isinstance(detokenizer_for(LIBRARY_TOKENIZERS["CTC"]), BufferedDetokenizer)
    assert isinstance(detokenizer_for(words(decoders.Strip(" ", 0, 1))), BufferedDetokenizer)


def test_the_bytes_of_gpt2() -> None:
    table: Callable[[str], int] = byte_of_character().__getitem__
    assert [table(character) for character in "aĠĊ¡ÿĀ"] == [0x61, 0x20, 0x0A, 0xA1, 0xFF, 0x00]
    assert sorted(byte_of_character().values()) == list(range(256))
