"""Evaluate a graph's index arithmetic on two samples of inputs: shapes, positions, masks, chosen rows.

What a graph computes of sizes and integer inputs alone is compared with what it may mean (a mask of valid keys, the
position of each token, the row of the largest id) instead of being matched node by node: exporters spell it in many
ways. The samples differ in all sizes; integers are random, and take the values that the graph compares with. Whatever
passes here by chance parity finds out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from transom.export.passes._match import is_standard, is_weight
from transom.runtime.graph_spec import Graph, Tensor

Array = NDArray[Any]
Samples = tuple[Array, Array]
BATCH = (3, 2)
SIZES = ((7, 11), (5, 13), (17, 9), (19, 23), (29, 25), (31, 37))  # of the other axes, in their order
MOST_ELEMENTS = 4096  # of an initializer that is index arithmetic; larger ones are weights


def sample_sizes(graph: Graph) -> dict[str, tuple[int, int]]:
    """Return two sizes of each named axis; no two axes have equal ones."""
    names = dict.fromkeys(size for tensor in graph.inputs for size in tensor.shape if isinstance(size, str))
    others = iter(SIZES)
    return {name: BATCH if name == "B" else next(others) for name in names}


class IndexValues:
    """Values of a graph by samples; ``shape_of`` gives the shape of what is no index value, where it is known."""

    def __init__(
        self, model: ir.Model, graph: Graph, shape_of: Callable[[ir.Value, int], tuple[int, ...] | None]
    ) -> None:
        self.sizes = sample_sizes(graph)
        self._shape_of = shape_of
        random = np.random.default_rng(0)
        # Zero points, of which a quantised graph has hundreds, would leave no room for the ids among them.
        self.special = special = sorted(
            {
                int(value.const_value.numpy().reshape(-1)[0])
                for value in model.graph.initializers.values()
                if value.const_value is not None and value.const_value.size == 1 and value.dtype in COMPARED
            }
        )
        self.inputs: dict[str, Samples] = {
            tensor.name: (self._input(tensor, 0, random, special), self._input(tensor, 1, random, special))
            for tensor in graph.inputs
            if tensor.dtype == "int64"
        }
        self._known: dict[ir.Value, Samples | None] = {
            value: self.inputs.get(str(value.name)) for value in model.graph.inputs
        }

    def _input(self, tensor: Tensor, sample: int, random: np.random.Generator, special: Sequence[int]) -> Array:
        shape = tuple(self.sizes[size][sample] if isinstance(size, str) else size for size in tensor.shape)
        most = 2 if tensor.default is not None else min(tensor.exclusive_max or 5, 1 << 20)
        drawn = random.integers(0, most, shape)
        values = [value for value in special if 0 <= value < most]
        if most > 5 and values:
            drawn = np.where(random.random(shape) < 0.4, random.choice(values, shape), drawn)
            once = values[::-1][: drawn.size // 2]  # each is there, the largest first: those are ids rather than sizes
            drawn.reshape(-1)[random.permutation(drawn.size)[: len(once)]] = once
        return drawn

    def of(self, value: ir.Value | None) -> Samples | None:
        """Return the value in both samples; None where it is no index arithmetic, or of an operator unknown here."""
        if value is None:
            return None
        if value not in self._known:
            self._known[value] = self._computed(value)
        return self._known[value]

    def reads_input(self, value: ir.Value | None) -> bool:
        """Return whether a value is computed from an input's contents, not from its shape alone."""
        seen: set[ir.Value] = set()
        left = [value]
        while left:
            each = left.pop()
            if each is None or each in seen or is_weight(each):
                continue
            seen.add(each)
            node = each.producer()
            if node is None:
                return True
            if not is_standard(node, "Shape"):
                left += node.inputs
        return False

    def _computed(self, value: ir.Value) -> Samples | None:
        if is_weight(value):
            tensor = value.const_value
            assert tensor is not None
            is_index = value.dtype in INTEGERS or tensor.size == 1
            if not is_index or tensor.size > MOST_ELEMENTS:
                return None
            array = tensor.numpy()
            return array, array
        node = value.producer()
        if node is None or node.domain:
            return None
        if is_standard(node, "Shape"):
            return self._shape(node)
        compute = OPERATORS.get(node.op_type)
        if compute is None or len(node.outputs) != 1:
            return None
        inputs = [None if given is None else self.of(given) for given in node.inputs]
        if any(found is None and given is not None for found, given in zip(inputs, node.inputs, strict=True)):
            return None
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}

        def at(sample: int) -> Array:
            return np.asarray(compute(attributes, *(None if each is None else each[sample] for each in inputs)))

        try:
            return at(0), at(1)
        except (ValueError, IndexError, TypeError):  # no shape of the samples: something is fixed that they vary
            return None

    def _shape(self, node: ir.Node) -> Samples | None:
        given = node.inputs[0]
        assert given is not None
        found = self.of(given)
        shapes = [self._shape_of(given, sample) if found is None else found[sample].shape for sample in (0, 1)]
        if shapes[0] is None or shapes[1] is None:
            return None
        start = node.attributes["start"].as_int() if "start" in node.attributes else 0
        end = node.attributes["end"].as_int() if "end" in node.attributes else len(shapes[0])
        return np.array(shapes[0][start:end], np.int64), np.array(shapes[1][start:end], np.int64)


