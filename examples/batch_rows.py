"""Cut a folder of texts, tables and images into blocks of rows, always the same ones, and read a block's rows.

What ``ray_batch.py`` works on. A row is a line of a .txt file, a line of JSON of a .jsonl file, a row of a .parquet
file, or an image file. It is called by its file, relative to the folder, and its number there, which counts from 1
and is None for an image.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from transom.runtime.errors import InputError
from transom.runtime.serving.ports import BYTES, Array, Port

TEXTS, LINES_OF_JSON, TABLES = (".txt",), (".jsonl",), (".parquet",)
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class Piece:
    """Rows of a block that come from one file: its name, the number of the first, how many, the first one's byte."""

    file: str
    first: int
    count: int
    offset: int


@dataclass(frozen=True)
class Row:
    """A row's file and number, and the values of its inputs by name, or why it has none."""

    file: str
    line: int | None
    values: Mapping[str, Any] | InputError


def files_in(source: Path, ports: Sequence[Port]) -> tuple[Path, list[str]]:
    """Return the folder of the input, and the names of the files in it that these inputs can be read from, sorted.

    InputError where there is none.
    """
    endings = endings_for(ports)
    if source.is_dir():
        paths = (path for path in source.rglob("*") if path.suffix.lower() in endings and path.is_file())
        names = sorted(path.relative_to(source).as_posix() for path in paths)
    elif not source.exists():
        raise InputError(f"{source} is neither a file nor a folder.")
    else:
        names = [source.name] if source.suffix.lower() in endings else []
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise InputError(f"the name of the file {name!r} is not UTF-8; rename it.") from None
    if not names:
        raise InputError(f"{source} holds nothing to read; expected files that end in {', '.join(endings)}.")
    return (source if source.is_dir() else source.parent), names


def endings_for(ports: Sequence[Port]) -> tuple[str, ...]:
    """Return which files hold these inputs: images where there is one, lines of text where it can go without one."""
    images = IMAGES if any(port.name == "image" for port in ports) else ()
    needed = [port.name for port in ports if not port.optional]
    texts = TEXTS if ports[0].text and needed in ([], [ports[0].name]) else ()
    return (*texts, *LINES_OF_JSON, *TABLES, *images)


def listing_hash(folder: Path, names: Iterable[str]) -> str:
    """Return a hash of the files' names, sizes and times of change: another one where the input has changed."""
    found = hashlib.sha256()
    for name in names:
        status = (folder / name).stat()
        found.update(json.dumps([name, status.st_size, status.st_mtime_ns]).encode())
    return found.hexdigest()


def blocks_of(folder: Path, names: Iterable[str], size: int) -> Iterator[list[Piece]]:
    """Yield the blocks of ``size`` rows, the last one of fewer: the rows of all files, one file after another."""
    block: list[Piece] = []
    room = size
    for name in names:
        first = count = offset = 0
        for number, start in enumerate(starts_of(folder / name), 1):
            if room == 0:
                if count:
                    block.append(Piece(name, first, count, offset))
                yield block
                block, room, count = [], size, 0
            if count == 0:
                first, offset = number, start
            count += 1
            room -= 1
        if count:
            block.append(Piece(name, first, count, offset))
    if block:
        yield block


def starts_of(path: Path) -> Iterator[int]:
    """Yield for each row of a file the byte where it starts, 0 where rows are not lines."""
    ending = path.suffix.lower()
    if ending in IMAGES:
        yield 0
    elif ending in TABLES:
        yield from (0 for _ in range(parquet_file(path).metadata.num_rows))
    else:
        offset = 0
        with path.open("rb") as file:
            for line in file:
                yield offset
                offset += len(line)


