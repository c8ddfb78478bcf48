"""Calibration data: what ships is none of what scores, and the user's files are read to the letter or refused."""

from __future__ import annotations

import json
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from transom.calib.builtin_sets import DATA
from transom.calib.data import NAMES, CalibrationData, Sample, open_calibration_data
from transom.calib.npz_reader import NpzRows
from transom.export.datasets import (
    digit_prompts,
    heldout_date_lists,
    heldout_dates,
    heldout_digits,
    heldout_text,
    wordnet_pairs,
)
from transom.export.scores import DIGIT_NAMES
from transom.runtime.errors import CalibrationError


def texts(name: str) -> list[str]:
    return [str(sample.text) for sample in open_calibration_data([name]).samples]


def flat(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


# ---- the shipped sets and the inputs that score


def test_no_passage_is_of_a_held_out_chapter() -> None:
    passages, scored = texts("austen"), flat(heldout_text())
    assert len(passages) == 400
    assert {100 <= len(passage) <= 900 and passage[0] == "\n" for passage in passages} == {True}
    assert [passage for passage in passages if flat(passage) in scored] == []
    joined = [flat(passage) for passage in passages]
    paragraphs = [flat(line) for line in heldout_text().splitlines() if len(line) > 60]
    assert len(paragraphs) == 187
    assert [line for line in paragraphs if any(line in passage for passage in joined)] == []


def test_no_scan_is_held_out() -> None:
    scored, _ = heldout_digits()
    images = [sample.image for sample in open_calibration_data(["digits"]).samples]
    assert {(image.dtype, image.shape) for image in images if isinstance(image, np.ndarray)} == {
        (np.dtype("uint8"), (8, 8))
    }
    ours = {image.tobytes() for image in images if isinstance(image, np.ndarray)}
    assert len(ours) == 512
    assert ours & {scan.tobytes() for scan in scored} == set()
    chosen = load_file(Path(str(DATA.joinpath("digits.safetensors"))))["indices"]
    held_out = load_file(Path(str(DATA)).parents[1] / "export" / "data" / "digits_heldout.safetensors")["indices"]
    assert set(chosen.tolist()) & set(held_out.tolist()) == set()


def test_no_caption_is_a_prompt_that_scores_and_each_names_its_digit() -> None:
    captions = texts("digit-captions")
    asked = [prompt.replace("{}", name) for prompt in digit_prompts() for name in DIGIT_NAMES]
    assert len(captions) == 512
    assert [caption for caption in captions if any(prompt in caption for prompt in asked)] == []
    labels = load_file(Path(str(DATA.joinpath("digits.safetensors"))))["labels"]
    named = [
        re.search(rf"\b({digit}|{DIGIT_NAMES[digit]})\b", caption)
        for caption, digit in zip(captions, labels.tolist(), strict=True)
    ]
    assert None not in named
    scans = [sample.image for sample in open_calibration_data(["digits"]).samples]
    beside = [sample.image for sample in open_calibration_data(["digit-captions"]).samples]
    np.testing.assert_array_equal(np.array(scans), np.array(beside))


def test_no_definition_and_no_word_is_scored() -> None:
    ours = texts("wordnet")
    definitions, words = wordnet_pairs()
    single = {word for line in words for word in line.split(", ")}
    assert len(ours) == len(set(ours)) == 500
    assert {part for text in ours for part in (text, *text.split(", "))} & {*definitions, *words, *single} == set()


def test_no_date_is_scored() -> None:
    ours = texts("dates")
    assert len(ours) == 500
    assert set(ours) & set(heldout_dates()[0]) == set()


def test_no_date_of_a_list_is_scored() -> None:
    ours = [text.split("; ") for text in texts("date-lists")]
    assert [len(dates) for dates in ours] == [1, 2, 3, 4, 5, 6] * 70
    scored = {date for text in heldout_date_lists()[0] for date in text.split("; ")} | set(heldout_dates()[0])
    assert len(scored) > 3000
    assert {date for dates in ours for date in dates} & scored == set()


def test_the_card_names_every_set_and_file() -> None:
    card = DATA.joinpath("README.md").read_text("utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \|", card, re.MULTILINE)
    assert sorted(rows) == sorted(NAMES)
    shipped = {path.name for path in Path(str(DATA)).iterdir()} - {"README.md"}
    assert {name for name in shipped if f"`{name}`" not in card} == set()


@pytest.mark.parametrize("name", NAMES)
def test_a_named_set_opens_with_distinct_samples(name: str) -> None:
    data = open_calibration_data([name])
    assert data.name == name
    assert len({entry.digest for entry in data.entries}) == len(data.samples) >= 400
    assert data.sha256 == open_calibration_data([name]).sha256


# ---- files of the user


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """The numbers of lines are an editor's: 1, 3, 4, ..."""
    path = tmp_path / "review.txt"
    path.write_bytes(
        "\ufefferste Zeile\r\n \nder Text\x85 geht weiter\n".encode() + b"".join(b"%d\n" % n for n in range(8))
    )
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for number in range(10):
        place = folder / ("cat" if number % 2 else ".") / f"{number}.PNG"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), number).save(place)
    (folder / "labels.csv").write_text("not an image")
    (folder / ".thumbnails").mkdir()
    (folder / ".thumbnails" / "0.png").write_bytes(b"no image, and hidden")
    (folder / "._0.png").write_bytes(b"likewise")
    return folder


