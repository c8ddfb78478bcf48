"""Fold SmoothQuant's factors into an FP32 graph: outliers of some channels move into the weights that read them.

SmoothQuant, Xiao et al. (2022, arXiv:2211.10438), section 4: ``X W = (X / s) (s W)`` per channel. The graph computes
the same function.

Cases:
1. Only linear layers read the result of a LayerNormalization (pre-norm): its gain and bias are divided by s, and
   nothing is added to the graph.
2. Other nodes read it too (the residual stream of a post-norm block, the graph's output), or it comes from anywhere
   else (an activation function, attention): the linear layers get a ``Mul`` by 1/s, all others the old value.
3. The weights behind are multiplied by s along K; each layer gets a weight of its own, since initializers
   may be shared with layers that read something else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from transom.export.passes._builder import NodeBuilder, clean_up
from transom.export.passes._match import is_weight, weight_shape
from transom.export.passes.linear_layers import Linear, find_linears

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
        """The LayerNormalization of case 1, which can take the factors."""
        node = self.value.producer()
        if node is None or node.op_type != "LayerNormalization" or self.value.is_graph_output():
            return None
        if set(self.value.uses()) != {(linear.node, 0) for linear in self.linears}:
            return None
        channels = self.linears[0].kernel_shape[0]
        weights = [value for value in node.inputs[GAIN:] if value is not None]
        fits = all(is_weight(value) and prod(weight_shape(value)) == channels for value in weights)
        return node if fits else None


def find_smoothquant_sites(model: ir.Model) -> list[SmoothQuantSite]:
    """Return the activations that the linear layers of the graph read, in its order."""
    readers: dict[ir.Value, list[Linear]] = {}
    for linear in find_linears(model):
        readers.setdefault(linear.activation, []).append(linear)
    return [SmoothQuantSite(value, linears) for value, linears in readers.items()]


def fold_smoothing(model: ir.Model, factors: Mapping[str, NDArray[np.float32]]) -> bool:
    """Fold ``factors``, which are s, float32 (K,), by site's name, into ``model`` in place.

    Return whether anything changed.
    """
    sites = [site for site in find_smoothquant_sites(model) if site.name in factors]
    for site in sites:
        s = factors[site.name]
        if site.norm is not None:
            divide_norm(model.graph, site.norm, site.name, s)
        else:
            insert_division(model.graph, site, s)
        for linear in site.linears:
            multiply_weight(model.graph, linear, s, site.name)
    clean_up(model)
    return bool(sites)


def divide_norm(graph: ir.Graph, norm: ir.Node, name: str, s: NDArray[np.float32]) -> None:
    """Apply case 1."""
    for index in (GAIN, BIAS):
        value = norm.inputs[index] if index < len(norm.inputs) else None
        if value is not None and value.const_value is not None:
            divided = (value.const_value.numpy() / s).astype(np.float32)
            norm.replace_input_with(index, NodeBuilder(graph, norm).weight(f"{value.name}.{name}", divided))


def insert_division(graph: ir.Graph, site: SmoothQuantSite, s: NDArray[np.float32]) -> None:
    """Apply case 2."""
    builder = NodeBuilder(graph, site.linears[0].node)
    inverse = builder.weight(f"{site.name}.smoothing", (1 / s).astype(np.float32))
    smoothed = builder.add("Mul", [site.value, inverse], f"{site.name}.smoothed")
    smoothed.shape = site.value.shape
    for linear in site.linears:
        linear.node.replace_input_with(0, smoothed)


def multiply_weight(graph: ir.Graph, linear: Linear, s: NDArray[np.float32], site: str) -> None:
    """Apply case 3. The new weight is stored as (K, N), whichever way round the old one was read."""
    linear.node.attributes.pop("transB", None)
    name = f"{linear.weight_name}.{site}"
    linear.node.replace_input_with(1, NodeBuilder(graph, linear.node).weight(name, linear.kernel() * s[:, None]))