def parquet_file(path: Path) -> Any:
    """Open a .parquet file; InputError where it is none."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())[:200]}") from None


class RowReader:
    """Reads the rows of blocks.

    ``columns`` has the column of each input that lines of JSON and tables are read for. The last rows of a table that
    were decoded are kept, since the next block is often among them.
    """

    def __init__(self, folder: Path, ports: Sequence[Port], columns: Mapping[str, str]) -> None:
        self.folder, self.ports, self.columns = folder, {port.name: port for port in ports}, columns
        self.first = ports[0].name
        self.decoded: tuple[tuple[str, int], Any] | None = None

    def rows(self, pieces: Iterable[Piece]) -> Iterator[Row]:
        """Yield the rows of a block; InputError in place of the values of one that cannot be read."""
        for piece in pieces:
            path = self.folder / piece.file
            ending = path.suffix.lower()
            if ending in IMAGES:
                yield Row(piece.file, None, self.image(path))
            elif ending in TABLES:
                for number, values in enumerate(self.table_rows(path, piece), piece.first):
                    yield Row(piece.file, number, self.checked(values, path.parent))
            else:
                read = self.text if ending in TEXTS else self.json
                with path.open("rb") as file:
                    file.seek(piece.offset)
                    for number in range(piece.first, piece.first + piece.count):
                        yield Row(piece.file, number, read(file.readline().rstrip(b"\r\n"), path.parent))

    def image(self, path: Path) -> Mapping[str, Any] | InputError:
        try:
            return {"image": path.read_bytes()}
        except OSError as error:
            return InputError(f"{path.name} cannot be read: {error.strerror}.")

    def text(self, line: bytes, folder: Path) -> Mapping[str, Any] | InputError:
        line = line.removeprefix(BYTE_ORDER_MARK)  # in front of a file's first line
        if b"\0" in line:
            return InputError("the line holds a NUL; expected UTF-8, not UTF-16.")
        return {self.first: line} if line.strip() else InputError("the line is empty.")

    def json(self, line: bytes, folder: Path) -> Mapping[str, Any] | InputError:
        try:
            found = json.loads(line.removeprefix(BYTE_ORDER_MARK))
        except (ValueError, RecursionError) as error:
            return InputError(f"the line is no JSON: {error}")
        if not isinstance(found, dict):
            return InputError(f"the line is a JSON {type(found).__name__}; expected an object.")
        return self.checked({name: found.get(column) for name, column in self.columns.items()}, folder)

    def table_rows(self, path: Path, piece: Piece) -> Iterator[dict[str, Any]]:
        """Yield the values of a table's rows; of the file, only the groups of rows that hold them are read."""
        file = parquet_file(path)
        wanted, begin = range(piece.first - 1, piece.first - 1 + piece.count), 0
        for group in range(file.num_row_groups):
            end = begin + file.metadata.row_group(group).num_rows
            low, high = max(wanted.start, begin), min(wanted.stop, end)
            if low < high:
                part = self.row_group(file, piece.file, group).slice(low - begin, high - low).to_pydict()
                for place in range(high - low):
                    yield {name: part[column][place] for name, column in self.columns.items()}
            begin = end

    def row_group(self, file: Any, name: str, group: int) -> Any:
        if self.decoded is None or self.decoded[0] != (name, group):
            self.decoded = None  # two at a time would be twice the memory
            try:
                self.decoded = (name, group), file.read_row_group(group, columns=sorted(set(self.columns.values())))
            except OSError as error:  # its parts have checksums of their own
                raise InputError(f"{name} cannot be read: {' '.join(str(error).split())[:200]}") from None
        return self.decoded[1]

    def checked(self, values: Mapping[str, Any], folder: Path) -> Mapping[str, Any] | InputError:
        """Return the values that are there, images as bytes; InputError where a needed one is not."""
        found = {}
        for name, value in values.items():
            if value is None and not self.ports[name].optional:
                return InputError(f"the row has no {self.columns[name]!r}, which is read for {name}.")
            if value is not None:
                try:
                    found[name] = image_bytes(value, folder) if name == "image" else value
                except OSError as error:
                    return InputError(f"{error.filename} cannot be read: {error.strerror}.")
                except ValueError:  # a NUL, or what no file system encodes
                    return InputError(f"{value!r:.80} is no path of an image.")
        return found


def image_bytes(value: Any, folder: Path) -> Any:
    """Return an image's bytes; a text names its file, relative to that of the row, and a list has several.

    In tables of the library ``datasets`` an image is an object with ``bytes``.
    """
    if isinstance(value, list):
        return [image_bytes(each, folder) for each in value]
    if isinstance(value, dict):
        value = value.get("bytes")
    return (folder / value).read_bytes() if isinstance(value, str) else value


def arrays_for(ports: Sequence[Port], values: Mapping[str, Any]) -> dict[str, Array]:
    """Return a row's values as the arrays of a request of one row; InputError for one that is no such array."""
    return {port.name: array_for(port, values[port.name]) for port in ports if port.name in values}


def array_for(port: Port, value: Any) -> Array:
    if port.dtype == BYTES:
        items = value if isinstance(value, list) else [value]
        found = np.empty((1, len(items)), object)
        found[0, :] = items
        return found
    try:
        array = np.asarray([value])
    except ValueError as error:
        raise InputError(f"{port.name} is no array of numbers: {error}") from None
    same_kind = array.dtype.kind in "iu" and np.dtype(port.dtype).kind in "iu"
    return array.astype(port.dtype) if same_kind else array


def check_columns(folder: Path, names: Iterable[str], ports: Sequence[Port], columns: Mapping[str, str]) -> None:
    """Raise InputError for a column of an input that there is not, and for a table that lacks a needed one."""
    known = {port.name: port for port in ports}
    for name in columns:
        if name not in known:
            raise InputError(f"--column names the input {name!r:.60}; this bundle takes {', '.join(known)}.")
    for file in names:
        if (folder / file).suffix.lower() in TABLES:
            there = parquet_file(folder / file).schema_arrow.names
            twice = [column for column in columns.values() if there.count(column) > 1]
            if twice:
                raise InputError(f"{file} has {there.count(twice[0])} columns {twice[0]!r:.60}; rename one of them.")
            missing = [column for column in columns.values() if column not in there]
            if missing:
                raise InputError(
                    f"{file} has no column {missing[0]!r:.60}; it has {', '.join(there[:8])}. Name one with --column."
                )
