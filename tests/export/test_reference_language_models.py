"""The data, tasks and baselines behind the reference GPT, BERT, Transformer and seq2seq; what their cards claim."""

from __future__ import annotations

import importlib
import json
import re
import zlib
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from paths import REPO
from transom.calib.builtin_sets import builtin_set
from transom.export.datasets import heldout_date_lists, heldout_dates, heldout_text, masked_text
from transom.export.reference_models import reference_folder
from transom.export.scores import bits_per_byte


@pytest.fixture(scope="module", autouse=True)
def examples() -> Any:
    """The scripts import one another by name, as they do when they are run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(REPO / "examples"))
        yield


def script(name: str) -> ModuleType:
    return importlib.import_module(name)


def card(name: str) -> str:
    return (reference_folder(name) / "README.md").read_text(encoding="utf-8")


def config(name: str, file: str = "config.json") -> Any:
    return json.loads((reference_folder(name) / file).read_text(encoding="utf-8"))


# ---- the text


def serialised(lines: list[str]) -> bytes:
    """A character vector as R writes it: R Internals, "Serialization Formats"."""

    def integer(value: int) -> bytes:
        return value.to_bytes(4, "big", signed=True)

    raw = b"X\n" + integer(3) + integer(0x040201) + integer(0x030500) + integer(5) + b"UTF-8"
    raw += integer(16) + integer(len(lines))
    for line in lines:
        raw += integer(0x40009) + integer(len(line.encode())) + line.encode()
    return raw


def package(folder: Path, *objects: bytes) -> Path:
    """An unpacked .deb with these objects in its lazy-load database."""
    file = folder / script("austen").DATABASE
    file.parent.mkdir(parents=True)
    file.write_bytes(b"".join(len(raw).to_bytes(4, "big") + zlib.compress(raw) for raw in objects))
    return folder


def test_novels_are_read_from_rs_database(tmp_path: Path) -> None:
    first, second = ["EMMA", "", "£5 for _me_"], ["PERSUASION", "Chapter 1"]
    novels = script("austen").novels(package(tmp_path, serialised(first), serialised(second)))
    assert novels == {"EMMA": first, "PERSUASION": second}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"X\n\x00\x00\x00\x03", b"X\n\x00\x00\x00\x02", "version 3"),
        (b"\x00\x00\x00\x10", b"\x00\x00\x00\x13", "R's type 19"),
        (b"\x00\x00\x00\x04EMMA", b"\xff\xff\xff\xff", "or NA"),
    ],
)
def test_other_objects_of_r_are_refused(tmp_path: Path, old: bytes, new: bytes, message: str) -> None:
    raw = serialised(["EMMA"])
    assert raw.count(old) == 1
    with pytest.raises(ValueError, match=message):
        script("austen").novels(package(tmp_path, raw.replace(old, new)))


def test_chapters_are_paragraphs_without_headings_and_marks() -> None:
    lines = [
        "EMMA",
        "VOLUME I",
        "CHAPTER I",
        "",
        "Emma _was_",
        "rich.",
        "",
        "",
        '"Yes,  sir."',
        "",
        "VOLUME II",
        "",
        "CHAPTER I",
    ]
    lines += ["", "The end of it, said", "he, was sad.", "", "FINIS", "", "A NOTE ON THE TEXT", "", "It was revised."]
    assert script("austen").chapters(lines) == ['Emma was rich.\n"Yes, sir."\n', "The end of it, said he, was sad.\n"]


def test_no_chapter_trains_and_scores(tmp_path: Path) -> None:
    austen = script("austen")
    novel = [line for number in range(1, 25) for line in (f"Chapter {number}", "", f"Text of chapter {number}.", "")]
    folder = package(tmp_path, serialised(["PERSUASION", *novel]))
    train, held_out = austen.split(folder)
    assert held_out == ["Text of chapter 20.\n"]
    assert len(train) == 23
    assert held_out[0] not in train
    train, dev = austen.split(folder, dev=True)
    assert dev == ["Text of chapter 10.\n"]
    assert len(train) == 22
    assert held_out[0] not in train


def test_the_masked_text_is_the_held_out_one() -> None:
    text = heldout_text()
    assert text.startswith("Jane Fairfax was an orphan")
    assert 60_000 <= len(text.encode()) <= 100_000
    passages = masked_text()
    assert sum(len(words) for _, words in passages) == sum(passage.count("[MASK]") for passage, _ in passages)
    for passage, words in passages:
        parts = passage.split("[MASK]")
        whole = parts[0] + "".join(word + part for word, part in zip(words, parts[1:], strict=True))
        assert whole.lower() in text.lower()


# ---- the n-grams


def test_kneser_ney_by_hand() -> None:
    """ "aab" has a twice and b once; each gives up 1/2 of its count, so 2 * 0.5 / 3 goes to all 256 bytes alike."""
    bits = script("byte_ngrams").KneserNey(b"aab", 1).bits(b"abc")
    shared = (2 * 0.5 / 3) / 256
    np.testing.assert_allclose(2**-bits, [1.5 / 3 + shared, 0.5 / 3 + shared, shared])


def test_kneser_ney_sums_to_one_and_learns() -> None:
    ngrams = script("byte_ngrams")
    text = heldout_text().encode()
    for order in (3, 8):
        model = ngrams.KneserNey(text[:30_000], order)
        for context in (b"of her ", b"zqxjvkw"):
            each = b"".join(context[len(context) - order + 1 :] + bytes([byte]) for byte in range(256))
            bits = model.bits(each)[::order]
            assert (2**-bits).sum() == pytest.approx(1)
    assert model.bits(text[:30_000]).mean() < 1.0 < 1.9 < model.bits(text[30_000:]).mean() < 3


# ---- the in-context task


def test_training_prompts_hold_no_held_out_pair() -> None:
    task = script("in_context")
    assert task.HELD_OUT.sum() == 26
    hidden = {f"{digit} -> {task.LETTERS[letter]}" for letter, digit in np.argwhere(task.HELD_OUT)}
    prompts = task.batch(np.random.RandomState(0), 1000)
    seen = {line for prompt in prompts for line in prompt.splitlines()}
    assert len(seen) > 220  # of 234: letters with several held-out digits fit few mappings
    assert not seen & hidden
    queries = [task.text(task.draw(np.random.RandomState(i), 2, held_out=True)).splitlines() for i in range(100)]
    assert all(lines[-1] in hidden and not hidden & set(lines[:-1]) for lines in queries)


def test_a_prompt_hides_a_mapping() -> None:
    task = script("in_context")
    pairs = [(3, "K"), (8, "T"), (5, "K"), (7, "K")]
    assert task.question(pairs) == "3 -> K\n8 -> T\n5 -> K\n7 ->"
    for seed in range(200):
        pairs = task.draw(np.random.RandomState(seed), 8)
        assert len({digit for digit, _ in pairs}) == 9
        parity = {(digit % 2, letter) for digit, letter in pairs}
        size = {(digit >= 5, letter) for digit, letter in pairs}
        assert min(len(parity), len(size)) == len({letter for _, letter in pairs}) == 2


def test_accuracy_counts_right_letters() -> None:
    task = script("in_context")
    assert task.accuracy(lambda prompt: " Q", 0, n=520)[0] == pytest.approx(20, abs=15)
    copied = task.accuracy(lambda prompt: prompt.splitlines()[0][-2:], 1, n=500)[0]
    assert copied / 500 == pytest.approx(4 / 9, abs=0.07)  # 4 of the 9 other digits share the example's class


def test_the_best_possible_reader() -> None:
    """With one example, 6 of 9 queries are, or may be, in its class; the rest are one of 25 letters at best."""
    task = script("in_context")
    assert task.likeliest([(3, "K"), (5, "?")]) == pytest.approx(0.5)  # odd as 3, but not as low
    assert task.likeliest([(3, "K"), (1, "?")]) == pytest.approx(1.0)
    assert task.likeliest([(3, "K"), (8, "?")]) == pytest.approx(1 / 25)
    assert task.likeliest([(3, "K"), (5, "T"), (7, "?")]) == pytest.approx(1.0)  # so it is low and high
    assert [task.best_possible(shots, 500) for shots in (0, 8)] == pytest.approx([1 / 26, 1.0], abs=0.02)


# ---- the dates


def test_forms_of_a_date() -> None:
    dates = script("dates")
    day = date(1979, 5, 3)
    assert {dates.written(day, form) for form in dates.FORMS} == {
        "3 May 1979", "03 May 1979", "3rd May 1979", "3rd of May 1979", "the 3rd of May, 1979", "May 3, 1979",
        "May 3rd, 1979", "May. 3, 1979", "May 3 1979", "Thursday, 3 May 1979", "Thursday, the 3rd of May 1979",
        "Thursday, May 3, 1979", "Thu, 03 May 1979", "Thu May 3 1979", "3. May 1979", "3-May-1979", "3-May-79",
        "03.05.1979", "3.5.1979", "03.05.79", "05/03/1979", "5/3/1979", "5/3/79", "1979/5/3", "1979/05/03",
        "1979-05-03",
    }  # fmt: skip
    assert {dates.written(day, form) for form in dates.HELD_OUT_FORMS} == {
        "Thursday 3rd May 1979", "May the 3rd, 1979", "Thu, May 3, 1979", "03-May-1979", "1979 May 3", "1979.05.03",
    }  # fmt: skip


def test_two_digits_of_a_year_have_one_meaning() -> None:
    dates = script("dates")
    short = [form for form in dates.FORMS if "1979" not in form(date(1979, 5, 3))]
    assert [dates.written(date(2068, 12, 31), form) for form in short] == ["31-Dec-68", "31.12.68", "12/31/68"]
    for outside in (date(1968, 12, 31), date(2069, 1, 1)):
        assert [dates.written(outside, form) for form in short] == [None] * 3


def test_every_form_of_every_day_is_told_from_the_others() -> None:
    dates = script("dates")
    meant: dict[str, date] = {}
    days, _ = dates.split()
    for day in days[:4000]:
        for form in dates.FORMS + dates.HELD_OUT_FORMS:
            text = dates.written(day, form)
            assert text is None or meant.setdefault(text, day) == day


def test_no_held_out_day_trains() -> None:
    dates = script("dates")
    train, held_out = dates.split()
    assert len(train) + len(held_out) == 73_049 == len({*train, *held_out})
    fitted, dev = dates.split(dev=True)
    assert {*fitted, *dev} == {*train}
    texts, expected = heldout_dates()
    assert list(zip(texts, expected, strict=True)) == dates.held_out_pairs()
    assert not {day.isoformat() for day in train} & set(expected)


def test_lists_of_dates_are_dates_in_a_row() -> None:
    lists = script("date_lists")
    rng = np.random.RandomState(1)
    found = lists.lists([date(1979, 5, 3)], 3, 4, rng)
    assert [target for _, target in found] == ["1979-05-03 1979-05-03 1979-05-03"] * 4
    forms = {script("dates").written(date(1979, 5, 3), form) for form in script("dates").FORMS}
    assert {part for text, _ in found for part in text.split("; ")} < forms
    even = lists.even_lists([date(1979, 5, 3), date(2001, 12, 31)], 12, rng)
    assert [text.count("; ") + 1 for text, _ in even] == [1, 2, 3, 4, 5, 6] * 2
    assert [len(target) for _, target in even] == [10, 21, 32, 43, 54, 65] * 2


def test_no_day_of_a_held_out_list_trains() -> None:
    """The script writes the lists that ship, of days on its own side of the split each."""
    lists = script("date_lists")
    train, held_out = ({day.isoformat() for day in days} for days in script("dates").split())
    texts, expected = heldout_date_lists()
    assert list(zip(texts, expected, strict=True)) == lists.held_out_lists()
    assert len(texts) == len(set(texts)) == 900
    assert [text.count("; ") + 1 for text in texts] == [target.count(" ") + 1 for target in expected]
    assert max(map(len, texts)) == 141  # as export/data/README.md says
    assert {day for target in expected for day in target.split(" ")} <= held_out

    made = script("make_calibration_sets").written_lists()
    assert [text for text, _ in made] == [sample.text for sample in builtin_set("date-lists").samples]
    assert {day for _, target in made for day in target.split(" ")} <= train


# ---- the models


def test_the_scripts_would_train_these_models() -> None:
    for name, trained in (("gpt", script("train_gpt")), ("bert", script("train_bert_mlm"))):
        theirs = trained.CONFIG.to_dict()
        ours = {key: value for key, value in config(name).items() if key not in ("architectures", "dtype")}
        assert {key: theirs[key] for key in ours if key in theirs} == {key: ours[key] for key in ours if key in theirs}
        assert config(name, "tokenizer_config.json") == trained.TOKENIZER_CONFIG
    dates = script("train_transformer_dates")
    assert config("transformer") == dates.CONFIG_JSON
    assert config("transformer", "generation_config.json") == dates.GENERATION
    assert config("transformer", "tokenizer_config.json") == dates.TOKENIZER_CONFIG
    stored = (reference_folder("transformer") / "tokenizer.json").read_text(encoding="utf-8")
    assert json.loads(stored) == json.loads(dates.make_tokenizer().to_str())


@pytest.mark.parametrize(("name", "attention"), [("seq2seq", True), ("seq2seq-fixed", False)])
def test_the_script_would_train_this_seq2seq(name: str, attention: bool) -> None:
    training = script("train_seq2seq_dates")
    sizes = training.config(attention=attention)
    assert config(name) == training.config_json(sizes)
    assert config(name, "generation_config.json") == training.GENERATION
    assert config(name, "tokenizer_config.json") == training.tokenizer_config(sizes)
    stored = (reference_folder(name) / "tokenizer.json").read_text(encoding="utf-8")
    assert json.loads(stored) == json.loads(training.make_tokenizer().to_str())
    steps = training.STEPS if attention else training.STEPS_WITHOUT_ATTENTION
    assert f"{steps:,} steps" in card(name)
    longest = "; ".join(["Wednesday, the 30th of September 1998"] * 6)
    assert len(training.make_tokenizer().encode(longest).ids) == 233 <= sizes.max_source_positions


def test_digits_and_letters_of_the_task_are_tokens() -> None:
    from transformers import GPT2Tokenizer

    tokenizer = GPT2Tokenizer.from_pretrained(reference_folder("gpt"))
    task = script("in_context")
    tokens = tokenizer.tokenize("".join(f"{digit} -> {letter}\n" for digit in range(10) for letter in task.LETTERS))
    assert tokens == [
        token for digit in range(10) for letter in task.LETTERS for token in (str(digit), "Ġ->", f"Ġ{letter}", "Ċ")
    ]


def test_the_reference_gpt_is_what_its_card_says() -> None:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2LMHeadModel

    folder, training = reference_folder("gpt"), script("train_gpt")
    model = GPT2LMHeadModel.from_pretrained(folder).eval()
    tokenizer = ByteLevelBPETokenizer.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    score = bits_per_byte(lambda block: training.log_probabilities(model, tokenizer, block), heldout_text())
    assert f"**{score.value:.3f}**" in card("gpt")
    assert "| {:.3f} to {:.3f} |".format(*score.interval) in card("gpt")
    assert f"{model.num_parameters():,} parameters" in card("gpt")

    task = script("in_context")
    few, none = (
        task.accuracy(lambda prompt: training.answer(model, tokenizer, prompt), shots, n=60)[0] for shots in (8, 0)
    )
    assert few == 60
    assert none < 10


def test_the_reference_bert_is_what_its_card_says() -> None:
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertForMaskedLM

    folder = reference_folder("bert")
    model = BertForMaskedLM.from_pretrained(folder).eval()
    tokenizer = BertWordPieceTokenizer(str(folder / "vocab.txt"))
    right, n = script("train_bert_mlm").correct(model, tokenizer, masked_text())
    assert f"**{right} of {n:,} = {right / n:.1%}**".replace("%", " %") in card("bert")
    assert f"{model.num_parameters():,} parameters" in card("bert")


def test_the_reference_transformer_is_what_its_card_says() -> None:
    from safetensors.torch import load_file

    dates = script("train_transformer_dates")
    model = dates.initial()
    stored = load_file(reference_folder("transformer") / "model.safetensors")
    weights = {name.removeprefix("model."): weight.float() for name, weight in stored.items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert set(missing) == dates.computed(dates.CONFIG).keys()
    assert not unexpected
    cases = list(zip(*heldout_dates(), strict=True))[:250]
    assert dates.correct(model.eval(), dates.make_tokenizer(), cases) == 250
    assert "**1,000 of 1,000 = 100.0 %**" in card("transformer")
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"{parameters:,} parameters" in card("transformer")


@pytest.mark.parametrize(("name", "attention"), [("seq2seq", True), ("seq2seq-fixed", False)])
def test_the_reference_seq2seq_is_what_its_card_says(name: str, attention: bool) -> None:
    from safetensors.torch import load_file

    training = script("train_seq2seq_dates")
    model = training.initial(attention=attention)
    stored = load_file(reference_folder(name) / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): weight.float() for name, weight in stored.items()})
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in card(name)
    cases = list(zip(*heldout_date_lists(), strict=True))
    rows = dict(re.findall(r"^\| (\d) \| \d+ to \d+ \| (\d+) \|$", card(name), re.MULTILINE))
    assert [*rows] == ["1", "2", "3", "4", "5", "6"]
    counted = [training.correct(model.eval(), training.make_tokenizer(), cases[dates::6]) for dates in range(6)]
    assert counted == [int(right) for right in rows.values()]
    assert f"**{sum(counted)} of 900 = {sum(counted) / 900:.1%}**".replace("%", " %") in card(name)
