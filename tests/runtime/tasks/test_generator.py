"""Test the tasks of bundles that generate: kinds of arguments, streams, scores, and bad input."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
import transformers
from numpy.typing import NDArray
from tokenizers import pre_tokenizers

from transom.export import pipeline
from transom.runtime import load
from transom.runtime.errors import InputError
from transom.runtime.tasks.gpt import GPT

# transformers says so where it loads a Marian tokenizer; it is never called when a text is tokenized
pytestmark = pytest.mark.filterwarnings("ignore:Recommended. pip install sacremoses")
MakeCheckpoint = Callable[..., Path]
Once = Callable[[str, Callable[[Path], object]], Path]
Exported = Callable[..., tuple[Path, Path]]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
END = "<|endoftext|>"


@pytest.fixture(scope="module")
def gpt_folder(once: Once, make_checkpoint: MakeCheckpoint) -> Path:
    """GPT-2 over single bytes: no merges, so that a text has as many tokens as bytes. Of at most 4 rows a call."""

    def make(folder: Path) -> None:
        made = make_checkpoint("GPT2LMHeadModel", vocab_size=257, eos_token_id=256)
        checkpoint = Path(shutil.copytree(made, folder / "checkpoint"))
        vocabulary = {character: number for number, character in enumerate(BYTES)} | {END: 256}
        (checkpoint / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
        (checkpoint / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
        pipeline.export(str(checkpoint), folder / "bundle", max_sizes={"B": 4})

    return once("gpt-of-bytes", make)


@pytest.fixture(scope="module")
def gpt(gpt_folder: Path) -> Iterator[Any]:
    with load(gpt_folder / "bundle", threads=1) as bundle:
        yield bundle


@pytest.fixture(scope="module")
def gpt_theirs(gpt_folder: Path) -> Any:
    return transformers.GPT2LMHeadModel.from_pretrained(gpt_folder / "checkpoint")


@pytest.fixture(scope="module")
def marian_folder(once: Once, make_checkpoint: MakeCheckpoint) -> Path:
    def make(folder: Path) -> None:
        lines = (files("transom.export") / "data/passage.txt").read_text(encoding="utf-8").splitlines()
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(line for line in lines if line.strip()), model_writer=model, minloglevel=2,
            num_threads=1, vocab_size=200, hard_vocab_limit=False,
        )  # fmt: skip
        opened = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        own = [opened.id_to_piece(number) for number in range(opened.get_piece_size())]
        vocabulary = ["</s>", "<unk>", *sorted(set(own) - {"<s>", "</s>", "<unk>"}), "<pad>"]
        pad = len(vocabulary) - 1
        made = make_checkpoint("MarianMTModel", vocab_size=pad + 1, pad_token_id=pad, decoder_start_token_id=pad)
        checkpoint = Path(shutil.copytree(made, folder / "checkpoint"))
        (checkpoint / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
        for side in ("source", "target"):
            (checkpoint / f"{side}.spm").write_bytes(model.getvalue())
        settings = json.loads((checkpoint / "generation_config.json").read_text())
        settings |= {"num_beams": 3, "bad_words_ids": [[pad]], "max_length": 30}
        (checkpoint / "generation_config.json").write_text(json.dumps(settings))
        pipeline.export(str(checkpoint), folder / "bundle", max_sizes={"B": 6})

    return once("marian-with-text", make)


@pytest.fixture(scope="module")
def marian(marian_folder: Path) -> Iterator[Any]:
    with load(marian_folder / "bundle", threads=1) as bundle:
        yield bundle


def ids_of(text: str) -> list[int]:
    tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return [BYTES.index(character) for character in tokenizer.pre_tokenize_str(text)[0][0]]


# --------------------------------------------------------------------------------------- generate, stream


def test_answers_come_in_kind(gpt: Any) -> None:
    texts = ["the way", "café 北"]
    rows = [ids_of(text) for text in texts]
    new = gpt.generate(rows, max_new_tokens=9)
    assert [len(row) for row in new] == [9, 9] or 256 in (new[0][-1], new[1][-1])
    assert all(type(token) is int for row in new for token in row)
    one = new[0]
    assert gpt.generate(rows[0], max_new_tokens=9) == one
    assert gpt.generate(tuple(rows[0]), max_new_tokens=9) == one
    assert gpt.generate(np.array(rows[0]), max_new_tokens=9) == one
    assert gpt.generate(np.array(rows[0], np.int16), max_new_tokens=9) == one
    assert gpt.generate([np.int64(token) for token in rows[0]], max_new_tokens=9) == one
    assert gpt.generate([rows[0]], max_new_tokens=9) == [one]  # a list for a list
    assert gpt.generate(np.array([rows[0]]), max_new_tokens=9) == [one]
    assert gpt.generate((tuple(rows[0]), np.array(rows[1])), max_new_tokens=9) == new
    answers = gpt.generate(texts, max_new_tokens=9)
    assert answers == [gpt.tokenizer().decode(row) for row in new]
    assert gpt.generate(texts[0], max_new_tokens=9) == answers[0]
    assert gpt.generate((texts[0],), max_new_tokens=9) == [answers[0]]
    assert gpt.generate(np.array(texts), max_new_tokens=9) == answers


def test_several_sequences_are_a_list_for_each_prompt(gpt: Any) -> None:
    sampled = {"do_sample": True, "seed": 7, "num_return_sequences": 2, "max_new_tokens": 5}
    batch = gpt.generate(["the", "way", "of"], **sampled)  # two rows each: four fit in a call, so there are two calls
    assert [len(answers) for answers in batch] == [2, 2, 2]
    assert all(isinstance(answer, str) for answers in batch for answer in answers)
    assert gpt.generate("the", **sampled) == batch[0]
    assert gpt.generate([5], **sampled) != gpt.generate([5], **{**sampled, "seed": 8})


@pytest.mark.parametrize("prompt", ["the way", "é", "北京 😀"])
def test_a_stream_joined_is_what_generate_gives(gpt: Any, prompt: str) -> None:
    """Random weights write bytes at random: most are no UTF-8, and characters are cut everywhere."""
    for seed in range(4):
        options = {"max_new_tokens": 30, "do_sample": True, "seed": seed, "top_k": 0}
        pieces = list(gpt.stream(prompt, **options))
        assert "".join(pieces) == gpt.generate(prompt, **options)
        assert all(pieces)
        tokens = list(gpt.stream(ids_of(prompt), **options))
        assert tokens == gpt.generate(ids_of(prompt), **options)
        assert all(type(token) is int for token in tokens)


def test_a_stream_gives_each_token_as_it_is_made(gpt: Any) -> None:
    steps, decode_step = [], type(gpt.prefill([[1]]).decoder).decode_step

    def counted(self: Any, tokens: Any) -> Any:
        steps.append(tokens)
        return decode_step(self, tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transom.runtime.decoder.Decoder.decode_step", counted)
        stream = gpt.stream([5, 6], max_new_tokens=4, eos_token_id=None)
        for number, _ in enumerate(stream):
            assert len(steps) == number
    assert len(steps) == 3  # the fourth token is not fed back


def test_greedy_equals_transformers(gpt: Any, gpt_theirs: Any) -> None:
    ids = ids_of("a long way down")
    expected = gpt_theirs.generate(torch.tensor([ids]), max_new_tokens=30, do_sample=False, pad_token_id=256)
    assert gpt.generate(ids, max_new_tokens=30) == expected[0, len(ids) :].tolist()


def test_a_stop_string_that_is_never_met(gpt: Any) -> None:
    free = gpt.generate("the way", max_new_tokens=12)
    assert gpt.generate("the way", max_new_tokens=12, stop_strings="never written") == free
    assert "".join(gpt.stream("the way", max_new_tokens=12, stop_strings=["never", "written"])) == free


def test_the_checkpoints_own_settings_are_the_defaults(gpt: Any) -> None:
    """20 new tokens by default, as transformers; fewer where the context ends."""
    assert len(gpt.generate([5], eos_token_id=None)) == 20
    assert len(gpt.generate([5] * 60, eos_token_id=None)) == 7


# -------------------------------------------------------------------------------------------------- score


def expected_log_probabilities(model: Any, ids: list[int]) -> NDArray[np.float64]:
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    found = logits.log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
    return found.numpy()  # type: ignore[no-any-return]


@pytest.mark.parametrize("text", ["the way down", "é", "ab", "x" * 67])
def test_score_is_the_exponential_of_transformers_loss(gpt: Any, gpt_theirs: Any, text: str) -> None:
    ids = ids_of(text)
    with torch.no_grad():
        loss = float(gpt_theirs(torch.tensor([ids]), labels=torch.tensor([ids])).loss)
    assert gpt.score(text) == pytest.approx(math.exp(loss), rel=1e-5)
    assert gpt.score(ids) == gpt.score(np.array(ids)) == gpt.score(text)
    assert gpt.score([text, "the way"]) == [gpt.score(text), gpt.score("the way")]
    found = gpt.log_probabilities(text)
    assert (found.shape, found.dtype) == ((len(ids) - 1,), np.float64)
    np.testing.assert_allclose(found, expected_log_probabilities(gpt_theirs, ids), atol=1e-5)
    assert gpt.score(text) == pytest.approx(math.exp(-found.mean()), rel=1e-12)


@pytest.mark.parametrize("length", [68, 99, 100, 101, 134, 250])
def test_a_text_longer_than_the_context_is_read_in_windows(gpt: Any, gpt_theirs: Any, length: int) -> None:
    """Windows of 67 begin every 33 tokens; a token is scored in the first that holds it."""
    ids = np.random.default_rng(length).integers(0, 256, length).tolist()
    expected = []
    for token in range(1, length):
        begin = 33 * max(0, math.ceil((token - 67) / 33))
        assert token - begin >= min(token, 33)
        with torch.no_grad():
            logits = gpt_theirs(torch.tensor([ids[begin:token]])).logits[0, -1].double()
        expected.append(float(logits.log_softmax(-1)[ids[token]]))
    np.testing.assert_allclose(gpt.log_probabilities(ids), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("context", "tokens", "windows"),
    [
        (4, 10, [((0, 4), 0), ((2, 6), 2), ((4, 8), 2), ((6, 10), 2)]),
        (4, 5, [((0, 4), 0)]),  # the fifth is predicted by the fourth: one window
        (4, 6, [((0, 4), 0), ((2, 6), 2)]),
        (4, 2, [((0, 2), 0)]),
        (5, 9, [((0, 5), 0), ((2, 7), 3), ((4, 9), 3)]),
        (1, 3, [((0, 1), 0), ((1, 2), 0)]),
    ],
)
def test_windows_by_pencil(
    gpt: Any, monkeypatch: pytest.MonkeyPatch, context: int, tokens: int, windows: list[Any]
) -> None:
    """Tokens are 0, 1, 2, ... and each is "judged" as minus itself: nothing is left out, nothing comes twice."""
    seen = []

    def window(self: GPT, read: Any, following: Any, skip: int, name: str) -> Any:
        seen.append(((int(read[0]), int(read[-1]) + 1), skip))
        assert following.tolist() == [token + 1 for token in read.tolist() if token + 1 < tokens]
        return -following[skip:].astype(np.float64)

    monkeypatch.setattr(GPT, "_window", window)
    monkeypatch.setattr(gpt, "context", context)
    assert gpt.log_probabilities(list(range(tokens))).tolist() == [-float(token) for token in range(1, tokens)]
    assert seen == windows


# ---------------------------------------------------------------------------------------------- translate


TEXTS = ["the old road", "It was a fine day, and they went.", "of"]


def test_translate_equals_transformers(marian: Any, marian_folder: Path) -> None:
    """One sentence alone and three in one batch, greedy and by the checkpoint's three beams."""
    tokenizer = transformers.MarianTokenizer.from_pretrained(marian_folder / "checkpoint")
    theirs = transformers.MarianMTModel.from_pretrained(marian_folder / "checkpoint")
    for options in ({"num_beams": 1}, {}, {"num_beams": 2, "length_penalty": 0.5, "max_new_tokens": 9}):
        expected = []
        for text in TEXTS:
            with torch.no_grad():
                ids = theirs.generate(**tokenizer(text, return_tensors="pt"), **options)
            expected.append(tokenizer.decode(ids[0], skip_special_tokens=True))
        assert marian.translate(TEXTS, **options) == expected
        assert marian.translate(TEXTS[1], **options) == expected[1]
        assert marian.generate(TEXTS, **options) == expected
    assert "".join(marian.stream(TEXTS[1], num_beams=1)) == marian.translate(TEXTS[1], num_beams=1)


