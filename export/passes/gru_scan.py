"""Write a ``GRU`` as a ``Scan`` whose step is one product and elementwise operators.

TensorRT-RTX 1.7.1's parser does not read a ``GRU`` with lengths in half precision: inside its loop it selects between
half and a zero in FP32. In FP32 it reads it, and makes a loop of 15 kernels a step, eight of which move counters. Of
this ``Scan`` it makes two kernels a step, in every precision.

Cases:
1. A bidirectional ``GRU`` in PyTorch's form (``linear_before_reset``) with a length for each row, weights that are
   initializers, and defaults for all else: what models/recurrent.py emits.
2. An output that nothing reads is not computed.

With B rows of S positions and states of H features:

- the product of all positions and the weights of both directions is taken at once, before the loop;
- the backward direction has its positions in reverse order, so that one loop moves both: (S, 2, B, 3H);
- a step is the product of the states (2, B, H) and the recurrent weights, then the gates. Operands of products have
  the graph's precision; states, gates and their sums are FP32;
- where a position is padding the state stays as it is, and the output is 0.

Left as it is: a ``GRU`` of another form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from transom.export.passes._builder import NodeBuilder, clean_up
from transom.export.passes._match import inputs_of, integer_attribute, is_standard, is_unused, is_weight

FLOAT, BOOL, INT64 = ir.DataType.FLOAT, ir.DataType.BOOL, ir.DataType.INT64
INPUTS = 6  # of a GRU: X, W, R, B, sequence_lens, initial_h
KNOWN = {"direction", "hidden_size", "linear_before_reset"}  # attributes of case 1
END = -(2**63)  # of a slice in reverse order: past the first element


def gru_scan(model: ir.Model) -> int:
    """Rewrite every ``GRU`` of case 1 in place; return how many there were."""
    found = [node for node in model.graph if is_recurrence(node)]
    for node in found:
        Recurrence(model.graph, node).replace()
    if found:
        clean_up(model)
    return len(found)


def is_recurrence(node: ir.Node) -> bool:
    """Return whether the node is of case 1."""
    if not is_standard(node, "GRU") or not node.attributes.keys() <= KNOWN:
        return False
    x, *weights, lengths, initial = inputs_of(node, INPUTS)
    return (
        "direction" in node.attributes
        and node.attributes["direction"].as_string() == "bidirectional"
        and integer_attribute(node, "linear_before_reset") == 1
        and x is not None
        and all(weight is not None and is_weight(weight) for weight in weights)
        and lengths is not None
        and initial is None
    )


class Recurrence:
    """A ``GRU`` of case 1: (S, B, E) -> (S, 2, B, H) and the final states (2, B, H)."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        x, W, R, B, lengths, _ = inputs_of(node, INPUTS)
        assert x is not None
        assert lengths is not None
        self._graph, self._node, self._x, self._lengths = graph, node, x, lengths
        self._name, self._dtype = str(node.name or node.outputs[-1].name), x.dtype or FLOAT
        self._builder = NodeBuilder(graph, node)
        # ONNX's gates are update, reset, new; the first two add both their biases, the reset gate scales the last one's
        self._W, self._R, (input_bias, recurrent_bias) = array_of(W), array_of(R), np.split(array_of(B), 2, axis=1)
        H = self._R.shape[2]
        self._hidden = H
        self._new_bias = recurrent_bias[:, None, 2 * H :].astype(np.float32)  # (2, 1, H)
        added = np.pad(recurrent_bias[:, : 2 * H].astype(np.float32), ((0, 0), (0, H)))
        self._bias = (input_bias.astype(np.float32) + added).astype(input_bias.dtype)  # (2, 3H)

    def replace(self) -> None:
        """Put the ``Scan``, and what leads to it and from it, in the node's place."""
        outputs, states = [*self._node.outputs, None][:2]
        wanted = outputs is not None and bool(outputs.name) and not is_unused(outputs)
        last, steps = self._scan(self._products(), self._shown(), self._zeros(), outputs=wanted)
        if steps is not None and outputs is not None:
            turned = self._add("Concat", self._turned(steps, "outputs"), "outputs", {"axis": 1}, dtype=FLOAT)
            self._replace_output(outputs, self._rounded(turned, "outputs.rounded"))
        if states is not None and states.name and not is_unused(states):
            self._replace_output(states, self._rounded(last, "states.rounded"))
        self._graph.remove(self._node, safe=True)

    def _products(self) -> ir.Value:
        """Return all positions times W, in the order of the steps: (S, 2, B, 3H)."""
        W = self._weight("W", np.concatenate([*self._W.transpose(0, 2, 1)], axis=1))  # (E, 6H)
        products = self._add("MatMul", [self._x, W], "products")
        products = self._add("Add", [products, self._weight("bias", self._bias.reshape(-1))], "biased")
        shape = self._weight("shape", np.array([0, 0, 2, 3 * self._hidden]))  # 0: S and B stay
        products = self._add("Reshape", [products, shape], "split")
        products = self._add("Transpose", [products], "transposed", {"perm": (0, 2, 1, 3)})
        return self._add("Concat", self._turned(products, "steps"), "steps", {"axis": 1})

    def _shown(self) -> ir.Value:
        """Return which positions are no padding, in the order of the steps: (S, 2, B, 1)."""
        size = self._add("Shape", [self._x], "positions", {"start": 0, "end": 1}, dtype=INT64)
        scalar = self._add("Squeeze", [size], "position_count", dtype=INT64)
        zero, one = (self._weight(name, np.array(n)) for name, n in (("zero", 0), ("one", 1)))
        position = self._add("Range", [zero, scalar, one], "position", dtype=INT64)
        position = self._add("Reshape", [position, self._weight("column", np.array([-1, 1, 1, 1]))], "of", dtype=INT64)
        lengths = self._add("Cast", [self._lengths], "lengths", {"to": INT64}, dtype=INT64)
        lengths = self._add("Reshape", [lengths, self._weight("row", np.array([1, 1, -1, 1]))], "ends", dtype=INT64)
        forward = self._add("Less", [position, lengths], "is_token", dtype=BOOL)
        backward = self._reversed(forward, "is_token.backward")
        return self._add("Concat", [forward, backward], "is_token.both", {"axis": 1}, dtype=BOOL)

    def _zeros(self) -> ir.Value:
        """Return the first states: (2, B, H)."""
        rows = self._add("Shape", [self._x], "rows", {"start": 1, "end": 2}, dtype=INT64)
        sizes = [self._weight("two", np.array([2])), rows, self._weight("features", np.array([self._hidden]))]
        shape = self._add("Concat", sizes, "state_shape", {"axis": 0}, dtype=INT64)
        zero = ir.Tensor(np.zeros(1, np.float32))
        return self._add("ConstantOfShape", [shape], "first_states", {"value": zero}, dtype=FLOAT)

    def _scan(
        self, products: ir.Value, shown: ir.Value, first: ir.Value, *, outputs: bool
    ) -> tuple[ir.Value, ir.Value | None]:
        """Return the final states (2, B, H) and, if wanted, the outputs in the order of the steps, both FP32."""
        H = self._hidden
        step = Step(self._name, self._node)
        state = step.input("state", FLOAT, (2, "B", H))
        product = step.input("product", self._dtype, (2, "B", 3 * H))
        token = step.input("token", BOOL, (2, "B", 1))
        R = self._weight("R", self._R.transpose(0, 2, 1))  # (2, H, 3H)
        narrow = step.cast(state, self._dtype, "narrow")
        recurrent = step.cast(step.add("MatMul", [narrow, R], "recurrent", dtype=self._dtype), FLOAT, "recurrent.wide")
        x_update, x_reset, x_new = step.split(step.cast(product, FLOAT, "product.wide"), 3, "input")
        h_update, h_reset, h_new = step.split(recurrent, 3, "hidden")
        update = step.add("Sigmoid", [step.add("Add", [x_update, h_update], "update.sum")], "update")
        reset = step.add("Sigmoid", [step.add("Add", [x_reset, h_reset], "reset.sum")], "reset")
        biased = step.add("Add", [h_new, self._weight("new_bias", self._new_bias)], "new.biased")
        kept = step.add("Mul", [reset, biased], "new.reset")
        new = step.add("Tanh", [step.add("Add", [x_new, kept], "new.sum")], "new")
        moved = step.add("Mul", [update, step.add("Sub", [state, new], "difference")], "moved")
        after = step.add("Add", [new, moved], "after")
        results = [step.add("Where", [token, after, state], "next")]
        if outputs:
            results.append(
                step.add("Where", [token, after, self._weight("padding", np.zeros((), np.float32))], "output")
            )
        body = step.body(results)
        attributes = [ir.AttrInt64("num_scan_inputs", 2), ir.AttrGraph("body", body)]
        scan = ir.Node("", "Scan", [first, products, shown], attributes, num_outputs=len(results), name=self._name)
        scan.metadata_props.update(self._node.metadata_props)
        for value, name in zip(scan.outputs, ("states", "step_outputs"), strict=False):
            value.name, value.type = f"{self._name}.{name}", ir.TensorType(FLOAT)
        self._graph.insert_before(self._node, scan)
        return scan.outputs[0], scan.outputs[1] if outputs else None

    def _turned(self, value: ir.Value, name: str) -> list[ir.Value]:
        """Return the forward and the backward direction of (S, 2, B, ...), the latter with S in reverse order."""
        dtype = value.dtype or FLOAT
        bounds = [self._weight(f"direction_{n}", np.array([n])) for n in range(3)]
        forward, backward = (
            self._add("Slice", [value, bounds[n], bounds[n + 1], bounds[1]], f"{name}.{direction}", dtype=dtype)
            for n, direction in enumerate(("forward", "backward"))
        )
        return [forward, self._reversed(backward, f"{name}.reversed")]

    def _reversed(self, value: ir.Value, name: str) -> ir.Value:
        last, end, axis = (self._weight(n, np.array([v])) for n, v in (("last", -1), ("end", END), ("time", 0)))
        return self._add("Slice", [value, last, end, axis, last], name, dtype=value.dtype)

    def _rounded(self, value: ir.Value, name: str) -> ir.Value:
        """Return ``value`` in the graph's precision."""
        if self._dtype == FLOAT:
            return value
        return self._add("Cast", [value], name, {"to": self._dtype})

    def _replace_output(self, old: ir.Value, new: ir.Value) -> None:
        name, new.shape = str(old.name), old.shape
        old.name, new.name = f"{name}.replaced", name
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)

    def _weight(self, name: str, array: NDArray[Any]) -> ir.Value:
        return self._builder.weight(f"{self._name}.{name}", array)

    def _add(
        self,
        operator: str,
        inputs: Sequence[ir.Value],
        name: str,
        attributes: Mapping[str, Any] | None = None,
        *,
        dtype: ir.DataType | None = None,
    ) -> ir.Value:
        return self._builder.add(operator, inputs, f"{self._name}.{name}", attributes, dtype=dtype or self._dtype)


