"""From a checkpoint's tokenizer files to one tokenizer.json and the ``tokenizer`` object of a bundle.

The ids are those of ``transformers.AutoTokenizer.from_pretrained(folder)``, 5.23, which does not simply
run tokenizer.json: for BERT's classes it takes the vocabulary from it (or from vocab.txt) and rebuilds
the rest from tokenizer_config.json. The source followed is ``models.bert.tokenization_bert``; those of the
settings are named in tokenizer_settings.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.export.tokenizer_settings import FILE, class_name, has_token_types, is_bert, names, read_settings, refusal
from transom.models.json_files import read_object
from transom.runtime.errors import BundleError, CheckpointError
from transom.runtime.text import MAX_LENGTH, TextEncoder, TextSpec, parse_tokenizer

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

BERT_TOKENS = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
# Vocabularies that only their own libraries can turn into a tokenizer.json
FOREIGN = ("vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "bpe.codes")
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
SENTENCE_FILES = tuple(
    f"sentence_{family}_config.json"
    for family in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)


def tokenizer_from_checkpoint(folder: Path, max_positions: int) -> tuple[bytes, TextSpec] | None:
    """The bytes of a tokenizer.json and what goes with it; None where the folder has no tokenizer.

    ``max_positions`` is the model's own limit in tokens. Raises CheckpointError when the files are
    damaged, contradict each other, or hold a vocabulary that is neither tokenizer.json nor vocab.txt.
    """
    if not any((folder / name).is_file() for name in (FILE, "vocab.txt", *FOREIGN, *SETTINGS)):
        return None
    sentence = next((read_object(folder / name) for name in SENTENCE_FILES if (folder / name).is_file()), {})
    with damaged(folder):
        given, added = read_settings(folder, sentence)
        tokenizer, named = build(folder, given)
        add_tokens(tokenizer, added, named, given.get("extra_special_tokens") or [])
        if is_bert(folder, given):
            frame_as_bert(tokenizer, named)
        if sentence.get("do_lower_case"):
            lower_case_first(tokenizer)
        pad, mask = (str(named[name]) if name in named else None for name in ("pad_token", "mask_token"))
        spec = TextSpec(
            file=FILE,
            max_length=longest(given, sentence, max_positions),
            pad_token=pad,
            pad_id=0 if pad is None else tokenizer.token_to_id(pad) or 0,
            mask_token=mask,
            mask_id=None if mask is None else tokenizer.token_to_id(mask),
            truncation_side=given["truncation_side"],
            split_special_tokens=given.get("split_special_tokens", False),
            token_types=has_token_types(folder, given),
        )
        spec = TextSpec.from_json(spec.to_json())  # the reader's checks, before anything is written
        written = tokenizer.to_str().encode()
        TextEncoder(written, spec, max_positions)
    return written, spec


@contextmanager
def damaged(folder: Path) -> Iterator[None]:
    """Anything that transformers and tokenizers choke on in these files is a CheckpointError here."""
    try:
        yield
    except CheckpointError:
        raise
    except (BundleError, RecursionError) as error:
        raise refusal(folder, str(error)) from None
    except Exception as error:  # tokenizers raises plain Exception
        raise refusal(folder, f"{type(error).__name__}: {error}") from None


def build(folder: Path, given: dict[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer before tokens are added, and its named special tokens."""
    path, bert, name = folder / FILE, is_bert(folder, given), class_name(folder, given)
    if path.is_file():
        stored = read_object(path)
        truncation, padding = stored.get("truncation") or {}, stored.get("padding") or {}
        given.setdefault("truncation_side", truncation.get("direction", "Right").lower())
        if not bert:
            given.setdefault("pad_token", padding.get("pad_token"))
            return parse_tokenizer(path.read_bytes()), names(given)
        parse_tokenizer(path.read_bytes())
        if stored["model"].get("type", "WordPiece") != "WordPiece":
            kind = stored["model"]["type"]
            raise refusal(folder, f"tokenizer.json holds a {kind} model and {name} takes WordPiece")
        vocabulary = stored["model"]["vocab"]
    else:
        if not bert or not (folder / "vocab.txt").is_file():
            found = next(other for other in ("vocab.txt", *FOREIGN, *SETTINGS) if (folder / other).is_file())
            raise refusal(folder, f"no tokenizer.json, and {found} cannot stand in for it ({name})")
        from tokenizers.models import WordPiece

        vocabulary = WordPiece.read_file(str(folder / "vocab.txt"))
        given.setdefault("truncation_side", "right")
    named = names({**BERT_TOKENS, **given})
    for needed in ("unk_token", "sep_token", "cls_token"):
        if needed not in named:
            raise refusal(folder, f"{needed} is null, which BERT's tokenizer cannot do without")
    return bert_tokenizer(vocabulary, str(named["unk_token"]), given), named


def bert_tokenizer(vocabulary: dict[str, int], unknown: str, given: Mapping[str, Any]) -> Tokenizer:
    """BertTokenizer's normaliser, pre-tokenizer and model; its template needs the added tokens first."""
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


def add_tokens(tokenizer: Tokenizer, added: list[AddedToken], named: Mapping[str, Any], extra: list[Any]) -> None:
    """Added tokens, then special ones that are not among them: the order decides the ids of new ones."""
    from tokenizers import AddedToken

    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    known |= {str(token) for token in added}
    tokens: list[Any] = list(added)
    for token in (*named.values(), *extra):
        if str(token) not in known and token not in tokens:
            tokens.append(token)
    special = {str(token) for token in named.values()}
    tokens = [AddedToken(token, special=True) if isinstance(token, str) else token for token in tokens]
    for token in tokens:
        token.special = token.special or str(token) in special
    tokenizer.add_tokens(tokens)


def frame_as_bert(tokenizer: Tokenizer, named: Mapping[str, Any]) -> None:
    """[CLS] A [SEP], and [CLS] A [SEP] B [SEP] with token types 0 and 1."""
    from tokenizers.processors import TemplateProcessing

    cls, sep = str(named["cls_token"]), str(named["sep_token"])
    tokenizer.post_processor = TemplateProcessing(
        single=f"{cls}:0 $A:0 {sep}:0",
        pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (cls, sep)],
    )


def lower_case_first(tokenizer: Tokenizer) -> None:
    """What sentence-transformers' do_lower_case does: lower case before the tokenizer's own normaliser."""
    from tokenizers.normalizers import Lowercase, Sequence

    stored = json.loads(tokenizer.to_str())["normalizer"] or {"type": "Sequence", "normalizers": []}
    steps = stored["normalizers"] if stored["type"] == "Sequence" else [stored]
    if not any(step["type"] == "Lowercase" for step in steps):
        own = tokenizer.normalizer
        tokenizer.normalizer = Sequence([Lowercase()] if own is None else [Lowercase(), own])


def longest(given: Mapping[str, Any], sentence: Mapping[str, Any], max_positions: int) -> int:
    """Tokens of the longest row: sentence-transformers' limit, else the tokenizer's, within the model's."""
    for name, value in (
        ("max_seq_length", sentence.get("max_seq_length")),
        ("model_max_length", given.get("model_max_length", given.get("max_len"))),
    ):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 1:
            raise ValueError(f"{name} is {value!r}, expected a number of tokens")
        if value <= MAX_LENGTH:  # transformers writes 1e30 for "no limit"
            return min(int(value), max_positions)
    return max_positions
