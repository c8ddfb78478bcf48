"""How passes write a run of new nodes into a graph."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray


class NodeBuilder:
    """New nodes that stand in front of ``place``, and carry its module's path."""

    def __init__(self, graph: ir.Graph, place: ir.Node) -> None:
        self._graph, self._place = graph, place

    def weight(self, name: str, array: NDArray[Any]) -> ir.Value:
        """The initializer of ``array``, made where there is none yet; ``name``, with a number where that is taken.

        Several nodes get one initializer by asking for the same name and contents, never by the name alone.
        """
        for found in numbered(name):
            known = self._graph.initializers.get(found)
            if known is None:
                break
            if holds(known, array):
                return known
        tensor = ir.Tensor(np.require(array, requirements="C"), name=found)
        value = ir.Value(name=found, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._graph.register_initializer(value)
        return value

    def unused(self, name: str, ending: str) -> str:
        """``name``, or that with a number, of which no initializer with ``ending`` has been made."""
        return next(found for found in numbered(name) if f"{found}{ending}" not in self._graph.initializers)

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
        """One node with one result, called ``name``."""
        node = ir.node(operator, inputs, attributes or {}, domain=domain, name=f"{operator}_{name}")
        node.metadata_props.update(self._place.metadata_props)
        result = node.outputs[0]
        result.name, result.type = name, ir.TensorType(dtype)
        self._graph.insert_before(self._place, node)
        return result

    def replace_node(self, value: ir.Value) -> None:
        """Remove ``place``; ``value`` is what it computed, under its name and with its shape."""
        old = self._place.outputs[0]
        name, value.shape = str(old.name), old.shape
        old.name = f"{name}.replaced"
        value.name = name
        ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
        self._graph.remove(self._place, safe=True)


def numbered(name: str) -> Iterator[str]:
    """``name``, ``name.2``, ``name.3``, ..."""
    return itertools.chain([name], (f"{name}.{number}" for number in itertools.count(2)))


def holds(weight: ir.Value, array: NDArray[Any]) -> bool:
    """Whether an initializer has the dtype, the shape and every bit of ``array``."""
    if weight.const_value is None:
        return False
    stored = weight.const_value.numpy()
    return stored.dtype == array.dtype and stored.shape == array.shape and stored.tobytes() == array.tobytes()


def drop_unused(model: ir.Model) -> None:
    """Remove weights that nobody reads any more, and the nodes that only turned them round."""
    for node in reversed(list(model.graph)):
        if node.op_type == "Transpose" and is_unused(node.outputs[0]):
            model.graph.remove(node, safe=True)
    for name, value in list(model.graph.initializers.items()):
        if is_unused(value):
            del model.graph.initializers[name]


def is_unused(value: ir.Value) -> bool:
    return not value.is_graph_output() and not list(value.uses())
