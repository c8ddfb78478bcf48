"""How a module is traced: example sizes that cannot be mistaken for each other, and the paths of its modules."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from transom.export.checkpoint import load_checkpoint
from transom.export.onnx_export import NO_MODULE, example_sizes, module_path, onnx_from_module
from transom.runtime.errors import ExportError
from transom.runtime.graph_spec import Axis, Graph, Tensor

MakeCheckpoint = Callable[..., Path]
TABLE = Graph("model", (Tensor("x", "float32", ("B", "S", 5)),), (Tensor("y", "float32", ("B", "S", 5)),))
CACHE = Graph(
    "decoder",
    (
        Tensor("ids", "int64", ("B", "S"), exclusive_max=7),
        Tensor("positions", "int64", ("B", "P")),
        Tensor("cache", "float32", ("B", 2, "C", 3)),
    ),
    (),
)


def bounds(**most: int) -> dict[str, Axis]:
    return {name: Axis(1, 1, size) for name, size in most.items()}


def test_example_sizes_are_distinct_whatever_the_bounds() -> None:
    for most in itertools.product((1, 2, 3, 512), repeat=4):
        axes = bounds(**dict(zip("BSPC", most, strict=True)))
        sizes = example_sizes(CACHE, axes)
        dynamic = [sizes[name] for name, axis in axes.items() if axis.max > 1]
        assert len(set(dynamic)) == len(dynamic), most
        assert min(dynamic, default=2) >= 2, most
        assert [sizes[name] for name, axis in axes.items() if axis.max == 1] == [1] * most.count(1), most


def test_the_batch_goes_beyond_its_bound_first() -> None:
    """Of positions there may be no more: a table of them may end at the bound."""
    assert example_sizes(CACHE, bounds(B=2, S=2, P=3, C=9)) == {"S": 2, "B": 3, "P": 4, "C": 5}


def test_a_size_is_not_below_its_axis() -> None:
    assert example_sizes(TABLE, {"B": Axis(1, 1, 8), "S": Axis(5, 6, 9)}) == {"B": 2, "S": 5}


class Turned(nn.Module):
    """What it computes depends on whether it gets as many rows as columns: no graph with two free axes can say so."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (x * 2,) if x.shape[0] == x.shape[1] else (x * 3,)


def test_axes_of_equal_bounds_are_not_taken_for_one() -> None:
    """Traced at two equal sizes, the branch for equal sizes would be all that the graph has."""
    model = onnx_from_module(Turned(), TABLE, bounds(B=2, S=2))
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": torch.ones(2, 1, 5).numpy()})
    assert (found == 3).all()


class Summed(nn.Module):
    """One column, however many it gets."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (x.sum(1, keepdim=True),)


def test_an_axis_that_came_out_as_a_number_is_refused() -> None:
    with pytest.raises(ExportError, match=r"the exporter made y \('B', 1, 5\) of y \('B', 'S', 5\)"):
        onnx_from_module(Summed(), TABLE, bounds(B=4, S=9))


def test_small_bounds_give_the_graph_of_large_ones(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("BertModel", num_hidden_layers=1)
    kinds = []
    for sizes in ({"B": 2, "S": 2}, {"B": 5, "S": 9}):
        loaded = load_checkpoint(str(folder), task=None, max_sizes=sizes, image_size=None, ignore_unused=False)
        model = onnx_from_module(loaded.module, loaded.graphs[0], loaded.axes)
        kinds.append([(node.op_type, [str(output.shape) for output in node.outputs]) for node in model.graph])
    assert kinds[0] == kinds[1]


def test_a_table_that_ends_at_the_bound(make_checkpoint: MakeCheckpoint) -> None:
    """Two positions is all that the checkpoint has, and all rows that are asked for."""
    folder = make_checkpoint("BertModel", num_hidden_layers=1, max_position_embeddings=2)
    loaded = load_checkpoint(str(folder), task=None, max_sizes={"B": 2}, image_size=None, ignore_unused=False)
    assert (loaded.axes["B"].max, loaded.axes["S"].max) == (2, 2)
    model = onnx_from_module(loaded.module, loaded.graphs[0], loaded.axes)
    assert str(model.graph.inputs[0].shape) == "[B,S]"


class Named(nn.Module):
    """Modules whose names hold what a list's repr is made of, and one whose name begins with an underscore."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleDict({"a, b": nn.Linear(5, 5), "it's [x]": nn.Linear(5, 5)})
        self._hidden = nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        for step in self.steps.values():
            x = step(x)
        return (self._hidden(x),)


def test_paths_of_modules_are_whole() -> None:
    model = onnx_from_module(Named(), TABLE, bounds(B=4, S=4))
    paths: list[Any] = [node.metadata_props.get("module") for node in model.graph if node.op_type == "MatMul"]
    assert paths == ["steps.a, b", "steps.it's [x]", "_hidden"]


@pytest.mark.parametrize(
    ("scopes", "path"),
    [
        ("['', 'encoder', 'encoder.0', 'linear']", "encoder.0"),
        ("""['', "it's", 'add']""", "it's"),
        ("['', 'add']", ""),
        ("['add']", ""),
        ("[]", ""),
        (f"['{NO_MODULE}', 'sym_size_int_1']", ""),
    ],
)
def test_the_path_is_that_of_the_innermost_module(scopes: str, path: str) -> None:
    assert module_path(scopes) == path


@pytest.mark.parametrize("scopes", ["", "encoder.0", "['a', 3]", "{'a': 1}", "['a'", "__import__('os')"])
def test_modules_that_are_noted_otherwise_are_refused(scopes: str) -> None:
    with pytest.raises(ExportError, match="expected a list of strings"):
        module_path(scopes)
