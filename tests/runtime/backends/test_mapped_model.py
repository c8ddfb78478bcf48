"""A model that has its weights in a file under a lease, and the session that is made of it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from leases import leases
from transom.runtime.backends import mapped_model
from transom.runtime.backends.inlined_model import InlinedModel, inlined_model
from transom.runtime.backends.mapped_model import consumers, parts, session_from_mapping
from transom.runtime.bundle import opened
from transom.runtime.errors import BundleError
from transom.runtime.leased_file import LeasedFile, take_lease

pytestmark = leases
LARGE, TABLE, BIAS = (128, 128), (4, 128), (128,)
WEIGHTS = np.arange(128 * 128 + 4 * 128 + 128, dtype="<f4")


def external(name: str, offset: int, shape: tuple[int, ...], dtype: int = TensorProto.FLOAT) -> onnx.TensorProto:
    tensor = TensorProto(name=name, dims=shape, data_type=dtype, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "w"), ("offset", offset), ("length", 4 * int(np.prod(shape)))):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def model(also: tuple[str, ...] = (), dtype: int = TensorProto.FLOAT) -> InlinedModel:
    """y = table[ids] @ large + bias; ``also`` are more operators that read ``large``."""
    tensors = [
        external("large", 0, LARGE),
        external("table", 4 * 128 * 128, TABLE),
        external("bias", 4 * (128 * 128 + 4 * 128), BIAS, dtype),
    ]
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("MatMul", ["x", "large"], ["m"]),
        helper.make_node("Add", ["m", "bias"], ["y"]),
        *(helper.make_node(operator, ["large"], [operator]) for operator in also),
    ]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["B"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", 128])
    graph = helper.make_graph(nodes, "g", [ids], [y], tensors)
    whole = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)]).SerializeToString()
    found = inlined_model(whole, "w", WEIGHTS.nbytes)
    assert found is not None
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "w"
    path.write_bytes(WEIGHTS.tobytes())
    return path


@contextmanager
def leased(path: Path, compare: Callable[[], None] = lambda: None) -> Iterator[LeasedFile]:
    source = opened(path.parent, path.name)
    assert take_lease(source.fileno())
    with closing(LeasedFile(source, compare)) as file:
        yield file


@pytest.fixture
def file(path: Path) -> Iterator[LeasedFile]:
    with leased(path) as file:
        yield file


def nothing(*_: Any) -> str:
    return "session"


def test_what_is_packed_is_mapped_and_the_rest_is_read(file: LeasedFile) -> None:
    data, kept = parts(model(), file)
    found = {tensor.name: tensor for tensor in onnx.load_from_string(data).graph.initializer}
    for name, offset, shape in (("large", 0, LARGE), ("table", 65536, TABLE), ("bias", 67584, BIAS)):
        expected = external(name, offset, shape)
        expected.external_data[0].value = f"proc/self/fd/{file.descriptor}"
        assert found[name] == expected
    assert [*kept] == ["table", "bias"]
    np.testing.assert_array_equal(kept["table"][0], WEIGHTS[128 * 128 : 128 * 132].reshape(TABLE))
    np.testing.assert_array_equal(kept["bias"][0], WEIGHTS[-128:])


def test_what_another_operator_reads_is_not_mapped(file: LeasedFile) -> None:
    assert "large" in parts(model(("Relu",)), file)[1]
    assert "large" not in parts(model(("Cast",)), file)[1]
    assert consumers(model(("Cast",)).graph)["large"] == {("MatMul", 1), ("Cast", 0)}


def test_a_session_of_a_file_that_stays_mapped_is_none(file: LeasedFile) -> None:
    held: list[mmap.mmap] = []

    def maps(*_: Any) -> str:
        held.append(mmap.mmap(file.descriptor, 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE))
        return "session"

    assert session_from_mapping(model(), file, nothing) == "session"
    assert session_from_mapping(model(), file, maps) is None
    assert session_from_mapping(model(), file, nothing) == "session"  # what was mapped before does not matter
    held.pop().close()


def test_a_session_whose_lease_ended_is_none(path: Path, file: LeasedFile) -> None:
    def written(*_: Any) -> str:
        with pytest.raises(BlockingIOError):
            os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        return "session"

    assert session_from_mapping(model(), file, written) is None


def test_a_wrong_hash_is_what_is_raised(path: Path, file: LeasedFile) -> None:
    def compare() -> None:
        raise BundleError("changed")

    def fails(*_: Any) -> None:
        raise RuntimeError("no model")

    made: list[int] = []
    with leased(path, compare) as wrong:
        for make in (nothing, fails):
            with pytest.raises(BundleError, match="changed"):
                session_from_mapping(model(), wrong, make)
        with pytest.raises(BundleError, match="changed"):  # before it is made, of int32
            session_from_mapping(model(dtype=TensorProto.INT32), wrong, lambda *_: made.append(1))
    assert not made
    with pytest.raises(RuntimeError, match="no model"):
        session_from_mapping(model(), file, fails)


def test_two_at_once_of_one_file_do_not_both_map_it(path: Path, file: LeasedFile) -> None:
    found = []

    def nested(*_: Any) -> str:
        with leased(path) as other:
            found.append(session_from_mapping(model(), other, nothing))
        return "session"

    assert session_from_mapping(model(), file, nested) == "session"
    assert found == [None]
    assert not mapped_model._mapping


def test_locations_that_are_not_rewritten_and_types_without_a_size_are_not_mapped(file: LeasedFile) -> None:
    assert session_from_mapping(model(("location",)), file, nothing) is None
    assert session_from_mapping(model(dtype=TensorProto.DOUBLE), file, nothing) is None
