"""GPT-2's tokenizer as transformers 5.23 builds it: ``models.gpt2.tokenization_gpt2``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.export.processors.tokenizer_settings import names
from transom.export.processors.vocabulary import read_bpe

if TYPE_CHECKING:
    from tokenizers import Tokenizer

GPT2_TOKENS = {f"{name}_token": "<|endoftext|>" for name in ("unk", "bos", "eos")}


def gpt2_tokenizer(
    folder: Path, stored: Mapping[str, Any] | None, given: Mapping[str, Any], rows: int | None
) -> tuple[Tokenizer, dict[str, Any]]:
    """Byte-level BPE, and its named special tokens.

    Of a tokenizer.json (``stored`` is that file, parsed) the vocabulary, the merges and the template count; its
    normaliser, pre-tokenizer and decoder do not.
    """
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    (vocabulary, merges), template = read_bpe(folder, stored, rows, "GPT2Tokenizer")
    prefix = given.get("add_prefix_space", False)
    tokenizer = Tokenizer(BPE(vocabulary, merges, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = template
    return tokenizer, names({**GPT2_TOKENS, **given})


def frame_as_gpt2(tokenizer: Tokenizer, named: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """A text between BOS and EOS, where ``add_bos_token`` and ``add_eos_token`` ask for them; by default neither."""
    from tokenizers.processors import TemplateProcessing

    asked = [f"{end}_token" for end in ("bos", "eos") if given.get(f"add_{end}_token")]
    ends = {name: str(named[name]) for name in asked if name in named}
    bos, eos = ([ends[name]] if name in ends else [] for name in ("bos_token", "eos_token"))
    single = [*(f"{token}:0" for token in bos), "$A:0", *(f"{token}:0" for token in eos)]
    second = [*(f"{token}:1" for token in bos), "$B:1", *(f"{token}:1" for token in eos)]
    tokenizer.post_processor = TemplateProcessing(
        single=" ".join(single),
        pair=" ".join(single + second),
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in dict.fromkeys(ends.values())],
    )
