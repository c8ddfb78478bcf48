"""CLIP's tokenizers: ids and decoded text equal transformers' AutoTokenizer's over 1,000 awkward lines."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from tokenizer_cases import LINES as OTHERS
from tokenizer_cases import encoder_of, tokenizer_of, write
from transom.runtime.errors import CheckpointError, InputError, ShapeError

START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = [
    "a photo of a dog", "A Photo Of A DOG.", "  two\t\tcats\nand a \r\n dog  ", "the dogs' ball", "DON'T", "'s't're",
    "it's, we're, they'VE, I'M, you'll, he'd", "1234567890", "10km 3.5%", "b2b", "x²", "Ⅷ Ⅸ", "cafe\u0301 = café",
    "ÅÅA\u030a", "I\u0307stanbul", "ΣΑΣ ς", "ﬁne", START, END, START.upper(), "<|EndOfText|>", f"{START}a{END}",
    f"a {END} b", f"x{END}y", f"{START} {START}", "<|startoftext|", "wow!!! ok!", "!", "a!", "!a", "! !", "a</w>b",
    "</w>", "a </w> b", "\x1c\x1d\x1e\x1f", "a\x1cb", "a\x85b", "e\u0301\u0301\u200de", "👩\u200d👧 and 👍🏽",
    "日本語のテキスト", "\u202eشجرة", "&amp; &lt;b&gt;", "hello" * 60,
]  # fmt: skip
LINES = [line for line in dict.fromkeys([*WORDS, *OTHERS]) if line.strip()]


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    """vocab and merges in CLIP's order: 256 bytes, 256 bytes that end a word, about 250 merges, the special tokens."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(vocab_size=599, end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator([*WORDS * 3, *OTHERS], trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*signs, *(f"{sign}</w>" for sign in signs), *("".join(pair) for pair in merges), START, END]
    return {"vocab": {token: number for number, token in enumerate(dict.fromkeys(tokens))}, "merges": merges}


def two_files(folder: Path, model: dict[str, Any], **config: Any) -> Path:
    """vocab.json and merges.txt, and tokenizer_config.json where there is something to say."""
    merges = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    write(folder, "clip", vocab=model["vocab"], **({"tokenizer_config": config} if config else {}))
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    return folder


def one_file(folder: Path, model: dict[str, Any], changes: dict[str, Any], **config: Any) -> Path:
    """tokenizer.json, of which ``changes`` replaces parts, and tokenizer_config.json."""
    bpe = models.BPE(model["vocab"], [tuple(pair) for pair in model["merges"]])  # no end_of_word_suffix: rebuilt
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # neither counts, nor does the template
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([START, END])
    stored = {**json.loads(tokenizer.to_str()), **changes}
    return write(folder, "clip", tokenizer=stored, **({"tokenizer_config": config} if config else {}))


def saved_by_transformers(folder: Path, model: dict[str, Any]) -> Path:
    """What version 5 writes for a folder as OpenAI's are: tokenizer.json and tokenizer_config.json."""
    older = folder / "older"
    AutoTokenizer.from_pretrained(openai(older, model)).save_pretrained(folder)
    for path in older.iterdir():
        path.unlink()
    return write(folder, "clip")


def token(content: str, **changes: Any) -> dict[str, Any]:
    """A special token as tokenizer_config.json has it; "normalized" finds it in any case of letters."""
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    return {"__type": "AddedToken", "content": content, **flags, **changes}


OLD = {
    "unk_token": token(END), "bos_token": token(START), "eos_token": token(END), "pad_token": END,
    "add_prefix_space": False, "errors": "replace", "do_lower_case": True, "model_max_length": 77,
    "name_or_path": "openai/clip-vit-base-patch32", "special_tokens_map_file": "./special_tokens_map.json",
    "tokenizer_class": "CLIPTokenizer",
}  # fmt: skip
MAP = {name: {k: v for k, v in value.items() if k != "__type"} for name, value in OLD.items() if "__type" in str(value)}
PADDING = {
    "strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": None, "pad_id": 3, "pad_type_id": 0,
    "pad_token": "x",
}  # fmt: skip
TRUNCATION = {"direction": "Left", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
WORD_LEVEL = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}


