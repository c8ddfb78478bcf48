"""FP32 graph -> the same function with the outliers of some channels moved into the weights that read them.

SmoothQuant, Xiao et al. (2022, arXiv:2211.10438), section 4: ``X W = (X / s) (s W)`` per channel.

Cases:
1. Only linear layers read the result of a LayerNormalization (pre-norm): its gain and bias are divided by s, and
   nothing is added to the graph.
2. Others read it too (the residual stream of a post-norm block, the graph's output), or it comes from anywhere else
   (an activation function, attention): the linear layers get a ``Mul`` by 1/s, everybody else the old value.
3. The weights behind are multiplied by s along K; each layer gets a weight of its own, since initializers
   may be shared with layers that read something else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from transom.export.passes._builder import NodeBuilder, drop_unused
from transom.export.passes.linear_layers import Linear, find_linears, is_weight

GAIN, BIAS = 1, 2  # inputs of LayerNormalization


@dataclass(frozen=True, eq=False)
class SmoothQuantSite:
    """An activation and all linear layers that read it, K inputs each."""

    value: ir.Value
    linears: Sequence[Linear]

    @property
    def name(self) -> str:
        return str(self.value.name)

    @property
    def norm(self) -> ir.Node | None:
        """Case 1: the LayerNormalization that can take the factors."""
        node = self.value.producer()
        if node is None or node.op_type != "LayerNormalization" or self.value.is_graph_output():
            return None
        if set(self.value.uses()) != {(linear.node, 0) for linear in self.linears}:
            return None
        channels = self.linears[0].kernel_shape[0]
        weights = [value for value in node.inputs[GAIN:] if value is not None]
        return node if all(is_weight(value) and size_of(value) == channels for value in weights) else None


def size_of(weight: ir.Value) -> int:
    assert weight.const_value is not None
    return int(np.prod(weight.const_value.shape.numpy()))


def find_smoothquant_sites(model: ir.Model) -> list[SmoothQuantSite]:
    """What the linear layers of the graph read, in its order."""
    behind: dict[ir.Value, list[Linear]] = {}
    for linear in find_linears(model):
        behind.setdefault(linear.activation, []).append(linear)
    return [SmoothQuantSite(value, linears) for value, linears in behind.items()]


def fold_smoothing(model: ir.Model, factors: Mapping[str, NDArray[np.float32]]) -> bool:
    """Rewrite ``model`` in place; True if anything changed. ``factors`` are s, float32 (K,), by inlet's name."""
    sites = [site for site in find_smoothquant_sites(model) if site.name in factors]
    for site in sites:
        s = factors[site.name]
        if site.norm is not None:
            divide(model.graph, site.norm, site.name, s)
        else:
            divide_apart(model.graph, site, s)
        for linear in site.linears:
            multiply(model.graph, linear, s, site.name)
    drop_unused(model)
    model.graph.sort()
    return bool(sites)


def divide(graph: ir.Graph, norm: ir.Node, name: str, s: NDArray[np.float32]) -> None:
    """Case 1."""
    for index in (GAIN, BIAS):
        value = norm.inputs[index] if index < len(norm.inputs) else None
        if value is not None and value.const_value is not None:
            divided = (value.const_value.numpy() / s).astype(np.float32)
            norm.replace_input_with(index, NodeBuilder(graph, norm).weight(f"{value.name}.{name}", divided))


def divide_apart(graph: ir.Graph, site: SmoothQuantSite, s: NDArray[np.float32]) -> None:
    """Case 2."""
    builder = NodeBuilder(graph, site.linears[0].node)
    inverse = builder.weight(f"{site.name}.smoothing", (1 / s).astype(np.float32))
    smoothed = builder.add("Mul", [site.value, inverse], f"{site.name}.smoothed")
    smoothed.shape = site.value.shape
    for linear in site.linears:
        linear.node.replace_input_with(0, smoothed)


def multiply(graph: ir.Graph, linear: Linear, s: NDArray[np.float32], site: str) -> None:
    """Case 3. The new weight lies as (K, N), whichever way round the old one was read."""
    linear.node.attributes.pop("transB", None)
    name = f"{linear.weight_name}.{site}"
    linear.node.replace_input_with(1, NodeBuilder(graph, linear.node).weight(name, linear.kernel() * s[:, None]))
