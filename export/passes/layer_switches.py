"""Give each layer of a shipped graph a switch that makes it compute in FP32 while the graph runs.

One new input, SWITCHES, int64 (n,), says which of the n layers compute in FP32. So one session serves every
combination of them, where a session for each would load and pack the weights anew.

Cases:
1. A linear layer or a convolution of a quantised graph: the passes kept the name of its result, and of the activation
   it reads. Where its switch is on, its readers get the FP32 product of that activation, not quantised. Where the
   shipped graph has no such result, because its integer product holds the bias too, they get product and bias.
2. A node of a half-precision graph, as ``fake_half`` rounds it: where the switch of its module is on it computes with
   the FP32 weights, and its result is not rounded. Nodes that only move values need no switch.
3. Nodes of no module share one switch, TOP.
4. A ``Transpose`` of a weight belongs to the node that reads it, which gets the FP32 weight transposed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from transom.calib.graph_hash import MODULE
from transom.export.passes._builder import NodeBuilder
from transom.export.passes._match import is_standard, is_weight, only_reader
from transom.export.passes.convolutions import Convolution, find_layers
from transom.export.passes.fake_half import fake_half
from transom.runtime.errors import BundleError

SWITCHES = "fp32_layers"
FP32 = "fp32"  # ends the names of FP32 weights and results
TOP = "top"
WIDE = "_wide"  # ends the name that ``fake_half`` gives a value that was rounded and is FP32 again

WeightViews = dict[ir.Value, tuple[str, Sequence[int]]]  # an initializer's name and the order of its axes


def add_layer_switches(model: ir.Model, fp32: ir.Model) -> list[str]:
    """Apply case 1 to ``model`` in place; return the names of the layers in the order of their switches.

    ``fp32`` is the graph that was quantised, smoothing folded in. Where ``model`` is in FP16 beside its integers it
    rounds as a GPU would. A convolution that reads its FP32 weight is no layer: where weights alone are quantised none
    is, nor did earlier versions. Raises BundleError where ``model`` does not have a layer of ``fp32``.
    """
    fake_half(model)
    values = values_by_name(model.graph)
    switches = Fp32Switches(model.graph)
    for layer in find_layers(fp32):
        convolves = isinstance(layer, Convolution)
        if convolves and layer.weight_name in model.graph.initializers:
            continue
        product = layer.node.outputs[0]
        bias_add = bias_inside(values, product)
        result = counterpart(values, product if bias_add is None else bias_add.outputs[0], layer.name)
        inputs = [counterpart(values, layer.activation, layer.name)]
        kernel = array_of(layer.weight) if convolves else layer.kernel()
        inputs.append(switches.weight(layer.weight_name, kernel))
        if layer.bias is not None and is_weight(layer.bias):
            inputs.append(switches.weight(str(layer.bias.name), array_of(layer.bias)))
        elif layer.bias is not None:
            inputs.append(counterpart(values, layer.bias, layer.name))
        nodes = [ir.node(layer.node.op_type, inputs, layer.node.attributes if convolves else {})]
        name = str(result.name)
        if bias_add is not None:
            describe_as(nodes[0].outputs[0], result, "product")
            bias = next(value for value in bias_add.inputs if value is not None and value is not product)
            terms = [nodes[0].outputs[0], switches.weight(str(bias.name), array_of(bias))]
            nodes.append(ir.node("Add", terms))
        (values[name],) = switches.add(layer.name, nodes, [result])
    switches.finish()
    return switches.names


def add_module_switches(model: ir.Model, fp32: ir.Model) -> list[str]:
    """Apply cases 2 to 4 to ``model``, in half precision, in place; return module paths in the order of their switches.

    Raises BundleError where ``model`` has a weight that ``fp32``, the canonical graph, does not have.
    """
    nodes = list(model.graph)
    fake_half(model)
    values = values_by_name(model.graph)
    weights: WeightViews = {}
    for name, weight in model.graph.initializers.items():
        for value in (weight, values.get(name + WIDE)):
            if value is not None and value.dtype == ir.DataType.FLOAT:
                weights[value] = name, range(len(value.shape or ()))
    switches = Fp32Switches(model.graph)
    for node in nodes:
        if is_weight_transpose(node, weights):  # case 4
            name, _ = weights[first_input(node)]
            weights[node.outputs[0]] = name, axis_order(node)
            continue
        results = [values.get(f"{output.name}{WIDE}", output) for output in node.outputs]
        if results != list(node.outputs) or any(value in weights for value in node.inputs):
            twin = fp32_node(node, switches, weights, fp32)
            switches.add(node.metadata_props.get(MODULE) or TOP, [twin], results)
    switches.finish()
    return switches.names


def is_weight_transpose(node: ir.Node, weights: WeightViews) -> bool:
    return node.op_type == "Transpose" and node.inputs[0] in weights


def first_input(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def axis_order(transpose: ir.Node) -> Sequence[int]:
    """Return the axes of a ``Transpose``'s result as axes of its input."""
    perm = transpose.attributes.get("perm")
    return perm.as_ints() if perm is not None else range(len(first_input(transpose).shape or ()))[::-1]


