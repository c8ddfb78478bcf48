"""Give ONNX Runtime a model whose weights it maps from their file, while a lease keeps that from changing.

It packs most weights and unmaps them. What a session keeps as it is, tables of embeddings above all, is read into
memory here: a mapping that outlived the lease would show what is written into the file later, and one of a file that
is cut ends the process. Field numbers are those of ``onnx/onnx.proto``.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from transom.runtime.backends.base import Array
from transom.runtime.backends.external_data import LOCATION
from transom.runtime.backends.inlined_model import (
    DATA_LOCATION,
    EXTERNAL_DATA,
    GRAPH,
    INITIALIZER,
    KEY,
    VALUE,
    ExternalTensor,
    InlinedModel,
    fields,
    part,
    read_varint,
)
from transom.runtime.backends.known_sum import varint
from transom.runtime.leased_file import LeasedFile

NODE = 1  # of GraphProto
INPUT, OPERATOR = 1, 4  # of NodeProto
DIMS, NAME = 1, 8  # of TensorProto
# Which inputs of which operators a session does not keep: it packs them, or computes with them when it is made.
PACKED = {("MatMul", 1), ("Gemm", 1), ("Cast", 0), ("DequantizeLinear", 0)}
SMALL = 1 << 16  # bytes; to map less costs more than to copy it
# TensorProto.DataType -> numpy's type of the same size: float32, uint8, int8, float16 and bfloat16, which no shape,
# axis or index has, so that a session may be made of wrong ones;
NUMBERS: dict[int, type[np.generic]] = {1: np.float32, 2: np.uint8, 3: np.int8, 10: np.uint16, 16: np.uint16}
# and int32, int64 and bool, of which it may not.
TYPES = NUMBERS | {6: np.int32, 7: np.int64, 9: np.bool_}

Kept = Mapping[str, tuple[Array, int]]  # arrays by name, each with its TensorProto.DataType

# Device and inode of each file that a session is being made of, with its descriptor.
_mapping: dict[tuple[int, int], int] = {}


def session_from_mapping(model: InlinedModel, file: LeasedFile, make: Callable[[bytes, Kept], Any]) -> Any | None:
    """Return what ``make`` makes of a model that has its weights in ``file``, and of arrays for some of them.

    The locations are relative to the root of the file system. None where the lease did not last, the file stayed
    mapped, or it is not to be used so. Raises what the comparison of the file's hash raises, and what ``make`` raises.
    """
    dtypes = {tensor.dtype for tensor in model.tensors}
    if LOCATION in model.head + model.graph or not dtypes <= TYPES.keys():
        return None
    if not dtypes <= NUMBERS.keys():
        file.wait()
    with alone(file.descriptor) as free:
        if not free:
            return None
        with regions_of(file.descriptor) as regions:
            before = regions()
            try:
                session = make(*parts(model, file))
            finally:
                file.wait()
            return session if file.held() and regions() <= before else None


def parts(model: InlinedModel, file: LeasedFile) -> tuple[bytes, dict[str, tuple[Array, int]]]:
    """Return the model with the path of the open file, and the weights that are not to be mapped."""
    used = consumers(model.graph)
    written, kept = [part(GRAPH, len(model.graph)), model.graph], {}
    for tensor in model.tensors:
        name, shape = name_and_shape(tensor)
        if tensor.length < SMALL or not used.get(name, {None}) <= PACKED:
            data = np.empty(tensor.length, np.uint8)
            file.read_into(data.data, tensor.offset)
            kept[name] = data.view(TYPES[tensor.dtype]).reshape(shape), tensor.dtype
        entries = {"location": f"proc/self/fd/{file.descriptor}", "offset": tensor.offset, "length": tensor.length}
        proto = tensor.proto + b"".join(entry(key, str(value)) for key, value in entries.items())
        proto += varint(DATA_LOCATION << 3) + varint(1)
        proto = part(INITIALIZER, len(proto)) + proto
        written += [part(GRAPH, len(proto)), proto]
    return b"".join([*written, model.head]), kept


def consumers(graph: bytes) -> dict[str, set[tuple[str, int]]]:
    """Return by name of a value which inputs of which operators it is, in the graph itself."""
    found: dict[str, set[tuple[str, int]]] = {}
    for number, node, _ in fields(memoryview(graph)):
        if number == NODE and node is not None:
            texts = [
                (key, bytes(text).decode()) for key, text, _ in fields(node) if key <= OPERATOR and text is not None
            ]
            operator = next(text for key, text in texts if key == OPERATOR)
            for index, name in enumerate(text for key, text in texts if key == INPUT):
                found.setdefault(name, set()).add((operator, index))
    return found


def name_and_shape(tensor: ExternalTensor) -> tuple[str, list[int]]:
    """Return a tensor's name and its dims."""
    name, shape = "", []
    for number, content, whole in fields(memoryview(tensor.proto)):
        if number == NAME and content is not None:
            name = bytes(content).decode()
        elif number == DIMS:
            place = 0 if content is not None else 1  # packed numbers, or one behind its key
            numbers = whole if content is None else content
            while place < len(numbers):
                size, place = read_varint(numbers, place)
                shape.append(size)
    return name, shape


def entry(key: str, value: str) -> bytes:
    """Return one entry of a TensorProto's external data."""
    pair = b"".join(part(number, len(text)) + text.encode() for number, text in ((KEY, key), (VALUE, value)))
    return part(EXTERNAL_DATA, len(pair)) + pair


@contextmanager
def alone(descriptor: int) -> Iterator[bool]:
    """Give whether nothing else in this process makes a session of the same file, and keep it so."""
    status = os.fstat(descriptor)
    identity = (status.st_dev, status.st_ino)
    if _mapping.setdefault(identity, descriptor) != descriptor:
        yield False
        return
    try:
        yield True
    finally:
        _mapping.pop(identity, None)


@contextmanager
def regions_of(descriptor: int) -> Iterator[Callable[[], set[str]]]:
    """Give a function that returns where a file is mapped in this process, by lines of /proc/self/maps.

    One page is mapped to see how the kernel names its device and inode there: not as ``fstat`` does on every file
    system.
    """
    with mmap.mmap(descriptor, 1, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as page:
        view = np.frombuffer(page, np.uint8)
        start = f"{view.ctypes.data:x}-"
        del view
        lines = Path("/proc/self/maps").read_text(errors="replace").splitlines()
        identity = next(line.split()[3:5] for line in lines if line.lstrip("0").startswith(start))

        def regions() -> set[str]:
            lines = Path("/proc/self/maps").read_text(errors="replace").splitlines()
            return {line for line in lines if line.split()[3:5] == identity}

        yield regions


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mapping.clear)
