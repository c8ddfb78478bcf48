"""From a checkpoint's tokenizer files to one JSON file and the ``tokenizer`` object of a bundle.

The ids are those of ``transformers.AutoTokenizer.from_pretrained(folder)``, 5.23, which does not simply
run tokenizer.json: for BERT's, GPT-2's and CLIP's classes it takes the vocabulary from it (or from the older files)
and rebuilds the rest from tokenizer_config.json; Marian's it cuts with SentencePiece itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.export.processors.byte_bpe import frame_as_gpt2, gpt2_tokenizer
from transom.export.processors.clip_bpe import clip_tokenizer, frame_as_clip
from transom.export.processors.marian import SOURCE, TARGET, Side, marian_bytes, marian_special_tokens
from transom.export.processors.tokenizer_settings import (
    FILE,
    FOREIGN,
    SETTINGS,
    VOCABULARIES,
    class_name,
    cleans_up,
    has_token_types,
    is_bert,
    names,
    no_stand_in,
    read_settings,
    refusal,
)
from transom.export.processors.wordpiece import bert_tokenizer, frame_as_bert
from transom.models.json_files import read_object
from transom.runtime.errors import BundleError, CheckpointError
from transom.runtime.text.tokenizer import TextTokenizer
from transom.runtime.text.tokenizer_json import parse_tokenizer
from transom.runtime.text.tokenizer_spec import MAX_LENGTH, TokenizerSpec

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

SENTENCE_FILES = tuple(
    f"sentence_{family}_config.json"
    for family in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
Found = tuple[bytes, TokenizerSpec]


def tokenizer_from_checkpoint(folder: Path, max_positions: int, rows: int | None = None) -> Found | None:
    """The bytes of a tokenizer's file and what goes with it; None where the folder has no tokenizer.

    ``max_positions`` is the model's own limit in tokens, ``rows`` the length of its embedding table. Raises
    CheckpointError when the files are damaged, contradict each other or the table, or hold a vocabulary
    that only another library can turn into a tokenizer.
    """
    if not any((folder / name).is_file() for name in (FILE, *VOCABULARIES, *FOREIGN, *SETTINGS)):
        return None
    sentence = next((read_object(folder / name) for name in SENTENCE_FILES if (folder / name).is_file()), {})
    with damaged(folder):
        given, added = read_settings(folder, sentence)
        if class_name(folder, given) == "MarianTokenizer":
            return marian(folder, SOURCE, given, added, max_positions, rows)
        tokenizer, named = build(folder, given, rows)
        add_tokens(tokenizer, list(added.values()), named, given.get("extra_special_tokens") or [])
        if is_bert(folder, given):
            frame_as_bert(tokenizer, named)
        elif class_name(folder, given) == "CLIPTokenizer":
            frame_as_clip(tokenizer, named)
        elif class_name(folder, given) == "GPT2Tokenizer" and not (folder / FILE).is_file():
            frame_as_gpt2(tokenizer, named, given)
        if sentence.get("do_lower_case"):
            lower_case_first(tokenizer)
        pad, mask = (str(named[name]) if name in named else None for name in ("pad_token", "mask_token"))
        spec = TokenizerSpec(
            file=FILE,
            max_length=longest(given, sentence, max_positions),
            pad_token=pad,
            pad_id=0 if pad is None else tokenizer.token_to_id(pad) or 0,
            mask_token=mask,
            mask_id=None if mask is None else tokenizer.token_to_id(mask),
            truncation_side=given["truncation_side"],
            split_special_tokens=given.get("split_special_tokens", False),
            token_types=has_token_types(folder, given),
            clean_up_spaces=cleans_up(given, type(tokenizer.model).__name__),
        )
        return checked(tokenizer.to_str().encode(), spec, max_positions)


def target_tokenizer_from_checkpoint(folder: Path, max_positions: int, rows: int | None = None) -> Found | None:
    """The tokenizer of what a Marian model writes, where its vocabulary is another than that of what it reads.

    None where the two are one; else as ``tokenizer_from_checkpoint``.
    """
    if not (folder / SOURCE.vocabulary).is_file():
        return None
    with damaged(folder):
        given, added = read_settings(folder, {})
        if class_name(folder, given) != "MarianTokenizer" or not given.get("separate_vocabs"):
            return None
        return marian(folder, TARGET, given, added, max_positions, rows)


def checked(data: bytes, spec: TokenizerSpec, max_positions: int) -> Found:
    """The reader's checks, before anything is written."""
    spec = TokenizerSpec.from_json(json.loads(json.dumps(spec.to_json())))
    TextTokenizer(data, spec, max_positions)
    return data, spec


@contextmanager
def damaged(folder: Path) -> Iterator[None]:
    """Anything that transformers and tokenizers choke on in these files is a CheckpointError here."""
    try:
        yield
    except (CheckpointError, ImportError):  # a library of the extra [export] is missing: no fault of the files
        raise
    except (BundleError, RecursionError) as error:
        raise refusal(folder, str(error)) from None
    except Exception as error:  # tokenizers raises plain Exception
        raise refusal(folder, f"{type(error).__name__}: {error}") from None


def build(folder: Path, given: dict[str, Any], rows: int | None) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer before tokens are added, and its named special tokens."""
    path, name = folder / FILE, class_name(folder, given)
    stored = read_object(path) if path.is_file() else None
    if stored is None:
        given.setdefault("truncation_side", "right")
    else:
        truncation, padding = stored.get("truncation") or {}, stored.get("padding") or {}
        given.setdefault("truncation_side", truncation.get("direction", "Right").lower())
        if name not in ("GPT2Tokenizer", "CLIPTokenizer"):  # these name it in their arguments
            given.setdefault("pad_token", padding.get("pad_token"))
    if is_bert(folder, given):
        return bert_tokenizer(folder, stored, given)
    if name == "GPT2Tokenizer":
        return gpt2_tokenizer(folder, stored, given, rows)
    if name == "CLIPTokenizer":
        return clip_tokenizer(folder, stored, given, rows)
    if stored is None:
        raise no_stand_in(folder, name)
    return parse_tokenizer(path.read_bytes()), names(given)


def marian(
    folder: Path, side: Side, given: dict[str, Any], added: dict[int, AddedToken], max_positions: int, rows: int | None
) -> Found:
    """One side of a Marian tokenizer."""
    named = marian_special_tokens(given)
    data, ids = marian_bytes(folder, side, given, added, named, rows)
    pad, mask = (str(named[name]) if name in named else None for name in ("pad_token", "mask_token"))
    spec = TokenizerSpec(
        file=side.file,
        max_length=longest({"model_max_length": 512, **given}, {}, max_positions),
        pad_token=pad,
        pad_id=0 if pad is None else ids[pad],
        mask_token=mask,
        mask_id=None if mask is None else ids[mask],
        truncation_side=given.get("truncation_side", "right"),
        split_special_tokens=given.get("split_special_tokens", False),
        token_types=False,
        kind="marian",
        clean_up_spaces=cleans_up(given, "Unigram"),
    )
    return checked(data, spec, max_positions)


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