COMPARED = (ir.DataType.INT64, ir.DataType.INT32)  # what ids are compared with
INTEGERS = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL, ir.DataType.UINT8, ir.DataType.INT8)


def cast(attributes: Mapping[str, Any], x: Array) -> Array:
    return x.astype(ir.DataType(attributes["to"]).numpy())


def squeeze(attributes: Mapping[str, Any], x: Array, axes: Array | None = None) -> Array:
    which = None if axes is None else tuple(int(axis) for axis in axes.reshape(-1))
    return np.asarray(np.squeeze(x, which))


def unsqueeze(attributes: Mapping[str, Any], x: Array, axes: Array) -> Array:
    return np.expand_dims(x, tuple(int(axis) for axis in axes.reshape(-1)))


def expand(attributes: Mapping[str, Any], x: Array, shape: Array) -> Array:
    return np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(int(size) for size in shape)))


def reshape(attributes: Mapping[str, Any], x: Array, shape: Array) -> Array:
    keeps = not attributes.get("allowzero", 0)
    sizes = [x.shape[i] if keeps and size == 0 else int(size) for i, size in enumerate(shape)]
    return x.reshape(sizes)


def slice_(
    attributes: Mapping[str, Any],
    x: Array,
    starts: Array,
    ends: Array,
    axes: Array | None = None,
    steps: Array | None = None,
) -> Array:
    places: list[slice] = [slice(None)] * x.ndim
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis = i if axes is None else int(axes[i])
        places[axis] = slice(int(start), int(end), 1 if steps is None else int(steps[i]))
    return x[tuple(places)]


def argmax(attributes: Mapping[str, Any], x: Array) -> Array:
    axis, keep = attributes.get("axis", 0), bool(attributes.get("keepdims", 1))
    if attributes.get("select_last_index", 0):
        raise ValueError("the last index")
    return np.asarray(x.argmax(axis, keepdims=keep), np.int64)


def reduce_sum(attributes: Mapping[str, Any], x: Array, axes: Array | None = None) -> Array:
    which = None if axes is None else tuple(int(axis) for axis in axes.reshape(-1))
    return np.asarray(x.sum(which, dtype=x.dtype, keepdims=bool(attributes.get("keepdims", 1))))


def clip(attributes: Mapping[str, Any], x: Array, low: Array | None = None, high: Array | None = None) -> Array:
    return np.clip(x, low, high)


OPERATORS: dict[str, Callable[..., Any]] = {
    "Cast": cast,
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Expand": expand,
    "Reshape": reshape,
    "Slice": slice_,
    "ArgMax": argmax,
    "ReduceSum": reduce_sum,
    "Clip": clip,
    "Concat": lambda attributes, *arrays: np.concatenate(arrays, attributes["axis"]),
    "Gather": lambda attributes, x, places: np.take(x, places, attributes.get("axis", 0)),
    "Range": lambda attributes, start, end, step: np.arange(start, end, step, dtype=start.dtype),
    "Transpose": lambda attributes, x: x.transpose(attributes.get("perm")),
    "Add": lambda attributes, x, y: x + y,
    "Sub": lambda attributes, x, y: x - y,
    "Mul": lambda attributes, x, y: x * y,
    "Max": lambda attributes, x, y: np.maximum(x, y),
    "Min": lambda attributes, x, y: np.minimum(x, y),
    "Equal": lambda attributes, x, y: x == y,
    "Less": lambda attributes, x, y: x < y,
    "LessOrEqual": lambda attributes, x, y: x <= y,
    "Greater": lambda attributes, x, y: x > y,
    "GreaterOrEqual": lambda attributes, x, y: x >= y,
    "And": lambda attributes, x, y: x & y,
    "Or": lambda attributes, x, y: x | y,
    "Not": lambda attributes, x: ~x,
    "Where": lambda attributes, which, x, y: np.where(which, x, y),
    "Identity": lambda attributes, x: x,
}
