"""GPT-2's tokenizer as transformers 5.23 builds it: ``models.gpt2.tokenization_gpt2``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.export.tokenizers.settings import FILE, names, refusal
from transom.export.tokenizers.vocabulary import check_rows, read_vocabulary
from transom.runtime.tokenizer_json import parse_tokenizer

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

    template = None
    if stored is not None:
        opened = parse_tokenizer((folder / FILE).read_bytes())
        if type(opened.model).__name__ != "BPE":
            kind = type(opened.model).__name__
            raise refusal(folder, f"tokenizer.json holds a {kind} model and GPT2Tokenizer takes BPE")
        vocabulary = stored["model"]["vocab"]
        pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in stored["model"]["merges"]]
        merges = [(str(first), str(second)) for first, second in pairs]
        check_rows(FILE, vocabulary, rows)
        template = opened.post_processor
    else:
        missing = [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
        if missing:
            raise refusal(folder, f"neither tokenizer.json nor {' and '.join(missing)}, which GPT2Tokenizer is made of")
        read_vocabulary(folder / "vocab.json", rows)
        vocabulary, merges = BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
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
