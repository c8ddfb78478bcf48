"""Write config.pbtxt, a ``ModelConfig`` of Triton Inference Server in protobuf's text format."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from transom.runtime.graph_spec import Tensor
from transom.runtime.serving.ports import BYTES, Port

CONFIG = "config.pbtxt"
DTYPES = {  # numpy's to Triton's
    "bool": "TYPE_BOOL",
    "int8": "TYPE_INT8",
    "uint16": "TYPE_UINT16",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "float32": "TYPE_FP32",
    BYTES: "TYPE_STRING",
}
INVALID = re.compile(r"[^A-Za-z0-9_.-]+")  # in the name of a folder that is part of a URL


@dataclass(frozen=True)
class TensorConfig:
    """An input or output; ``shape`` is without the rows where the model is batched, None is any size.

    An input that is ``ragged`` may have other sizes than those of requests in the same batch.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]
    optional: bool = False
    ragged: bool = False

    def text(self) -> str:
        dims = ", ".join(str(-1 if size is None else size) for size in self.shape)
        # dims may not be empty
        shape = f"dims: [ {dims} ]" if self.shape else "dims: [ 1 ] reshape { shape: [ ] }"
        words = [f"name: {quoted(self.name)}", f"data_type: {DTYPES[self.dtype]}", shape]
        words += ["allow_ragged_batch: true"] * self.ragged + ["optional: true"] * self.optional
        return f"  {{ {' '.join(words)} }}"


@dataclass(frozen=True)
class ModelConfig:
    """The configuration of one model.

    max_batch_size  rows of a batch at most; 0 where shapes have no rows in front
    queue_delay_us  microseconds that a request waits for others to share a batch; None does not batch requests
    decoupled       whether a request may have several responses
    instances       how often the model is loaded, and Triton's kind of where; None leaves both to the server
    """

    name: str
    inputs: tuple[TensorConfig, ...]
    outputs: tuple[TensorConfig, ...]
    max_batch_size: int
    platform: str | None = None
    backend: str | None = None
    queue_delay_us: int | None = None
    decoupled: bool = False
    instances: tuple[int, str] | None = None
    parameters: Mapping[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """Return config.pbtxt."""
        lines = [f"name: {quoted(self.name)}"]
        lines += [f"platform: {quoted(self.platform)}"] if self.platform is not None else []
        lines += [f"backend: {quoted(self.backend)}"] if self.backend is not None else []
        lines += [f"max_batch_size: {self.max_batch_size}"]
        for kind, tensors in (("input", self.inputs), ("output", self.outputs)):
            lines += [f"{kind} [", ",\n".join(tensor.text() for tensor in tensors), "]"]
        if self.queue_delay_us is not None:
            delay = f"max_queue_delay_microseconds: {self.queue_delay_us} " if self.queue_delay_us else ""
            lines += [f"dynamic_batching {{ {delay}}}"]
        if self.decoupled:
            lines += ["model_transaction_policy { decoupled: true }"]
        if self.instances is not None:
            count, kind = self.instances
            lines += [f"instance_group [ {{ count: {count} kind: {kind} }} ]"]
        lines += [
            f"parameters {{ key: {quoted(key)} value {{ string_value: {quoted(value)} }} }}"
            for key, value in self.parameters.items()
        ]
        return "\n".join([*lines, ""])


def tensor_configs(tensors: Sequence[Tensor], *, batched: bool) -> tuple[TensorConfig, ...]:
    """Return the tensors of a graph; where it is ``batched`` their first axis is the rows, which Triton leaves out."""
    return tuple(
        TensorConfig(
            tensor.name,
            tensor.dtype,
            tuple(size if isinstance(size, int) else None for size in tensor.shape[1 if batched else 0 :]),
        )
        for tensor in tensors
    )


def port_configs(ports: Sequence[Port], *, ragged: bool = False) -> tuple[TensorConfig, ...]:
    """Return the tensors of an operation; ``ragged`` lets requests of different sizes into a batch."""
    return tuple(
        TensorConfig(port.name, port.dtype, port.shape, optional=port.optional, ragged=ragged and None in port.shape)
        for port in ports
    )


def quoted(text: str) -> str:
    """Return a string of protobuf's text format: bytes outside printable ASCII are octal."""
    escaped = {ord('"'): '\\"', ord("\\"): "\\\\"}
    return '"' + "".join(escaped.get(byte, shown(byte)) for byte in text.encode("utf-8", "backslashreplace")) + '"'


def shown(byte: int) -> str:
    return chr(byte) if 0x20 <= byte < 0x7F else f"\\{byte:03o}"
