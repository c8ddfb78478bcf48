"""From a checkpoint's tokenizer files to one tokenizer.json and the ``tokenizer`` object of a bundle.

The ids are those of ``transformers.AutoTokenizer.from_pretrained(folder)``, 5.23, which does not simply
run tokenizer.json: for BERT's classes it takes the vocabulary from it (or from vocab.txt) and rebuilds
the rest from tokenizer_config.json. The sources followed are ``tokenization_utils_base``,
``tokenization_utils_tokenizers``, ``models.bert.tokenization_bert`` and ``models.auto.tokenization_auto``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.models.pooling import read_object
from transom.runtime.errors import BundleError, CheckpointError
from transom.runtime.text import MAX_LENGTH, TextEncoder, TextSpec, parse_tokenizer

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

FILE = "tokenizer.json"
# Model types whose tokenizer is transformers' BertTokenizer, and the class names that mean it
BERT_TYPES = ("bert", "convbert", "distilbert", "electra", "layoutlm", "lxmert", "mobilebert", "squeezebert")
BERT_CLASSES = ("Bert", "ConvBert", "DistilBert", "Electra", "LayoutLM", "Lxmert", "MobileBert", "SqueezeBert")
BERT_TOKENS = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
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


def refusal(folder: Path, problem: str) -> CheckpointError:
    reason = " ".join(problem.split())[:400].rstrip(".")
    return CheckpointError(
        f"{folder}: the tokenizer's files cannot be used: {reason}. Download them again, or write a tokenizer.json "
        f"with transformers: AutoTokenizer.from_pretrained(...).save_pretrained({str(folder)!r})."
    )


def read_settings(folder: Path, sentence: Mapping[str, Any]) -> tuple[dict[str, Any], list[AddedToken]]:
    """What the tokenizer's class would be constructed with, and tokens to add in the order of their ids.

    tokenizer_config.json and the older files beside it, merged as ``_from_pretrained`` does.
    """
    from tokenizers import AddedToken

    given = optional(folder / "tokenizer_config.json")
    asked = sentence.get("processor_kwargs") or sentence.get("tokenizer_args") or {}
    given.update(asked)
    if set(given.get("fast_tokenizer_files") or []) - {FILE}:
        raise refusal(folder, "fast_tokenizer_files names a tokenizer.json for one version of transformers only")
    if "additional_special_tokens" in given and not given.get("extra_special_tokens"):
        given["extra_special_tokens"] = given.pop("additional_special_tokens")
    own = {k: given.pop(k) for k in list(given) if is_own_name(k) and isinstance(given[k], str)}
    if isinstance(given.get("extra_special_tokens"), dict):
        own.update(given.pop("extra_special_tokens"))
    if own:
        given["model_specific_special_tokens"] = own

    added: dict[int, AddedToken] = {}
    if "added_tokens_decoder" in given:  # then none of the older files is read
        added = {int(k): AddedToken(**v) for k, v in given.pop("added_tokens_decoder").items()}
    else:
        merge_special_tokens(given, optional(folder / "special_tokens_map.json"), asked)
        special = {str(given[name]) for name in NAMED if given.get(name)}
        special |= {str(token) for token in given.get("extra_special_tokens") or []}
        for token, number in optional(folder / "added_tokens.json").items():
            added[number] = AddedToken(token, normalized=token not in special, special=token in special)
        for token in optional(folder / FILE).get("added_tokens", []):
            added[token["id"]] = AddedToken(**{k: v for k, v in token.items() if k != "id"})
    if "additional_special_tokens" in given and "extra_special_tokens" not in given:
        given["extra_special_tokens"] = given.pop("additional_special_tokens")
    return revived(given), [added[number] for number in sorted(added)]


def is_own_name(name: str) -> bool:
    """Of a special token that transformers has no name for, such as "image_token"."""
    return name.endswith("_token") and name not in NAMED


def merge_special_tokens(given: dict[str, Any], found: dict[str, Any], asked: Mapping[str, Any]) -> None:
    """special_tokens_map.json wins over tokenizer_config.json, but not over what the caller asked for."""
    from tokenizers import AddedToken

    for name, value in found.items():
        if asked.get(name):
            continue
        if isinstance(value, dict) and name != "extra_special_tokens":
            value = AddedToken(**{**value, "special": True})
        elif name == "extra_special_tokens" and isinstance(value, list):
            tokens = [AddedToken(**{**t, "special": True}) if isinstance(t, dict) else t for t in value]
            known = list(given.get(name) or [])
            value = known + [token for token in tokens if token not in known]
        given[name] = value
    if isinstance(given.get("extra_special_tokens"), dict):
        given.setdefault("model_specific_special_tokens", {}).update(given.pop("extra_special_tokens"))


def revived(value: Any) -> Any:
    """JSON's ``{"__type": "AddedToken", ...}`` as the token it was."""
    from tokenizers import AddedToken

    if isinstance(value, dict):
        if value.get("__type") == "AddedToken":
            return AddedToken(**{k: v for k, v in value.items() if k != "__type"})
        return {k: revived(v) for k, v in value.items()}
    return [revived(v) for v in value] if isinstance(value, list) else value


def class_name(folder: Path, given: Mapping[str, Any]) -> str:
    """The tokenizer's class as transformers finds it, without "Fast"."""
    config = optional(folder / "config.json")
    by_type = "BertTokenizer" if config.get("model_type", "bert") in BERT_TYPES else "PreTrainedTokenizer"
    return str(given.get("tokenizer_class") or config.get("tokenizer_class") or by_type).removesuffix("Fast")


def is_bert(folder: Path, given: Mapping[str, Any]) -> bool:
    """Whether transformers would rebuild this as a BertTokenizer; else tokenizer.json counts as it is."""
    return class_name(folder, given).removesuffix("Tokenizer") in BERT_CLASSES


def has_token_types(folder: Path, given: Mapping[str, Any]) -> bool:
    """Whether transformers' tokenizer returns token_type_ids; BERT takes zeros where it does not."""
    inputs = given.get("model_input_names")
    if inputs is not None:
        return "token_type_ids" in inputs
    return is_bert(folder, given) and class_name(folder, given) != "DistilBertTokenizer"


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


def names(given: Mapping[str, Any]) -> dict[str, Any]:
    """Named special tokens in the order in which transformers adds them; null ones left out."""
    from tokenizers import AddedToken

    found = {name: given.get(name) for name in NAMED}
    for name, value in given.items():
        if is_own_name(name) and isinstance(value, (str, AddedToken)):
            found[name] = value
    found.update(given.get("model_specific_special_tokens") or {})
    for name, value in found.items():
        if value is not None and not isinstance(value, (str, AddedToken)):
            raise TypeError(f"{name} is {value!r}, expected a token")
    return {name: value for name, value in found.items() if value is not None}


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


def optional(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}
