"""A checkpoint's tokenizer files, read as one JSON file and the object ``tokenizer`` of bundle.json.

The ids are those of ``transformers.AutoTokenizer.from_pretrained(folder)``, 5.23, which does not simply
run tokenizer.json: for BERT's, GPT-2's and CLIP's classes it takes the vocabulary from it (or from the older files)
and rebuilds the rest from tokenizer_config.json; for Marian's it calls SentencePiece itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.export.processors.byte_bpe import clip_tokenizer, gpt2_tokenizer, set_clip_template, set_gpt2_template
from transom.export.processors.byte_tokenizer import CLASS as BYTES
from transom.export.processors.byte_tokenizer import MAX_LENGTH as MAX_BYTES
from transom.export.processors.byte_tokenizer import byte_tokenizer, set_byte_template
from transom.export.processors.marian import (
    SOURCE,
    TARGET,
    SentencePieceModel,
    Side,
    marian_bytes,
    marian_special_tokens,
    read_models,
)
from transom.export.processors.tokenizer_settings import (
    FILE,
    FOREIGN,
    SETTINGS,
    VOCABULARIES,
    class_name,
    cleans_up,
    has_token_types,
    is_bert,
    no_stand_in,
    read_settings,
    refusal,
    special_tokens,
)
from transom.export.processors.wordpiece import bert_tokenizer, set_bert_template
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


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer as a bundle holds it: the bytes of its file and their ``spec``, and both opened, with no limits."""

    data: bytes
    spec: TokenizerSpec
    opened: TextTokenizer = field(compare=False)

    def with_spec(self, spec: TokenizerSpec) -> LoadedTokenizer:
        """Return the tokenizer with another ``spec``; the file is not parsed again."""
        return LoadedTokenizer(self.data, spec, self.opened.with_limits(spec, self.opened.max_tokens))


class TokenizerFiles:
    """The tokenizer files of a checkpoint's folder. Those that both tokenizers of a translator need are parsed once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def exist(self) -> bool:
        """Return whether the folder has any file of a tokenizer."""
        return any((self.folder / name).is_file() for name in (FILE, *VOCABULARIES, *FOREIGN, *SETTINGS))

    @cached_property
    def tokenizer_json(self) -> dict[str, Any] | None:
        """tokenizer.json, parsed; None where there is none."""
        return read_object(self.folder / FILE) if (self.folder / FILE).is_file() else None

    @cached_property
    def sentence(self) -> dict[str, Any]:
        """sentence-transformers' settings of the tokenizer; empty where there are none."""
        paths = [self.folder / name for name in SENTENCE_FILES]
        return next((read_object(path) for path in paths if path.is_file()), {})

    @cached_property
    def spm_models(self) -> dict[str, SentencePieceModel]:
        """Marian's two .spm files, by name."""
        return read_models(self.folder)


def read_tokenizer(files: TokenizerFiles, max_positions: int, rows: int | None = None) -> LoadedTokenizer | None:
    """Read the tokenizer of a checkpoint's inputs; None where the folder has no tokenizer.

    ``max_positions`` is the model's own limit in tokens, ``rows`` the length of its embedding table. Raises
    CheckpointError when the files are damaged, contradict each other or the table, or hold a vocabulary
    that only another library can turn into a tokenizer.
    """
    if not files.exist() and class_name(files.folder, {}) != BYTES:  # which has no files of its own
        return None
    folder, sentence = files.folder, files.sentence
    with damaged(folder):
        given, added = read_settings(folder, sentence, lambda: files.tokenizer_json)
        if class_name(folder, given) == "MarianTokenizer":
            return marian(files, SOURCE, given, added, max_positions, rows)
        tokenizer, named = build(files, given, rows)
        add_tokens(tokenizer, list(added.values()), named, given.get("extra_special_tokens") or [])
        if is_bert(folder, given):
            set_bert_template(tokenizer, named)
        elif class_name(folder, given) == "CLIPTokenizer":
            set_clip_template(tokenizer, named)
        elif class_name(folder, given) == "GPT2Tokenizer" and files.tokenizer_json is None:
            set_gpt2_template(tokenizer, named, given)
        elif class_name(folder, given) == BYTES:
            set_byte_template(tokenizer, named)
            given = {"model_max_length": MAX_BYTES, **given}
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
        return opened(tokenizer.to_str().encode(), spec)


