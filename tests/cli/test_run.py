"""Test `transom run`: texts, images and arrays in, the results of every task out, as JSON and as lines."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from command_line import document, error_line, transom
from transom.runtime import load


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photos") / "ein Bild – 写真.png"
    Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(path)
    return path


def test_run_embeds_texts(bert_bundle: Path) -> None:
    texts = ["a word", "[MASK] :smile: [/b]"]
    printed = document(transom("run", bert_bundle, *texts, "--json"))
    assert [result["text"] for result in printed["results"]] == texts
    with load(bert_bundle) as bert:
        expected = bert.embed(texts)
    found = np.array([result["embedding"] for result in printed["results"]], np.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)

    lines = transom("run", bert_bundle, *texts).stdout.splitlines()
    norm = float(np.linalg.norm(expected[1]))
    assert lines[2] == "[MASK] :smile: [/b]"
    assert lines[3].startswith(f"  embedding {expected[1, 0]:.4f} {expected[1, 1]:.4f} ")
    assert lines[3].endswith(f"{len(expected[1])} numbers, norm {norm:.4f}")


def test_run_reads_lines_from_stdin(bert_bundle: Path) -> None:
    printed = document(transom("run", bert_bundle, "-", "a word", "--json", stdin="\ufeffone\r\ntwo\n".encode()))
    assert [result["text"] for result in printed["results"]] == ["one", "two", "a word"]
    assert "stdin is not UTF-8 (byte 1)" in error_line(transom("run", bert_bundle, "-", stdin=b"a\xff"))
    assert "stdin is empty" in error_line(transom("run", bert_bundle, "-", stdin=""))
    assert transom("run", bert_bundle, "-", "-", stdin="one").exit_code == 2


def test_run_takes_a_text_that_begins_with_a_dash(bert_bundle: Path) -> None:
    printed = document(transom("run", bert_bundle, "--json", "--", "--debug"))
    assert printed["results"][0]["text"] == "--debug"


def test_run_writes_embeddings_to_a_file(bert_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "vectors é.npz"
    result = transom("run", bert_bundle, "a word", "time", "--out", out)
    assert result.stdout.endswith(f"written to {out}\n")
    with load(bert_bundle) as bert, np.load(out) as file:
        np.testing.assert_allclose(file["embedding"], bert.embed(["a word", "time"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--top-k", "3"], "--top-k is 3; feature-extraction gives no ranking"),
        (["--out", "vectors.txt"], "--out is 'vectors.txt'; expected the name of a .npz file"),
    ],
)
def test_run_refuses_options_that_mean_nothing(bert_bundle: Path, options: list[str], said: str) -> None:
    result = transom("run", bert_bundle, "a word", *options)
    assert result.exit_code == 2
    assert said in result.stderr


def test_run_refuses_an_empty_text(bert_bundle: Path) -> None:
    assert "transom.runtime.errors.InputError: " in error_line(transom("run", bert_bundle, ""))


def test_run_classifies_images(vit_bundle: Path, photo: Path) -> None:
    printed = document(transom("run", vit_bundle, photo, photo, "--top-k", "3", "--json"))
    with load(vit_bundle) as vit:
        expected = vit.classify(str(photo), top_k=3)
    assert [result["image"] for result in printed["results"]] == [str(photo)] * 2
    for result in printed["results"]:
        assert [each["label"] for each in result["labels"]] == [label for label, _ in expected]
        assert [each["probability"] for each in result["labels"]] == pytest.approx([p for _, p in expected], rel=1e-4)
    lines = transom("run", vit_bundle, photo).stdout.splitlines()
    assert lines[:2] == [str(photo), f"  {expected[0][1]:.4f}  {expected[0][0]}"]
    assert len(lines) == 6
    assert "--out holds arrays" in transom("run", vit_bundle, photo, "--out", "o.npz").stderr


def test_run_refuses_what_is_no_image(vit_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.png"
    path.write_text("no image")
    assert "transom.runtime.errors.InputError: " in error_line(transom("run", vit_bundle, path))


def test_run_takes_arrays_and_gives_arrays(bert_bundle: Path, tmp_path: Path) -> None:
    ids = np.array([[2, 7, 3]])
    np.savez(tmp_path / "in.npz", input_ids=ids)
    with load(bert_bundle) as bert:
        expected = bert.run({"input_ids": ids})
    printed = document(transom("run", bert_bundle, tmp_path / "in.npz", "--json"))
    assert printed["outputs"].keys() == expected.keys()
    for name, array in expected.items():
        assert printed["outputs"][name]["shape"] == list(array.shape)
        np.testing.assert_allclose(np.array(printed["outputs"][name]["values"]), array, rtol=1e-5, atol=1e-6)

    lines = transom("run", bert_bundle, tmp_path / "in.npz", "--out", tmp_path / "out.npz").stdout.splitlines()
    name, array = next(iter(expected.items()))
    assert lines[0].startswith(f"{name} float32 {array.shape}  min {array.min():.5g}  ")
    with np.load(tmp_path / "out.npz") as file:
        assert set(file.files) == expected.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.npz", "out.npz"]


def test_run_says_what_is_wrong_with_arrays(bert_bundle: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "pickled.npz", input_ids=np.array([{"an": "object"}], dtype=object))
    np.savez(tmp_path / "name.npz", ids=np.array([[1]]))
    np.savez(tmp_path / "good.npz", input_ids=np.array([[1]]))
    (tmp_path / "text.npz").write_text("no zip")
    said = {
        name: error_line(transom("run", bert_bundle, tmp_path / f"{name}.npz")) for name in ("pickled", "name", "text")
    }
    assert "cannot be read as a .npz file of plain arrays: " in said["pickled"]
    assert "cannot be read as a .npz file of plain arrays: " in said["text"]
    assert "InputError: unknown input 'ids'" in said["name"]
    missing = error_line(transom("run", bert_bundle, tmp_path / "missing.npz"))
    assert "missing.npz cannot be read as a .npz file of plain arrays: No such file or directory" in missing
    nowhere = error_line(transom("run", bert_bundle, tmp_path / "good.npz", "--out", tmp_path / "no" / "out.npz"))
    assert "out.npz cannot be written: No such file or directory" in nowhere


TASKS: dict[str, tuple[str, tuple[str, ...], str]] = {  # architecture -> task, INPUTs, key of the answer
    "BertForMaskedLM": ("fill-mask", ("the [MASK] of france", "a [MASK] is a [MASK]"), "masks"),
    "BertForSequenceClassification": ("text-classification", ("a word", "two more"), "labels"),
    "BertForTokenClassification": ("token-classification", ("people of paris",), "entities"),
    "BertForQuestionAnswering": ("question-answering", ("what is it", "it is the capital of france"), "answers"),
    "BertForNextSentencePrediction": ("next-sentence-prediction", ("go now", "call him"), "probability"),
}


@pytest.mark.parametrize("architecture", TASKS)
def test_run_knows_every_task_of_bert(architecture: str, exported: Callable[..., tuple[Path, Path]]) -> None:
    task, inputs, key = TASKS[architecture]
    _, bundle = exported(architecture)
    assert document(transom("inspect", bundle, "--json"))["task"] == task
    results = document(transom("run", bundle, *inputs, "--json"))["results"]
    assert all(key in result for result in results)
    with load(bundle) as bert:
        if task == "fill-mask":
            assert [len(result["masks"]) for result in results] == [1, 2]
            one, two = bert.fill_mask(inputs[0]), bert.fill_mask(inputs[1])
            assert [each["token"] for each in results[0]["masks"][0]] == [token for token, _ in one]
            assert [each["token"] for each in results[1]["masks"][1]] == [token for token, _ in two[1]]
        elif task == "text-classification":
            assert results[1]["labels"][0]["label"] == bert.classify(inputs[1])[0][0]
        elif task == "token-classification":
            assert [each["start"] for each in results[0]["entities"]] == [each.start for each in bert.tag(inputs[0])]
        elif task == "question-answering":
            assert results[0]["answers"][0]["text"] == bert.answer(*inputs)[0].text
        else:
            assert results[0]["probability"] == pytest.approx(bert.next_sentence(*inputs), rel=1e-4)

    text = transom("run", bundle, *inputs).stdout
    assert re.search(r"^ *[01]\.\d{4} ", text, re.MULTILINE)
    if task in ("question-answering", "next-sentence-prediction"):
        assert transom("run", bundle, inputs[0]).exit_code == 2
        long = f"{inputs[1]}\nand more of it"  # all of stdin is one text
        piped = document(transom("run", bundle, inputs[0], "-", "--json", stdin=f"{long}\n"))["results"]
        assert list(piped[0].values())[:2] == [inputs[0], long]
        assert piped == document(transom("run", bundle, inputs[0], long, "--json"))["results"]
