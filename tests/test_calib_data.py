"""Calibration data: what ships is none of what scores, and the user's files are read to the letter or refused."""

from __future__ import annotations

import json
import os
import re
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from transom.calib.arrays import NpzRows
from transom.calib.data import MIN_SAMPLES, NAMES, CalibrationData, Sample, open_calibration_data
from transom.calib.named import DATA
from transom.export.inputs import (
    digit_prompts,
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


def test_a_split_is_disjoint_complete_and_the_same_again() -> None:
    data = open_calibration_data(["dates"])
    kept, held_out = data.split(0.25)
    assert (len(kept.samples), len(held_out.samples)) == (375, 125)
    names = [[sample.name for sample in part.samples] for part in (kept, held_out)]
    assert sorted([*names[0], *names[1]]) == sorted(entry.name for entry in data.entries)
    assert names[1] == sorted(names[1], key=lambda name: int(re.findall(r"\d+", name)[0]))
    again, others = data.split(0.25)[1], data.split(0.25, seed=1)[1]
    assert again.sha256 == held_out.sha256 != others.sha256
    assert held_out.split(0.2)[1].samples[0].name in names[1]
    assert kept.name == "dates (375 of 500, for calibration)"


def test_equal_samples_stay_on_one_side(tmp_path: Path) -> None:
    path = tmp_path / "often.txt"
    path.write_text("\n".join(f"text {n % 10}" for n in range(40)))
    for seed in range(5):
        kept, held_out = open_calibration_data([str(path)]).split(0.5, seed)
        sides = [{sample.text for sample in part.samples} for part in (kept, held_out)]
        assert sides[0] & sides[1] == set()
        assert (len(sides[0]), len(sides[1])) == (5, 5)


@pytest.mark.parametrize("fraction", [0, 1, -0.5, float("nan")])
def test_a_split_needs_a_fraction(fraction: float) -> None:
    with pytest.raises(CalibrationError, match="expected a number between 0 and 1"):
        open_calibration_data(["dates"]).split(fraction)


# ---- what is refused


def refused(*given: object) -> str:
    with pytest.raises(CalibrationError) as caught:
        open_calibration_data([str(each) for each in given])
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


@pytest.mark.parametrize("name", ["random", "Random", "noise"])
def test_random_data_is_refused_with_the_reason(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    message = refused(name)
    assert "random inputs have ranges that no real input has" in message
    assert "austen" in message


def test_nothing_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"is nothing; expected a list of names \(austen, "):
        open_calibration_data([])
    with pytest.raises(CalibrationError, match="is 'austen'; expected a list"):
        open_calibration_data("austen")
    for absent in ("", "austin", "x" * 5000, "a\0b", "/dev/null"):
        assert "expected one of austen, digits, digit-captions, wordnet, dates, or a .txt" in refused(absent)


@pytest.mark.parametrize("count", [1, MIN_SAMPLES - 1])
def test_too_few_are_refused_with_the_reason(tmp_path: Path, count: int) -> None:
    path = tmp_path / "few.txt"
    path.write_text("\n".join(f"text {n % count}" for n in range(100)))
    assert re.search(
        f"few.txt holds {count} distinct texts?, at least 8 are needed: of fewer, one unusual input", refused(path)
    )
    path.write_text("\n".join(f"text {n}" for n in range(MIN_SAMPLES)))
    assert len(open_calibration_data([str(path)]).samples) == MIN_SAMPLES


def test_too_few_of_one_kind_are_refused(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "few.txt").write_text("a\nb\n")
    assert "photos + few.txt holds 2 distinct texts, at least 8" in refused(photos, tmp_path / "few.txt")


def write_npz(path: Path, **members: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)


def npy(shape: str, descr: str = "'<f4'", body: bytes = b"", fortran: bool = False) -> bytes:
    head = f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + body


def of_lines(*parts: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / "data.jsonl"
        path.write_bytes(b'{"text": "fine"}\n' + b"\n".join(parts))
        return path

    return make


def of_npz(**members: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        write_npz(folder / "data.npz", **members)
        return folder / "data.npz"

    return make


def of_bytes(name: str, data: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def of_arrays(**arrays: object) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        np.savez(folder / "data.npz", **{name: np.asarray(value) for name, value in arrays.items()})  # type: ignore[arg-type]
        return folder / "data.npz"

    return make


def folder_of(**files: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        made = folder / "images"
        made.mkdir()
        for name, data in files.items():
            (made / name.replace("_", ".")).write_bytes(data)
        return made

    return make


def outside(folder: Path) -> Path:
    made = folder_of(a_txt=b"")(folder)
    (folder / "secret.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (made / "b.png").symlink_to("../secret.png")
    return made


def outside_folder(folder: Path) -> Path:
    made = folder_of()(folder)
    (made / "up").symlink_to("..")
    return made


def piped(folder: Path) -> Path:
    made = folder_of()(folder)
    os.mkfifo(made / "a.png")
    return made


ROWS = "Write it with np.savez"
OBJECTS = np.array([{}] * 8, dtype=object)
REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "an empty text": (of_bytes("a.txt", b""), "holds no text; expected one per line"),
    "blank lines": (of_bytes("a.txt", b"\n \n\t\r\n"), "holds no text; expected one per line"),
    "Latin-1": (of_bytes("a.txt", b"caf\xc3\xa9\ncaf\xe9\n"), "a.txt:2 is no UTF-8: byte 0xe9 at 3"),
    "another suffix": (of_bytes("a.csv", b"a"), "no file of a known kind; expected a .txt, .jsonl or .npz file"),
    "no lines": (of_bytes("a.jsonl", b""), "holds no text"),
    "no JSON": (of_lines(b'{"text": "fine"}', b'{"text"'), "data.jsonl:3 is no JSON (Expecting"),
    "deep JSON": (of_lines(b"[" * 100_000), "data.jsonl:2 is no JSON (nested too deeply); expected an object such as"),
    "an array": (of_lines(b"[1]"), "data.jsonl:2 is JSON of a list; expected an object"),
    "other keys": (of_lines(b'{"sentence": "a", "id": 1}'), "data.jsonl:2 has the keys sentence, id; expected"),
    "no keys": (of_lines(b"{}"), "data.jsonl:2 has the keys none"),
    "a pair alone": (of_lines(b'{"text_pair": "a"}'), "data.jsonl:2 has the keys text_pair"),
    "a pair of an image": (of_lines(b'{"text_pair": "a", "image": "b"}'), "data.jsonl:2 has the keys text_pair"),
    "a number": (of_lines(b'{"text": 3}'), "data.jsonl:2 has text 3, no text"),
    "a blank": (of_lines(b'{"text": " "}'), "data.jsonl:2 has text ' ', no text"),
    "a surrogate": (of_lines(b'{"text": "\\ud800"}'), "data.jsonl:2 has text '\\ud800', which is no Unicode"),
    "no such image": (of_lines(b'{"image": "not/there.png"}'), "which is no file that is there"),
    "an image beyond names": (of_lines(b'{"image": "a\\u0000b"}'), "which is no Unicode text"),
    "no image": (folder_of(a_txt=b"a", b_md=b"b"), "holds no image; expected files that end in .png"),
    "no files": (folder_of(), "holds no image"),
    "text called PNG": (folder_of(a_png=b"hello, world"), "starts with b'hello, w', which is none of PNG, JPEG"),
    "a link out": (outside, "b.png is a link that leaves the folder"),
    "a linked folder": (outside_folder, "up is a link that leaves the folder"),
    "a pipe": (piped, "is no regular file; expected an image"),
    "no archive": (of_bytes("a.npz", b"PK no"), f"as calibration data: File is not a zip file. {ROWS}"),
    "an empty archive": (of_npz(), "it holds 0 arrays of 0 names, expected 1 to 1000"),
    "pickles": (of_arrays(x=OBJECTS), "array 'x' holds pickled objects, which can run code"),
    "no numbers": (of_arrays(x=["a"] * 8), "array 'x' is of <U1, expected numbers"),
    "a scalar": (of_arrays(x=3), "array 'x' is a single number, without an axis for the samples"),
    "lengths": (of_arrays(x=[1] * 8, y=[1] * 9), "its arrays differ in their first axis (x (8,), y (9,))"),
    "no rows": (of_arrays(x=np.zeros((0, 3))), "array 'x' is float64 (0, 3), expected samples"),
    "Fortran order": (of_arrays(x=np.zeros((8, 3), order="F")), "is in Fortran order, expected C order"),
    "no .npy": (of_npz(x=b"hello, world"), "the magic string is not correct"),
    "a short array": (of_npz(x=npy("(8, 4)", body=bytes(100))), "is float32 (8, 4) by its header, but has"),
    "a huge header": (of_npz(x=npy("(99999999, 99999999, 99999999)")), "by its header, but has"),
    "a negative header": (of_npz(x=npy("(-8, -1)", body=bytes(32))), "array 'x' is float32 (-8, -1), expected"),
    "nothing, often": (of_npz(x=npy(f"({10**30}, 0)")), "0), expected samples of at least one number"),
    "one sample in many": (of_arrays(x=np.zeros((100, 3))), "holds 1 distinct sample of 'x', at least 8"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    make, message = REFUSED[case]
    assert message in refused(make(tmp_path))


def test_a_bomb_is_refused_by_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transom.calib.arrays.MAX_BYTES", 1 << 20)
    np.savez_compressed(tmp_path / "bomb.npz", x=np.zeros((8, 1 << 15), np.float32))
    assert "it unpacks to 1048704 bytes, at most 1048576 are read" in refused(tmp_path / "bomb.npz")
    monkeypatch.setattr("transom.calib.arrays.MAX_BYTES", 1 << 30)
    monkeypatch.setattr("transom.calib.arrays.MAX_ROW_BYTES", 1 << 10)
    assert "a sample of 'x' is 131072 bytes, at most 1024 are read" in refused(tmp_path / "bomb.npz")


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transom.calib.files.MAX_LINE_BYTES", 100)
    path = tmp_path / "long.txt"
    path.write_text("a" * 99 + "\n" + "b" * 100 + "\n")
    assert "long.txt:2 is longer than 100 bytes; expected one text per line" in refused(path)


def test_damage_behind_the_header_is_found_at_once(tmp_path: Path) -> None:
    """By the archive's checksum, before a sample is handed out."""
    path = tmp_path / "flipped.npz"
    np.savez(path, x=np.arange(64, dtype=np.float32).reshape(8, 8))
    data = bytearray(path.read_bytes())
    data[data.index(np.float32(63).tobytes())] ^= 1
    path.write_bytes(data)
    assert "Bad CRC-32" in refused(path)


def test_names_in_messages_are_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "im\nages"
    folder.mkdir()
    (folder / "a\nb.png").write_bytes(b"no image")
    assert "im?ages/a?b.png starts with" in refused(folder)


def test_a_type_of_the_interface(lines: Path) -> None:
    data: CalibrationData = open_calibration_data([str(lines)])
    assert list(data.samples[2:4]) == [data.samples[2], data.samples[3]]
    with pytest.raises(IndexError):
        data.samples[10]
