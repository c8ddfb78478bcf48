"""What the batch job of examples/ does without Ray: blocks of rows, reading them, writing shards whole."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from paths import REPO
from transom.runtime.errors import InputError
from transom.runtime.serving.ports import BYTES, Port

if not (REPO / "examples").is_dir():
    pytest.skip(f"no examples in {REPO}: set TRANSOM_REPO to the repository", allow_module_level=True)

TEXT, PAIR = Port("text", BYTES, text=True), Port("pair", BYTES, text=True, optional=True)
IMAGE, IDS = Port("image", BYTES), Port("input_ids", "int64", (None,))
VECTOR = Port("embedding", "float32", (None,))


def module(name: str) -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location(name, REPO / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[name] = found  # where dataclasses look for it
    spec.loader.exec_module(found)
    yield found
    del sys.modules[name]


@pytest.fixture(scope="module")
def rows() -> Iterator[ModuleType]:
    yield from module("batch_rows")


@pytest.fixture(scope="module")
def shards() -> Iterator[ModuleType]:
    yield from module("batch_shards")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of 3, 0, 5 and 1 lines, and an image between them."""
    (tmp_path / "more").mkdir()
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\n\xc3\xa9t\xc3\xa9")
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": f"c{number}"}) + "\n" for number in range(5)))
    (tmp_path / "d.png").write_bytes(b"image")
    (tmp_path / "more" / "E.TXT").write_text("last\n")
    (tmp_path / "z.md").write_text("not read\n")
    return tmp_path


NAMES = ["a.txt", "b.txt", "c.jsonl", "more/E.TXT"]
VALUES = [b"one", b"two", "été".encode(), "c0", "c1", "c2", "c3", "c4", b"last"]
PLACES = [("a.txt", n) for n in (1, 2, 3)] + [("c.jsonl", n) for n in (1, 2, 3, 4, 5)] + [("more/E.TXT", 1)]


