"""External data of a graph that is not its bundle's weights, wherever in the model it stands."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from transom.runtime.backends import model_pipe
from transom.runtime.backends.external_data import foreign_location
from transom.runtime.backends.inlined_model import part
from transom.runtime.backends.ort import open_session
from transom.runtime.errors import BundleError
from transom.runtime.graph_spec import Graph, Tensor
from transom.runtime.manifest_graphs import GraphFile

SPEC = Graph("m", (Tensor("x", "float32", ("B",)),), (Tensor("y", "float32", ("B",)),))


def outside(location: str, name: str = "w") -> TensorProto:
    tensor = TensorProto(name=name, dims=[1], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "4")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def sum_with(*tensors: TensorProto, location: str | None = None, place: str = "branch") -> onnx.ModelProto:
    """y = x + w, with external data at ``location`` in a branch of an If, in a Constant, or in a function."""
    nodes = [helper.make_node("Add", ["x", tensors[0].name if tensors else "x"], ["sum"])]
    functions = []
    if location is None:
        nodes.append(helper.make_node("Identity", ["sum"], ["y"]))
    elif place == "branch":
        body = helper.make_graph(
            [helper.make_node("Identity", ["hidden"], ["b"])], "b", [], [value("b", [1])], [outside(location, "hidden")]
        )
        nodes.append(helper.make_node("If", ["yes"], ["c"], then_branch=body, else_branch=body))
        nodes.append(helper.make_node("Add", ["sum", "c"], ["y"]))
    else:
        constant = helper.make_node("Constant", [], ["c"], value=outside(location, "hidden"))
        if place == "function":
            opset = [helper.make_opsetid("", 23)]
            functions.append(helper.make_function("own", "Hidden", [], ["c"], [constant], opset))
            constant = helper.make_node("Hidden", [], ["c"], domain="own")
        nodes += [constant, helper.make_node("Add", ["sum", "c"], ["y"])]
    yes = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    graph = helper.make_graph(nodes, "g", [value("x", ["B"])], [value("y", ["B"])], [*tensors, yes])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)


def value(name: str, shape: list[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def test_weights_of_the_bundle_are_no_strangers() -> None:
    model = sum_with(outside("model.weights")).SerializeToString()
    assert foreign_location(model, "model.weights", 1) is None
    assert foreign_location(model, "model.weights", 0) is None
    assert foreign_location(sum_with().SerializeToString(), None, 0) is None
    named = sum_with()
    named.graph.node[0].name = "allocation of a location"
    assert foreign_location(named.SerializeToString(), None, 0) is None


@pytest.mark.parametrize("place", ["branch", "constant", "function"])
@pytest.mark.parametrize("location", ["secret", "../secret", "/etc/hostname"])
def test_other_files_are_found(location: str, place: str) -> None:
    own = outside("model.weights")
    model = sum_with(own, location=location, place=place).SerializeToString()
    assert foreign_location(model, "model.weights", 1) == location
    assert foreign_location(sum_with(location=location, place=place).SerializeToString(), None, 0) == location
    assert foreign_location(sum_with(outside(location)).SerializeToString(), "model.weights", 0) == location


def test_no_depth_is_walked_that_is_not_read() -> None:
    message = outside("secret").SerializeToString()
    for number in [
        5,
        *[6, 5, 1] * 40,
        7,
    ]:  # a tensor in graphs, in attributes, in nodes; onnx itself writes none so deep
        message = part(number, len(message)) + message
    with pytest.raises(ValueError, match="100 messages inside of each other"):
        foreign_location(message, None, 0)


@pytest.mark.parametrize("place", ["branch", "constant", "function"])
@pytest.mark.parametrize("weights", [None, "model.weights"])
def test_a_session_of_another_file_is_refused(
    place: str, weights: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("secret").write_bytes(np.float32(1).tobytes())
    tensors = [] if weights is None else [outside("model.weights")]
    model = sum_with(*tensors, location="secret", place=place).SerializeToString()
    files = {"m.onnx": model, "model.weights": np.float32(1).tobytes()}
    with pytest.raises(BundleError, match=r"m\.onnx reads weights from 'secret'; bundle\.json has"):
        open_session(GraphFile(SPEC, {"default": "m.onnx"}, weights), files.__getitem__, "cpu", 1)


class Files:
    """A reader of bytes that gives them in pieces as well."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files

    def __call__(self, name: str) -> bytes:
        return self.files[name]

    def size(self, name: str) -> int:
        return len(self.files[name])

    def pieces(self, name: str):  # type: ignore[no-untyped-def]
        yield memoryview(self.files[name])


def test_a_pipe_that_cannot_be_opened_costs_memory_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_pipe, "PIPES", f"{os.curdir}/no/such/folder")
    monkeypatch.setattr("transom.runtime.backends.ort.can_pipe", lambda: True)
    files = Files(
        {"m.onnx": sum_with(outside("model.weights")).SerializeToString(), "model.weights": np.float32(2).tobytes()}
    )
    session = open_session(GraphFile(SPEC, {"default": "m.onnx"}, "model.weights"), files, "cpu", 1)
    assert session.run(None, {"x": np.float32([1, 5])})[0].tolist() == [3, 7]
