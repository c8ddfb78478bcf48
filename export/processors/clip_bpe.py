"""CLIP's tokenizer as transformers 5.23 builds it: ``models.clip.tokenization_clip``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.export.processors.tokenizer_settings import names, refusal
from transom.export.processors.vocabulary import read_bpe

if TYPE_CHECKING:
    from tokenizers import Tokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_TOKENS = {"unk_token": END, "bos_token": START, "eos_token": END, "pad_token": END}
END_OF_WORD = "</w>"
# What is a word: the two special tokens, a contraction, letters, one digit, other signs; no space is in any
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# What str.strip() takes away. A run is tried at its beginning only, and not again when it isn't the last
BLANK = r"[\s\x1c-\x1f]"
ENDS = rf"\A{BLANK}++|(?<!{BLANK}){BLANK}++\z"


def clip_tokenizer(
    folder: Path, stored: Mapping[str, Any] | None, given: Mapping[str, Any], rows: int | None
) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer but for its template, and its named special tokens.

    Of a tokenizer.json (``stored`` is that file, parsed) the vocabulary and the merges count, all else is
    rebuilt. Of the settings do_lower_case, errors and add_prefix_space have no effect.
    """
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    (vocabulary, merges), _ = read_bpe(folder, stored, rows, "CLIPTokenizer")
    settings = {**CLIP_TOKENS, **given}
    named = names(settings)
    for needed in ("bos_token", "eos_token"):
        if needed not in named:
            raise refusal(folder, f"{needed} is null, which CLIP's tokenizer cannot do without")
    model = BPE(
        vocabulary,
        merges,
        unk_token=str(settings["unk_token"]),  # "None" of null: no token, needed only where a byte has none
        continuing_subword_prefix="",
        end_of_word_suffix=END_OF_WORD,
        fuse_unk=False,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    # transformers wraps ``decode`` to put spaces for the ends of words and to strip; these steps do the same
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace(END_OF_WORD, " "), decoders.Replace(Regex(ENDS), "")]
    )
    return tokenizer, named


def frame_as_clip(tokenizer: Tokenizer, named: Mapping[str, Any]) -> None:
    """BOS A EOS, and BOS A EOS EOS B EOS for a pair; whatever add_bos_token and tokenizer.json's template say."""
    from tokenizers.processors import RobertaProcessing

    ids = tokenizer.get_vocab(with_added_tokens=True)
    bos, eos = str(named["bos_token"]), str(named["eos_token"])
    tokenizer.post_processor = RobertaProcessing(
        (eos, ids[eos]), (bos, ids[bos]), trim_offsets=False, add_prefix_space=False
    )
