"""Shipped graph -> the same graph with a switch per layer that puts FP32 in its place while it runs.

One new input, RESTORED, int64 (n,), says which of the n layers compute as in FP32. So one session serves every
combination of them, where a session for each would load and pack the weights anew.

Cases:
1. A linear layer of a quantised graph: the passes kept the name of its result, and of the activation it reads. Where
   it is restored, the FP32 product of that activation, not quantised, is what its readers get.
2. A node of a half-precision graph, as ``fake_half`` rounds it: where its module is restored it computes with the
   FP32 weights, and its result is not rounded. Nodes that only move values have nothing to restore.
3. Nodes of no module are restored together, as TOP.
4. A ``Transpose`` of a weight belongs to the node that reads it, which gets the FP32 weight turned round already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from transom.calib.graph_hash import MODULE
from transom.export.passes._builder import NodeBuilder
from transom.export.passes.fake_half import fake_half
from transom.export.passes.linear_layers import find_linears, is_weight
from transom.runtime.errors import BundleError

RESTORED = "restored"
TOP = "top"
WIDE = "_wide"  # what ``fake_half`` calls a value, rounded and in FP32 again

Weights = dict[ir.Value, tuple[str, Sequence[int]]]  # an initializer's name and the order of its axes


def add_linear_switches(model: ir.Model, fp32: ir.Model) -> list[str]:
    """Case 1: rewrite ``model`` in place; the names of the layers in the order of their switches.

    ``fp32`` is the graph that was quantised, smoothing folded in. Where ``model`` is in FP16 beside its integers it
    rounds as a GPU would. Raises BundleError where it does not have a layer of ``fp32``.
    """
    fake_half(model)
    values = values_by_name(model.graph)
    switches = Fp32Switches(model.graph)
    for linear in find_linears(fp32):
        result = read_as(values, linear.node.outputs[0], linear.name)
        inputs = [read_as(values, linear.activation, linear.name)]
        inputs.append(switches.weight(linear.weight_name, linear.kernel()))
        if linear.bias is not None and is_weight(linear.bias):
            inputs.append(switches.weight(str(linear.bias.name), array_of(linear.bias)))
        elif linear.bias is not None:
            inputs.append(read_as(values, linear.bias, linear.name))
        name = str(result.name)
        (values[name],) = switches.choose(linear.name, ir.node(linear.node.op_type, inputs), [result])
    switches.finish()
    return switches.names


def add_module_switches(model: ir.Model, fp32: ir.Model) -> list[str]:
    """Cases 2 to 4: rewrite ``model``, in half precision, in place; the paths in the order of their switches.

    Raises BundleError where ``model`` has a weight that ``fp32``, the canonical graph, does not have.
    """
    nodes = list(model.graph)
    fake_half(model)
    values = values_by_name(model.graph)
    weights: Weights = {}
    for name, weight in model.graph.initializers.items():
        for value in (weight, values.get(name + WIDE)):
            if value is not None and value.dtype == ir.DataType.FLOAT:
                weights[value] = name, range(len(value.shape or ()))
    switches = Fp32Switches(model.graph)
    for node in nodes:
        if is_turned_weight(node, weights):  # case 4
            name, _ = weights[read(node)]
            weights[node.outputs[0]] = name, order_of(node)
            continue
        results = [values.get(f"{output.name}{WIDE}", output) for output in node.outputs]
        if results != list(node.outputs) or any(value in weights for value in node.inputs):
            twin = unrounded(node, switches, weights, fp32)
            switches.choose(node.metadata_props.get(MODULE) or TOP, twin, results)
    switches.finish()
    return switches.names


def is_turned_weight(node: ir.Node, weights: Weights) -> bool:
    return node.op_type == "Transpose" and node.inputs[0] in weights


def read(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def order_of(transpose: ir.Node) -> Sequence[int]:
    """The axes of its result as those of what it reads."""
    perm = transpose.attributes.get("perm")
    return perm.as_ints() if perm is not None else range(len(read(transpose).shape or ()))[::-1]


def unrounded(node: ir.Node, switches: Fp32Switches, weights: Weights, fp32: ir.Model) -> ir.Node:
    """Case 2: the same node, its weights those of ``fp32``."""
    inputs: list[ir.Value | None] = []
    for value in node.inputs:
        if value is None or value not in weights:
            inputs.append(value)
            continue
        name, order = weights[value]
        original = fp32.graph.initializers.get(name)
        if original is None or original.const_value is None:
            raise BundleError(f"the graph has a weight {name} that its checkpoint does not give; export it again.")
        turned = order != range(len(order))
        inputs.append(
            switches.weight(f"{name}.{tuple(order)}" if turned else name, array_of(original).transpose(order))
        )
    attributes = {name: attribute for name, attribute in node.attributes.items() if name != "to"}
    if "to" in node.attributes:  # a Cast that rounds
        attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))
    return ir.node(node.op_type, inputs, attributes, domain=node.domain, num_outputs=len(node.outputs))


class Fp32Switches:
    """The switches of a graph; several nodes may hang on one of them."""

    def __init__(self, graph: ir.Graph) -> None:
        self.names: list[str] = []
        self._graph, self._splice = graph, NodeBuilder(graph, graph[0])
        self._conditions: dict[str, ir.Value] = {}
        self._restored = ir.Value(name=RESTORED, type=ir.TensorType(ir.DataType.INT64))
        graph.inputs.append(self._restored)

    def weight(self, name: str, array: NDArray[np.float32]) -> ir.Value:
        return self._splice.weight(f"{name}.{RESTORED}", array)

    def choose(self, name: str, node: ir.Node, results: Sequence[ir.Value]) -> list[ir.Value]:
        """Whoever reads ``results`` gets the outputs of ``node``, which is in no graph, where ``name`` is restored.

        What they read instead has the old names, and is returned.
        """
        for old, new in zip(results, node.outputs, strict=True):
            like(new, old, RESTORED)
        shipped = [ir.node("Identity", [old]) for old in results]
        for old, identity in zip(results, shipped, strict=True):
            like(identity.outputs[0], old, "identity")
        branches = {
            "then_branch": ir.Graph([], node.outputs, nodes=[node], name="restored"),
            "else_branch": ir.Graph([], [each.outputs[0] for each in shipped], nodes=shipped, name="shipped"),
        }
        chosen = ir.node("If", [self._condition(name)], branches, num_outputs=len(results))
        for old, new, identity in zip(results, chosen.outputs, shipped, strict=True):
            for reader, place in list(old.uses()):
                if reader is not identity:
                    reader.replace_input_with(place, new)
            for place, output in enumerate(list(self._graph.outputs)):
                if output is old:
                    self._graph.outputs[place] = new
            like(new, old, "chosen")
            old.name, new.name = f"{old.name}.shipped", old.name
        self._graph.append(chosen)
        return list(chosen.outputs)

    def _condition(self, name: str) -> ir.Value:
        if name not in self._conditions:
            index = self._splice.weight(f"{RESTORED}.{len(self.names)}", np.array(len(self.names), np.int64))
            one = self._splice.add("Gather", [self._restored, index], f"{index.name}.is", dtype=ir.DataType.INT64)
            self._conditions[name] = self._splice.add(
                "Cast", [one], f"{index.name}.condition", {"to": ir.DataType.BOOL}, dtype=ir.DataType.BOOL
            )
            self.names.append(name)
        return self._conditions[name]

    def finish(self) -> None:
        self._restored.shape = ir.Shape([len(self.names)])
        self._graph.sort()


def like(value: ir.Value, other: ir.Value, word: str) -> None:
    dtype = other.dtype or ir.DataType.FLOAT
    value.name, value.type, value.shape = f"{other.name}.{word}", ir.TensorType(dtype), other.shape


def values_by_name(graph: ir.Graph) -> dict[str, ir.Value]:
    """Inputs and what the nodes compute."""
    return {str(value.name): value for value in (*graph.inputs, *(out for node in graph for out in node.outputs))}


def read_as(values: Mapping[str, ir.Value], value: ir.Value, layer: str) -> ir.Value:
    """What the shipped graph's nodes read where those of the FP32 graph read ``value``."""
    found = values.get(f"{value.name}{WIDE}") or values.get(str(value.name))
    if found is None:
        raise BundleError(f"the graph has no {value.name}, which belongs to the layer {layer}; export it again.")
    return found


def array_of(weight: ir.Value) -> NDArray[np.float32]:
    assert weight.const_value is not None
    return weight.const_value.numpy()