def openai(folder: Path, model: dict[str, Any], **changes: Any) -> Path:
    """Laid out as OpenAI's checkpoints of 2021: every file but tokenizer.json."""
    two_files(folder, model, **{**OLD, **changes})
    return write(folder, "clip", special_tokens_map={**MAP, "pad_token": changes.get("pad_token", END)})


def added(model: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Tokens that were added: known ones, plain words, one that takes spaces, one found across a run of blanks."""
    after = len(model["vocab"])
    return {
        str(model["vocab"][START]): {"content": START, "special": True, "normalized": True},
        str(model["vocab"][END]): {"content": END, "special": True, "normalized": False, "lstrip": True},
        str(after): {"content": "hello", "special": False, "normalized": True, "single_word": True},
        str(after + 1): {"content": "<|new|>", "special": True, "rstrip": True},
        str(after + 2): {"content": "漢", "special": False, "normalized": False},
        str(after + 3): {"content": "two cats", "special": False, "normalized": True},
    }


def lacking(model: dict[str, Any], character: str) -> dict[str, Any]:
    """The model without a letter; <|startoftext|> stays."""
    tokens = [token for token in model["vocab"] if character not in token or token in (START, END)]
    merges = [pair for pair in model["merges"] if character not in "".join(pair)]
    return {**model, "vocab": {token: number for number, token in enumerate(tokens)}, "merges": merges}


# name -> the folder's files; each is compared with AutoTokenizer on every line
FOLDERS: dict[str, Callable[[Path, dict[str, Any]], Path]] = {
    "vocab.json and merges.txt": two_files,
    "OpenAI's of 2021": openai,
    "OpenAI's of 2021 with tokenizer.json": lambda f, m: one_file(
        openai(f, m),
        m,
        {"model": {**m, "type": "BPE", "end_of_word_suffix": "</w>", "merges": [" ".join(p) for p in m["merges"]]}},
        **OLD,
    ),
    "as transformers 5 writes it": saved_by_transformers,
    "tokenizer.json alone": lambda f, m: one_file(f, m, {}),
    "tokenizer.json without a template": lambda f, m: one_file(f, m, {"post_processor": None}, add_bos_token=True),
    "tokenizer.json with padding": lambda f, m: one_file(f, m, {"padding": PADDING}),
    "tokenizer.json with padding, and null": lambda f, m: one_file(f, m, {"padding": PADDING}, pad_token=None),
    "tokenizer.json beside the two files": lambda f, m: one_file(
        two_files(f, {**m, "merges": []}), m, {}, tokenizer_class="CLIPTokenizerFast"
    ),
    "tokenizer.json as it is": lambda f, m: one_file(f, m, {}, tokenizer_class="PreTrainedTokenizerFast"),
    "padded with !": lambda f, m: openai(f, m, pad_token="!"),
    "padded with ! of tokenizer.json": lambda f, m: one_file(f, m, {}, pad_token="!"),
    "no padding token": lambda f, m: two_files(f, m, pad_token=None),
    "a padding token of its own": lambda f, m: two_files(f, m, pad_token="<pad>"),
    "other ends": lambda f, m: two_files(f, m, bos_token="<s>", eos_token=token("</s>", normalized=False)),
    "no unknown token": lambda f, m: two_files(f, m, unk_token=None),
    "a byte missing": lambda f, m: two_files(f, lacking(m, "e")),
    "added_tokens_decoder": lambda f, m: two_files(f, m, added_tokens_decoder=added(m)),
    "added_tokens_decoder and tokenizer.json": lambda f, m: one_file(f, m, {}, added_tokens_decoder=added(m)),
    "added_tokens.json": lambda f, m: write(
        two_files(f, m), "clip", added_tokens={"漢字": len(m["vocab"]), "I've": len(m["vocab"]) + 1}
    ),
    "special tokens of its own": lambda f, m: two_files(
        f, m, additional_special_tokens=["#tag", "ok"], image_token="☃"
    ),
    "special tokens are split": lambda f, m: two_files(f, m, split_special_tokens=True),
    "BOS and EOS are not asked for": lambda f, m: two_files(f, m, add_bos_token=False, add_eos_token=False),
    "do_lower_case is false": lambda f, m: two_files(f, m, do_lower_case=False, add_prefix_space=True),
    "spaces cleaned up": lambda f, m: two_files(
        f,
        m,
        clean_up_tokenization_spaces=True,
        clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=True,
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_equal_transformers(name: str, trained: dict[str, Any], tmp_path: Path) -> None:
    folder = FOLDERS[name](tmp_path, trained)
    ours, theirs = encoder_of(folder), AutoTokenizer.from_pretrained(folder)
    assert type(theirs).__name__ == ("TokenizersBackend" if name.endswith("as it is") else "CLIPTokenizer")
    expected = theirs(LINES)["input_ids"]
    ends = theirs("")["input_ids"]
    said = [(line, ids) for line, ids in zip(LINES, expected, strict=True) if len(ids) > len(ends)]
    assert len(said) > 900  # the others are control characters, which no token stands for
    batch = ours.encode([line for line, _ in said], truncate=ours.max_tokens < 1000)
    for (line, ids), row in zip(said, batch.rows, strict=True):
        if len(ids) > ours.max_tokens:
            ids = theirs(line, truncation=True)["input_ids"]
            assert len(ids) == ours.max_tokens
        assert row.ids == ids, repr(line)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
    firsts, seconds = ([line for line, _ in said[start : start + 20]] for start in (0, 20))
    pairs = theirs(firsts, seconds)["input_ids"]
    assert [row.ids for row in ours.encode(firsts, seconds, truncate=False).rows] == pairs
    assert (ours.spec.pad_token, ours.vocab_size) == (theirs.pad_token, len(theirs))
    assert ours.spec.pad_id == (0 if theirs.pad_token is None else theirs.pad_token_id)


def test_any_ids_decode_as_in_transformers(trained: dict[str, Any], tmp_path: Path) -> None:
    """Bytes in no order: half characters, blanks at either end, the end of a word without a word."""
    folder = two_files(tmp_path, trained)
    ours, theirs, rng = encoder_of(folder), AutoTokenizer.from_pretrained(folder), random.Random(5)
    blanks = [trained["vocab"][sign] for sign in pre_tokenizers.ByteLevel(use_regex=False).pre_tokenize_str(
        " \t\n\v\f\r\x1c\x1d\x1e\x1f\x85\u00a0\u2003\u3000\u200b")[0][0]]  # fmt: skip
    for _ in range(2000):
        among = blanks if rng.random() < 0.5 else range(len(trained["vocab"]))
        ids = [rng.choice(among) for _ in range(rng.randint(0, 12))]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), ids
        detokenizer = ours.detokenizer()
        assert "".join([*map(detokenizer.add, ids), detokenizer.end()]) == ours.decode(ids), ids


def test_lower_case_words_between_bos_and_eos(trained: dict[str, Any], tmp_path: Path) -> None:
    ours = encoder_of(two_files(tmp_path, trained))
    v = trained["vocab"]
    batch = ours.encode(["B2 \t\n '", "Ñ"], truncate=False)
    b, two, quote, c3, b1 = (v[token] for token in ("b</w>", "2</w>", "'</w>", "Ã", "±</w>"))  # ñ is C3 B1 in UTF-8
    assert batch.input_ids.tolist() == [[v[START], b, two, quote, v[END]], [v[START], c3, b1, v[END], v[END]]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert not batch.token_type_ids.any()
    assert ours.decode(batch.input_ids[0].tolist()) == "b 2 '"
    with pytest.raises(InputError, match="text 0, '', has no tokens"):
        ours.encode([""], truncate=True)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("limit", [None, 77, 1e30])
def test_a_long_text_keeps_both_ends(limit: float | None, side: str, trained: dict[str, Any], tmp_path: Path) -> None:
    said = {} if limit is None else {"model_max_length": limit}
    folder = two_files(tmp_path, trained, truncation_side=side, **said)
    ours, theirs = encoder_of(folder, 77), AutoTokenizer.from_pretrained(folder)
    texts = ["a b c " * 1000, "a " * 75, "b " * 76, "hello"]
    expected = theirs(texts, truncation=True, max_length=77, padding=True)
    batch = ours.encode(texts, truncate=True)
    assert batch.input_ids.shape == (4, 77)
    assert batch.input_ids.tolist() == expected["input_ids"]
    assert batch.attention_mask.tolist() == expected["attention_mask"]
    assert batch.input_ids[0, [0, 76]].tolist() == [trained["vocab"][START], trained["vocab"][END]]
    with pytest.raises(ShapeError, match="text 0 is 3002 tokens, 2 of them special; at most 77 fit"):
        ours.encode(texts, truncate=False)


@pytest.mark.parametrize("pad", [END, "!", "<pad>"])
def test_padding_is_as_in_transformers(pad: str, trained: dict[str, Any], tmp_path: Path) -> None:
    folder = openai(tmp_path, trained, pad_token=pad)
    ours, theirs = encoder_of(folder), AutoTokenizer.from_pretrained(folder)
    expected = theirs(["a b c", "a"], padding=True)
    batch = ours.encode(["a b c", "a"], truncate=False)
    assert batch.input_ids.tolist() == expected["input_ids"]
    assert batch.attention_mask.tolist() == expected["attention_mask"] == [[1] * 5, [1] * 3 + [0] * 2]
    assert (
        batch.input_ids[1, 3:].tolist()
        == [{END: len(trained["vocab"]) - 1, "!": 0}.get(pad, len(trained["vocab"]))] * 2
    )


def test_a_very_long_text_takes_no_longer_than_it_should(trained: dict[str, Any], tmp_path: Path) -> None:
    """No expression of ours looks at a character more than a few times: half a megabyte of the worst lines."""
    ours = encoder_of(two_files(tmp_path, trained), 77)
    for text in (" " * 500_000 + "a", "'" * 500_000, "a" * 500_000, "<|" * 250_000, "\u0301" * 500_000):
        assert ours.encode([text], truncate=True).input_ids.shape[1] in (3, 77)
    blank = [trained["vocab"]["Ġ"]] * 200_000
    assert ours.decode([trained["vocab"]["a"], *blank, trained["vocab"]["b"], *blank]) == "a" + " " * 200_000 + "b"


# ---- bad checkpoints


def without(name: str) -> Callable[[Path, dict[str, Any]], Path]:
    def make(folder: Path, model: dict[str, Any]) -> Path:
        two_files(folder, model)
        (folder / name).unlink()
        return folder

    return make


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (without("merges.txt"), "neither tokenizer.json nor merges.txt, which CLIPTokenizer is made of"),
        (without("vocab.json"), "neither tokenizer.json nor vocab.json, which CLIPTokenizer is made of"),
        (lambda f, m: two_files(f, m, bos_token=None), "bos_token is null, which CLIP's tokenizer cannot do without"),
        (lambda f, m: two_files(f, m, eos_token=None), "eos_token is null, which CLIP's tokenizer cannot do without"),
        (lambda f, m: two_files(f, m, eos_token=3), "eos_token is 3, expected a token"),
        (lambda f, m: two_files(f, {**m, "vocab": {"a": 0, "b": 2}}), "vocab.json has no token with the id 1"),
        (lambda f, m: two_files(f, {**m, "merges": [["a", "zz9"]]}), "out of vocabulary"),
        (lambda f, m: one_file(f, m, {"model": WORD_LEVEL}), "holds a WordLevel model and CLIPTokenizer takes BPE"),
        (
            lambda f, m: one_file(f, m, {"normalizer": {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}}),
            "",
        ),
        (lambda f, m: two_files(f, lacking(m, "1"), unk_token=None), "Unk token"),
    ],
)
def test_files_that_cannot_be_used(
    make: Callable[[Path, dict[str, Any]], Path], said: str, trained: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as caught:
        tokenizer_of(make(tmp_path, trained), 77)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [two_files, lambda folder, model: one_file(folder, model, {})])
def test_a_vocabulary_beyond_the_embedding_table(make: Any, trained: dict[str, Any], tmp_path: Path) -> None:
    rows = len(trained["vocab"])
    make(tmp_path, trained)
    assert tokenizer_of(tmp_path, 77, rows) is not None
    with pytest.raises(
        CheckpointError, match=rf"json has ids up to {rows - 1}, the model's are 0\.\.{rows - 2}; it is"
    ):
        tokenizer_of(tmp_path, 77, rows - 1)
