"""Describe the tensors of a request and of its answer, and turn them into rows of texts, bytes and arrays and back.

The first axis of every tensor has the rows of a request. A text is UTF-8 in a tensor of bytes, which numpy has as an
array of objects: the form that the Open Inference Protocol calls BYTES, in Triton's and KServe's libraries alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.runtime.errors import InputError, ShapeError

Array = NDArray[Any]
BYTES = "bytes"
PADDING = -1  # behind ids of a row that is shorter than another of its request


@dataclass(frozen=True)
class Port:
    """One tensor: its name, dtype (BYTES or numpy's name), and shape without the rows; None is any size.

    ``text`` says that bytes are UTF-8. An ``optional`` input may be left out.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...] = (1,)
    text: bool = False
    optional: bool = False

    def rows(self, array: Array) -> list[Any]:
        """Return one value per row: an array, or of bytes the value itself for a shape (1,), else a list of them.

        Texts are str, other bytes bytes. Raises InputError for another dtype and for bytes that are
        no UTF-8, ShapeError for another rank or size.
        """
        if not isinstance(array, np.ndarray):
            raise InputError(f"{self.name} is a {type(array).__name__}; expected a numpy array.")
        self._check(array)
        if self.dtype != BYTES:
            return list(array)
        found = [[self._value(item) for item in row.ravel()] for row in array]
        return [row[0] for row in found] if self.shape == (1,) else found

    def _check(self, array: Array) -> None:
        kind = BYTES if array.dtype.kind in "OSU" else str(array.dtype)
        if kind != self.dtype:
            raise InputError(f"{self.name} has dtype {kind}; expected {self.dtype}.")
        sizes = array.shape[1:]
        fits = len(sizes) == len(self.shape) and all(
            wanted in (None, size) for wanted, size in zip(self.shape, sizes, strict=True)
        )
        if array.ndim == 0 or not fits or 0 in array.shape:
            wanted = ", ".join(["rows", *("any" if size is None else str(size) for size in self.shape)])
            raise ShapeError(f"{self.name} has shape {array.shape}; expected ({wanted}), none of them 0.")

    def _value(self, item: Any) -> str | bytes:
        if not isinstance(item, str | bytes):
            raise InputError(f"{self.name} holds a {type(item).__name__}; expected bytes.")
        if not self.text:
            if isinstance(item, str):
                raise InputError(f"{self.name} holds text; expected the bytes of an encoded image, such as a PNG file.")
            return item
        if isinstance(item, str):
            return item
        try:
            return item.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{self.name} is not UTF-8 (byte {error.start}); send the text as UTF-8.") from None

    def array(self, values: Sequence[Any]) -> Array:
        """Return the values of an output, one per row, as an array: the inverse of ``rows``."""
        if self.dtype != BYTES:
            values = padded(values) if self.shape == (None, None) else values
            found = np.stack([np.asarray(value, self.dtype) for value in values])
            return found[:, None] if self.shape == (1,) else found
        rows = [[value] if isinstance(value, str | bytes) else value for value in values]
        texts = np.empty((len(rows), len(rows[0])), object)
        for place, row in enumerate(rows):
            texts[place] = [item.encode() if isinstance(item, str) else item for item in row]
        return texts


def padded(values: Sequence[Sequence[Sequence[int]]]) -> list[list[list[int]]]:
    """Return sequences of ids, several per row, all as long as the longest: PADDING follows the others."""
    longest = max(len(ids) for row in values for ids in row)
    return [[[*ids, *[PADDING] * (longest - len(ids))] for ids in row] for row in values]


def checked_names(ports: Sequence[Port], arrays: Mapping[str, Array]) -> None:
    """Raise InputError for an input that does not exist, and for one that is missing."""
    known = [port.name for port in ports]
    unknown = [name for name in arrays if name not in known]
    if unknown:
        raise InputError(f"unknown input {unknown[0]!r:.60}; this bundle takes {', '.join(known)}.")
    missing = [port.name for port in ports if port.name not in arrays and not port.optional]
    if missing:
        raise InputError(f"the input {missing[0]} is missing; this bundle takes {', '.join(known)}.")


def rows_of(ports: Sequence[Port], arrays: Mapping[str, Array]) -> list[tuple[Any, ...]]:
    """Return the rows of a request: for each a value of every port, None for an input that was left out.

    Raises InputError and ShapeError as ``checked_names`` and ``Port.rows`` do, and ShapeError for inputs of different
    numbers of rows.
    """
    checked_names(ports, arrays)
    columns = {port.name: port.rows(arrays[port.name]) for port in ports if port.name in arrays}
    counts = {name: len(column) for name, column in columns.items()}
    if not counts:
        raise InputError(f"the request has no input; give one of {', '.join(port.name for port in ports)}.")
    count = next(iter(counts.values()))
    if len(set(counts.values())) > 1:
        raise ShapeError(f"the inputs have different numbers of rows: {counts}; expected one number.")
    blank = [None] * count
    return list(zip(*(columns.get(port.name, blank) for port in ports), strict=True))


def arrays_of(ports: Sequence[Port], answers: Sequence[Sequence[Any]]) -> dict[str, Array]:
    """Return the arrays of an answer from its rows, each with a value for every port."""
    return {port.name: port.array(column) for port, column in zip(ports, zip(*answers, strict=True), strict=True)}
