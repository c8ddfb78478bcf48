"""Write an ONNX model with its external weights inside, piece by piece, as they are read from their file.

ONNX Runtime holds what it is given as external weights until the session is freed, beside its own packed copies. What
is inside of the model it frees one by one while it packs them. A message of Protocol Buffers may give an embedded
message in several parts, which the reader merges: the graph comes first, then one part per weight. Field numbers are
those of ``onnx/onnx.proto``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise

from transom.runtime.backends.known_sum import varint

GRAPH, INITIALIZER = 7, 5  # of ModelProto, of GraphProto
RAW_DATA, EXTERNAL_DATA, DATA_LOCATION = 9, 13, 14  # of TensorProto
KEY, VALUE = 1, 2  # of StringStringEntryProto
FIXED = {1: 8, 5: 4}  # wire type -> bytes
LENGTH = 2  # wire type of texts and messages
DATA_TYPE, FLOAT = 2, 1  # of TensorProto; of TensorProto.DataType
LARGEST = 2**31 - 1  # bytes of a message
LONGEST_VARINT = 10  # bytes


@dataclass(frozen=True)
class ExternalTensor:
    """The place of a tensor's data in the weights, in bytes, and its TensorProto without that."""

    offset: int
    length: int
    dtype: int  # TensorProto.DataType
    proto: bytes


@dataclass(frozen=True)
class InlinedModel:
    """The parts of a model whose weights lie in another file, the tensors in the order of their data there."""

    head: bytes  # all fields of the ModelProto but the graph
    graph: bytes  # the GraphProto without the tensors
    tensors: tuple[ExternalTensor, ...]

    @property
    def is_float32(self) -> bool:
        """Return whether all the tensors are float32."""
        return all(tensor.dtype == FLOAT for tensor in self.tensors)

    def parts(self, pieces: Iterator[memoryview]) -> Iterator[bytes | memoryview]:
        """Yield the serialised model; ``pieces`` are the bytes of the weights in order, each valid until the next.

        The last part, without which it is no model, comes when ``pieces`` has ended without an error.
        """
        weights = Cursor(pieces)
        yield part(GRAPH, len(self.graph)) + self.graph
        for (offset, length), group in groupby(self.tensors, key=lambda tensor: (tensor.offset, tensor.length)):
            for _ in weights.up_to(offset):
                pass
            same = list(group)
            if len(same) == 1:
                yield before_data(same[0])
                yield from weights.up_to(offset + length)
                continue
            data = b"".join([bytes(piece) for piece in weights.up_to(offset + length)])
            for tensor in same:
                yield before_data(tensor)
                yield data
        for _ in pieces:
            pass
        yield self.head


class Cursor:
    """A place in a file that is read piece by piece."""

    def __init__(self, pieces: Iterator[memoryview]) -> None:
        self._pieces, self._rest, self._place = pieces, memoryview(b""), 0

    def up_to(self, end: int) -> Iterator[memoryview]:
        """Yield the bytes from the place to ``end``. Raises EOFError where the file is shorter."""
        while self._place < end:
            if not self._rest:
                self._rest = next(self._pieces, memoryview(b""))
                if not self._rest:
                    raise EOFError
            piece, self._rest = self._rest[: end - self._place], self._rest[end - self._place :]
            self._place += len(piece)
            yield piece


def inlined_model(data: bytes, weights: str, size: int) -> InlinedModel | None:
    """Split the model ``data``, whose weights lie in the file ``weights`` of ``size`` bytes.

    None for what cannot be written so: no model, weights elsewhere or beyond the end or overlapping, or too large.
    """
    head, graph, tensors = [], [], []
    try:
        for number, content, whole in fields(memoryview(data)):
            if number != GRAPH or content is None:
                head.append(whole)
                continue
            for key, value, field in fields(content):
                tensor = external_tensor(value, weights) if key == INITIALIZER and value is not None else None
                if tensor is None:
                    graph.append(field)
                else:
                    tensors.append(tensor)
    except (IndexError, KeyError, ValueError):  # UnicodeDecodeError is a ValueError
        return None
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.length))
    model = InlinedModel(b"".join(head), b"".join(graph), tuple(tensors))
    places = sorted({(tensor.offset, tensor.offset + tensor.length) for tensor in tensors})
    apart = all(end <= start for (_, end), (start, _) in pairwise(places))
    fits = all(0 <= start <= end <= size for start, end in places)
    whole_size = len(data) + sum(tensor.length + 64 for tensor in tensors)
    return model if tensors and model.head and apart and fits and whole_size <= LARGEST else None


def external_tensor(proto: memoryview, weights: str) -> ExternalTensor | None:
    """Return a TensorProto's place in the weights, None for one that has its data inside.

    Raises KeyError or ValueError for one whose data lies elsewhere.
    """
    rest, place, dtype = [], {}, 0
    for number, content, whole in fields(proto):
        if number == DATA_TYPE:
            dtype, _ = read_varint(whole, 1)
        if number == EXTERNAL_DATA and content is not None:
            entry = {key: bytes(text).decode() for key, text, _ in fields(content) if text is not None}
            place[entry[KEY]] = entry[VALUE]
        elif number != DATA_LOCATION:
            rest.append(whole)
    if not place:
        return None
    if place["location"] != weights:
        raise ValueError(place["location"])
    return ExternalTensor(int(place["offset"]), int(place["length"]), dtype, b"".join(rest))


def before_data(tensor: ExternalTensor) -> bytes:
    """Return what comes before a tensor's data: the beginnings of graph, initializer and raw data."""
    inside = tensor.proto + part(RAW_DATA, tensor.length)
    inside = part(INITIALIZER, len(inside) + tensor.length) + inside
    return part(GRAPH, len(inside) + tensor.length) + inside


def part(number: int, length: int) -> bytes:
    """Return the beginning of a text or message of ``length`` bytes."""
    return varint(number << 3 | LENGTH) + varint(length)


def fields(message: memoryview) -> Iterator[tuple[int, memoryview | None, memoryview]]:
    """Yield of each field its number, the content of a text or message (else None), and the whole field.

    Raises ValueError or IndexError for what is no message.
    """
    place = 0
    while place < len(message):
        start = place
        key, place = read_varint(message, place)
        kind, content = key & 7, None
        if kind == LENGTH:
            length, place = read_varint(message, place)
            content = message[place : place + length]
            place += length
        elif kind == 0:
            _, place = read_varint(message, place)
        elif kind in FIXED:
            place += FIXED[kind]
        else:
            raise ValueError(f"wire type {kind}")
        if place > len(message):
            raise ValueError(f"a field of {place - start} bytes, {len(message) - start} left")
        yield key >> 3, content, message[start:place]


def read_varint(message: memoryview, place: int) -> tuple[int, int]:
    """Read a number at a place; return it and the place behind it."""
    number = 0
    for index in range(LONGEST_VARINT):
        byte = message[place + index]
        number |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            return number, place + index + 1
    raise ValueError("an endless number")
