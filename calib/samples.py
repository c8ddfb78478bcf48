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


@dataclass(frozen=True)
class Sample:
    """The inputs of one call of a model: at least one of ``text``, ``image`` and ``feeds``.

    name       where it comes from, for messages: "review.txt:17", "photos/cat/1.png"
    text       one text; ``text_pair`` is the second of a pair
    image      a file, or uint8 (height, width) or (height, width, 3) of 0..255
    feeds      raw graph inputs by name, each with a first axis of size 1
    """

    name: str
    text: str | None = None
    text_pair: str | None = None
    image: Path | NDArray[np.uint8] | None = None
    feeds: dict[str, Array] | None = None

    @property
    def kinds(self) -> frozenset[str]:
        """The kinds of its inputs: "text", "image", and the names of raw inputs."""
        found = {kind for kind, value in ((TEXT, self.text), (IMAGE, self.image)) if value is not None}
        return frozenset(found | set(self.feeds or ()))

    def digest(self) -> bytes:
        """Return the SHA-256 of the contents, not of the name; an image file is read in pieces.

        Raises CalibrationError when the image cannot be read.
        """
        total = hashlib.sha256()
        for part, value in ((b"text", self.text), (b"text_pair", self.text_pair)):
            if value is not None:
                total.update(part + hashlib.sha256(value.encode()).digest())
        if isinstance(self.image, Path):
            total.update(b"file" + file_digest(self.image, self.name))
        elif self.image is not None:
            total.update(b"image" + array_digest(self.image))
        for name, array in sorted((self.feeds or {}).items()):
            total.update(hashlib.sha256(name.encode()).digest() + array_digest(array))
        return total.digest()


class Source(Protocol):
    """Samples that are read by index from 0, each when it is accessed."""

    def __len__(self) -> int: ...

    def sample(self, index: int) -> Sample: ...


def printable(text: object) -> str:
    """Make text fit for a message of one line: file names may hold line breaks, and bytes that are no Unicode."""
    return "".join(character if character.isprintable() else "?" for character in str(text))


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
