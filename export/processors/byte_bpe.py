"""Byte-level BPE tokenizers of GPT-2 and CLIP as transformers 5.23 builds them, and the vocabularies they read.

Sources: ``models.gpt2.tokenization_gpt2`` and ``models.clip.tokenization_clip``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.export.processors.tokenizer_settings import FILE, refusal, special_tokens
from transom.models.json_files import read_object
from transom.runtime.text.tokenizer_json import parse_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.processors import PostProcessor

BpeModel = tuple[dict[str, int], list[tuple[str, str]]]  # vocabulary, merges

GPT2_TOKENS = {f"{name}_token": "<|endoftext|>" for name in ("unk", "bos", "eos")}
CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
CLIP_TOKENS = {"unk_token": CLIP_END, "bos_token": CLIP_START, "eos_token": CLIP_END, "pad_token": CLIP_END}
END_OF_WORD = "</w>"
# One of CLIP's words: the two special tokens, a contraction, letters, one digit, other signs; without spaces
CLIP_WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# The white space that str.strip() removes. A run is tried at its beginning only, not again when it isn't the last
BLANK = r"[\s\x1c-\x1f]"
ENDS = rf"\A{BLANK}++|(?<!{BLANK}){BLANK}++\z"


def gpt2_tokenizer(
    folder: Path, stored: Mapping[str, Any] | None, given: Mapping[str, Any], rows: int | None
) -> tuple[Tokenizer, dict[str, Any]]:
    """Build GPT-2's tokenizer; return it with its named special tokens.

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
    return tokenizer, special_tokens({**GPT2_TOKENS, **given})


def set_gpt2_template(tokenizer: Tokenizer, named: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Set the template of GPT-2: BOS where ``add_bos_token`` is set, the text, EOS where ``add_eos_token`` is."""
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


def clip_tokenizer(
    folder: Path, stored: Mapping[str, Any] | None, given: Mapping[str, Any], rows: int | None
) -> tuple[Tokenizer, dict[str, Any]]:
    """Build CLIP's tokenizer without its template; return it with its named special tokens.

    Of a tokenizer.json (``stored`` is that file, parsed) the vocabulary and the merges count, all else is
    rebuilt. Of the settings do_lower_case, errors and add_prefix_space have no effect.
    """
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    (vocabulary, merges), _ = read_bpe(folder, stored, rows, "CLIPTokenizer")
    settings = {**CLIP_TOKENS, **given}
    named = special_tokens(settings)
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
            pre_tokenizers.Split(Regex(CLIP_WORD), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    # transformers wraps ``decode`` to put spaces for the ends of words and to strip; these steps do the same
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace(END_OF_WORD, " "), decoders.Replace(Regex(ENDS), "")]
    )
    return tokenizer, named


def set_clip_template(tokenizer: Tokenizer, named: Mapping[str, Any]) -> None:
    """Set the template of CLIP: BOS A EOS, and BOS A EOS EOS B EOS for a pair, whatever the files say."""
    from tokenizers.processors import RobertaProcessing

    ids = tokenizer.get_vocab(with_added_tokens=True)
    bos, eos = str(named["bos_token"]), str(named["eos_token"])
    tokenizer.post_processor = RobertaProcessing(
        (eos, ids[eos]), (bos, ids[bos]), trim_offsets=False, add_prefix_space=False
    )


def read_bpe(
    folder: Path, stored: Mapping[str, Any] | None, rows: int | None, name: str
) -> tuple[BpeModel, PostProcessor | None]:
    """Read vocabulary and merges for the class ``name``, and the template of a tokenizer.json.

    ``stored`` is tokenizer.json, parsed, or None where there is none; it wins over the two older files.
    """
    from tokenizers.models import BPE

    if stored is not None:
        opened = parse_tokenizer((folder / FILE).read_bytes())
        kind = type(opened.model).__name__
        if kind != "BPE":
            raise refusal(folder, f"tokenizer.json holds a {kind} model and {name} takes BPE")
        vocabulary = stored["model"]["vocab"]
        pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in stored["model"]["merges"]]
        check_rows(FILE, vocabulary, rows)
        return (vocabulary, [(str(first), str(second)) for first, second in pairs]), opened.post_processor
    missing = [file for file in ("vocab.json", "merges.txt") if not (folder / file).is_file()]
    if missing:
        raise refusal(folder, f"neither tokenizer.json nor {' and '.join(missing)}, which {name} is made of")
    read_vocabulary(folder / "vocab.json", rows)
    return BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt")), None


def read_vocabulary(path: Path, rows: int | None) -> dict[str, int]:
    """Read a vocab.json; ValueError unless its ids are 0, 1, 2, ..., each once, and below ``rows``, the table's."""
    vocabulary = read_object(path)
    strange = next((token for token, number in vocabulary.items() if type(number) is not int), None)
    if strange is not None:
        raise ValueError(f"{path.name} gives {strange!r:.60} the id {vocabulary[strange]!r:.60}, expected an integer")
    if not vocabulary:
        raise ValueError(f"{path.name} has no tokens")
    numbers = sorted(vocabulary.values())
    wrong = next((place for place, number in enumerate(numbers) if number != place), None)
    if wrong is not None:
        twice = wrong > 0 and numbers[wrong] == numbers[wrong - 1]
        what = f"the id {numbers[wrong]} twice" if twice else f"no token with the id {wrong}"
        raise ValueError(f"{path.name} has {what}; expected 0..{len(numbers) - 1}, each once")
    check_rows(path.name, vocabulary, rows)
    return vocabulary


def check_rows(name: str, vocabulary: Mapping[str, int], rows: int | None) -> None:
    """Raise ValueError where an id is beyond an embedding table of ``rows``; added tokens are not in ``vocabulary``."""
    most = max(vocabulary.values(), default=0)
    if rows is not None and most >= rows:
        raise ValueError(f"{name} has ids up to {most}, the model's are 0..{rows - 1}; it is that of another model")
