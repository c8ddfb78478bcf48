"""Read the user's calibration data one sample at a time: lines of text, lines of JSON, folders of images."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from transom.calib.samples import Part, Sample, printable
from transom.runtime.errors import CalibrationError, one_line
from transom.runtime.image_loading import SIGNATURES

MAX_LINE_BYTES = 16 << 20  # a model reads some thousand tokens of a text: a longer line is no text
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
KEYS = ("text", "text_pair", "image", "parts", "answer")  # of a line of JSON; others are ignored


class TextLines:
    """A .txt file, UTF-8: a text per line, blank lines skipped. Only the offsets of lines are kept in memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._starts, self._numbers = array("q"), array("q")
        for number, start, line in lines(path):
            if line.strip():
                self._starts.append(start)
                self._numbers.append(number)
        if not self._starts:
            raise CalibrationError(f"{path} holds no text; expected one per line, in UTF-8.")

    def __len__(self) -> int:
        return len(self._starts)

    def sample(self, index: int) -> Sample:
        with opened(self._path) as file:
            file.seek(self._starts[index])
            line = file.readline(MAX_LINE_BYTES + 1)
        where = f"{printable(self._path.name)}:{self._numbers[index]}"
        try:
            text = line.decode("utf-8-sig" if self._starts[index] == 0 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise CalibrationError(
                f"{where} is no UTF-8: byte {line[error.start]:#04x} at {error.start} of the line. Save it as UTF-8."
            ) from None
        return self.parse(text, where)

    def parse(self, line: str, where: str) -> Sample:
        return Sample(where, text=line)


class JsonLines(TextLines):
    """A .jsonl file: an object per line with "text", "text_pair" and "image", a path relative to the file.

    A line has "text" or "image", or both; or "parts", a list of texts, images ``{"image": path}`` and examples
    ``[question, answer]`` in the order in which a model reads them. "answer" is what it should say, where that is
    known. A key whose value is null counts as absent. An image outside of the file's folder is refused, as a link out
    of an ``ImageFolder`` is: an untrusted file could have any file read.
    """

    def parse(self, line: str, where: str) -> Sample:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else one_line(error, 100)
            refuse(where, f"is no JSON ({reason})")
        if not isinstance(value, dict):
            refuse(where, f"is JSON of a {type(value).__name__}")
        found = {key: value[key] for key in KEYS if value.get(key) is not None}
        parts = found.pop("parts", None)
        for key, text in found.items():
            self._check(key, text, where)
        if parts is not None:
            complete = found.keys() <= {"answer"}
        else:
            complete = "text" in found or ("image" in found and "text_pair" not in found)
        if not complete:
            refuse(where, f"has the keys {printable(', '.join(map(str, value))[:100]) or 'none'}")
        image = self._inside(found["image"], where) if "image" in found else None
        interleaved = None if parts is None else self._parts(parts, where)
        answer = found.get("answer")
        return Sample(where, found.get("text"), found.get("text_pair"), image, parts=interleaved, answer=answer)

    def _check(self, key: str, text: object, where: str) -> None:
        """Raise CalibrationError unless the value of ``key`` is a text."""
        if not isinstance(text, str) or not text.strip():
            refuse(where, f"has {key} {printable(repr(text)[:60])}, no text")
        if not is_unicode(text) or (key == "image" and "\0" in text):
            refuse(where, f"has {key} {printable(repr(text)[:60])}, which is no Unicode text")

    def _parts(self, given: object, where: str) -> tuple[Part, ...]:
        """Read texts, images and examples in their order."""
        if not isinstance(given, list) or not given:
            refuse(where, f"has parts {printable(repr(given)[:60])}, no list of parts")
        found: list[Part] = []
        for part in given:
            if isinstance(part, dict) and part.keys() == {"image"}:
                self._check("image", part["image"], where)
                found.append(self._inside(part["image"], where))
            elif isinstance(part, list) and len(part) == 2:
                for text in part:
                    self._check("part", text, where)
                question, answer = part
                found.append((question, answer))
            else:
                self._check("part", part, where)
                found.append(part)
        return tuple(found)

    def _inside(self, image: str, where: str) -> Path:
        folder = self._path.parent
        path = folder / image
        try:
            inside = path.resolve().is_relative_to(folder.resolve())
        except (OSError, RuntimeError) as error:  # a name too long, links in a circle
            refuse(
                where, f"names the image {printable(repr(image)[:60])}, which cannot be found ({one_line(error, 60)})"
            )
        if not inside:
            raise CalibrationError(
                f"{where} names the image {printable(repr(image)[:100])}, which lies outside of the file's folder; "
                "expected a path relative to the file, below it. Move the file, or copy the image."
            )
        return path


class ImageFolder:
    """The images below a folder, in the order of their paths; hidden files and folders are skipped.

    So are files of other kinds. A link to a place outside of the folder is refused: what is hashed as calibration
    data must be what lies there.
    """

    def __init__(self, folder: Path) -> None:
        self._name = folder.resolve().name
        self._folder = folder
        try:
            self._paths = sorted(path.relative_to(folder).as_posix() for path in walk(folder) if is_image(path))
        except OSError as error:
            shown = printable(error.filename or folder)
            raise CalibrationError(
                f"{shown} cannot be read: {error.strerror or error}. Check its permissions."
            ) from None
        if not self._paths:
            raise CalibrationError(
                f"{folder} holds no image; expected files that end in {', '.join(IMAGE_SUFFIXES)}, at any depth."
            )

    def __len__(self) -> int:
        return len(self._paths)

    def sample(self, index: int) -> Sample:
        return Sample(printable(f"{self._name}/{self._paths[index]}"), image=self._folder / self._paths[index])


def walk(folder: Path) -> Iterator[Path]:
    """Yield every file that is not hidden. Raises OSError, and CalibrationError for a link that leaves the folder."""
    root = folder.resolve()

    def stop(error: OSError) -> NoReturn:
        raise error

    for parent, folders, names in os.walk(folder, onerror=stop):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in [*folders, *names]:
            path = Path(parent, name)
            if not name.startswith(".") and path.is_symlink() and not path.resolve().is_relative_to(root):
                raise CalibrationError(
                    f"{printable(path)} is a link that leaves the folder; expected images that lie in {folder}. "
                    "Copy what it points to, or give that folder as well."
                )
        # A folder linked from within is not entered: its images are found where they lie
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def is_image(path: Path) -> bool:
    """Return whether a file is an image by its suffix, checked by its first bytes; without a suffix by these alone."""
    suffix = path.suffix.lower()
    if suffix not in ("", *IMAGE_SUFFIXES) or (not suffix and not path.is_file()):
        return False
    if not path.is_file():
        raise CalibrationError(f"{printable(path)} is no regular file; expected an image. Remove it, or replace it.")
    with path.open("rb") as file:
        head = file.read(16)
    known = any(head.startswith(magic) for magic, _, _ in SIGNATURES)
    if suffix and not known:
        raise CalibrationError(
            f"{printable(path)} starts with {head[:8]!r}, which is none of PNG, JPEG, WebP, BMP, GIF and TIFF. "
            "Convert it, or take it out."
        )
    return known


def lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield (number from 1, offset, bytes) of every line; lines end in \\n alone, as editors count."""
    number, start = 1, 0
    with opened(path) as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            if len(line) > MAX_LINE_BYTES:
                raise CalibrationError(
                    f"{printable(path.name)}:{number} is longer than {MAX_LINE_BYTES} bytes; expected one text per "
                    "line. Split it into lines."
                )
            yield number, start, line
            number, start = number + 1, start + len(line)


def opened(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        raise CalibrationError(
            f"{printable(path)} cannot be read: {error.strerror or error}. Check its permissions."
        ) from None


def is_unicode(text: str) -> bool:
    """Return whether the text has no lone surrogate, which JSON can contain."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def refuse(where: str, what: str) -> NoReturn:
    raise CalibrationError(
        f'{where} {what}; expected an object such as {{"text": "..."}}, {{"text": "...", "text_pair": "..."}}, '
        '{"image": "a path relative to the file"} or {"parts": [{"image": "..."}, ["question", "answer"], "..."]} on '
        "each line. Correct the line, or take it out."
    )