@pytest.mark.parametrize("size", range(1, 11))
def test_blocks_have_every_row_once_and_in_order(rows: ModuleType, folder: Path, size: int) -> None:
    found, names = rows.files_in(folder, [TEXT, PAIR])
    assert (found, names) == (folder, NAMES)
    blocks = list(rows.blocks_of(folder, names, size))
    counts = [sum(piece.count for piece in block) for block in blocks]
    assert counts == [size] * (9 // size) + [9 % size] * (9 % size > 0)
    for order in (blocks, blocks[::-1]):  # a reader may get them in any order
        reader = rows.RowReader(folder, [TEXT, PAIR], {"text": "text"})
        read = {number: list(reader.rows(block)) for number, block in enumerate(order)}
        ordered = [row for number in sorted(read, reverse=order is not blocks) for row in read[number]]
        assert [(row.file, row.line) for row in ordered] == PLACES
        assert [row.values for row in ordered] == [{"text": value} for value in VALUES]


def test_which_files_hold_which_inputs(rows: ModuleType, folder: Path) -> None:
    assert rows.files_in(folder, [IMAGE])[1] == ["c.jsonl", "d.png"]
    assert rows.files_in(folder, [IDS])[1] == ["c.jsonl"]
    several = Port("image", BYTES, (None,), optional=True)
    assert rows.files_in(folder, [Port("text", BYTES, text=True, optional=True), several])[1] == [
        *NAMES[:3],
        "d.png",
        NAMES[3],
    ]
    assert rows.files_in(folder / "a.txt", [TEXT]) == (folder, ["a.txt"])
    two = Port("question", BYTES, text=True), Port("context", BYTES, text=True)
    assert rows.files_in(folder, two)[1] == ["c.jsonl"]  # a line has one text only
    with pytest.raises(InputError, match=r"a\.txt holds nothing to read; expected files that end in .*\.png"):
        rows.files_in(folder / "a.txt", [IMAGE])


def test_an_input_that_changed_has_another_hash(rows: ModuleType, folder: Path) -> None:
    before = rows.listing_hash(folder, NAMES)
    assert rows.listing_hash(folder, NAMES) == before
    assert rows.listing_hash(folder, NAMES[1:]) != before
    (folder / "b.txt").write_bytes(b"x")
    assert rows.listing_hash(folder, NAMES) != before


def test_rows_that_cannot_be_read_have_an_error_each(rows: ModuleType, tmp_path: Path) -> None:
    lines = [
        b'{"q": "a"}',
        b"{",
        b'"q"',
        b'{"q": null}',
        b"",
        b"[" * 100_000,
        b'{"q": "b", "p": "c"}',
        b'{"q": {"a": 1}}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    (block,) = rows.blocks_of(tmp_path, ["a.jsonl"], 100)
    found = [row.values for row in rows.RowReader(tmp_path, [TEXT, PAIR], {"text": "q", "pair": "p"}).rows(block)]
    said = [str(each) if isinstance(each, InputError) else each for each in found]
    assert said[0] == {"text": "a"}
    assert said[6] == {"text": "b", "pair": "c"}
    assert all(said[place].startswith("the line is no JSON: ") for place in (1, 4, 5))
    assert said[2] == "the line is a JSON str; expected an object."
    assert said[3] == "the row has no 'q', which is read for text."
    assert rows.arrays_for([TEXT, PAIR], said[7])["text"].tolist() == [[{"a": 1}]]  # which the service refuses


def test_images_by_name_and_as_bytes(rows: ModuleType, folder: Path) -> None:
    assert rows.image_bytes("../d.png", folder / "more") == b"image"
    assert rows.image_bytes(["d.png", b"x", {"bytes": b"y", "path": None}], folder) == [b"image", b"x", b"y"]
    images = Port("image", BYTES, (None,))
    assert rows.arrays_for([images], {"image": [b"x", b"y"]})["image"].tolist() == [[b"x", b"y"]]


def test_numbers_keep_their_kind(rows: ModuleType) -> None:
    assert rows.array_for(IDS, [3, 5]).tolist() == [[3, 5]]
    assert rows.array_for(IDS, [3, 5]).dtype == np.int64
    assert rows.array_for(IDS, [1.5]).dtype == np.float64  # which the service refuses
    with pytest.raises(InputError, match="input_ids is no array of numbers"):
        rows.array_for(IDS, [[1], [2, 3]])


def test_a_shard_is_whole_or_not_there(shards: ModuleType, tmp_path: Path) -> None:
    def half() -> None:
        with shards.replacing(tmp_path / "part-000000.npy") as file:
            file.write(b"half")
            file.flush()
            assert [path.name.endswith(".partial") for path in tmp_path.iterdir()] == [True]
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        half()
    assert list(tmp_path.iterdir()) == []


def test_rows_without_a_vector_are_nan_and_counted(shards: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "part-000000.npy"
    answers = [{"embedding": np.float32([[1, 2, 3]])}, InputError("too long"), {"embedding": np.float32([[4, 5, 6]])}]
    ids = [("a.txt", 1), ("a.txt", 2), ("b.png", None)]
    shards.write_ids(path.with_suffix(".jsonl"), ids, answers)
    shards.write_vectors(path, VECTOR, answers, lambda: 1 // 0)
    np.testing.assert_array_equal(np.load(path), np.float32([[1, 2, 3], [np.nan] * 3, [4, 5, 6]]))
    lines = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    assert lines[1:] == [
        {"file": "a.txt", "line": 2, "error": "too long"},
        {"file": "b.png", "line": None, "error": None},
    ]
    assert shards.failed_rows(path) == 1
    shards.write_vectors(path, VECTOR, answers[1:2], lambda: 3)
    assert np.load(path).shape == (1, 3)


def test_answers_as_plain_values(shards: ModuleType) -> None:
    def of(*rows: object) -> np.ndarray:
        array = np.empty((1, len(rows)), object)
        array[0] = rows
        return array

    assert shards.value_of(Port("mask", BYTES, text=True), of(b"[]")) == "[]"
    assert shards.value_of(Port("label", BYTES, (None,), text=True), of(b"a", "é".encode())) == ["a", "é"]
    assert shards.value_of(Port("probability", "float32"), np.float32([[0.5]])) == 0.5
    ids = np.array([[[3, 4, -1], [5, 6, 7]]])
    assert shards.value_of(Port("generated_ids", "int64", (None, None)), ids) == [[3, 4], [5, 6, 7]]


def test_marks_of_other_encodings(rows: ModuleType, tmp_path: Path) -> None:
    """A byte order mark is no part of the first line; a line of UTF-16 is no text."""
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\ntwo\n")
    (tmp_path / "b.txt").write_bytes("one\ntwo\n".encode("utf-16"))
    (tmp_path / "c.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "three"}\n')
    (block,) = rows.blocks_of(tmp_path, ["a.txt", "b.txt", "c.jsonl"], 100)
    found = [row.values for row in rows.RowReader(tmp_path, [TEXT], {"text": "text"}).rows(block)]
    assert found[:2] == [{"text": b"one"}, {"text": b"two"}]
    assert found[-1] == {"text": "three"}
    assert all("expected UTF-8, not UTF-16" in str(each) for each in found[2:-1])


@pytest.mark.parametrize("path", ["a\0b.png", "\ud800.png"])
def test_paths_that_are_none_fail_their_own_row(rows: ModuleType, tmp_path: Path, path: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": path}) + "\n")
    (block,) = rows.blocks_of(tmp_path, ["a.jsonl"], 100)
    (row,) = rows.RowReader(tmp_path, [IMAGE], {"image": "image"}).rows(block)
    assert "is no path of an image" in str(row.values)


def test_a_file_name_that_is_not_utf8(rows: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "\udcff.txt").write_text("one\n")
    with pytest.raises(InputError, match="is not UTF-8; rename it"):
        rows.files_in(tmp_path, [TEXT])