def test_a_text_per_line(lines: Path) -> None:
    data = open_calibration_data([str(lines)])
    assert [(sample.name, sample.text) for sample in data.samples[:3]] == [
        ("review.txt:1", "erste Zeile"),
        ("review.txt:3", "der Text\x85 geht weiter"),
        ("review.txt:4", "0"),
    ]
    assert (data.name, len(data.samples)) == ("review.txt", 10)
    assert data.kinds == {"text"}
    assert data.samples[-1] == data.samples[9] == Sample("review.txt:11", text="7")


def test_objects_per_line(tmp_path: Path, photos: Path) -> None:
    rows = [
        {"text": "a", "label": 3, "image": None},
        {"text": "b", "text_pair": "c"},
        {"image": "photos/0.PNG", "text": "zero"},
        *({"text": f"{n}", "image": f"photos/cat/{n}.PNG"} for n in (1, 3, 5, 7, 9)),
        *({"image": f"photos/{n}.PNG"} for n in (2, 4, 6, 8)),
        *({"text": f"more {n}"} for n in range(9)),
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    data = open_calibration_data([str(path)])
    assert data.samples[0] == Sample("pairs.jsonl:1", text="a")
    assert data.samples[1] == Sample("pairs.jsonl:2", text="b", text_pair="c")
    assert data.samples[2] == Sample("pairs.jsonl:3", text="zero", image=photos / "0.PNG")
    assert data.entries[2].kinds == {"text", "image"}
    assert len({entry.digest for entry in data.entries}) == len(rows)


def test_interleaved_texts_and_images_per_line(tmp_path: Path, photos: Path) -> None:
    """A part is a text, an image, or an example of a question and its answer; their order counts."""
    image = {"image": "photos/0.PNG"}
    rows: list[dict[str, object]] = [
        {"parts": [image, ["how many?", "two"], {"image": "photos/cat/1.PNG"}, "how many now?"], "answer": "one"},
        {"image": "photos/0.PNG", "text": "how many?", "answer": "two"},
        {"parts": [image, "how many?"], "answer": "two"},
        {"parts": ["how many?", image], "answer": "two"},
        {"parts": [image, "how many?"], "answer": "three"},
        {"parts": [image, "how", "many?"]},
        {"parts": [image, ["how", "many?"]]},
        {"image": "photos/4.PNG"},
        *({"parts": [f"text {number}"]} for number in range(8)),
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    data = open_calibration_data([str(path)])
    first, second = photos / "0.PNG", photos / "cat" / "1.PNG"
    assert data.samples[0] == Sample(
        "questions.jsonl:1", parts=(first, ("how many?", "two"), second, "how many now?"), answer="one"
    )
    assert data.samples[1] == Sample("questions.jsonl:2", text="how many?", image=first, answer="two")
    assert [sorted(entry.kinds) for entry in data.entries[:2]] == [["image", "parts", "text"], ["image", "text"]]
    assert data.entries[-1].kinds == {"parts", "text"}
    assert len({entry.digest for entry in data.entries}) == len(rows)
    (photos / "0.PNG").write_bytes((photos / "2.PNG").read_bytes())
    again = open_calibration_data([str(path)])
    changed = [entry.digest != other.digest for entry, other in zip(data.entries, again.entries, strict=True)]
    assert changed == [True] * 7 + [False] * 9


def test_a_folder_of_images_in_the_order_of_their_paths(photos: Path) -> None:
    data = open_calibration_data([str(photos)])
    assert [sample.name for sample in data.samples] == [
        *(f"photos/{n}.PNG" for n in (0, 2, 4, 6, 8)),
        *(f"photos/cat/{n}.PNG" for n in (1, 3, 5, 7, 9)),
    ]
    assert data.samples[5].image == photos / "cat" / "1.PNG"


def test_several_are_one_after_another(photos: Path, lines: Path) -> None:
    data = open_calibration_data([str(photos), str(lines), "dates"])
    assert (data.name, len(data.samples)) == ("photos + review.txt + dates", 520)
    assert [data.samples[index].name for index in (9, 10, 19, 20, 519)] == [
        *("photos/cat/9.PNG", "review.txt:1", "review.txt:11", "dates[0]", "dates[499]")
    ]
    assert data.kinds == {"text", "image"}


def test_the_hash_follows_names_and_contents_and_not_the_place(photos: Path, tmp_path: Path) -> None:
    before = open_calibration_data([str(photos)]).sha256
    moved = tmp_path / "elsewhere" / "photos"
    moved.parent.mkdir()
    photos.rename(moved)
    assert open_calibration_data([str(moved)]).sha256 == before
    (moved / "0.PNG").rename(moved / "00.PNG")
    renamed = open_calibration_data([str(moved)]).sha256
    assert renamed != before
    Image.new("L", (4, 4), 99).save(moved / "00.PNG", "PNG")
    assert open_calibration_data([str(moved)]).sha256 not in (before, renamed)


def test_arrays_are_rows_with_a_first_axis_of_one(tmp_path: Path) -> None:
    ids, wide = np.arange(24).reshape(8, 3), np.arange(8.0, dtype=">f4")
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "ids.npz", input_ids=ids, scale=wide)
        data = open_calibration_data([str(tmp_path / "ids.npz")])
        assert data.kinds == {"input_ids", "scale"}
        for index in (7, 0, 3, 4):  # not only in order
            feeds = data.samples[index].feeds
            assert feeds is not None
            np.testing.assert_array_equal(feeds["input_ids"], ids[index : index + 1])
            np.testing.assert_array_equal(feeds["scale"], wide[index : index + 1])
        assert data.samples[4].name == "ids.npz[4]"


def test_one_row_of_an_array_is_in_memory(tmp_path: Path) -> None:
    """64 MB in 128 rows."""
    path = tmp_path / "large.npz"
    np.savez_compressed(path, pixel_values=np.zeros((128, 64, 64, 32), np.float32))
    tracemalloc.start()
    rows = NpzRows(path)
    assert {rows.sample(index).digest() for index in range(len(rows))} == {rows.sample(0).digest()}
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20


def test_texts_and_images_are_not_held(tmp_path: Path) -> None:
    """30 MB of each; what stays is 300 bytes or so a sample."""
    (tmp_path / "long.txt").write_bytes(b"".join(b"%d " % n * 20_000 + b"\n" for n in range(1000, 1300)))
    folder = tmp_path / "large"
    folder.mkdir()
    for n in range(32):
        (folder / f"{n}.bmp").write_bytes(b"BM" + bytes([n]) * (1 << 20))  # opened, if at all, when put through
    tracemalloc.start()
    data = open_calibration_data([str(tmp_path / "long.txt"), str(folder)])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "long.txt").stat().st_size == 30_000_300
    assert len(data.samples) == 332
    assert peak < 4 << 20


