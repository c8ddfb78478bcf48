"""Insert new nodes and weights into a graph."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass, TopologicalSortPass


class NodeBuilder:
    """New nodes in front of ``node``, with the path of its module."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self._graph, self._node = graph, node

    def weight(self, name: str, array: NDArray[Any]) -> ir.Value:
        """Return the initializer ``name`` that holds ``array``, made if there is none; ``name.2``, ... if it is taken.

        Several nodes share an initializer by asking for the same name and contents, never by the name alone.
        """
        for candidate in numbered(name):
            known = self._graph.initializers.get(candidate)
            if known is None:
                break
            if is_equal(known, array):
                return known
        tensor = ir.Tensor(np.require(array, requirements="C"), name=candidate)
        value = ir.Value(
            name=candidate, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self._graph.register_initializer(value)
        return value

    def unused(self, name: str, ending: str) -> str:
        """Return ``name``, or it with a number, such that no initializer ``<name><ending>`` exists."""
        return next(free for free in numbered(name) if f"{free}{ending}" not in self._graph.initializers)

    def add(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        attributes: Mapping[str, Any] | None = None,
        *,
        dtype: ir.DataType = ir.DataType.FLOAT,
        domain: str = "",
    ) -> ir.Value:
        """Insert a node of one output and return that output, called ``name``."""
        node = ir.node(operator, inputs, attributes or {}, domain=domain, name=f"{operator}_{name}")
        node.metadata_props.update(self._node.metadata_props)
        result = node.outputs[0]
        result.name, result.type = name, ir.TensorType(dtype)
        self._graph.insert_before(self._node, node)
        return result

    def replace_node(self, value: ir.Value) -> None:
        """Remove the node; ``value`` takes the place, the name and the shape of its output."""
        old = self._node.outputs[0]
        name, value.shape = str(old.name), old.shape
        old.name = f"{name}.replaced"
        value.name = name
        ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
        self._graph.remove(self._node, safe=True)


def cast_of(value: ir.Value, to: ir.DataType, name: str) -> ir.Node:
    """Return a ``Cast`` of ``value`` to the dtype ``to``, in no graph yet; its output is called ``name``."""
    node = ir.node("Cast", [value], {"to": to}, name=f"cast_{name}")
    result = node.outputs[0]
    result.name, result.type, result.shape = name, ir.TensorType(to), value.shape
    return node


def numbered(name: str) -> Iterator[str]:
    """Yield ``name``, ``name.2``, ``name.3``, ..."""
    return itertools.chain([name], (f"{name}.{number}" for number in itertools.count(2)))


def is_equal(weight: ir.Value, array: NDArray[Any]) -> bool:
    """Return whether an initializer has the dtype, the shape and every bit of ``array``."""
    if weight.const_value is None:
        return False
    stored = weight.const_value.numpy()
    return stored.dtype == array.dtype and stored.shape == array.shape and stored.tobytes() == array.tobytes()


def clean_up(model: ir.Model) -> None:
    """Remove nodes and weights that nothing reads, and sort the nodes topologically."""
    RemoveUnusedNodesPass()(model)
    TopologicalSortPass()(model)