class Step:
    """The body of a ``Scan``, whose values are called after ``name``; it reads weights of the graph around it."""

    def __init__(self, name: str, like: ir.Node) -> None:
        self._name, self._like = name, like
        self._inputs: list[ir.Value] = []
        self._nodes: list[ir.Node] = []

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        value = ir.Value(name=f"{self._name}.step.{name}", type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self._inputs.append(value)
        return value

    def add(self, operator: str, inputs: Sequence[ir.Value], name: str, *, dtype: ir.DataType = FLOAT) -> ir.Value:
        return self._outputs(ir.node(operator, inputs), [name], dtype)[0]

    def cast(self, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
        if value.dtype == dtype:
            return value
        return self._outputs(ir.node("Cast", [value], {"to": dtype}), [name], dtype)[0]

    def split(self, value: ir.Value, count: int, name: str) -> Sequence[ir.Value]:
        """Cut the last axis into equal parts."""
        node = ir.node("Split", [value], {"axis": -1, "num_outputs": count}, num_outputs=count)
        return self._outputs(node, [f"{name}.{n}" for n in range(count)], FLOAT)

    def body(self, results: Sequence[ir.Value]) -> ir.Graph:
        return ir.Graph(self._inputs, results, nodes=self._nodes, name=f"{self._name}.step")

    def _outputs(self, node: ir.Node, names: Sequence[str], dtype: ir.DataType) -> Sequence[ir.Value]:
        node.name = f"{node.op_type}_{self._name}.step.{names[0]}"
        node.metadata_props.update(self._like.metadata_props)
        for value, name in zip(node.outputs, names, strict=True):
            value.name, value.type = f"{self._name}.step.{name}", ir.TensorType(dtype)
        self._nodes.append(node)
        return node.outputs


def array_of(weight: ir.Value | None) -> NDArray[Any]:
    assert weight is not None
    assert weight.const_value is not None
    return weight.const_value.numpy()