# ---- splits


def test_parts_are_disjoint_complete_and_the_same_again() -> None:
    data = open_calibration_data(["dates"])
    kept, held_out = data.split(4)
    assert (len(kept.samples), len(held_out.samples)) == (375, 125)
    names = [[sample.name for sample in part.samples] for part in (kept, held_out)]
    assert sorted([*names[0], *names[1]]) == sorted(entry.name for entry in data.entries)
    assert names[1] == sorted(names[1], key=lambda name: int(re.findall(r"\d+", name)[0]))
    assert data.split(4)[1].sha256 == held_out.sha256
    parts = [{entry.name for entry in data.split(4, part)[1].entries} for part in range(4)]
    assert set.union(*parts) == {entry.name for entry in data.entries}
    assert sum(map(len, parts)) == 500
    assert kept.split(3)[1].samples[0].name in names[0]
    assert kept.name == "dates (375 of 500, for calibration)"


def test_equal_samples_stay_on_one_side(tmp_path: Path) -> None:
    path = tmp_path / "often.txt"
    path.write_text("\n".join(f"text {n % 10}" for n in range(40)))
    for part in range(2):
        kept, held_out = open_calibration_data([str(path)]).split(2, part)
        sides = [{sample.text for sample in part.samples} for part in (kept, held_out)]
        assert sides[0] & sides[1] == set()
        assert (len(sides[0]), len(sides[1])) == (5, 5)


@pytest.mark.parametrize(("parts", "part"), [(1, 0), (4, 4), (4, -1), (501, 0)])
def test_a_split_needs_samples_for_its_parts(parts: int, part: int) -> None:
    with pytest.raises(CalibrationError, match=r"of at least two parts|too few for 501 parts"):
        open_calibration_data(["dates"]).split(parts, part)


def test_a_type_of_the_interface(lines: Path) -> None:
    data: CalibrationData = open_calibration_data([str(lines)])
    assert list(data.samples[2:4]) == [data.samples[2], data.samples[3]]
    with pytest.raises(IndexError):
        data.samples[10]


def test_too_few_of_one_kind_are_refused(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("a\nb\n")
    with pytest.raises(CalibrationError, match=r"^photos \+ few\.txt holds 2 distinct texts, at least 8"):
        open_calibration_data([str(photos), str(tmp_path / "few.txt")])
