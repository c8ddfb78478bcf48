"""Perceiver's tokenizer of bytes as transformers 5.23 has it, in the form of the tokenizers library.

Source: ``models.perceiver.tokenization_perceiver``: six special tokens, then the 256 bytes; no vocabulary file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.export.processors.tokenizer_settings import refusal, special_tokens
from transom.runtime.text.detokenizer import byte_of_character

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CLASS = "PerceiverTokenizer"
# By their ids; transformers' class puts each in its place whatever it is called
SPECIAL = ("pad_token", "bos_token", "eos_token", "mask_token", "cls_token", "sep_token")
MAX_LENGTH = 2048  # tokens, where tokenizer_config.json says nothing


def byte_tokenizer(folder: Path, given: Mapping[str, Any], rows: int | None) -> tuple[Tokenizer, dict[str, Any]]:
    """Build the tokenizer without its template; return it with its named special tokens.

    ``rows`` is the length of the model's embedding table; CheckpointError where a byte's id lies beyond it.
    """
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    named = special_tokens({**{name: f"[{name[:-6].upper()}]" for name in SPECIAL}, **given})
    missing = [name for name in SPECIAL if name not in named]
    if missing:
        raise refusal(folder, f"{missing[0]} is null, which Perceiver's tokenizer cannot do without")
    specials = [str(named[name]) for name in SPECIAL]
    characters = sorted(byte_of_character(), key=byte_of_character().__getitem__)
    vocabulary = {token: number for number, token in enumerate([*specials, *characters])}
    if len(vocabulary) != len(SPECIAL) + 256:
        raise refusal(folder, f"the special tokens {specials} are not {len(SPECIAL)} of their own, longer than a byte")
    if rows is not None and rows < len(vocabulary):
        raise refusal(
            folder,
            f"the model has a vocabulary of {rows}, and the bytes from 0x{max(rows - len(SPECIAL), 0):02X} on have "
            f"ids beyond it; expected {len(vocabulary)} or more",
        )
    tokenizer = Tokenizer(BPE(vocabulary, [], fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, named


def set_byte_template(tokenizer: Tokenizer, named: Mapping[str, Any]) -> None:
    """Set the template [CLS] A [SEP], or [CLS] A [SEP] B [SEP]; all tokens are of type 0."""
    from tokenizers.processors import TemplateProcessing

    cls, sep = (str(named[name]) for name in ("cls_token", "sep_token"))
    tokenizer.post_processor = TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:0 {sep}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (cls, sep)],
    )
