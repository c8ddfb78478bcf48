"""Test `transom run` on bundles that generate: prompts as texts or ids, streams, scores, and wrong usage."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from command_line import document, error_line, transom
from transom.cli.generation_options import GenerationOptions, option_of
from transom.cli.output import printable
from transom.runtime import load
from transom.runtime.generation.validation import KEYWORDS

Exported = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="module")
def gpt(exported: Exported) -> Path:
    """A tiny random GPT-2 of 101 tokens and a context of 67, without a tokenizer."""
    return exported("GPT2LMHeadModel")[1]


@pytest.fixture(scope="module")
def marian(exported: Exported) -> Path:
    return exported("MarianMTModel")[1]


@pytest.fixture(scope="module")
def speaker(once: Callable[..., Path], make_checkpoint: Callable[..., Path]) -> Path:
    """A tiny random GPT-2 with a tokenizer: a token for each byte."""
    from tokenizers.pre_tokenizers import ByteLevel

    from transom.export.pipeline import export

    def make(folder: Path) -> None:
        size = {"vocab_size": 257, "n_embd": 64, "n_layer": 1, "bos_token_id": 256, "eos_token_id": 256}
        checkpoint = make_checkpoint("GPT2LMHeadModel", **size)
        vocabulary = [*sorted(ByteLevel.alphabet()), "<|endoftext|>"]
        (checkpoint / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(vocabulary)}))
        (checkpoint / "merges.txt").write_text("#version: 0.2\n")
        export(str(checkpoint), folder / "bundle", max_sizes={"B": 2})

    return once("speaker", make) / "bundle"


def results(*arguments: str | Path, stdin: str | None = None) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = document(transom("run", *arguments, "--json", stdin=stdin))["results"]
    return found


def test_ids_in_and_ids_out_without_a_tokenizer(gpt: Path) -> None:
    with load(gpt) as bundle:
        expected = bundle.generate([1, 2, 3], max_new_tokens=9)
    for prompt in ("1 2 3", "1,2,3", " 1, 2\t3\n"):
        assert transom("run", gpt, prompt, "--max-new-tokens", "9").stdout == f"{' '.join(map(str, expected))}\n"
    assert results(gpt, "1 2 3", "--max-new-tokens", "9") == [
        {"prompt": "1 2 3", "ids": expected, "tokens": len(expected)}
    ]


def test_several_prompts_are_printed_apart(gpt: Path) -> None:
    with load(gpt) as bundle:
        first, second = bundle.generate([[1, 2, 3], [5]], max_new_tokens=4)
    lines = transom("run", gpt, "1 2 3", "5", "--max-new-tokens", "4").stdout.splitlines()
    assert lines == ["1 2 3", f"  {' '.join(map(str, first))}", "5", f"  {' '.join(map(str, second))}"]


@pytest.mark.parametrize("kind", ["gpt", "marian"])
def test_beams_and_their_other_sequences(kind: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(kind)
    with load(path) as bundle:
        expected = bundle.generate(
            [[1, 2, 3], [7]],
            max_new_tokens=6,
            num_beams=3,
            num_return_sequences=2,
            length_penalty=2,
            early_stopping=True,
        )
    options = "--max-new-tokens 6 --num-beams 3 --num-return-sequences 2 --length-penalty 2 --early-stopping true"
    found = results(path, "1 2 3", "7", *options.split())
    assert [each["ids"] for each in found] == [ids for answers in expected for ids in answers]
    assert [each["prompt"] for each in found] == ["1 2 3", "1 2 3", "7", "7"]
    lines = transom("run", path, "1 2 3", *options.split()).stdout.splitlines()
    assert lines == ["1 2 3", *(f"  {' '.join(map(str, ids))}" for ids in expected[0])]


def test_a_translation_is_what_the_runtime_gives(marian: Path) -> None:
    with load(marian) as bundle:
        expected = bundle.generate([1, 2, 3], max_new_tokens=5)
    assert transom("run", marian, "1 2 3", "--max-new-tokens", "5").stdout == f"{' '.join(map(str, expected))}\n"


def test_text_streams_into_what_generate_gives(speaker: Path) -> None:
    with load(speaker) as bundle:
        text = bundle.generate("Zürich", max_new_tokens=40)
        shown = "\n".join(map(printable, text.split("\n")))
    assert transom("run", speaker, "Zürich", "--max-new-tokens", "40").stdout == f"{shown}\n"
    (found,) = results(speaker, "Zürich", "--max-new-tokens", "40")
    assert found == {"prompt": "Zürich", "text": text, "tokens": 40}
    beams = ("--num-beams", "2", "--max-new-tokens", "7")
    (found,) = results(speaker, "Zürich", *beams)
    shown = "\n".join(map(printable, found["text"].split("\n")))
    assert transom("run", speaker, "Zürich", *beams).stdout == f"{shown}\n"


def test_sampling_is_repeated_by_its_seed(speaker: Path) -> None:
    options = ("--do-sample", "--top-k", "9", "--top-p", "0.9", "--temperature", "1.5", "--max-new-tokens", "12")
    with load(speaker) as bundle:
        expected = bundle.generate("a", do_sample=True, top_k=9, top_p=0.9, temperature=1.5, max_new_tokens=12, seed=3)
    first, again = (results(speaker, "a", *options, "--seed", "3") for _ in range(2))
    assert first == again
    assert first[0]["text"] == expected
    assert results(speaker, "a", *options, "--seed", "4") != first


def test_a_stop_string_ends_the_text_or_is_never_met(speaker: Path) -> None:
    (whole,) = results(speaker, "b", "--max-new-tokens", "30")
    stop = whole["text"][4]
    (cut,) = results(speaker, "b", "--max-new-tokens", "30", "--stop-string", "never this", "--stop-string", stop)
    assert whole["text"].startswith(cut["text"])
    assert cut["text"].endswith(stop)
    assert cut["tokens"] < 30
    assert results(speaker, "b", "--max-new-tokens", "30", "--stop-string", "never this") == [whole]


def test_stdin_is_one_prompt_of_many_lines(speaker: Path) -> None:
    (found,) = results(speaker, "-", "--max-new-tokens", "2", stdin="one -> 1\ntwo ->\n")
    assert found["prompt"] == "one -> 1\ntwo ->"
    lines = transom("run", speaker, "--score", "-", "x y", stdin="one\ntwo\n").stdout.splitlines()
    assert [lines[0], lines[2]] == ["one two", "x y"]


def test_each_line_of_stdin_is_translated(marian: Path) -> None:
    assert [each["prompt"] for each in results(marian, "-", "--max-new-tokens", "2", stdin="1 2\n3\n")] == ["1 2", "3"]


def test_a_score_is_a_perplexity(speaker: Path, gpt: Path) -> None:
    with load(speaker) as bundle:
        expected = math.exp(-bundle.log_probabilities("Zürich").mean())
    (found,) = results(speaker, "--score", "Zürich")
    assert found == {"text": "Zürich", "perplexity": pytest.approx(expected, rel=1e-5), "tokens": 7}  # ü is two bytes
    assert transom("run", speaker, "--score", "Zürich").stdout == f"perplexity {expected:.4f}, 7 tokens\n"
    assert results(gpt, "--score", "1 2 3")[0]["tokens"] == 3


BAD = [  # bundle, arguments, what is said
    ("gpt", [""], "a prompt is empty"),
    ("gpt", ["1 2", ""], "prompt 1 is empty"),
    ("speaker", [""], "a prompt is empty"),
    ("marian", [""], "a prompt is empty"),
    ("gpt", ["1 2 101"], "a prompt holds the id 101; expected 0..100"),
    ("gpt", ["1 -2"], "a prompt holds the id -2; expected 0..100"),
    ("gpt", ["9" * 18], "999999; expected 0..100"),
    ("gpt", ["9" * 5000], "expected token ids, such as '1 2 3'"),
    ("gpt", ["hello"], "the prompt is 'hello', but this bundle has no tokenizer"),
    ("gpt", ["1 2", "--max-new-tokens", "66"], "a prompt of 2 tokens and 66 new ones make 68; the context holds 67"),
    ("marian", ["1", "--max-new-tokens", "67"], "a prompt of 1 tokens and 67 new ones make 68; the context holds 67"),
    ("marian", ["1 " * 68], "a source is 68 tokens; axis S allows 67"),
    ("gpt", ["1", "--max-new-tokens", "0"], "max_new_tokens is 0, expected an int, 1..1000000"),
    ("gpt", ["1", "--temperature", "0.5"], "temperature=0.5 has no effect without do_sample"),
    ("gpt", ["1", "--top-k", "5"], "top_k=5 has no effect without do_sample"),
    ("gpt", ["1", "--top-p", "1.5", "--do-sample"], "top_p is 1.5, expected a number above 0 to 1"),
    ("gpt", ["1", "--length-penalty", "2"], "length_penalty=2.0 has no effect with num_beams=1"),
    ("gpt", ["1", "--early-stopping", "never"], "early_stopping='never' has no effect with num_beams=1"),
    ("gpt", ["1", "--num-beams", "2", "--num-return-sequences", "3"], "num_return_sequences=3 is above num_beams=2"),
    ("gpt", ["1", "--num-beams", "4"], "asks for 4 rows; this bundle allows 3"),
    ("gpt", ["1", "--min-new-tokens", "5", "--max-new-tokens", "4"], "min_new_tokens=5 is above max_new_tokens=4"),
    ("gpt", ["1", "--stop-string", "x"], "this bundle has no tokenizer to find them with"),
    ("speaker", ["a", "--stop-string", ""], "stop_strings is ['']"),
    ("gpt", ["1", "--score"], "a text of one token has no token that could be predicted"),
]


@pytest.mark.parametrize(("kind", "arguments", "said"), BAD)
def test_bad_input_is_one_line(kind: str, arguments: list[str], said: str, request: pytest.FixtureRequest) -> None:
    line = error_line(transom("run", request.getfixturevalue(kind), *arguments))
    assert line.startswith("transom.runtime.errors.InputError: ")
    assert said in line


UNFIT = [
    ("bert_bundle", ["a", "--max-new-tokens", "3"], "--max-new-tokens is given, but feature-extraction generates"),
    ("bert_bundle", ["a", "--stop-string", "x"], "--stop-string is given, but feature-extraction generates nothing"),
    ("bert_bundle", ["a", "--score"], "--score is given, but feature-extraction generates nothing"),
    ("bert_bundle", ["in.npz", "--seed", "1"], "--seed is given, but a raw run generates nothing"),
    ("vit_bundle", ["a.png", "--top-k", "0"], "--top-k is 0; image-classification gives at least one answer"),
    ("gpt", ["1", "--truncate"], "--truncate is given; text-generation truncates no prompt"),
    ("gpt", ["1 2", "--score", "--seed", "1"], "--seed is given, but --score generates nothing"),
    ("gpt", ["1 2", "--out", "o.npz"], "--out holds arrays; the answers of text-generation are none"),
    ("marian", ["1 2", "--score"], "--score is for text-generation; this bundle is for translation"),
    ("marian", ["1 2", "--early-stopping", "maybe"], "'--early-stopping'"),
]


@pytest.mark.parametrize(("kind", "arguments", "said"), UNFIT)
def test_an_option_that_does_not_fit_is_a_wrong_call(
    kind: str, arguments: list[str], said: str, request: pytest.FixtureRequest
) -> None:
    result = transom("run", request.getfixturevalue(kind), *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr


def test_what_was_streamed_stays_when_it_is_interrupted(gpt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bytes] = []

    def interrupted(*arguments: Any, **keywords: Any) -> Iterator[int]:
        for token in (7, 8):
            yield token
            seen.append(sys.stdout.buffer.getvalue())  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    monkeypatch.setattr("transom.runtime.tasks.generator.Generator.stream", interrupted)
    result = transom("run", gpt, "1 2 3")
    assert seen == [b"7", b"7 8"]  # printed as soon as it was there
    assert (result.exit_code, result.stdout, result.stderr) == (130, "7 8\n", "transom: interrupted\n")


def test_the_options_are_keywords_of_the_runtime() -> None:
    options = set(GenerationOptions.__dataclass_fields__) - {"score"}
    assert options <= KEYWORDS.keys()
    assert set(map(option_of, options)) <= set(transom("run", "--help").stdout.split())
