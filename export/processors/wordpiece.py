"""WordPiece: BERT's tokenizer as transformers 5.23 builds it, ``models.bert.tokenization_bert``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.export.processors.tokenizer_settings import FILE, class_name, no_stand_in, refusal, special_tokens
from transom.runtime.text.tokenizer_json import parse_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BERT_TOKENS = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}


def bert_tokenizer(
    folder: Path, stored: Mapping[str, Any] | None, given: Mapping[str, Any]
) -> tuple[Tokenizer, dict[str, Any]]:
    """Build BERT's tokenizer without its template; return it with its named special tokens.

    ``stored`` is tokenizer.json, parsed, or None where there is none.
    """
    from tokenizers.models import WordPiece

    name = class_name(folder, given)
    if stored is not None:
        parse_tokenizer((folder / FILE).read_bytes())
        kind = stored["model"].get("type", "WordPiece")
        if kind != "WordPiece":
            raise refusal(folder, f"tokenizer.json holds a {kind} model and {name} takes WordPiece")
        vocabulary = stored["model"]["vocab"]
    elif (folder / "vocab.txt").is_file():
        vocabulary = WordPiece.read_file(str(folder / "vocab.txt"))
    else:
        raise no_stand_in(folder, name)
    named = special_tokens({**BERT_TOKENS, **given})
    for needed in ("unk_token", "sep_token", "cls_token"):
        if needed not in named:
            raise refusal(folder, f"{needed} is null, which BERT's tokenizer cannot do without")
    return word_pieces(vocabulary, str(named["unk_token"]), given), named


def word_pieces(vocabulary: dict[str, int], unknown: str, given: Mapping[str, Any]) -> Tokenizer:
    """Build BertTokenizer's normaliser, pre-tokenizer and model; its template needs the added tokens first."""
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import WordPiece

    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=given.get("tokenize_chinese_chars", True),
        strip_accents=given.get("strip_accents"),
        lowercase=given.get("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def set_bert_template(tokenizer: Tokenizer, named: Mapping[str, Any]) -> None:
    """Set the template of BERT: [CLS] A [SEP], and [CLS] A [SEP] B [SEP] with token types 0 and 1."""
    from tokenizers.processors import TemplateProcessing

    cls, sep = str(named["cls_token"]), str(named["sep_token"])
    tokenizer.post_processor = TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0",
        pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (cls, sep)],
    )
