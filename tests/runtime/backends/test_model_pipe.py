"""A model that is written with its weights inside, and the pipe that it passes through."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from transom.runtime.backends import malloc, model_pipe
from transom.runtime.backends.inlined_model import InlinedModel, inlined_model
from transom.runtime.backends.model_pipe import session_from_parts
from transom.runtime.errors import BundleError

WEIGHTS = np.arange(6, dtype="<f4").tobytes() + bytes(8) + np.arange(4, dtype="<i8").tobytes() + b"end"  # 67 bytes
A, B, TWIN = (0, 24, (2, 3), TensorProto.FLOAT), (32, 32, (4,), TensorProto.INT64), (0, 24, (6,), TensorProto.FLOAT)

pipes = pytest.mark.skipif(not model_pipe.can_pipe(), reason="pipes have no paths here")


def model(*places: tuple[int, int, Sequence[int], int], location: str = "w") -> onnx.ModelProto:
    """A model of external tensors t0, t1, ... and one inside of it."""
    tensors = [helper.make_tensor("inside", TensorProto.FLOAT, [1], [3.0])]
    for index, (offset, length, shape, dtype) in enumerate(places):
        tensor = TensorProto(name=f"t{index}", dims=shape, data_type=dtype, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
            tensor.external_data.add(key=key, value=value)
        tensors.append(tensor)
    graph = helper.make_graph([helper.make_node("Identity", ["inside"], ["y"])], "g", [], [], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], producer_name="p")


def pieces(size: int, ended: list[int] | None = None) -> Iterator[memoryview]:
    """The weights, ``size`` bytes at a time in one buffer that is used again."""
    buffer = bytearray(size)
    for start in range(0, len(WEIGHTS), size):
        part = WEIGHTS[start : start + size]
        buffer[: len(part)] = part
        yield memoryview(buffer)[: len(part)]
    if ended is not None:
        ended.append(1)


def split(*places: tuple[int, int, Sequence[int], int]) -> InlinedModel:
    found = inlined_model(model(*places).SerializeToString(), "w", len(WEIGHTS))
    assert found is not None
    return found


@pytest.mark.parametrize("size", [1, 7, 24, 100])
@pytest.mark.parametrize("places", [(A, B), (B, A), (A, B, TWIN)])
def test_weights_come_inside(size: int, places: tuple[tuple[int, int, Sequence[int], int], ...]) -> None:
    written = b"".join([bytes(each) for each in split(*places).parts(pieces(size))])
    found = onnx.load_from_string(written)
    tensors = {tensor.name: tensor for tensor in found.graph.initializer}
    for index, (offset, length, shape, dtype) in enumerate(places):
        tensor = tensors.pop(f"t{index}")
        assert (tuple(tensor.dims), tensor.data_type) == (shape, dtype)
        assert tensor.raw_data == WEIGHTS[offset : offset + length]
        assert (len(tensor.external_data), tensor.data_location) == (0, TensorProto.DEFAULT)
    assert [*tensors] == ["inside"]
    expected = model(*places)
    for each in (found, expected):
        del each.graph.initializer[:]
    assert found == expected


def test_the_last_part_waits_for_the_end_of_the_weights() -> None:
    ended: list[int] = []
    parts = [(bytes(each), list(ended)) for each in split(A, B).parts(pieces(5, ended))]
    assert parts[-1][1] == [1]
    assert all(not before for _, before in parts[:-1])
    with pytest.raises(onnx.onnx_cpp2py_export.checker.ValidationError):  # without it, it is no model
        onnx.checker.check_model(b"".join(part for part, _ in parts[:-1]))


def test_weights_that_end_early_are_an_error() -> None:
    with pytest.raises(EOFError):
        for _ in split(B).parts(iter([memoryview(WEIGHTS[:40])])):
            pass


@pytest.mark.parametrize(
    "data",
    [
        model(A, location="/etc/hostname").SerializeToString(),
        model((60, 8, (2,), TensorProto.FLOAT)).SerializeToString(),  # beyond the end
        model((-8, 8, (2,), TensorProto.FLOAT)).SerializeToString(),
        model(A, (8, 24, (6,), TensorProto.FLOAT)).SerializeToString(),  # overlaps
        model().SerializeToString(),  # nothing outside
        model(A).SerializeToString()[:-40],
        b"\xff" * 20,
        b"",
    ],
)
def test_what_cannot_be_written_so(data: bytes) -> None:
    assert inlined_model(data, "w", len(WEIGHTS)) is None


def test_dtypes_are_known() -> None:
    assert split(A, TWIN).is_float32
    assert not split(A, B).is_float32


@pipes
def test_a_pipe_gives_all_parts() -> None:
    parts = [b"a" * 70_000, b"", memoryview(b"bc" * 50_000)]
    assert session_from_parts(iter(parts), lambda path: Path(path).read_bytes()) == b"".join(parts)


@pipes
def test_a_reader_that_ends_early_has_no_session() -> None:
    large = [b"a" * (4 << 20)]  # more than a pipe holds
    assert session_from_parts(iter(large), lambda path: "session") is None
    with pytest.raises(RuntimeError, match="no model"):
        session_from_parts(iter(large), fails)


def fails(path: str) -> None:
    raise RuntimeError("no model")


@pipes
def test_an_error_of_the_weights_ends_the_model_with_no_field() -> None:
    read = []

    def parts() -> Iterator[bytes]:
        yield b"begun"
        raise BundleError("changed")

    with pytest.raises(BundleError, match="changed"):
        session_from_parts(parts(), lambda path: read.append(Path(path).read_bytes()))
    assert read == [b"begun\x07"]

    def reads_and_fails(path: str) -> None:
        Path(path).read_bytes()
        fails(path)

    with pytest.raises(BundleError, match="changed"):
        session_from_parts(parts(), reads_and_fails)


@pipes
def test_a_child_process_closes_both_ends() -> None:
    ends = os.pipe()
    model_pipe._ends.update(ends)
    model_pipe.close_in_child()
    for end in ends:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(end)
    assert not model_pipe._ends
    before = len(os.listdir(model_pipe.PIPES))
    session_from_parts(iter([b"a"]), lambda path: Path(path).read_bytes())
    assert (len(os.listdir(model_pipe.PIPES)), model_pipe._ends) == (before, set())


def test_thresholds_are_those_of_glibc_when_the_last_load_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(malloc, "mallopt", lambda: lambda name, size: calls.append((name, size)))
    with malloc.large_blocks_apart():
        with malloc.large_blocks_apart():
            pass
        assert calls == [(-3, 1 << 20)] * 2
    assert calls[2:] == [(-3, 32 << 20), (-1, 64 << 20)]


@pytest.mark.parametrize("name", malloc.SET_BY_USER)
def test_what_the_user_set_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    assert malloc.mallopt.__wrapped__() is None
