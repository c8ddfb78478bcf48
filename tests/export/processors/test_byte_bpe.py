"""GPT-2's tokenizers: ids equal transformers' AutoTokenizer's over 1,000 awkward lines, and so does decoded text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from tokenizer_cases import LINES, encoder_of, tokenizer_of, write
from transom.runtime.errors import CheckpointError, InputError

END = "<|endoftext|>"


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    """The ``model`` of a tokenizer.json: 256 bytes, about 340 merges, and <|endoftext|> last, as in GPT-2's files."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=599, initial_alphabet=alphabet))
    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    model["vocab"][END] = len(model["vocab"])
    return model


def two_files(folder: Path, model: dict[str, Any], **config: Any) -> Path:
    """vocab.json and merges.txt, and tokenizer_config.json where there is something to say."""
    merges = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    write(folder, "gpt2", vocab=model["vocab"], **({"tokenizer_config": config} if config else {}))
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    return folder


def one_file(folder: Path, model: dict[str, Any], changes: dict[str, Any], **config: Any) -> Path:
    """tokenizer.json, of which ``changes`` replaces parts, and tokenizer_config.json."""
    tokenizer = Tokenizer(models.BPE(model["vocab"], [tuple(pair) for pair in model["merges"]]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # what the config says counts
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([END])
    stored = {**json.loads(tokenizer.to_str()), **changes}
    return write(folder, "gpt2", tokenizer=stored, **({"tokenizer_config": config} if config else {}))


def template(*parts: dict[str, Any]) -> dict[str, Any]:
    special = {END: {"id": END, "ids": [599], "tokens": [END]}}
    pair = [*parts, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": [*parts], "pair": pair, "special_tokens": special}


A = {"Sequence": {"id": "A", "type_id": 0}}
ADDED = {
    "599": {"content": END, "special": True, "normalized": False, "lstrip": True},
    "600": {"content": "hello", "special": False, "normalized": True, "single_word": True},
    "601": {"content": "<|new|>", "special": True, "rstrip": True},
    "602": {"content": " ", "special": False},
}
BANG = {"__type": "AddedToken", "content": "!"}
WORDS = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
PADDING = {
    "strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": None, "pad_id": 3, "pad_type_id": 0,
    "pad_token": "x",
}  # fmt: skip


def lacking(model: dict[str, Any], character: str) -> dict[str, Any]:
    """The model without a byte: what it cannot write is left out, since GPT-2's model has no unknown token."""
    tokens = [token for token in model["vocab"] if character not in token]
    merges = [pair for pair in model["merges"] if character not in "".join(pair)]
    return {**model, "vocab": {token: number for number, token in enumerate(tokens)}, "merges": merges}


# name -> the folder's files; each is compared with AutoTokenizer on every line
FOLDERS: dict[str, Callable[[Path, dict[str, Any]], Path]] = {
    "vocab.json and merges.txt": two_files,
    "a byte missing": lambda f, m: two_files(f, lacking(m, "e"), unk_token="a"),
    "a space in front": lambda f, m: two_files(f, m, add_prefix_space=True),
    "BOS": lambda f, m: two_files(f, m, add_bos_token=True),
    "BOS and EOS of their own": lambda f, m: two_files(
        f, m, add_bos_token=True, add_eos_token=True, bos_token="<s>", eos_token=BANG
    ),
    "BOS is null": lambda f, m: two_files(f, m, add_bos_token=True, bos_token=None),
    "a padding token": lambda f, m: two_files(f, m, pad_token="<pad>", unk_token=None),
    "padded with the end": lambda f, m: two_files(f, m, pad_token=END, tokenizer_class="GPT2Tokenizer"),
    "added_tokens_decoder": lambda f, m: two_files(f, m, added_tokens_decoder=ADDED),
    "special tokens are split": lambda f, m: two_files(f, m, split_special_tokens=True),
    "added_tokens.json": lambda f, m: write(two_files(f, m), "gpt2", added_tokens={"漢字": 600, "I've": 601}),
    "special_tokens_map.json": lambda f, m: write(
        two_files(f, m),
        "gpt2",
        special_tokens_map={"bos_token": {"content": "<s>", "lstrip": True}, "additional_special_tokens": ["#tag"]},
    ),
    "tokenizer.json is rebuilt": lambda f, m: one_file(f, m, {}),
    "tokenizer.json and a space in front": lambda f, m: one_file(f, m, {}, add_prefix_space=True),
    "tokenizer.json beside the two files": lambda f, m: one_file(
        two_files(f, {**m, "merges": []}), m, {}, tokenizer_class="GPT2TokenizerFast"
    ),
    "tokenizer.json with merges as text": lambda f, m: one_file(
        f, m, {"model": {**m, "merges": [" ".join(pair) for pair in m["merges"]]}}
    ),
    "tokenizer.json with a template": lambda f, m: one_file(
        f, m, {"post_processor": template({"SpecialToken": {"id": END, "type_id": 0}}, A)}
    ),
    "tokenizer.json without a template": lambda f, m: one_file(f, m, {"post_processor": None}, add_bos_token=True),
    "tokenizer.json with padding": lambda f, m: one_file(f, m, {"padding": PADDING}),
    "tokenizer.json and added_tokens_decoder": lambda f, m: one_file(f, m, {}, added_tokens_decoder=ADDED),
    "tokenizer.json as it is": lambda f, m: one_file(f, m, {}, tokenizer_class="PreTrainedTokenizerFast"),
    "spaces cleaned up, but not in BPE": lambda f, m: two_files(f, m, clean_up_tokenization_spaces=True),
    "spaces cleaned up all the same": lambda f, m: two_files(
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
    assert type(theirs).__name__ == ("TokenizersBackend" if name.endswith("as it is") else "GPT2Tokenizer")
    lines = [line for line in LINES if line.strip("eE")] if name == "a byte missing" else LINES
    expected = theirs(lines)["input_ids"]
    batch = ours.encode(lines, truncate=False)
    for line, row, ids in zip(lines, batch.rows, expected, strict=True):
        assert row.ids == ids, repr(line)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
    pairs = theirs(LINES[:50], LINES[50:100])["input_ids"]
    assert [row.ids for row in ours.encode(LINES[:50], LINES[50:100], truncate=False).rows] == pairs
    assert (ours.spec.pad_token, ours.vocab_size) == (theirs.pad_token, len(theirs))
    assert ours.spec.pad_id == (0 if theirs.pad_token is None else theirs.pad_token_id)


def test_no_special_token_is_added_and_none_is_made_up_for_padding(trained: dict[str, Any], tmp_path: Path) -> None:
    ours = encoder_of(two_files(tmp_path, trained, model_max_length=1e30))
    batch = ours.encode(["a", f"a{END}a"], truncate=False)
    a = trained["vocab"]["a"]
    assert batch.input_ids.tolist() == [[a, 0, 0], [a, 599, a]]
    assert batch.attention_mask.tolist() == [[1, 0, 0], [1, 1, 1]]
    assert (ours.spec.pad_token, ours.spec.pad_id, ours.spec.max_length) == (None, 0, 100_000)
    with pytest.raises(InputError, match="text 0, '', has no tokens"):
        ours.encode([""], truncate=True)


def test_a_long_prompt_is_cut_on_the_side_the_checkpoint_says(trained: dict[str, Any], tmp_path: Path) -> None:
    ours = encoder_of(two_files(tmp_path, trained, truncation_side="left", model_max_length=3), 1024)
    assert ours.decode(ours.encode(["0 1 2 3"], truncate=True).input_ids[0].tolist()) == "2 3"[-3:]


# ---- bad checkpoints


def damage(**changes: Any) -> Callable[[Path, dict[str, Any]], Path]:
    return lambda folder, model: two_files(folder, {**model, **changes})


def without(name: str) -> Callable[[Path, dict[str, Any]], Path]:
    def make(folder: Path, model: dict[str, Any]) -> Path:
        two_files(folder, model)
        (folder / name).unlink()
        return folder

    return make


def merges_of(text: str) -> Callable[[Path, dict[str, Any]], Path]:
    def make(folder: Path, model: dict[str, Any]) -> Path:
        two_files(folder, model)
        (folder / "merges.txt").write_text(text)
        return folder

    return make


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (without("merges.txt"), "neither tokenizer.json nor merges.txt"),
        (without("vocab.json"), "neither tokenizer.json nor vocab.json"),
        (damage(vocab={}), "vocab.json has no tokens"),
        (damage(vocab={"a": 0, "b": "1"}), "vocab.json gives 'b' the id '1', expected an integer"),
        (damage(vocab={"a": 0, "b": True}), "vocab.json gives 'b' the id True"),
        (damage(vocab={"a": 0, "b": 2, "c": 1, "d": 2}), "vocab.json has the id 2 twice; expected 0..3, each once"),
        (damage(vocab={"a": 0, "b": 2}), "vocab.json has no token with the id 1"),
        (damage(vocab={"a": -1, "b": 0}), "vocab.json has no token with the id 0"),
        (damage(vocab={"a": 0, "b": 2**40}), "vocab.json has no token with the id 1"),
        (damage(merges=[["a", "\u0120nothing"]]), "out of vocabulary"),
        (merges_of("#version: 0.2\na b c\n"), "Merges text file invalid"),
        (merges_of("a\n"), "Merges text file invalid"),
        (
            lambda f, m: one_file(f, m, {"model": WORDS}),
            "WordLevel",
        ),
        (lambda f, m: one_file(f, m, {"model": {**m, "merges": [["a", "zz9"]]}}), "out of vocabulary"),
        (lambda f, m: two_files(f, m, add_prefix_space="yes"), "TypeError"),
        (lambda f, m: two_files(f, m, bos_token=3), "bos_token is 3, expected a token"),
    ],
)
def test_files_that_cannot_be_used(
    make: Callable[[Path, dict[str, Any]], Path], said: str, trained: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as caught:
        tokenizer_of(make(tmp_path, trained), 512)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [two_files, lambda folder, model: one_file(folder, model, {})])
def test_a_vocabulary_beyond_the_embedding_table(make: Any, trained: dict[str, Any], tmp_path: Path) -> None:
    make(tmp_path, trained)
    assert tokenizer_of(tmp_path, 512, 600) is not None
    with pytest.raises(CheckpointError, match=r"json has ids up to 599, the model's are 0\.\.598; it is"):
        tokenizer_of(tmp_path, 512, 599)


def test_a_token_that_was_added_may_be_beyond_the_table(trained: dict[str, Any], tmp_path: Path) -> None:
    """As where a token for padding was added and never trained with."""
    two_files(tmp_path, trained, pad_token="<pad>")
    found = tokenizer_of(tmp_path, 512, 600)
    assert found is not None
    assert found[1].pad_id == 600
