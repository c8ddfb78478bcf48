"""Find the convolutions of a graph that gain by being quantised.

A convolution of integers needs its input quantised and its result dequantised, which costs time for each of their
values, and saves time for each multiply-add. So a convolution is quantised that has

1. at least LEAST_INPUTS input channels in a group: those of an image have three, of which integer instructions, which
   add up four products or more at once, use a part;
2. at least LEAST_PRODUCTS multiply-adds for each value that it reads or writes, at one position of its result:
   (C / groups * O * height * width) / (C * stride * stride + O) with C input and O output channels.

The rule reads the shapes in the graph alone, so that an export is the same on every machine. What it was measured on is
in docs/int8.md.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from transom.export.passes._match import integer_attribute, is_standard, is_weight, weight_shape
from transom.export.passes.linear_layers import Linear, find_linears, unique_name

LEAST_INPUTS = 32
LEAST_PRODUCTS = 64


@dataclass(frozen=True, eq=False)
class Convolution:
    """A convolution with a weight (O, C / groups, height, width); the names are those of ``Linear``."""

    name: str
    node: ir.Node
    weight: ir.Value

    @property
    def activation(self) -> ir.Value:
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def result(self) -> ir.Value:
        return self.node.outputs[0]

    @property
    def bias(self) -> ir.Value | None:
        return self.node.inputs[2] if len(self.node.inputs) > 2 else None

    @property
    def weight_name(self) -> str:
        return str(self.weight.name)

    @property
    def kernel_id(self) -> object:
        """The tensor, which clones of a graph share and which equals itself alone."""
        return self.weight.const_value

    @property
    def kernel_shape(self) -> tuple[int, int]:
        """(K, N): what is summed over, C / groups * height * width, and the output channels."""
        outputs, *summed = weight_shape(self.weight)
        return prod(summed), outputs

    def kernel(self) -> NDArray[np.float32]:
        """Return the weight as float32 (K, N)."""
        assert self.weight.const_value is not None
        stored = self.weight.const_value.numpy()
        return np.asarray(stored.reshape(len(stored), -1).T, np.float32)

    def stored_form(self, kernel: NDArray[np.int8]) -> NDArray[np.int8]:
        """Return a kernel (K, N) in the shape of the weight."""
        return np.ascontiguousarray(kernel.T).reshape(weight_shape(self.weight))


QuantizableLayer = Linear | Convolution


def find_layers(model: ir.Model) -> list[QuantizableLayer]:
    """Return the linear layers and the convolutions that gain, in the order of the graph, each under its own name."""
    layers: list[QuantizableLayer] = [*find_linears(model)]
    layers += find_convolutions(model, {layer.name for layer in layers})
    found = {layer.node: layer for layer in layers}
    return [found[node] for node in model.graph if node in found]


def find_convolutions(model: ir.Model, taken: Collection[str] = ()) -> list[Convolution]:
    """Return the convolutions of the main graph that gain, in its order, under names that are not ``taken``."""
    names = set(taken)
    convolutions = []
    for node in model.graph:
        weight = node.inputs[1] if is_standard(node, "Conv") and len(node.inputs) > 1 else None
        if weight is not None and is_weight(weight) and weight.dtype == ir.DataType.FLOAT and gains(node, weight):
            convolutions.append(Convolution(unique_name(node, names), node, weight))
    return convolutions


def gains(node: ir.Node, weight: ir.Value) -> bool:
    """Return whether a ``Conv`` of an image with this weight is quantised, by the rule above."""
    shape = weight_shape(weight)
    if len(shape) != 4 or node.inputs[0] is None or is_weight(node.inputs[0]):
        return False
    return shape[1] >= LEAST_INPUTS and multiply_adds_per_value(node, weight) >= LEAST_PRODUCTS


def multiply_adds_per_value(node: ir.Node, weight: ir.Value) -> float:
    """Return how many multiply-adds a ``Conv`` makes for each value that it reads or writes: rule 2."""
    outputs, inputs, *_ = weight_shape(weight)
    strides = node.attributes.get("strides")
    read = inputs * integer_attribute(node, "group", 1) * prod(strides.as_ints() if strides is not None else (1, 1))
    return prod(weight_shape(weight)) / (read + outputs)
