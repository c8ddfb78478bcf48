"""Marian's tokenizers: ids and decoded text equal transformers' MarianTokenizer's over 1,000 awkward lines.

The .spm files are trained here, as Marian's are: unigram, no bytes for what is unknown, and vocab.json written as
its converter does.
"""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, MarianTokenizer

from tokenizer_cases import LIMIT, LINES, encoder_of, target_tokenizer_of, tokenizer_of, write
from transom.export.processors import marian
from transom.export.processors.marian import read_spm
from transom.export.processors.tokenizer import TokenizerFiles, read_target_tokenizer, read_tokenizer
from transom.runtime.errors import BundleError, CheckpointError, InputError
from transom.runtime.text.marian import MarianSpec
from transom.runtime.text.tokenizer import TextTokenizer
from transom.runtime.text.tokenizer_spec import TokenizerSpec

# It is never called when a text is tokenized
pytestmark = pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
ENGLISH = (files("transom.export") / "data/passage.txt").read_text(encoding="utf-8").splitlines()


def train(lines: list[str], **options: Any) -> bytes:
    """An .spm file. Characters that are rarer than 2 % of the text are unknown to it."""
    model = io.BytesIO()
    options = {"vocab_size": 400, "character_coverage": 0.98, "hard_vocab_limit": False, **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in lines if line.strip()]),
        model_writer=model,
        minloglevel=2,
        num_threads=1,
        **options,
    )
    return model.getvalue()


def pieces(model: bytes) -> list[str]:
    opened = sentencepiece.SentencePieceProcessor(model_proto=model)
    return [opened.id_to_piece(number) for number in range(opened.get_piece_size())]


def changed(model: bytes, before: bytes, after: bytes) -> bytes:
    assert before in model
    return model.replace(before, after, 1)


def numbered(*models: bytes, extra: tuple[str, ...] = ()) -> dict[str, int]:
    """vocab.json as Marian's converter writes it: </s>, <unk>, the pieces, codes of languages, <pad>."""
    own = sorted({piece for model in models for piece in pieces(model)} - {"<s>", "</s>", "<unk>"})
    return {token: number for number, token in enumerate(["</s>", "<unk>", *own, *extra, "<pad>"])}


@pytest.fixture(scope="module")
def english() -> bytes:
    return train(ENGLISH)


@pytest.fixture(scope="module")
def others() -> bytes:
    return train(LINES)


@pytest.fixture(scope="module")
def by_rule() -> dict[str, bytes]:
    """Normalisers other than nmt_nfkc, and the switches that Marian leaves as they are."""
    changes: dict[str, dict[str, Any]] = {
        "nmt_nfkc_cf": {"normalization_rule_name": "nmt_nfkc_cf"},
        "identity": {"normalization_rule_name": "identity"},
        "a space behind": {"treat_whitespace_as_suffix": True},
        "no space in front": {"add_dummy_prefix": False},
        "spaces as they come": {"remove_extra_whitespaces": False},
    }
    return {name: train(LINES[:600], **options) for name, options in changes.items()}


def save(folder: Path, source: bytes, target: bytes, vocabulary: dict[str, int], **config: Any) -> Path:
    write(folder, "marian", vocab=vocabulary, **({"tokenizer_config": config} if config else {}))
    (folder / "source.spm").write_bytes(source)
    (folder / "target.spm").write_bytes(target)
    return folder


ADDED = {
    "0": {"content": "</s>", "special": True, "lstrip": True, "rstrip": True},
    "7": {"content": "hello", "special": False, "single_word": True},
    "3000": {"content": "Wo", "special": False},
    "3001": {"content": "World", "special": True, "rstrip": True},
    "3002": {"content": "orl", "special": False, "lstrip": True},
}

# name -> the folder's files, from the .spm of a passage of English and that of the awkward lines themselves
FOLDERS: dict[str, Callable[[Path, bytes, bytes], Path]] = {
    "both languages in one vocabulary": lambda f, e, o: save(f, e, o, numbered(e, o)),
    "the other way round": lambda f, e, o: save(f, o, e, numbered(e, o)),
    "pieces missing from the vocabulary": lambda f, e, o: save(f, o, e, numbered(e)),
    "codes of languages": lambda f, e, o: save(f, e, o, numbered(e, o, extra=(">>fr<<", ">>cmn_Hans<<"))),
    "added_tokens_decoder": lambda f, e, o: save(f, o, e, numbered(e, o), added_tokens_decoder=ADDED),
    "added_tokens.json": lambda f, e, o: write(
        save(f, o, e, numbered(e, o)), "marian", added_tokens={"漢字": 2000, "I've": 2001}
    ),
    "special tokens of its own": lambda f, e, o: save(
        f,
        o,
        e,
        numbered(e, o),
        bos_token="<s>",
        mask_token="[MASK]",
        extra_special_tokens=["#tag", "e"],
        image_token="№",
    ),
    "special tokens are split": lambda f, e, o: save(f, o, e, numbered(e, o), split_special_tokens=True),
    "spaces are cleaned up": lambda f, e, o: save(f, o, e, numbered(e, o), clean_up_tokenization_spaces=True),
    "the class is named": lambda f, e, o: save(f, e, o, numbered(e, o), tokenizer_class="MarianTokenizer"),
}


