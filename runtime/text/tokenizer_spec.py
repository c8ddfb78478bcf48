"""The object ``tokenizer`` of bundle.json: what a tokenizer's file itself does not say."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from transom.runtime.json_reader import Fields

MAX_ID = 2**31 - 1  # ids are int64 in the graph, but no embedding table is longer than this
MAX_LENGTH = 1_000_000  # tokens; far past any position table
KINDS = ("tokenizers", "marian")


@dataclass(frozen=True)
class TokenizerSpec:
    """A tokenizer's file, limits and special tokens.

    file         name of the tokenizer's JSON file, beside bundle.json
    max_length   tokens of the longest row the checkpoint was trained for, with special ones, whatever the bundle's S
    pad_token    fills a shorter row, on the right, under an attention mask of zeros; None: id 0 is used
    mask_token   what ``fill_mask`` replaces, or None
    truncation_side       "right" or "left": the end that is truncated
    split_special_tokens  True: "[MASK]" within a text is ordinary text
    token_types           False: token_type_ids are 0 in a pair's second text too, because the
                          checkpoint's own tokenizer gives none to the model
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
        """Return the JSON object that ``from_json`` reads back to an equal value."""
        return asdict(self)


def _is_file_name(value: object) -> bool:
    """Return whether it is printable ASCII without a separator: no path that leaves the folder, on any system."""
    if not isinstance(value, str) or value in ("", ".", ".."):
        return False
    return value.isascii() and value.isprintable() and not set(value) & set("/\\:")


def _is_id(value: object) -> bool:
    return value is None or (type(value) is int and 0 <= value <= MAX_ID)


def _is_token(value: object) -> bool:
    """Return whether it is None or a str that is Unicode: JSON can hold a lone surrogate."""
    if value is None or not isinstance(value, str):
        return value is None
    return value != "" and not any("\ud800" <= character <= "\udfff" for character in value)
