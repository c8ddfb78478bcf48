"""Derive optimization profiles from a bundle's axes: the sizes that an engine accepts, and those it is tuned for.

An encoder has one. A decoder with a cache has two, because prefill and decoding one token are different work: in
"decode" each row has one new token and one position whose logits are computed. One with a recurrent state has that one.

An engine computes at every size that a profile allows, whether the graph can or not: memory behind the last row of a
table of positions is read like a row. So the greatest sizes are checked against the graph's tables first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from transom.export.passes._match import is_unused, is_weight
from transom.runtime.errors import BundleError, one_line
from transom.runtime.graph_spec import Axis, Graph, cache_inputs, is_decoder, state_inputs

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Profile:
    """An optimization profile: the (min, opt, max) shapes of each input of the graph."""

    name: str
    shapes: Mapping[str, tuple[Sizes, Sizes, Sizes]]


def profiles_of(graph: Graph, axes: Mapping[str, Axis]) -> tuple[Profile, ...]:
    """Return the profiles of a graph; a cache has its greatest length in all of them."""
    if not is_decoder(graph):
        return (profile("all", graph, axes),)
    fixed = {axis: Axis(size, size, size) for axis, size in cache_sizes(graph, axes).items()}
    single = {axis: Axis(1, 1, 1) for axis in step_axes(graph)}
    if not fixed:  # a recurrent state: there is no other work than steps
        return (profile("decode", graph, {**axes, **single}),)
    return (
        profile("prefill", graph, {**axes, **fixed}),
        profile("decode", graph, {**axes, **fixed, **single}),
    )


def profile(name: str, graph: Graph, axes: Mapping[str, Axis]) -> Profile:
    """Return a profile of the bounds of ``axes``; an axis of groups of rows has the rows' (one_row_per_group.py)."""

    def shape(sizes: tuple[str | int, ...], bound: str) -> Sizes:
        return tuple(
            size if isinstance(size, int) else getattr(axes[axes[size].divides or size], bound) for size in sizes
        )

    return Profile(
        name, {t.name: (shape(t.shape, "min"), shape(t.shape, "opt"), shape(t.shape, "max")) for t in graph.inputs}
    )


def cache_sizes(graph: Graph, axes: Mapping[str, Axis]) -> dict[str, int]:
    """Return the greatest sizes of the axes of a decoder's cache, without the batch's."""
    batch = graph.inputs[0].shape[0]
    names = {size for tensor in state_inputs(graph) for size in tensor.shape}
    return {name: axes[name].max for name in sorted(str(n) for n in names if isinstance(n, str)) if name != batch}


def step_axes(graph: Graph) -> tuple[str, ...]:
    """Return the axes of one element in a decoding step: new tokens, and positions whose logits are computed."""
    tokens = graph.inputs[0].shape[1]
    positions = [tensor.shape[1] for tensor in graph.inputs if tensor.name == "logits_positions"]
    return tuple(str(axis) for axis in (tokens, *positions) if isinstance(axis, str))


@dataclass(frozen=True, eq=False)
class TableRead:
    """A node that reads rows of a weight by ``index``, whose values are at most ``most``."""

    table: str
    rows: int
    index: ir.Value
    most: int


def require_tables(model: ir.Model, graph: Graph, axes: Mapping[str, Axis]) -> None:
    """Raise BundleError where ``axes``, or the bound of an index, let the graph read beyond the end of a table.

    The indices are computed here in ONNX's reference implementation, at the greatest sizes of each profile with a full
    cache. ``model`` is not changed.
    """
    if is_decoder(graph):
        require_cache_for_prompt(graph, axes)
    integers = model.clone()
    reads = table_reads(integers)
    if not reads:
        return
    enough = 1 + max(read.rows for read in reads)  # of any axis: a size beyond a table is then one beyond it
    keep_only(integers, [read.index for read in reads])
    for known in profiles_of(graph, axes):
        values = evaluated(integers, greatest(graph, known, enough))
        for read in reads:
            if np.max(values[str(read.index.name)], initial=0) > read.most:
                sizes = sorted({size for tensor in graph.inputs for size in tensor.shape if isinstance(size, str)})
                raise BundleError(
                    f"the graph {graph.name!r} reads beyond the {read.rows} rows of its table {read.table!r} where its "
                    f"axes are greatest ({', '.join(f'{name}={axes[name].max}' for name in sizes)}) and its indices, "
                    "too; an engine would compute with whatever lies there. Export the bundle again."
                )


