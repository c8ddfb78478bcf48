"""Read a graph node by node into steps on rows: handlers by operator say what each node's result means."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from transom.export.native.axes import Axis, Dims, columns_in, features, size_of
from transom.export.native.index_values import IndexValues, Samples
from transom.export.native.meanings import Image, Matrix, Meaning, Multiplied, Rows, Scaled, State, Unknown
from transom.export.native.row_program import (
    PATCHES,
    POSITIONS,
    SEQUENCES,
    TOKENS,
    CannotLowerError,
    Step,
    View,
    Weight,
)
from transom.export.passes._match import is_weight, made_by
from transom.runtime.graph_spec import CACHE, Graph

Handler = Callable[["GraphReader", ir.Node], Meaning | list[Meaning]]

BATCH = "B"
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


class GraphReader:
    """The meanings of a graph's values so far, and the steps that they are of.

    ids     the input with a row for each token, or the images; known once something was looked up or cut
    mask    the input that says which tokens count, known once attention or a pooling read it
    """

    def __init__(self, model: ir.Model, graph: Graph) -> None:
        self.graph = graph
        self.index = IndexValues(model, graph, self._shape_of)
        self.steps: list[Step] = []
        self.ids: str | None = None
        self.mask: str | None = None
        self.dropped: set[ir.Value] = set()
        self.caches: set[str] = set()
        self._meanings: dict[ir.Value, Meaning] = {}
        for value in model.graph.inputs:
            meaning = self._input(value)
            if meaning is not None:
                self._meanings[value] = meaning

    def read(self, nodes: Iterable[ir.Node], handlers: dict[str, Handler]) -> None:
        """Read all nodes in their order."""
        for node in nodes:
            handler = None if node.domain else handlers.get(node.op_type)
            given: Meaning | list[Meaning]
            try:
                lost = next(
                    (each for each in self._inputs_of(node) if isinstance(each, Unknown) and each.of_rows), None
                )
                if lost is not None:
                    raise CannotLowerError(lost.reason)
                if handler is None:
                    raise CannotLowerError("no operator of a list computes it")
                given = handler(self, node)
            except CannotLowerError as error:
                reason = str(error) if " node " in str(error) else f"{node.op_type} node {node.name!r}: {error}"
                given = [Unknown(reason, self._reads_rows(node))] * len(node.outputs)
            found = given if isinstance(given, list) else [given]
            self._meanings |= dict(zip(node.outputs, found, strict=False))

    def _inputs_of(self, node: ir.Node) -> list[Meaning]:
        return [self._meanings[value] for value in node.inputs if value is not None and value in self._meanings]

    def _reads_rows(self, node: ir.Node) -> bool:
        """Return whether a node computes something of activations, and not of sizes, masks and weights alone."""
        return node.op_type != "Shape" and any(
            each.of_rows if isinstance(each, Unknown) else not isinstance(each, Matrix)
            for each in self._inputs_of(node)
        )

    def meaning(self, value: ir.Value | None) -> Meaning:
        """Return what a value means. Raises CannotLowerError where it is nothing that a list has."""
        if value is None:
            raise CannotLowerError("an input is missing")
        if value not in self._meanings:
            weight = self.weight(value)
            if weight is None:
                raise CannotLowerError(f"it reads {value.name!r}, which no operator of a list gives")
            self._meanings[value] = Matrix(weight)
        found = self._meanings[value]
        if isinstance(found, Unknown):
            raise CannotLowerError(found.reason)
        return found

    def rows(self, value: ir.Value | None) -> Rows:
        """Return the rows that a value is. Raises CannotLowerError where it is none."""
        found = self.meaning(value)
        if isinstance(found, Scaled | Multiplied) or not isinstance(found, Rows):
            raise CannotLowerError(f"it reads {value.name if value else None!r}, which is no activation of its own")
        return found

    def whole_rows(self, value: ir.Value | None) -> Rows:
        """Return rows of which the last axis has all columns. Raises CannotLowerError where they are none."""
        rows = self.rows(value)
        self.require_whole(rows)
        return rows

    def require_whole(self, rows: Rows) -> None:
        """Raise CannotLowerError unless the last axis has all columns of the step's rows."""
        if not rows.view.whole or not rows.dims or columns_in(rows.dims[-1]) != rows.step.columns:
            raise CannotLowerError(f"it computes with some of the columns of {rows.step.name!r} alone")

    def add(self, step: Step) -> View:
        """Add a step and return all of its columns."""
        self.steps.append(step)
        return View(step, 0, step.columns)

    def weight(self, value: ir.Value | None) -> Weight | None:
        """Return a float weight, through a cast to another float; None for anything else."""
        if value is None:
            return None
        cast = made_by(value, "Cast")
        stored = cast.inputs[0] if cast is not None else value
        if stored is None or not is_weight(stored) or stored.const_value is None or stored.dtype not in FLOATS:
            return None
        shape = tuple(int(size) for size in stored.const_value.shape.numpy())
        return Weight(str(stored.name), stored.const_value, shape)

    def float32(self, weight: Weight, shape: tuple[int, ...] | None = None) -> Weight:
        """Return a weight in float32, as epilogues read it, of ``shape``."""
        shape = weight.shape if shape is None else shape
        if weight.tensor.dtype == ir.DataType.FLOAT:
            return Weight(weight.name, weight.tensor, shape)
        name = f"{weight.name}.float32"
        return Weight(name, ir.Tensor(weight.tensor.numpy().astype(np.float32), name=name), shape)

    def vector(self, value: ir.Value | None, columns: int) -> Weight | None:
        """Return a weight of one number for each column, in float32; None for anything else."""
        weight = self.weight(value)
        if weight is None or weight.tensor.size != columns or (weight.shape and weight.shape[-1] != columns):
            return None
        return self.float32(weight, (columns,))

    def number(self, value: ir.Value | None) -> float | None:
        """Return a constant number; None for anything else."""
        weight = self.weight(value)
        if weight is None or weight.tensor.size != 1:
            return None
        return float(weight.tensor.numpy().reshape(-1)[0])

    def integers(self, value: ir.Value | None) -> NDArray[np.int64] | None:
        """Return constant integers, flat; None for anything else."""
        found = self.index.of(value)
        if found is None or found[0].dtype.kind not in "iu" or not np.array_equal(*found):
            return None
        return found[0].reshape(-1).astype(np.int64)

    def is_input(self, found: Samples, name: str) -> bool:
        """Return whether index values are those of an input, shape and all."""
        given = self.index.inputs[name]
        return all(np.array_equal(a, b) for a, b in zip(found, given, strict=True))

    @property
    def batch(self) -> tuple[Axis, ...]:
        return (self.axis(BATCH),)

    def axis(self, name: str | int) -> Axis:
        """Return a named axis of the graph's inputs."""
        if not isinstance(name, str) or name not in self.index.sizes:
            raise CannotLowerError(f"{name!r} is no axis of the inputs")
        return Axis(name, self.index.sizes[name])

    @property
    def token_axis(self) -> tuple[Axis, ...]:
        """The axis of a sequence's tokens. Raises CannotLowerError where nothing has said which it is."""
        if self.ids is None:
            raise CannotLowerError("it comes before any token is looked up")
        tensor = self.graph.inputs_by_name[self.ids]
        if len(tensor.shape) == 2:
            return (self.axis(tensor.shape[1]),)
        prepended = next((step for step in self.steps if step.rows == TOKENS), None)
        if prepended is None:
            raise CannotLowerError("it comes before any image is cut")
        return self.image_tokens

    image_tokens: tuple[Axis, ...] = ()

    @property
    def has_cache(self) -> bool:
        return any(tensor.aliases is not None for tensor in self.graph.outputs)

    def take_caches(self, key: str, value: str) -> None:
        """Take two caches as those of one attention. Raises CannotLowerError where another has them."""
        if {key, value} & self.caches or key == value:
            raise CannotLowerError(f"the caches {key!r} and {value!r} are read twice")
        self.caches |= {key, value}

    def use_ids(self, name: str) -> None:
        """Take an input as the one that has the tokens. Raises CannotLowerError where another has them."""
        known = self.graph.inputs_by_name
        if self.ids is not None and known[self.ids].shape != known[name].shape:
            raise CannotLowerError(f"the inputs {self.ids!r} and {name!r} both have tokens, in other numbers")
        self.ids = name if self.ids is None else self.ids

    def use_mask(self, name: str) -> None:
        """Take an input as the mask. Raises CannotLowerError where another is."""
        if self.mask not in (None, name):
            raise CannotLowerError(f"the inputs {self.mask!r} and {name!r} both say which tokens count")
        self.mask = name

    def leading(self, rows: str) -> Dims:
        """Return the axes in front of the columns, of rows as they usually lie."""
        if rows == TOKENS:
            return (self.batch, self.token_axis)
        if rows == POSITIONS:
            return (self.batch, (self.axis("P"),))
        if rows == SEQUENCES:
            return (self.batch,)
        raise CannotLowerError(f"rows of {PATCHES} lie in no order yet")

    def tokens(self, rows: Rows) -> Rows:
        """Return token rows (B, tokens, n). Raises CannotLowerError where they are none."""
        self.require_whole(rows)
        if rows.step.rows != TOKENS or rows.dims != (*self.leading(TOKENS), features(rows.step.columns)):
            raise CannotLowerError(f"{rows.step.name!r} is no (B, tokens, n)")
        return rows

    def _shape_of(self, value: ir.Value, sample: int) -> tuple[int, ...] | None:
        found = self._meanings.get(value)
        if isinstance(found, Rows):
            return size_of(found.dims, sample)
        if value.shape is None:
            return None
        sizes = [self.index.sizes.get(str(size)) if not isinstance(size, int) else size for size in value.shape]
        if any(size is None for size in sizes):
            return None
        return tuple(size if isinstance(size, int) else size[sample] for size in sizes if size is not None)

    def _input(self, value: ir.Value) -> Meaning | None:
        tensor = self.graph.inputs_by_name.get(str(value.name))
        if tensor is None or tensor.dtype == "int64" or len(tensor.shape) != 4 or tensor.shape[0] != BATCH:
            return None
        sizes = tensor.shape
        if isinstance(sizes[1], int) and isinstance(sizes[3], int) and isinstance(sizes[2], str):
            return State(tensor.name, sizes[1], sizes[3])
        if all(isinstance(size, int) for size in sizes[1:]) and not tensor.state and CACHE not in sizes:
            return Image(tensor.name, (int(sizes[1]), int(sizes[2]), int(sizes[3])))
        return None


def name_of(node: ir.Node) -> str:
    """Return the name of a node's first result."""
    return str(node.outputs[0].name)


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """Return an attribute of a node, ``default`` where the node does not give it."""
    found = node.attributes.get(name)
    return default if found is None else found.value