def fp32_node(node: ir.Node, switches: Fp32Switches, weights: WeightViews, fp32: ir.Model) -> ir.Node:
    """Return a copy of a node of case 2, in no graph, with the weights of ``fp32`` and without rounding."""
    inputs: list[ir.Value | None] = []
    for value in node.inputs:
        if value is None or value not in weights:
            inputs.append(value)
            continue
        name, order = weights[value]
        original = fp32.graph.initializers.get(name)
        if original is None or original.const_value is None:
            raise BundleError(f"the graph has a weight {name} that its checkpoint does not give; export it again.")
        transposed = order != range(len(order))
        inputs.append(
            switches.weight(f"{name}.{tuple(order)}" if transposed else name, array_of(original).transpose(order))
        )
    attributes = {name: attribute for name, attribute in node.attributes.items() if name != "to"}
    if "to" in node.attributes:  # a Cast that rounds
        attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
    return ir.node(node.op_type, inputs, attributes, domain=node.domain, num_outputs=len(node.outputs))


class Fp32Switches:
    """The switches of a graph, by the names of layers; several nodes may share one."""

    def __init__(self, graph: ir.Graph) -> None:
        self.names: list[str] = []
        self._graph, self._builder = graph, NodeBuilder(graph, graph[0])
        self._conditions: dict[str, ir.Value] = {}
        self._switches = ir.Value(name=SWITCHES, type=ir.TensorType(ir.DataType.INT64))
        graph.inputs.append(self._switches)

    def weight(self, name: str, array: NDArray[np.float32]) -> ir.Value:
        """Return the initializer of an FP32 weight."""
        return self._builder.weight(f"{name}.{FP32}", array)

    def add(self, name: str, nodes: Sequence[ir.Node], results: Sequence[ir.Value]) -> list[ir.Value]:
        """Give the readers of ``results`` the outputs of the last of ``nodes``, where the switch ``name`` is on.

        The nodes are in no graph yet. Return the values that they read from now on, under the old names.
        """
        outputs = nodes[-1].outputs
        for old, new in zip(results, outputs, strict=True):
            describe_as(new, old, FP32)
        shipped = [ir.node("Identity", [old]) for old in results]
        for old, identity in zip(results, shipped, strict=True):
            describe_as(identity.outputs[0], old, "identity")
        branches = {
            "then_branch": ir.Graph([], outputs, nodes=nodes, name=FP32),
            "else_branch": ir.Graph([], [each.outputs[0] for each in shipped], nodes=shipped, name="shipped"),
        }
        chosen = ir.node("If", [self._condition(name)], branches, num_outputs=len(results))
        for old, new, identity in zip(results, chosen.outputs, shipped, strict=True):
            for reader, index in list(old.uses()):
                if reader is not identity:
                    reader.replace_input_with(index, new)
            for index, output in enumerate(list(self._graph.outputs)):
                if output is old:
                    self._graph.outputs[index] = new
            describe_as(new, old, "chosen")
            old.name, new.name = f"{old.name}.shipped", old.name
        self._graph.append(chosen)
        return list(chosen.outputs)

    def _condition(self, name: str) -> ir.Value:
        if name not in self._conditions:
            index = self._builder.weight(f"{SWITCHES}.{len(self.names)}", np.array(len(self.names), np.int64))
            switch = self._builder.add("Gather", [self._switches, index], f"{index.name}.is", dtype=ir.DataType.INT64)
            self._conditions[name] = self._builder.add(
                "Cast", [switch], f"{index.name}.condition", {"to": ir.DataType.BOOL}, dtype=ir.DataType.BOOL
            )
            self.names.append(name)
        return self._conditions[name]

    def finish(self) -> None:
        """Give the input SWITCHES its size and sort the nodes topologically."""
        self._switches.shape = ir.Shape([len(self.names)])
        self._graph.sort()


def describe_as(value: ir.Value, other: ir.Value, ending: str) -> None:
    """Give ``value`` the dtype, the shape and, with ``ending``, the name of ``other``."""
    dtype = other.dtype or ir.DataType.FLOAT
    value.name, value.type, value.shape = f"{other.name}.{ending}", ir.TensorType(dtype), other.shape


def values_by_name(graph: ir.Graph) -> dict[str, ir.Value]:
    """Return the graph's inputs and the outputs of its nodes."""
    return {str(value.name): value for value in (*graph.inputs, *(out for node in graph for out in node.outputs))}


def bias_inside(values: Mapping[str, ir.Value], product: ir.Value) -> ir.Node | None:
    """Return the ``Add`` of the FP32 graph whose bias the shipped operator adds to the product itself.

    None where the shipped graph has the product alone, or a result of the Add that ONNX's own Add computes.
    """
    reader = only_reader(product)
    if str(product.name) in values or reader is None or not is_standard(reader, "Add"):
        return None
    if not any(value is not None and is_weight(value) for value in reader.inputs):
        return None
    result = values.get(str(reader.outputs[0].name))
    operator = None if result is None else result.producer()
    return reader if operator is not None and operator.domain else None


def counterpart(values: Mapping[str, ir.Value], value: ir.Value, layer: str) -> ir.Value:
    """Return the value of the shipped graph that stands for ``value`` of the FP32 graph."""
    found = values.get(f"{value.name}{WIDE}") or values.get(str(value.name))
    if found is None:
        raise BundleError(f"the graph has no {value.name}, which belongs to the layer {layer}; export it again.")
    return found


def array_of(weight: ir.Value) -> NDArray[np.float32]:
    assert weight.const_value is not None
    return weight.const_value.numpy()