def evaluated(integers: ir.Model, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Return ``feeds`` and the outputs computed from them. Raises BundleError where the graph cannot be computed."""
    try:
        evaluator = ReferenceEvaluator(ir.to_proto(integers))
        read = {str(value.name): feeds[str(value.name)] for value in integers.graph.inputs}
        computed = dict(zip(evaluator.output_names, evaluator.run(None, read), strict=True))
    except Exception as error:  # onnx raises various errors
        raise BundleError(
            f"the graph {integers.graph.name!r} does not compute at its greatest sizes ({one_line(error)}); export "
            "the bundle again."
        ) from None
    return {**feeds, **computed}


def require_cache_for_prompt(graph: Graph, axes: Mapping[str, Axis]) -> None:
    """Raise BundleError where a prompt can be longer than the cache that it is written to."""
    tokens = graph.inputs[0].shape[1]
    for cache, size in cache_sizes(graph, axes).items():
        if isinstance(tokens, str) and axes[tokens].max > size:
            raise BundleError(
                f"the graph {graph.name!r} takes {tokens}={axes[tokens].max} tokens at once, and its cache holds "
                f"{cache}={size}; an engine would drop the others. Export the bundle again."
            )


def greatest(graph: Graph, known: Profile, enough: int) -> dict[str, NDArray[Any]]:
    """Return inputs of one row at the greatest sizes of a profile, at most ``enough``, indices at their bounds.

    New tokens are written to the end of the cache.
    """
    sizes = {t.name: tuple(min(size, enough) for size in known.shapes[t.name][2][1:]) for t in graph.inputs}
    caches = [sizes[tensor.name] for tensor in cache_inputs(graph)]
    values = {t.name: t.exclusive_max - 1 for t in graph.inputs if t.exclusive_max is not None}
    for cache in caches:
        values["write_indices"] = max(cache[1] - sizes[graph.inputs[0].name][0], 0)
    return {
        t.name: np.broadcast_to(np.array(values.get(t.name, 0), np.int64), (1, *sizes[t.name])) for t in graph.inputs
    }


def table_reads(model: ir.Model) -> list[TableRead]:
    """Return the nodes that read rows of a weight by integers: inputs, or computed from inputs and sizes."""
    reads = []
    for node in model.graph:
        if node.domain or node.op_type not in ("Gather", "Slice"):
            continue
        table, index = node.inputs[0], node.inputs[1 if node.op_type == "Gather" else 2]
        if table is None or not is_weight(table) or index is None or is_weight(index) or not from_integers(index):
            continue
        assert table.const_value is not None
        rows = int(table.const_value.shape.numpy()[axis_of(node)])
        reads.append(TableRead(str(table.name), rows, index, rows if node.op_type == "Slice" else rows - 1))
    return reads


def axis_of(node: ir.Node) -> int:
    """Return the axis of a ``Gather``, or of a ``Slice``, which this exporter writes for one axis only."""
    if node.op_type == "Gather":
        return node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    given = node.inputs[3] if len(node.inputs) > 3 else None
    return int(given.const_value.numpy()[0]) if given is not None and given.const_value is not None else 0


def from_integers(value: ir.Value) -> bool:
    """Return whether the value is computed from integers alone; ``Shape`` may read any tensor."""
    node = value.producer()
    if value.dtype not in (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL):
        return False
    return node is None or node.op_type == "Shape" or all(v is None or from_integers(v) for v in node.inputs)


def keep_only(model: ir.Model, values: list[ir.Value]) -> None:
    """Reduce ``model`` to the nodes that compute ``values``."""
    graph = model.graph
    graph.outputs.clear()
    graph.outputs.extend(value for value in dict.fromkeys(values) if value.producer() is not None)
    for node in reversed(list(graph)):
        if all(is_unused(output) for output in node.outputs):
            graph.remove(node, safe=True)
    for name, weight in list(graph.initializers.items()):
        if is_unused(weight):
            del graph.initializers[name]
    for index in reversed(range(len(graph.inputs))):
        if is_unused(graph.inputs[index]):
            del graph.inputs[index]