def read_target_tokenizer(files: TokenizerFiles, max_positions: int, rows: int | None = None) -> LoadedTokenizer | None:
    """Read the tokenizer of a Marian model's outputs, where its vocabulary differs from that of the inputs.

    None where the two are one; else as ``read_tokenizer``.
    """
    folder = files.folder
    if not (folder / SOURCE.vocabulary).is_file():
        return None
    with damaged(folder):
        given, added = read_settings(folder, {}, lambda: files.tokenizer_json)
        if class_name(folder, given) != "MarianTokenizer" or not given.get("separate_vocabs"):
            return None
        return marian(files, TARGET, given, added, max_positions, rows)


def opened(data: bytes, spec: TokenizerSpec) -> LoadedTokenizer:
    """Open a tokenizer as a bundle's reader does, with all of its checks. The only time that an export parses it."""
    spec = TokenizerSpec.from_json(json.loads(json.dumps(spec.to_json())))
    return LoadedTokenizer(data, spec, TextTokenizer(data, spec, MAX_LENGTH))


@contextmanager
def damaged(folder: Path) -> Iterator[None]:
    """Turn every error that transformers and tokenizers raise for these files into a CheckpointError."""
    try:
        yield
    except (CheckpointError, ImportError):  # a library of the extra [export] is missing: no fault of the files
        raise
    except (BundleError, RecursionError) as error:
        raise refusal(folder, str(error)) from None
    except Exception as error:  # tokenizers raises plain Exception
        raise refusal(folder, f"{type(error).__name__}: {error}") from None


def build(files: TokenizerFiles, given: dict[str, Any], rows: int | None) -> tuple[Tokenizer, dict[str, Any]]:
    """Build the tokenizer before tokens are added; return it with its named special tokens."""
    folder, stored = files.folder, files.tokenizer_json
    name = class_name(folder, given)
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
    if name == BYTES:
        return byte_tokenizer(folder, given, rows)
    if stored is None:
        raise no_stand_in(folder, name)
    return parse_tokenizer((folder / FILE).read_bytes()), special_tokens(given)


def marian(
    files: TokenizerFiles,
    side: Side,
    given: dict[str, Any],
    added: dict[int, AddedToken],
    max_positions: int,
    rows: int | None,
) -> LoadedTokenizer:
    """Build one side of a Marian tokenizer."""
    named = marian_special_tokens(given)
    data, ids = marian_bytes(files.folder, files.spm_models, side, given, added, named, rows)
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
    return opened(data, spec)


def add_tokens(tokenizer: Tokenizer, added: list[AddedToken], named: Mapping[str, Any], extra: list[Any]) -> None:
    """Add the ``added`` tokens, then special ones that are not among them: the order decides the ids of new ones."""
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
    """Lower the case before the tokenizer's own normaliser, as sentence-transformers' do_lower_case does."""
    from tokenizers.normalizers import Lowercase, Sequence

    stored = json.loads(tokenizer.to_str())["normalizer"] or {"type": "Sequence", "normalizers": []}
    steps = stored["normalizers"] if stored["type"] == "Sequence" else [stored]
    if not any(step["type"] == "Lowercase" for step in steps):
        own = tokenizer.normalizer
        tokenizer.normalizer = Sequence([Lowercase()] if own is None else [Lowercase(), own])


def longest(given: Mapping[str, Any], sentence: Mapping[str, Any], max_positions: int) -> int:
    """Return the longest row in tokens: sentence-transformers' limit, else the tokenizer's, within the model's."""
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