def unlimited(folder: Path, read: Any = tokenizer_of) -> TextTokenizer:
    """Marian's 512 tokens, lifted: some lines are longer."""
    data, spec = read(folder, LIMIT)
    return TextTokenizer(data, replace(spec, max_length=LIMIT), LIMIT)


def compare(folder: Path, lines: list[str]) -> tuple[TextTokenizer, Any]:
    """Ids line by line, then decoded text of those ids and of random ones."""
    ours, theirs = unlimited(folder), AutoTokenizer.from_pretrained(folder)
    assert isinstance(theirs, MarianTokenizer)
    bare = theirs("")["input_ids"]
    for line in lines:
        expected = theirs(line)["input_ids"]
        if expected == bare:
            with pytest.raises(InputError, match="has no tokens"):
                ours.encode([line], truncate=False)
            continue
        assert ours.encode([line], truncate=False).rows[0].ids == expected, repr(line)
    rng = random.Random(3)
    tokens = sorted({*theirs.decoder, *theirs.added_tokens_decoder})
    rows = [theirs(line)["input_ids"] for line in lines[::5]]
    rows += [rng.choices([*tokens, *range(12), *tokens[-8:] * 9], k=rng.randint(0, 12)) for _ in range(400)]
    marked = [number for token, number in theirs.encoder.items() if token.startswith("▁")][:6]
    rows += [rng.choices([*marked, *marked, *theirs.all_special_ids], k=8) for _ in range(200)]
    for ids in rows:
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), ids
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids), ids
    return ours, theirs


@pytest.mark.parametrize("name", FOLDERS)
def test_ids_and_text_equal_transformers(name: str, english: bytes, others: bytes, tmp_path: Path) -> None:
    folder = FOLDERS[name](tmp_path, english, others)
    ours, theirs = compare(folder, LINES)
    assert (ours.spec.pad_token, ours.spec.pad_id) == (theirs.pad_token, theirs.pad_token_id)
    assert (ours.spec.mask_token, ours.vocab_size) == (theirs.mask_token, len(theirs))
    assert target_tokenizer_of(folder, LIMIT) is None


@pytest.mark.parametrize(
    "name", ["nmt_nfkc_cf", "identity", "a space behind", "no space in front", "spaces as they come"]
)
def test_other_normalisers(name: str, by_rule: dict[str, bytes], english: bytes, tmp_path: Path) -> None:
    folder = save(tmp_path, by_rule[name], english, numbered(by_rule[name], english))
    compare(folder, LINES)


def test_two_vocabularies(english: bytes, others: bytes, tmp_path: Path) -> None:
    """With separate_vocabs the answer has ids and pieces of its own, special tokens those of the source."""
    own = {token: number for number, token in enumerate(reversed(numbered(others)))}
    folder = save(tmp_path, english, others, numbered(english), separate_vocabs=True)
    (folder / "target_vocab.json").write_text(json.dumps(own))
    theirs = AutoTokenizer.from_pretrained(folder)
    source, target = unlimited(folder), unlimited(folder, target_tokenizer_of)
    assert (source.spec.file, target.spec.file) == ("marian.json", "marian_target.json")
    for line in LINES:
        expected = theirs(text_target=line)["input_ids"]
        if len(expected) > 1:
            assert target.encode([line], truncate=False).rows[0].ids == expected, repr(line)
    rng = random.Random(4)
    for _ in range(500):
        ids = rng.choices([*own.values(), 0, 1, len(own) - 1], k=rng.randint(0, 12))
        assert target.decode(ids) == theirs.decode(ids, skip_special_tokens=True), ids
        assert target.decode(ids, skip_special_tokens=False) == theirs.decode(ids), ids
    assert [row.ids for row in source.encode(LINES[:9], truncate=False).rows] == theirs(LINES[:9])["input_ids"]