def test_a_source_of_ids_is_translated_to_ids(marian: Any) -> None:
    ids = marian.tokenizer().encode([TEXTS[1]], truncate=False).rows[0].ids
    tokens = marian.generate(ids)
    assert marian.target_tokenizer().decode(tokens) == marian.translate(TEXTS[1])
    assert tokens[-1] == 0  # </s>: kept, as transformers keeps it


def test_a_source_that_is_too_long(marian: Any) -> None:
    """transformers' keywords have no ``truncate``, so that no message may advise it."""
    with pytest.raises(InputError, match=r"a source is \d+ tokens; axis S allows 67\. .* a longer context\.$"):
        marian.translate("way " * 100)
    with pytest.raises(InputError, match=r"source 1 is 68 tokens; axis S allows 67\. .* a longer context\.$"):
        marian.generate([[5], [5] * 68])


# ---------------------------------------------------------------------------------------------- bad input


BAD_PROMPTS = [
    ("", "a prompt is empty"),
    ([], "a prompt is empty"),
    ([[]], "prompt 0 is empty"),
    (["the", ""], "prompt 1 is empty"),
    ([[5], []], "prompt 1 is empty"),
    (np.zeros(0, np.int64), "a prompt is empty"),
    ([257], r"holds the id 257; expected 0\.\.256\. Is this the tokenizer of this model"),
    ([[5, -1]], r"holds the id -1; expected 0\.\.256"),
    ([10**30], r"holds the id 1000000"),
    ([5, True], "holds 'True'; expected integers"),
    ([5.0], r"holds '5\.0'; expected integers"),
    (np.array([5.0]), r"holds '5\.0'; expected integers"),
    ([None], "holds 'None'; expected integers"),
    ([[[5]]], r"holds '\[5\]'; expected integers"),
    ([[5], 6], "a prompt is a int; expected a str or a list of ids"),
    (["the", [5]], "both texts and ids; give one kind"),
    (["the", None], "both texts and ids; give one kind|a prompt is"),
    (5, "prompts is a int; expected a str, a list of ids"),
    (None, "prompts is a NoneType"),
    (b"the", "prompts is a bytes"),
    ({"text": "the"}, "prompts is a dict"),
    (np.int64(5), "prompts is a int64"),
    (np.array(5), "prompts is a int;"),
]


