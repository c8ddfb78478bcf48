"""The operation of a graph: its own tensors in and out, as ``run`` of a loaded bundle has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from transom.runtime.feeds import storage
from transom.runtime.graph_spec import Graph, Tensor
from transom.runtime.manifest import ROWS
from transom.runtime.serving.operation import Operation, Parameters, Row
from transom.runtime.serving.ports import Array, Port, checked_names
from transom.runtime.session import LoadedBundle


@dataclass(frozen=True)
class WholeOperation(Operation):
    """The operation of a graph whose tensors do not all have rows first: a request is one row, of whole arrays."""

    def read(self, arrays: Mapping[str, Array]) -> list[Row]:
        checked_names(self.inputs, arrays)
        return [tuple(arrays.get(port.name) for port in self.inputs)]

    def write(self, answers: Sequence[Row]) -> dict[str, Array]:
        (answer,) = answers
        return {port.name: value for port, value in zip(self.outputs, answer, strict=True)}


def graph_operation(bundle: LoadedBundle, name: str) -> Operation:
    """Return the operation of the graph called ``name``; BundleError where the bundle has none.

    A decoder's caches are inputs and outputs like any other: they travel with every request.
    """
    graph = bundle.backend(name).graph
    inputs = tuple(port_of(graph, tensor) for tensor in graph.inputs)
    outputs = tuple(port_of(graph, tensor) for tensor in graph.outputs)
    names = [port.name for port in inputs]
    returned = [tensor.aliases or tensor.name for tensor in graph.outputs]  # ``run`` calls a state as its input

    def run(arrays: Sequence[Array | None]) -> Row:
        given = {key: array for key, array in zip(names, arrays, strict=True) if array is not None}
        found = bundle.run(given)
        return tuple(found[key] for key in returned)

    if not by_rows(graph):
        # Copies, since caches are written in place and a request's arrays may be read-only
        return WholeOperation(
            inputs,
            outputs,
            lambda rows, _: [run([array if array is None else array.copy() for array in row]) for row in rows],
            alone=lambda _: True,
        )

    def answer(rows: Sequence[Row], parameters: Parameters) -> list[Row]:
        most = bundle.max_size(ROWS)
        found: list[Row] = []
        for first in range(0, len(rows), most):
            columns = zip(*rows[first : first + most], strict=True)
            outputs = run([None if column[0] is None else np.stack(column) for column in columns])
            found += zip(*outputs, strict=True)
        return found

    return Operation(inputs, outputs, answer, key=shapes)


def by_rows(graph: Graph) -> bool:
    """Return whether all tensors have the rows of a batch first."""
    return all(tensor.shape[:1] == (ROWS,) for tensor in (*graph.inputs, *graph.outputs))


def port_of(graph: Graph, tensor: Tensor) -> Port:
    sizes = tensor.shape[1:] if by_rows(graph) else tensor.shape
    shape = tuple(size if isinstance(size, int) else None for size in sizes)
    return Port(tensor.name, str(storage(tensor)), shape, optional=tensor.default is not None)


def shapes(row: Row) -> object:
    return tuple(None if array is None else array.shape for array in row)
