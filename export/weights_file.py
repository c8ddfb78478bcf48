"""Write the weights of graphs into one file as they come: aligned, equal ones once, hashed on the way.

A file of weights is as large as the model. In memory it would stand beside the module and the sessions that it is
compared in, so each weight goes to the disk as soon as it is read, and only its place is kept.
"""

from __future__ import annotations

import hashlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from transom.export.stored_files import StoredFile
from transom.runtime.atomic_write import replacing

SMALLEST = 1024  # bytes; scalars and shapes stay in the graph, where shape inference can see them
ALIGNMENT = 64  # bytes: a cache line


class WeightsWriter:
    """Appends weights to an open file; equal ones are stored once. ``size`` is in bytes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._places: dict[bytes, tuple[int, int]] = {}
        self.size = 0

    def add(self, tensor: ir.TensorProtocol) -> tuple[int, int]:
        """Return the offset and the length of the tensor's bytes, which are written unless they are there."""
        data = tensor_bytes(tensor)
        key = hashlib.sha256(data).digest()
        if key not in self._places:
            self._write(bytes(-self.size % ALIGNMENT))
            self._places[key] = (self.size, len(data))
            self._write(data)
        return self._places[key]

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


def tensor_bytes(tensor: ir.TensorProtocol) -> bytes | memoryview:
    """Return a tensor's bytes, little-endian; where its array has them in this order already, without a copy."""
    array = tensor.numpy()
    if tensor.dtype.bitwidth < 8 or sys.byteorder == "big":
        return tensor.tobytes()
    return memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8))  # type: ignore[arg-type]


def externalize(
    models: Sequence[ir.Model], location: str, tensors: Sequence[ir.TensorProtocol] = ()
) -> tuple[bytes, list[int]]:
    """Point the models' weights at ``location``; return that file's bytes, and the offsets of ``tensors`` in it.

    Those are weights that no model reads in this form.
    """
    file = io.BytesIO()
    offsets = [writer.add(tensor)[0] for writer in [write_weights(models, file, location)] for tensor in tensors]
    return file.getvalue(), offsets


def externalize_to(
    models: Sequence[ir.Model], path: Path, tensors: Sequence[ir.TensorProtocol] = ()
) -> tuple[StoredFile, list[int]]:
    """Write the models' weights to ``path``, and ``tensors`` behind them, as ``externalize`` does. Raises OSError."""
    with replacing(path) as file:
        writer = write_weights(models, file, path.name)
        offsets = [writer.add(tensor)[0] for tensor in tensors]
    return StoredFile(path, writer.size, writer.sha256), offsets


def write_weights(models: Sequence[ir.Model], file: BinaryIO, location: str) -> WeightsWriter:
    """Write the models' weights to ``file``, point the models at ``location``, and return the file's writer.

    Weights below SMALLEST stay in the models.
    """
    writer = WeightsWriter(file)
    for model in models:
        for name, weight in model.graph.initializers.items():
            tensor = weight.const_value
            if tensor is None or tensor.nbytes < SMALLEST:
                continue
            offset, length = writer.add(tensor)
            shape = ir.Shape(tensor.shape.numpy())
            weight.const_value = ir.ExternalTensor(
                location, offset, length, tensor.dtype, shape=shape, name=name, base_dir=""
            )
    return writer
