"""Calibration data that is refused: random, too little, damaged, hostile; one line that says what to do."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from transom.calib.data import MIN_SAMPLES, open_calibration_data
from transom.runtime.errors import CalibrationError


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
        assert (
            "expected one of austen, digits, digit-captions, digit-compositions, digit-questions, wordnet, dates, "
            "date-lists, or a .txt" in refused(absent)
        )


@pytest.mark.parametrize("count", [1, MIN_SAMPLES - 1])
def test_too_few_are_refused_with_the_reason(tmp_path: Path, count: int) -> None:
    path = tmp_path / "few.txt"
    path.write_text("\n".join(f"text {n % count}" for n in range(100)))
    assert re.search(
        f"few.txt holds {count} distinct texts?, at least 8 are needed: of fewer, one unusual input", refused(path)
    )
    path.write_text("\n".join(f"text {n}" for n in range(MIN_SAMPLES)))
    assert len(open_calibration_data([str(path)]).samples) == MIN_SAMPLES


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


def lines_with_a_link(folder: Path) -> Path:
    """The file and the link lie in one folder, the image beside it."""
    made = outside(folder)
    (made / "data.jsonl").write_text('{"image": "b.png"}')
    return made / "data.jsonl"


def lines_with_a_linked_folder(folder: Path) -> Path:
    (outside_folder(folder) / "data.jsonl").write_text('{"image": "up/data.png"}')
    (folder / "data.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return folder / "images" / "data.jsonl"


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
    "an image beyond the folder": (of_lines(b'{"image": "../there.png"}'), "which lies outside of the file's folder"),
    "an image by a whole path": (of_lines(b'{"image": "/etc/hostname"}'), "which lies outside of the file's folder"),
    "an image by a link": (lines_with_a_link, "names the image 'b.png', which lies outside of the file's folder"),
    "an image by linked folder": (lines_with_a_linked_folder, "'up/data.png', which lies outside of the file's folder"),
    "no such image": (of_lines(b'{"image": "not/there.png"}'), "which is no file that is there"),
    "an image beyond names": (of_lines(b'{"image": "a\\u0000b"}'), "which is no Unicode text"),
    "parts beside a text": (of_lines(b'{"parts": ["a"], "text": "b"}'), "data.jsonl:2 has the keys parts, text"),
    "parts that are none": (of_lines(b'{"parts": "a"}'), "data.jsonl:2 has parts 'a', no list of parts"),
    "no parts": (of_lines(b'{"parts": []}'), "data.jsonl:2 has parts [], no list of parts"),
    "a part that is a number": (of_lines(b'{"parts": ["a", 3]}'), "data.jsonl:2 has part 3, no text"),
    "a blank part": (of_lines(b'{"parts": [" "]}'), "data.jsonl:2 has part ' ', no text"),
    "an example of one": (of_lines(b'{"parts": [["a"], "b"]}'), "data.jsonl:2 has part ['a'], no text"),
    "an example of none": (of_lines(b'{"parts": [["a", null], "b"]}'), "data.jsonl:2 has part None, no text"),
    "an object of a part": (of_lines(b'{"parts": [{"image": "a", "text": "b"}]}'), "data.jsonl:2 has part {'image'"),
    "an image of a part": (of_lines(b'{"parts": [{"image": 3}]}'), "data.jsonl:2 has image 3, no text"),
    "an image of a part beyond": (of_lines(b'{"parts": [{"image": "../a.png"}]}'), "outside of the file's folder"),
    "an answer alone": (of_lines(b'{"answer": "a"}'), "data.jsonl:2 has the keys answer"),
    "an answer that is a number": (of_lines(b'{"text": "a", "answer": 3}'), "data.jsonl:2 has answer 3, no text"),
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
    monkeypatch.setattr("transom.calib.npz_reader.MAX_BYTES", 1 << 20)
    np.savez_compressed(tmp_path / "bomb.npz", x=np.zeros((8, 1 << 15), np.float32))
    assert "it unpacks to 1048704 bytes, at most 1048576 are read" in refused(tmp_path / "bomb.npz")
    monkeypatch.setattr("transom.calib.npz_reader.MAX_BYTES", 1 << 30)
    monkeypatch.setattr("transom.calib.npz_reader.MAX_ROW_BYTES", 1 << 10)
    assert "a sample of 'x' is 131072 bytes, at most 1024 are read" in refused(tmp_path / "bomb.npz")


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transom.calib.readers.MAX_LINE_BYTES", 100)
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