def test_both_tokenizers_of_a_translator_share_what_is_read(
    english: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, read = save(tmp_path, english, english, numbered(english), separate_vocabs=True), []
    (folder / "target_vocab.json").write_text(json.dumps(numbered(english)))
    monkeypatch.setattr(marian, "read_spm", lambda path: read.append(path.name) or read_spm(path))
    files = TokenizerFiles(folder)
    assert read_tokenizer(files, 512) != read_target_tokenizer(files, 512)
    assert read == ["source.spm", "target.spm"]


@settings(max_examples=300, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text(text: str, shared: tuple[TextTokenizer, Any]) -> None:
    ours, theirs = shared
    expected = theirs(text)["input_ids"]
    if len(expected) > 1:
        assert ours.encode([text], truncate=False).rows[0].ids == expected


@pytest.fixture(scope="module")
def shared(english: bytes, others: bytes, tmp_path_factory: pytest.TempPathFactory) -> tuple[TextTokenizer, Any]:
    folder = save(tmp_path_factory.mktemp("marian"), others, english, numbered(english, others))
    return unlimited(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_long_text_is_cut_before_the_end(side: str, shared: tuple[TextTokenizer, Any]) -> None:
    ours, theirs = shared
    theirs.truncation_side = side
    expected = theirs("one two three", truncation=True, max_length=4)["input_ids"]
    theirs.truncation_side = "right"
    data = json.dumps(ours._tokenizer.spec.to_json()).encode()
    cut = TextTokenizer(data, replace(ours.spec, truncation_side=side), 4)
    assert cut.encode(["one two three"], truncate=True).input_ids.tolist() == [expected]
    assert (len(expected), expected[-1]) == (4, 0)


def test_the_checkpoint_says_how_long(english: bytes, tmp_path: Path) -> None:
    folder = save(tmp_path, english, english, numbered(english))
    assert encoder_of(folder).spec.max_length == 512
    assert encoder_of(write(folder, "marian", tokenizer_config={"model_max_length": 1e30})).spec.max_length == LIMIT


# ---- bad checkpoints


def test_files_that_are_missing(english: bytes, tmp_path: Path) -> None:
    for name in ("source.spm", "target.spm", "vocab.json", "target_vocab.json"):
        folder = save(tmp_path / name, english, english, numbered(english), separate_vocabs=True)
        (folder / name).unlink(missing_ok=True)
        read = target_tokenizer_of if name == "target_vocab.json" else tokenizer_of
        with pytest.raises(CheckpointError, match=rf"{name} is missing"):
            read(folder, 512)


def test_spm_files_that_cannot_be_used(english: bytes, tmp_path: Path) -> None:
    for number, (damaged, said) in enumerate(
        [
            (b"", "is no SentencePiece model"),
            (b"nothing of the kind", "is no SentencePiece model"),
            (english[:-2000], "is no SentencePiece model"),
            (english[: len(english) // 2], "is no SentencePiece model"),
            (changed(english, b"\n\x03\xe2\x96\x81\x15", b"\n\x03\xff\x96\x81\x15"), "has a piece that is no UTF-8"),
            (train(LINES, model_type="bpe"), "is a BPE model, expected a unigram model"),
            (train(LINES, model_type="char"), "is a character model, expected a unigram model"),
            (train(LINES, byte_fallback=True, vocab_size=700), "has bytes for unknown characters"),
            (train(LINES, user_defined_symbols=["<sep>"]), "has user-defined pieces"),
        ]
    ):
        for sides in ((damaged, english), (english, damaged)):
            with pytest.raises(CheckpointError) as caught:
                tokenizer_of(save(tmp_path / str(number), *sides, numbered(english)), 512)
            assert said in str(caught.value)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("vocabulary", "config", "said"),
    [
        ({}, {}, "vocab.json has no tokens"),
        ({"</s>": 0}, {}, "vocab.json has no '<unk>', the unknown token"),
        ({"</s>": 0, "<unk>": 2}, {}, "vocab.json has no token with the id 1"),
        ({"</s>": 0, "<unk>": 0}, {}, "vocab.json has the id 0 twice"),
        ({"</s>": 0, "<unk>": 1.0}, {}, "the id 1.0, expected an integer"),
        ({"</s>": 0, "<unk>": 1}, {"sp_model_kwargs": {"enable_sampling": True}}, "sp_model_kwargs is {'enable"),
        ({"</s>": 0, "<unk>": 1}, {"eos_token": None}, "eos_token is null"),
        (
            {str(number): number for number in range(11)} | {"<unk>": 11},
            {},
            "ids up to 11, the model's are 0..9",
        ),
    ],
    ids=range(8),
)
def test_settings_that_cannot_be_used(
    vocabulary: dict[str, Any], config: dict[str, Any], said: str, english: bytes, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as caught:
        tokenizer_of(save(tmp_path, english, english, vocabulary, **config), 512, 10)
    assert said in str(caught.value)


def test_a_vocabulary_that_is_no_object(english: bytes, tmp_path: Path) -> None:
    save(tmp_path, english, english, [])  # type: ignore[arg-type]
    (tmp_path / "vocab.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"vocab\.json holds a JSON list, expected an object"):
        tokenizer_of(tmp_path, 512)


def test_without_the_library_the_files_are_not_to_blame(
    english: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ImportError, match="sentencepiece"):
        tokenizer_of(save(tmp_path, english, english, numbered(english)), 512)


def test_the_runtime_needs_no_sentencepiece(english: bytes, tmp_path: Path) -> None:
    found = tokenizer_of(save(tmp_path, english, english, numbered(english)), 512)
    assert found is not None
    (tmp_path / "file").write_bytes(found[0])
    code = f"""
import json, sys
sys.modules.update(sentencepiece=None, tokenizers=None)
from transom.runtime.text.tokenizer import TextTokenizer
from transom.runtime.text.tokenizer_spec import TokenizerSpec
spec = TokenizerSpec.from_json({found[1].to_json()!r})
tokenizer = TextTokenizer(open({str(tmp_path / "file")!r}, "rb").read(), spec, 512)
print(json.dumps(tokenizer.encode(["Ann met him"], truncate=False).input_ids.tolist()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert (
        json.loads(done.stdout) == TextTokenizer(*found, 512).encode(["Ann met him"], truncate=False).input_ids.tolist()
    )


# ---- bad bundles


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocabulary": {}}, "vocabulary is {}"),
        ({"vocabulary": {"a": -1}}, "vocabulary is"),
        ({"vocabulary": {"": 1}}, "vocabulary is"),
        ({"vocabulary": {"\ud800": 1}}, "vocabulary is"),
        ({"added": [{"content": "", "id": 1}]}, "added[0].content is '', expected a token; "),
        ({"added": [3]}, "added[0] is a int, expected an object"),
        ({"surfaces": {"<s>": 0}}, "surfaces is"),
        ({"eos_token": "nowhere"}, "eos_token 'nowhere' is not in the vocabulary"),
        ({"unk_token": 3}, "unk_token is 3, expected a token"),
        ({"unigram": []}, "unigram is [], expected an object"),
        ({"more": 1}, "has the unknown key 'more'"),
        ({"unigram.pieces": {"a": 1e31}}, "unigram.pieces is"),
        ({"unigram.pieces": {"": -1.0}}, "unigram.pieces is"),
        ({"unigram.pieces": {"a": True}}, "unigram.pieces is"),
        ({"unigram.unknown_score": "low"}, "unigram.unknown_score is 'low'"),
        ({"unigram.charsmap": "not base64"}, "unigram.charsmap is 'not base64', expected base64"),
        ({"unigram.charsmap": "AAAA"}, "the charsmap has 3 bytes and a trie of 0"),
        ({"unigram.charsmap": "/////wAA"}, "the charsmap has 6 bytes and a trie of 4294967295"),
        ({"unigram.add_dummy_prefix": 1}, "unigram.add_dummy_prefix is 1, expected true or false"),
    ],
    ids=str,
)
def test_a_hostile_file(change: dict[str, Any], said: str, shared: tuple[TextTokenizer, Any]) -> None:
    stored = shared[0]._tokenizer.spec.to_json()
    for key, value in change.items():
        *within, last = key.split(".")
        (stored[within[0]] if within else stored)[last] = value
    with pytest.raises(BundleError) as caught:
        TextTokenizer(json.dumps(stored).encode(), shared[0].spec, 512)
    assert said in str(caught.value)


def test_rules_that_lead_nowhere_raise_nothing(shared: tuple[TextTokenizer, Any]) -> None:
    """A trie of noise: whatever it makes of a text, it ends, and it is text."""
    import base64

    rng = random.Random(5)
    ours, _ = shared
    for _ in range(50):
        noise = (400).to_bytes(4, "little") + rng.randbytes(400) + rng.randbytes(30)
        spec = ours._tokenizer.spec
        wild = replace(spec, unigram=replace(spec.unigram, charsmap=base64.b64encode(noise).decode()))
        encoder = TextTokenizer(json.dumps(wild.to_json()).encode(), ours.spec, 512)
        assert encoder.encode(["x y z " + "".join(map(chr, range(1, 200)))], truncate=True).input_ids.size > 0


def test_the_file_reads_back_to_the_same(shared: tuple[TextTokenizer, Any]) -> None:
    spec = shared[0]._tokenizer.spec
    assert MarianSpec.from_bytes(json.dumps(spec.to_json()).encode(), "marian.json") == spec
    assert TokenizerSpec.from_json(shared[0].spec.to_json()).kind == "marian"
