"""Perceiver's tokenizer of bytes: ids, truncation and special tokens equal transformers'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from conftest import save_checkpoint
from edited_checkpoints import read
from perceiver_cases import SIZES
from transom.runtime.errors import CheckpointError

ODD = [
    "naïve café",
    "日本語 ☃",
    "\u0000\x7f\t\n",
    "👩‍👩‍👧 \ufeffÅ",
    "a [MASK] b[MASK][MASK]",
    "[CLS]x[SEP] [UNK] é[PAD]",
    "  ",
]


def masked_checkpoint(folder: Path) -> Path:
    """Write a random checkpoint that fills gaps of bytes, without tokenizer files."""
    return save_checkpoint(folder, "PerceiverForMaskedLM", kind=("PerceiverConfig", SIZES), wordpiece=False)


def bytes_of(folder: Path, **settings: Any) -> Any:
    """Save transformers' tokenizer to the folder, and return it."""
    tokenizer = transformers.PerceiverTokenizer(**settings)
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("settings", [{}, {"mask_token": "<gap>", "cls_token": "<s>"}], ids=str)
def test_ids_equal_transformers(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = masked_checkpoint(tmp_path)
    theirs = bytes_of(folder, **settings)
    ours = read(folder).open_tokenizer()
    assert ours is not None
    for text in [*ODD, "<gap>x<s>", *(chr(code) for code in range(1, 0x300, 7))]:
        assert ours.encode([text], truncate=False).input_ids[0].tolist() == theirs(text)["input_ids"], text
        assert ours.decode(theirs(text)["input_ids"]) == theirs.decode(theirs(text)["input_ids"], True)
    pair = ours.encode(["é"], ["two"], truncate=False)
    assert pair.input_ids[0].tolist() == theirs("é", "two")["input_ids"]
    assert not pair.token_type_ids.any()


@pytest.mark.parametrize("side", ["right", "left"])
def test_truncation_equals_transformers(side: str, tmp_path: Path) -> None:
    folder = masked_checkpoint(tmp_path)
    theirs = bytes_of(folder, model_max_length=9, truncation_side=side)
    loaded = read(folder)
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.spec.max_length == 9
    found = loaded.tokenizer.opened.encode(["日本語"], truncate=True).input_ids[0]
    assert found.tolist() == theirs("日本語", truncation=True)["input_ids"]
    assert len(found) == 9


def test_a_checkpoint_without_tokenizer_files_has_its_bytes(tmp_path: Path) -> None:
    """There is no vocabulary to store."""
    tokenizer = read(masked_checkpoint(tmp_path)).tokenizer
    assert tokenizer is not None
    assert tokenizer.opened.encode(["ab"], truncate=False).input_ids.tolist() == [[4, 103, 104, 5]]
    assert tokenizer.spec.mask_id == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_token": None}, "mask_token is null"),
        ({"mask_token": "[PAD]"}, "are not 6 of their own"),
        ({"mask_token": "x"}, "are not 6 of their own"),
    ],
    ids=str,
)
def test_special_tokens_that_cannot_be(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = masked_checkpoint(tmp_path)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=message):
        read(folder)
