"""What the tests of tokenizers share: awkward lines, and checkpoints that hold nothing but tokenizer files."""

from __future__ import annotations

import json
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transom.export.processors.tokenizer import (
    LoadedTokenizer,
    TokenizerFiles,
    read_target_tokenizer,
    read_tokenizer,
)
from transom.runtime.text.tokenizer import TextTokenizer
from transom.runtime.text.tokenizer_spec import TokenizerSpec

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
    "<|endoftext|>", "<|endoftext", "</s>", "<s>", "<unk>", "<pad>", ">>fr<<", ">>fr", "<<", "▁", "▁▁x▁", " ", "   ",
    "\u1112\u1161\u11ab", "\u1100\u1161", "\u11a8", "!!!!!!!", "aaaaaaaaaaaa", "1st", "I've", "we'll", "'s", "''",
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


def write(folder: Path, model_type: str = "bert", /, **files: Any) -> Path:
    """name=content; a dict becomes <name>.json, a list vocab.txt."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    for name, content in files.items():
        if isinstance(content, list):
            (folder / f"{name}.txt").write_text("\n".join(content) + "\n")
        else:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def encoder_of(folder: Path, max_positions: int = LIMIT) -> TextTokenizer:
    found = tokenizer_of(folder, max_positions)
    assert found is not None
    return TextTokenizer(found[0], TokenizerSpec.from_json(json.loads(json.dumps(found[1].to_json()))), max_positions)


def tokenizer_of(
    folder: Path, max_positions: int, rows: int | None = None, read: Any = read_tokenizer
) -> tuple[bytes, TokenizerSpec] | None:
    """The file and the spec that an export makes of a folder's tokenizer."""
    found: LoadedTokenizer | None = read(TokenizerFiles(folder), max_positions, rows)
    return None if found is None else (found.data, found.spec)


def target_tokenizer_of(
    folder: Path, max_positions: int, rows: int | None = None
) -> tuple[bytes, TokenizerSpec] | None:
    """The same of what a translator writes."""
    return tokenizer_of(folder, max_positions, rows, read_target_tokenizer)