@pytest.mark.parametrize(("prompts", "message"), BAD_PROMPTS, ids=lambda value: re.sub(r"\W+", "-", repr(value))[:40])
@pytest.mark.parametrize("call", ["generate", "stream", "score", "log_probabilities"])
def test_prompts_that_are_none(gpt: Any, call: str, prompts: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        getattr(gpt, call)(prompts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"temperature": 0.7}, "do_sample"),
        ({"top_p": 0.5, "do_sample": False}, "do_sample"),
        ({"length_penalty": 2.0}, "num_beams"),
        ({"max_length": 9, "max_new_tokens": 3}, "max_length"),
        ({"num_beams": 2, "stop_strings": ["a"], "no_such": 1}, "no_such"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 2.5}, r"max_new_tokens is 2\.5"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"num_beams": 5}, r"asks for 5 rows; this bundle allows 4\. .*--max B=5"),
        ({"eos_token_id": 257}, r"eos_token_id has the token 257, but the model has 257: 0\.\.256"),
        ({"min_new_tokens": 9, "max_new_tokens": 3}, "min_new_tokens=9 is above max_new_tokens=3"),
        ({"max_new_tokens": 65}, r"a prompt of 3 tokens and 65 new ones make 68; the context holds 67\..*=64"),
        ({"max_length": 68}, r"make 68; the context holds 67"),
    ],
)
def test_keywords_that_cannot_be(gpt: Any, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        gpt.generate([5, 6, 7], **keywords)
    assert "\n" not in str(caught.value)


def test_a_text_whose_tokens_lie_past_the_models(gpt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a token that was added to the tokenizer and not to the embedding table."""
    assert gpt.tokenizer().encode(["the way"], truncate=False).rows[0].ids[0] >= 2
    monkeypatch.setattr(gpt._prompt_reader, "vocabulary", 2)
    for call in (gpt.generate, gpt.stream, gpt.score):
        with pytest.raises(InputError, match=r"holds the id \d+; expected 0\.\.1"):
            call("the way")


def test_a_stream_checks_when_it_is_called(gpt: Any) -> None:
    """Not when the first piece is asked for: an HTTP server has sent its headers by then."""
    for wrong, options in (([], {}), ("the", {"num_beams": 2}), ("the", {"max_new_tokens": 65}), ([300], {})):
        with pytest.raises(InputError):
            gpt.stream(wrong, **options)
    with pytest.raises(InputError, match=r"one prompt, received a list of 2; call it once for each"):
        gpt.stream(["the", "way"])


def test_a_text_without_anything_to_predict(gpt: Any) -> None:
    for call in (gpt.score, gpt.log_probabilities):
        with pytest.raises(InputError, match="one token has no token that could be predicted"):
            call("a")
    with pytest.raises(InputError, match="log_probabilities takes one text, received 2"):
        gpt.log_probabilities(["the", "way"])
    with pytest.raises(InputError, match="one token"):
        gpt.score(["the way", "a"])


def test_without_a_tokenizer_ids_are_given_and_taken(exported: Exported) -> None:
    for architecture in ("GPT2LMHeadModel", "MarianMTModel"):
        with load(exported(architecture)[1], threads=1) as bundle:
            assert all(type(token) is int for token in bundle.generate([5, 6], max_new_tokens=3, num_beams=1))
            assert list(bundle.stream([5, 6], max_new_tokens=3)) == bundle.generate([5, 6], max_new_tokens=3)
            with pytest.raises(
                InputError, match="no tokenizer, since its checkpoint had none; give and take token ids"
            ):
                bundle.generate("the way")
            with pytest.raises(InputError, match=r"stop_strings is .* no tokenizer to find them with"):
                bundle.generate([5], stop_strings=["a"])
            if architecture == "MarianMTModel":
                with pytest.raises(InputError, match="no tokenizer"):
                    bundle.translate("the way")


@pytest.mark.parametrize("texts", [7, None, [], ["the", ""], ["the", 5]])
def test_translate_takes_texts(marian: Any, texts: Any) -> None:
    with pytest.raises(InputError):
        marian.translate(texts)


def test_a_closed_bundle_says_so(gpt_folder: Path) -> None:
    bundle = load(gpt_folder / "bundle", threads=1)
    bundle.close()
    from transom.runtime.errors import BackendError

    for call in (bundle.generate, bundle.stream, bundle.score):
        with pytest.raises(BackendError, match="closed; load it again"):
            call([5, 6])
