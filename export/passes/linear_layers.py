"""Find the linear layers of a graph, all of which can be quantised; convolutions are found in convolutions.py.

Cases:
1. ``MatMul`` of an activation and a weight (K, N).
2. ``MatMul`` of an activation and a transposed weight (N, K): a head tied to the embedding.
3. ``Gemm`` with a weight, either way round, alpha and beta 1; its bias may be None.

No linear layers: residual Add, LayerNormalization, Softmax, products of two activations, convolutions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from transom.calib.graph_hash import MODULE
from transom.export.passes._match import is_standard, is_weight


@dataclass(frozen=True, eq=False)
class Linear:
    """A layer ``y = x W (+ b)``. ``name`` is the path of its module, or of its result where it has none."""

    name: str
    node: ir.Node  # MatMul or Gemm
    weight: ir.Value  # the initializer
    stored_transposed: bool  # as (N, K)

    @property
    def activation(self) -> ir.Value:
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def bias(self) -> ir.Value | None:
        """The bias of a ``Gemm``; that of a ``MatMul`` is an Add of its own, and stays one."""
        return self.node.inputs[2] if self.node.op_type == "Gemm" and len(self.node.inputs) > 2 else None

    @property
    def weight_name(self) -> str:
        """The name of the kernel, which is another where one initializer is read both ways round."""
        return f"{self.weight.name}.transposed" if self.stored_transposed else str(self.weight.name)

    @property
    def kernel_id(self) -> tuple[object, bool]:
        """The tensor, which clones of a graph share and which equals itself alone, and which way round it is read."""
        return self.weight.const_value, self.stored_transposed

    @property
    def kernel_shape(self) -> tuple[int, int]:
        """(K, N)."""
        assert self.weight.const_value is not None
        rows, columns = self.weight.const_value.shape.numpy()
        return (columns, rows) if self.stored_transposed else (rows, columns)

    def kernel(self) -> NDArray[np.float32]:
        """Return the weight as float32 (K, N)."""
        assert self.weight.const_value is not None
        stored = self.weight.const_value.numpy()
        return np.asarray(stored.T if self.stored_transposed else stored, np.float32)


def find_linears(model: ir.Model) -> list[Linear]:
    """Return the linear layers of the main graph, in its order, each under a name of its own."""
    linears: list[Linear] = []
    names: set[str] = set()
    for node in model.graph:
        weight = weight_of(node)
        if weight is not None:
            linears.append(Linear(unique_name(node, names), node, *weight))
    return linears


def unique_name(node: ir.Node, names: set[str]) -> str:
    """Return the layer's name, which is none of ``names``, and add it to them."""
    name = name_of(node)
    if name in names:  # a module that is called twice
        name = f"{name}:{node.outputs[0].name}"
    names.add(name)
    return name


def weight_of(node: ir.Node) -> tuple[ir.Value, bool] | None:
    """Return (initializer, whether it is stored as (N, K)) of a linear layer; None for any other node."""
    if not is_standard(node, "MatMul", "Gemm") or node.inputs[0] is None or is_weight(node.inputs[0]):
        return None
    value, transposed = node.inputs[1], False
    if node.op_type == "Gemm":
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        if attributes.get("transA", 0) or attributes.get("alpha", 1.0) != 1.0 or attributes.get("beta", 1.0) != 1.0:
            return None
        transposed = bool(attributes.get("transB", 0))
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == "Transpose":  # case 2
        value, transposed = producer.inputs[0], not transposed
    if value is None or not is_weight(value) or value.dtype != ir.DataType.FLOAT:
        return None
    return (value, transposed) if value.shape is not None and len(value.shape) == 2 else None


def name_of(node: ir.Node) -> str:
    """Return the module's path; of a node without one, the name of its result with the bias in it."""
    path = node.metadata_props.get(MODULE)
    if path:
        return path
    result = node.outputs[0]
    readers = list(result.consumers())
    if not result.is_graph_output() and len(readers) == 1 and readers[0].op_type == "Add":
        result = readers[0].outputs[0]
    return str(result.name)
