"""FP32 graph -> the same function with the outliers of LayerNorm's channels moved into the weights behind it.

SmoothQuant, Xiao et al. (2022, arXiv:2211.10438), section 4: ``X W = (X / s) (s W)`` per channel.

Cases:
1. Only linear layers read the LayerNorm (pre-norm): its gain and bias are divided by s, nothing is added.
2. Others read it too, the residual stream of a post-norm block or the graph's output: the linear layers get a
   ``Mul`` by 1/s of their own, everybody else the old value.
3. The weights behind are multiplied by s along K; each layer gets a weight of its own, since initializers
   may be shared by layers behind other norms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from transom.export.passes.linears import Linear, find_linears, is_weight
from transom.export.passes.splice import Splice, drop_unused

GAIN, BIAS = 1, 2  # inputs of LayerNormalization


@dataclass(frozen=True, eq=False)
class Norm:
    """A LayerNormalization and the linear layers that read it. ``name`` is that of its result."""

    node: ir.Node
    linears: Sequence[Linear]

    @property
    def name(self) -> str:
        return str(self.node.outputs[0].name)

    @property
    def read_by_others(self) -> bool:
        result = self.node.outputs[0]
        readers = {(node, index) for node, index in result.uses()}
        return result.is_graph_output() or readers != {(linear.node, 0) for linear in self.linears}


def find_norms(model: ir.Model) -> list[Norm]:
    """The norms with a weight over the last axis, and linear layers behind them."""
    behind: dict[ir.Node, list[Linear]] = {}
    for linear in find_linears(model):
        norm = linear.activation.producer()
        if norm is not None and norm.op_type == "LayerNormalization" and foldable(norm, linear):
            behind.setdefault(norm, []).append(linear)
    return [Norm(node, linears) for node, linears in behind.items()]


def foldable(norm: ir.Node, linear: Linear) -> bool:
    """Whether gain and bias are weights of as many numbers as the layer has inputs."""
    values = [value for value in norm.inputs[GAIN:] if value is not None]
    return all(is_weight(value) and value.const_value.shape == (linear.kernel_shape[0],) for value in values)  # type: ignore[union-attr]


def fold_smoothing(model: ir.Model, factors: Mapping[str, NDArray[np.float32]]) -> bool:
    """Rewrite ``model`` in place; True if anything changed. ``factors`` are s, float32 (K,), by norm's name."""
    norms = [norm for norm in find_norms(model) if norm.name in factors]
    for norm in norms:
        s = factors[norm.name]
        if norm.read_by_others:  # case 2
            splice = Splice(model.graph, norm.linears[0].node)
            inverse = splice.weight(f"{norm.name}.smoothing", (1 / s).astype(np.float32))
            smoothed = splice.add("Mul", [norm.node.outputs[0], inverse], f"{norm.name}.smoothed")
            smoothed.shape = norm.node.outputs[0].shape
            for linear in norm.linears:
                linear.node.replace_input_with(0, smoothed)
        else:
            divide(model.graph, norm, s)
        for linear in norm.linears:
            multiply(model.graph, linear, s, norm.name)
    drop_unused(model)
    model.graph.sort()
    return bool(norms)


def divide(graph: ir.Graph, norm: Norm, s: NDArray[np.float32]) -> None:
    """Case 1."""
    for index in (GAIN, BIAS):
        value = norm.node.inputs[index] if index < len(norm.node.inputs) else None
        if value is not None and value.const_value is not None:
            divided = (value.const_value.numpy() / s).astype(np.float32)
            norm.node.replace_input_with(index, Splice(graph, norm.node).weight(f"{value.name}.{norm.name}", divided))


def multiply(graph: ir.Graph, linear: Linear, s: NDArray[np.float32], norm: str) -> None:
    """Case 3."""
    kernel = linear.kernel() * s[:, None]
    as_stored = kernel.T if linear.node.op_type == "Gemm" and linear.stored_transposed else kernel
    name = f"{linear.weight_name}.{norm}"
    linear.node.replace_input_with(1, Splice(graph, linear.node).weight(name, as_stored))
