"""Settings of a checkpoint's tokenizer beside the vocabulary: its class, options and special tokens.

Merged as transformers 5.23 merges them in ``tokenization_utils_base``, ``tokenization_utils_tokenizers`` and
``models.auto.tokenization_auto``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.models.json_files import read_optional
from transom.runtime.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import AddedToken

FILE = "tokenizer.json"
# Every file whose presence means that the checkpoint has a tokenizer
VOCABULARIES = ("vocab.txt", "vocab.json", "merges.txt", "source.spm", "target.spm")
FOREIGN = ("spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "bpe.codes")  # of classes not built here
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# Model types whose tokenizer is transformers' BertTokenizer, and the class names that mean it
BERT_TYPES = ("bert", "convbert", "distilbert", "electra", "layoutlm", "lxmert", "mobilebert", "squeezebert")
BERT_CLASSES = ("Bert", "ConvBert", "DistilBert", "Electra", "LayoutLM", "Lxmert", "MobileBert", "SqueezeBert")
OTHER_TYPES = {
    "gpt2": "GPT2Tokenizer",
    "marian": "MarianTokenizer",
    "clip": "CLIPTokenizer",
    "perceiver": "PerceiverTokenizer",
}
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def read_settings(
    folder: Path, sentence: Mapping[str, Any], tokenizer_json: Callable[[], Mapping[str, Any] | None]
) -> tuple[dict[str, Any], dict[int, AddedToken]]:
    """Read the arguments of the tokenizer's class, and the tokens to add by id, in order.

    tokenizer_config.json and the older files beside it, merged as ``_from_pretrained`` does. ``tokenizer_json``
    returns that file parsed, None where there is none; it is called where the file counts.
    """
    from tokenizers import AddedToken

    given = read_optional(folder / "tokenizer_config.json")
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
        merge_special_tokens(given, read_optional(folder / "special_tokens_map.json"), asked)
        special = {str(given[name]) for name in NAMED if given.get(name)}
        special |= {str(token) for token in given.get("extra_special_tokens") or []}
        for token, number in read_optional(folder / "added_tokens.json").items():
            added[number] = AddedToken(token, normalized=token not in special, special=token in special)
        for token in (tokenizer_json() or {}).get("added_tokens", []):
            added[token["id"]] = AddedToken(**{k: v for k, v in token.items() if k != "id"})
    if "additional_special_tokens" in given and "extra_special_tokens" not in given:
        given["extra_special_tokens"] = given.pop("additional_special_tokens")
    return revived(given), {number: added[number] for number in sorted(added)}


def is_own_name(name: str) -> bool:
    """Return whether this names a special token that transformers has no name for, such as "image_token"."""
    return name.endswith("_token") and name not in NAMED


def merge_special_tokens(given: dict[str, Any], found: dict[str, Any], asked: Mapping[str, Any]) -> None:
    """Merge special_tokens_map.json over tokenizer_config.json, but not over the arguments ``asked`` for."""
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
    """Replace JSON's ``{"__type": "AddedToken", ...}`` by the token it stands for, at any depth."""
    from tokenizers import AddedToken

    if isinstance(value, dict):
        if value.get("__type") == "AddedToken":
            return AddedToken(**{k: v for k, v in value.items() if k != "__type"})
        return {k: revived(v) for k, v in value.items()}
    return [revived(v) for v in value] if isinstance(value, list) else value


def special_tokens(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the named special tokens in the order in which transformers adds them, without null ones."""
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


def class_name(folder: Path, given: Mapping[str, Any]) -> str:
    """Return the name of the tokenizer's class as transformers finds it, without "Fast"."""
    config = read_optional(folder / "config.json")
    model_type = str(config.get("model_type", "bert"))
    by_type = "BertTokenizer" if model_type in BERT_TYPES else OTHER_TYPES.get(model_type, "PreTrainedTokenizer")
    return str(given.get("tokenizer_class") or config.get("tokenizer_class") or by_type).removesuffix("Fast")


def is_bert(folder: Path, given: Mapping[str, Any]) -> bool:
    """Return whether transformers would rebuild this as a BertTokenizer; else tokenizer.json counts as it is."""
    return class_name(folder, given).removesuffix("Tokenizer") in BERT_CLASSES


def cleans_up(given: Mapping[str, Any], model: str) -> bool:
    """Return whether ``decode`` removes spaces before punctuation; for a BPE model one setting is not enough."""
    anyway = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    return bool(given.get("clean_up_tokenization_spaces")) and (model != "BPE" or bool(given.get(anyway)))


def has_token_types(folder: Path, given: Mapping[str, Any]) -> bool:
    """Return whether transformers' tokenizer returns token_type_ids; BERT takes zeros where it does not."""
    inputs = given.get("model_input_names")
    if inputs is not None:
        return "token_type_ids" in inputs
    return is_bert(folder, given) and class_name(folder, given) != "DistilBertTokenizer"


def no_stand_in(folder: Path, name: str) -> CheckpointError:
    """Return the error for a folder without tokenizer.json and without the vocabulary of the class ``name``."""
    found = next(other for other in (*VOCABULARIES, *FOREIGN, *SETTINGS) if (folder / other).is_file())
    return refusal(folder, f"no tokenizer.json, and {found} cannot stand in for it ({name})")


def refusal(folder: Path, problem: str) -> CheckpointError:
    """Return the error for tokenizer files that have a ``problem``."""
    reason = " ".join(problem.split())[:400].rstrip(".")
    return CheckpointError(
        f"{folder}: the tokenizer's files cannot be used: {reason}. Download them again, or write a tokenizer.json "
        f"with transformers: AutoTokenizer.from_pretrained(...).save_pretrained({str(folder)!r})."
    )
