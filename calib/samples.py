"""One calibration sample: its inputs and their hash."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from transom.runtime.backends.base import Array
from transom.runtime.errors import CalibrationError

TEXT, IMAGE = "text", "image"  # the kinds of a sample beside the names of its raw inputs
PARTS = "parts"  # the kind of one whose texts and images are interleaved, beside the kinds of its parts

ImagePart = Path | NDArray[np.uint8]
Part = str | tuple[str, str] | ImagePart  # a text, a question with its answer, or an image


@dataclass(frozen=True)
class Sample:
    """The inputs of one call of a model: at least one of ``text``, ``image``, ``feeds`` and ``parts``.

    name       where it comes from, for messages: "review.txt:17", "photos/cat/1.png"
    text       one text; ``text_pair`` is the second of a pair
    image      a file, or uint8 (height, width) or (height, width, 3) of 0..255
    feeds      raw graph inputs by name, each with a first axis of size 1
    parts      texts, (question, answer) examples and images in the order in which they are read, without the others
    answer     what a model that answers should say, where that is known
    """

    name: str
    text: str | None = None
    text_pair: str | None = None
    image: ImagePart | None = None
    feeds: dict[str, Array] | None = None
    parts: tuple[Part, ...] | None = None
    answer: str | None = None

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of its inputs: "text", "image", "parts", and the names of raw inputs."""
        found = {kind for kind, value in ((TEXT, self.text), (IMAGE, self.image)) if value is not None}
        if self.parts is not None:
            found |= {PARTS, *(TEXT if isinstance(part, str | tuple) else IMAGE for part in self.parts)}
        return frozenset(found | set(self.feeds or ()))

    def digest(self) -> bytes:
        """Return the SHA-256 of the contents, not of the name; an image file is read in pieces.

        Raises CalibrationError when the image cannot be read.
        """
        total = hashlib.sha256()
        for part, value in ((b"text", self.text), (b"text_pair", self.text_pair), (b"answer", self.answer)):
            if value is not None:
                total.update(part + text_digest(value))
        if self.image is not None:
            total.update(self._image_digest(self.image))
        for name, array in sorted((self.feeds or {}).items()):
            total.update(text_digest(name) + array_digest(array))
        for each in self.parts or ():
            if isinstance(each, str):
                total.update(b"part" + text_digest(each))
            elif isinstance(each, tuple):
                total.update(b"example" + b"".join(map(text_digest, each)))
            else:
                total.update(self._image_digest(each))
        return total.digest()

    def _image_digest(self, image: ImagePart) -> bytes:
        return b"file" + file_digest(image, self.name) if isinstance(image, Path) else b"image" + array_digest(image)


class Source(Protocol):
    """Samples that are read by index from 0, each when it is accessed."""

    def __len__(self) -> int: ...

    def sample(self, index: int) -> Sample: ...


def printable(text: object) -> str:
    """Make text fit for a message of one line: file names may hold line breaks, and bytes that are no Unicode."""
    return "".join(character if character.isprintable() else "?" for character in str(text))


def text_digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def file_digest(path: Path, name: str) -> bytes:
    """Return the SHA-256 of a file's bytes; CalibrationError where it cannot be read."""
    try:
        if not path.is_file():  # a pipe would block
            raise CalibrationError(f"{name} names {printable(path)}, which is no file that is there. Check the path.")
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise CalibrationError(f"{name} cannot be read: {error.strerror or error}. Check its permissions.") from None


def array_digest(array: NDArray[Any]) -> bytes:
    """Return the SHA-256 of an array's dtype, shape and elements."""
    head = f"{array.dtype.str} {array.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).digest()
