"""Write the answers to a block of rows as a shard, whole or not at all: .parquet, or .npy with ids beside.

For ``ray_batch.py``. A row is called by its file and its number there, as ``batch_rows.py`` has them.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from transom.runtime.errors import InputError
from transom.runtime.serving.ports import BYTES, PADDING, Array, Port

Answer = Mapping[str, Array] | InputError  # of a row: the arrays of a request of one row, or what is wrong with it
Name = tuple[str, int | None]  # of a row: its file, and its number there


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of ``path`` when the block succeeds; no two workers share its first name."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_table(path: Path, ports: Sequence[Port], ids: Sequence[Name], answers: Sequence[Answer]) -> None:
    """Write a .parquet shard: file, line, a column of each output, error."""
    import pyarrow
    import pyarrow.parquet

    columns = {
        "file": pyarrow.array([file for file, _ in ids], pyarrow.string()),
        "line": pyarrow.array([line for _, line in ids], pyarrow.int64()),
    }
    for port in ports:
        kind = pyarrow.from_numpy_dtype(port.dtype) if port.dtype != BYTES else pyarrow.string()
        for _ in () if port.shape == (1,) else port.shape:
            kind = pyarrow.list_(kind)
        values = [None if isinstance(answer, InputError) else value_of(port, answer[port.name]) for answer in answers]
        columns[port.name] = pyarrow.array(values, kind)
    errors = [str(answer) if isinstance(answer, InputError) else None for answer in answers]
    columns["error"] = pyarrow.array(errors, pyarrow.string())
    with replacing(path) as file:
        pyarrow.parquet.write_table(pyarrow.table(columns), file)


def value_of(port: Port, array: Array) -> Any:
    """Return an output of one row as Arrow takes it: a text, a number, an array, or lists of those."""
    (row,) = array
    if port.dtype == BYTES:
        texts = [text.decode() for text in row]
        return texts[0] if port.shape == (1,) else texts
    if port.shape == (1,):
        return row[0].item()
    return row if len(port.shape) == 1 else [[number for number in each if number != PADDING] for each in row.tolist()]


def write_ids(path: Path, ids: Sequence[Name], answers: Sequence[Answer]) -> None:
    """Write a line of JSON for each row: file, line, error."""
    with replacing(path) as file:
        for (name, line), answer in zip(ids, answers, strict=True):
            error = str(answer) if isinstance(answer, InputError) else None
            file.write(json.dumps({"file": name, "line": line, "error": error}).encode() + b"\n")


def write_vectors(path: Path, port: Port, answers: Sequence[Answer], width: Callable[[], int]) -> None:
    """Write a .npy shard, float32 (rows, D): NaN where a row has no vector; ``width`` returns D where none has."""
    found = {place: answer[port.name][0] for place, answer in enumerate(answers) if not isinstance(answer, InputError)}
    vectors = np.full((len(answers), len(next(iter(found.values()))) if found else width()), np.nan, np.float32)
    for place, vector in found.items():
        vectors[place] = vector
    with replacing(path) as file:
        np.save(file, vectors)


def failed_rows(path: Path) -> int:
    """Return how many rows of a shard have an error."""
    if path.suffix == ".npy":
        return sum(
            json.loads(line)["error"] is not None for line in path.with_suffix(".jsonl").read_bytes().splitlines()
        )
    import pyarrow.parquet

    errors = pyarrow.parquet.read_table(path, columns=["error"])["error"]
    return len(errors) - int(errors.null_count)
