"""Lower one ONNX graph to a list of fused operators, or say why not.

    read      nodes -> steps on rows: what each does to an activation, whatever way the graph spells it
    fuse      steps -> operators with their epilogues
    place     tensors -> offsets in the bundle's file of weights, once that is written

Everything is found by the graph's structure, nothing by the names of families, modules or weights. Nodes whose results
no output needs are not asked about.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir

from transom.export.native import attention, images, integers, layers, norms, shapes
from transom.export.native.axes import columns_in, heads_in
from transom.export.native.fuse import fuse
from transom.export.native.meanings import Rows, Written
from transom.export.native.reader import GraphReader, Handler
from transom.export.native.row_program import TOKENS, CannotLowerError, Output, RowProgram, Weight
from transom.runtime.graph_spec import Graph
from transom.runtime.native.operators import OperatorList, StoredTensor

HANDLERS: dict[str, Handler] = {
    **shapes.HANDLERS,
    **layers.HANDLERS,
    **integers.HANDLERS,
    **norms.HANDLERS,
    **attention.HANDLERS,
    **images.HANDLERS,
}
DTYPES = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16", ir.DataType.INT8: "int8"}


@dataclass(frozen=True)
class Lowered:
    """A graph's list, whose tensors lie nowhere yet, and those tensors by name."""

    operators: OperatorList
    weights: Mapping[str, Weight]

    def placed(self, file: str, offsets: Mapping[str, int]) -> OperatorList:
        """Return the list with its tensors at ``offsets`` of ``file``, in bytes."""
        tensors = {
            name: StoredTensor(DTYPES[ir.DataType(weight.tensor.dtype)], weight.shape, offsets[name])
            for name, weight in self.weights.items()
        }
        return replace(self.operators, weights=file, tensors=tensors)


def lower(model: ir.Model, graph: Graph) -> Lowered:
    """Return the list of a graph in FP32 or Q/DQ for uint8, its weights float32, float16 or int8.

    Raises CannotLowerError for what no operator computes; the message names the node.
    """
    reader = GraphReader(model, graph)
    reader.read(model.graph, HANDLERS)
    outputs = [output for value in model.graph.outputs if (output := output_of(reader, graph, value)) is not None]
    if reader.ids is None or not outputs:
        raise CannotLowerError("no output is computed of token ids or images")
    made = fuse(RowProgram(reader.steps, outputs, reader.ids, reader.mask, len(reader.dropped)))
    for weight in made.weights.values():
        if weight.tensor.dtype not in DTYPES:
            raise CannotLowerError(f"the weight {weight.name!r} is {weight.tensor.dtype}")
    operators = OperatorList(
        graph.name,
        "",
        reader.ids,
        reader.mask,
        tuple(made.operators),
        {},
        made.outputs,
        dict(sorted(made.counts.items())),
    )
    return Lowered(operators, made.weights)


def output_of(reader: GraphReader, graph: Graph, value: ir.Value) -> Output | None:
    """Return what a graph output is of; None for a cache, which attention writes in place."""
    name = str(value.name)
    found = reader.meaning(value)
    tensor = next(tensor for tensor in graph.outputs if tensor.name == name)
    if isinstance(found, Written):
        if tensor.aliases != found.cache.name or found.cache.name not in reader.caches:
            raise CannotLowerError(f"the output {name!r} is a cache that no attention reads")
        return None
    if not isinstance(found, Rows):
        raise CannotLowerError(f"the output {name!r} is no activation")
    view, dims = found.view, found.dims
    if view.step.rows != TOKENS:
        if dims != (*reader.leading(view.step.rows), dims[-1]) or columns_in(dims[-1]) != view.columns:
            raise CannotLowerError(f"the output {name!r} has its rows in another order")
        return Output(name, view)
    leading = reader.leading(TOKENS)
    if dims[:2] == leading and len(dims) == 2 and view.columns == 1:
        return Output(name, view)
    if dims[:2] == leading and len(dims) == 3 and columns_in(dims[2]) == view.columns:
        return Output(name, view)
    if len(dims) == 4 and (dims[0], dims[2]) == leading:
        head_dim = columns_in(dims[3])
        heads = None if head_dim is None else heads_in(dims[1], head_dim)
        if heads and head_dim and heads * head_dim == view.columns:
            return Output(name, view, heads)
    raise CannotLowerError(f"the output {name!r} has its rows in another order")
