"""Read what moves rows about: Reshape and Transpose, views of columns, rows that are chosen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from transom.export.native.axes import Dims, columns_in, features, reshaped
from transom.export.native.index_values import Samples
from transom.export.native.meanings import ClassRow, Length, MaskedRows, Matrix, Meaning, Rows
from transom.export.native.reader import GraphReader, Handler, attribute, name_of
from transom.export.native.row_program import (
    POSITIONS,
    SEQUENCES,
    TOKENS,
    CannotLowerError,
    EmbedStep,
    Lookup,
    SelectStep,
    View,
    Weight,
)
from transom.runtime.native.operators import COLUMN, FIRST, FIRST_EQUAL, INDICES, LARGEST

WRITE_INDICES = "write_indices"  # the positions that caches hold


def read_reshape(reader: GraphReader, node: ir.Node) -> Meaning:
    rows = reader.rows(node.inputs[0])
    target = reader.index.of(node.inputs[1])
    if target is None:
        raise CannotLowerError("its shape is not known")
    dims = reshaped(rows.dims, [sizes.tolist() for sizes in target])
    if dims is None:
        raise CannotLowerError(f"it mixes the axes of {rows.step.name!r}")
    return Rows(rows.view, dims)


def read_transpose(reader: GraphReader, node: ir.Node) -> Meaning:
    """Read ``Transpose`` of rows, or of a weight (N, K)."""
    weight = reader.weight(node.inputs[0])
    if weight is not None:
        found = reader.meaning(node.inputs[0])
        if not isinstance(found, Matrix) or len(weight.shape) != 2:
            raise CannotLowerError("it transposes a weight of other than two axes")
        return replace(found, transposed=not found.transposed)
    rows = reader.rows(node.inputs[0])
    order = node.attributes["perm"].as_ints() if "perm" in node.attributes else range(len(rows.dims))[::-1]
    return Rows(rows.view, tuple(rows.dims[axis] for axis in order))


def read_squeeze(reader: GraphReader, node: ir.Node) -> Meaning:
    rows = reader.rows(node.inputs[0])
    axes = reader.integers(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is None:
        raise CannotLowerError("its axes are not known")
    gone = {int(axis) % len(rows.dims) for axis in axes}
    if any(rows.dims[axis] for axis in gone):
        raise CannotLowerError("it removes an axis whose size is not 1")
    return Rows(rows.view, tuple(dim for axis, dim in enumerate(rows.dims) if axis not in gone))


def read_unsqueeze(reader: GraphReader, node: ir.Node) -> Meaning:
    rows = reader.rows(node.inputs[0])
    axes = reader.integers(node.inputs[1])
    if axes is None:
        raise CannotLowerError("its axes are not known")
    count = len(rows.dims) + len(axes)
    new = {int(axis) % count for axis in axes}
    left = iter(rows.dims)
    return Rows(rows.view, tuple(() if axis in new else next(left) for axis in range(count)))


def read_split(reader: GraphReader, node: ir.Node) -> list[Meaning]:
    """Read ``Split`` along the columns."""
    rows = reader.rows(node.inputs[0])
    count = len(node.outputs)
    if int(attribute(node, "axis", 0)) % len(rows.dims) != len(rows.dims) - 1:
        raise CannotLowerError("it cuts another axis than the columns")
    given = reader.integers(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else None
    if given is None and rows.view.columns % count:
        raise CannotLowerError("its parts are of several sizes")
    sizes = [rows.view.columns // count] * count if given is None else given.tolist()
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    return [columns_of(rows, start, size) for start, size in zip(starts, sizes, strict=True)]


def columns_of(rows: Rows, start: int, count: int) -> Rows:
    """Return some of the columns of a view whose last axis they are."""
    if not rows.dims or columns_in(rows.dims[-1]) != rows.view.columns or start + count > rows.view.columns:
        raise CannotLowerError("it takes columns of rows that lie in another order")
    view = View(rows.step, rows.view.column + start, count)
    return Rows(view, (*rows.dims[:-1], features(count)))


def read_slice(reader: GraphReader, node: ir.Node) -> Meaning:
    """Read ``Slice``: the first rows of a table of positions, some columns, or each sequence's first row."""
    bounds = [reader.index.of(value) for value in node.inputs[1:5]]
    if len(bounds) < 3 or any(found is None or found[0].size != 1 for found in bounds):
        raise CannotLowerError("its bounds are not known, or several axes are cut")
    start, end, axis, *step = (tuple(int(array.reshape(-1)[0]) for array in found) for found in bounds if found)
    if step and step[0] != (1, 1):
        raise CannotLowerError("it takes some rows and leaves out others")
    weight = reader.weight(node.inputs[0])
    if weight is not None:
        if len(weight.shape) != 2 or axis[0] != 0 or start != (0, 0) or end != reader.token_axis[0].sizes:
            raise CannotLowerError("it takes some of a weight, and not the positions of a sequence from 0 on")
        if reader.has_cache:
            raise CannotLowerError("it takes positions from 0 on, where a cache has positions already")
        return embedding(reader, node, weight, COLUMN, (reader.token_axis,))
    rows = reader.rows(node.inputs[0])
    if axis[0] % len(rows.dims) == len(rows.dims) - 1 and start[0] == start[1] and start[0] >= 0:
        stop = min(end[0], rows.view.columns)
        return columns_of(rows, start[0], stop - start[0])
    if axis == (1, 1) and start == (0, 0) and end == (1, 1):
        return chosen(reader, rows, node, FIRST, keep=True)
    raise CannotLowerError("it takes other rows than each sequence's first")


def read_gather(reader: GraphReader, node: ir.Node) -> Meaning:
    """Read ``Gather``: of an embedding, of a column, of each sequence's first row."""
    axis = int(attribute(node, "axis", 0))
    weight = reader.weight(node.inputs[0])
    if weight is not None:
        if axis != 0 or len(weight.shape) != 2:
            raise CannotLowerError("it looks up a weight along another axis than its rows")
        ids, dims = token_ids(reader, node.inputs[1])
        return embedding(reader, node, weight, ids, dims)
    found = reader.meaning(node.inputs[0])
    places = reader.integers(node.inputs[1])
    if isinstance(found, MaskedRows) and found.repeated and axis == 1 and places is not None and len(places) == 1:
        return replace(found, repeated=False)
    rows = reader.rows(node.inputs[0])
    if places is None or len(places) != 1:
        raise CannotLowerError("it takes rows that are computed")
    axis, place = axis % len(rows.dims), int(places[0])
    scalar = node.inputs[1] is not None and node.inputs[1].shape is not None and len(node.inputs[1].shape) == 0
    if axis == len(rows.dims) - 1:
        column = columns_of(rows, place % rows.view.columns, 1)
        return Rows(column.view, column.dims[:-1]) if scalar else column
    if not rows.dims[axis] and place in (0, -1):
        return Rows(rows.view, (*rows.dims[:axis], *([] if scalar else [()]), *rows.dims[axis + 1 :]))
    if axis == 1 and place == 0:
        return chosen(reader, rows, node, FIRST, keep=not scalar)
    raise CannotLowerError("it takes another row than each sequence's first")


def embedding(reader: GraphReader, node: ir.Node, table: Weight, ids: str, leading: Dims) -> Rows:
    columns = table.shape[1]
    step = EmbedStep(name_of(node), TOKENS, columns, (Lookup(table, ids),))
    return Rows(reader.add(step), (*leading, features(columns)))


def token_ids(reader: GraphReader, value: ir.Value | None) -> tuple[str, Dims]:
    """Return the input that ids are, or COLUMN, and the axes of what is looked up by them."""
    found = reader.index.of(value)
    if found is None:
        raise CannotLowerError("it looks up ids that are computed")
    for name in reader.index.inputs:
        if reader.is_input(found, name) and found[0].ndim == 2:
            reader.use_ids(name)
            return name, reader.leading(TOKENS)
    sizes = reader.token_axis[0].sizes
    pasts = reader.index.inputs.get(WRITE_INDICES) if reader.has_cache else None
    columns = []
    for sample, size in enumerate(sizes):
        past = np.zeros((1, 1), np.int64) if pasts is None else pasts[sample][:, None]
        columns.append(past + np.arange(size))
    if pasts is None and all(np.array_equal(*pair) for pair in zip(found, (c[0] for c in columns), strict=True)):
        return COLUMN, (reader.token_axis,)
    batches = [np.broadcast_to(c, (reader.index.sizes["B"][i], c.shape[1])) for i, c in enumerate(columns)]
    if all(np.array_equal(*pair) for pair in zip(found, batches, strict=True)):
        return COLUMN, reader.leading(TOKENS)
    if pasts is None and all(np.array_equal(f, c) for f, c in zip(found, columns, strict=True)):
        return COLUMN, ((), reader.token_axis)
    raise CannotLowerError("it looks up ids that are neither an input nor the position of each token")


def chosen(
    reader: GraphReader,
    rows: Rows,
    node: ir.Node,
    rule: str,
    given: str | None = None,
    value: int | None = None,
    *,
    keep: bool,
) -> Rows:
    """Return one row of each sequence, or those at the positions that an input has."""
    reader.tokens(rows)
    kind = POSITIONS if rule == INDICES else SEQUENCES
    columns = rows.step.columns
    view = reader.add(SelectStep(name_of(node), kind, columns, rows.step, rule, given, value))
    middle: Dims = (((reader.axis("P"),),) if rule == INDICES else ((),)) if keep else ()
    return Rows(view, (reader.batch, *middle, features(columns)))


def read_gather_nd(reader: GraphReader, node: ir.Node) -> Meaning:
    """Read ``GatherND`` of rows that lie flat, (B * tokens, n), by the place of each."""
    rows, found = reader.rows(node.inputs[0]), reader.index.of(node.inputs[1])
    flat: Dims = ((*reader.batch, *reader.token_axis), features(rows.step.columns))
    if rows.dims != flat or found is None or int(attribute(node, "batch_dims", 0)):
        raise CannotLowerError("it takes rows that are computed")
    whole = Rows(rows.view, (*reader.leading(TOKENS), features(rows.step.columns)))
    sizes = reader.token_axis[0].sizes
    columns = []
    for sample, places in enumerate(found):
        if places.ndim != 3 or places.shape[2] != 1:
            raise CannotLowerError("it takes rows by several numbers each")
        columns.append(places[..., 0] - sizes[sample] * np.arange(len(places))[:, None])
    reads = reader.index.reads_input(node.inputs[1])
    return chosen(reader, whole, node, *rule_of(reader, (columns[0], columns[1]), reads=reads), keep=True)


def rule_of(reader: GraphReader, columns: Samples, *, reads: bool) -> tuple[str, str | None, int | None]:
    """Return the rule of Select by which rows are chosen, its input and value.

    ``reads``: the choice is made of what an input holds. Samples in which it falls on every sequence's first row show
    nothing of it then: each rule chooses that row where it finds no other.
    """
    inputs = reader.index.inputs
    if all(array.shape[1] == 1 and not array.any() for array in columns):
        if reads:
            raise CannotLowerError("it chooses rows by what an input holds, and the samples do not show how")
        return FIRST, None, None
    for name in inputs:
        if reader.is_input(columns, name) and reader.graph.inputs_by_name[name].shape[1:] == ("P",):
            return INDICES, name, None
    for name, given in inputs.items():
        if given[0].ndim != 2 or reader.graph.inputs_by_name[name].shape[1:] == ("P",):
            continue
        if all(np.array_equal(c, ids.argmax(1)[:, None]) for c, ids in zip(columns, given, strict=True)):
            return LARGEST, name, None
        for value in reader.index.special:
            firsts = [(ids == value).argmax(1)[:, None] for ids in given]
            if all(np.array_equal(c, first) for c, first in zip(columns, firsts, strict=True)):
                return FIRST_EQUAL, name, value
    raise CannotLowerError("it chooses rows by another rule than those of Select")


def read_cast(reader: GraphReader, node: ir.Node) -> Meaning:
    """Read ``Cast`` between floats, which changes nothing: registers are float32."""
    if node.attributes["to"].as_int() not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        raise CannotLowerError("it computes in another dtype than float32")
    return reader.meaning(node.inputs[0])


def read_identity(reader: GraphReader, node: ir.Node) -> Meaning:
    return reader.meaning(node.inputs[0])


def read_expand(reader: GraphReader, node: ir.Node) -> Meaning:
    """Read ``Expand`` of one row of weights for each sequence, or of a length to its row."""
    weight, sizes = reader.weight(node.inputs[0]), reader.index.of(node.inputs[1])
    if weight is not None:
        columns = weight.shape[-1] if weight.shape else 1
        wanted = tuple([size, 1, columns] for size in reader.index.sizes.get("B", (0, 0)))
        if sizes is None or weight.tensor.size != columns or columns == 1:
            raise CannotLowerError("it repeats a weight that is no single row")
        whole = [np.broadcast_shapes(weight.shape, tuple(int(size) for size in found)) for found in sizes]
        if [list(shape) for shape in whole] != list(wanted):
            raise CannotLowerError("it repeats a weight other than once for each sequence")
        return ClassRow(reader.float32(weight, (columns,)))
    found = reader.meaning(node.inputs[0])
    if not isinstance(found, Length):
        raise CannotLowerError("it repeats an activation")
    return found


HANDLERS: dict[str, Handler] = {
    "Reshape": read_reshape,
    "Transpose": read_transpose,
    "Squeeze": read_squeeze,
    "Unsqueeze": read_unsqueeze,
    "Split": read_split,
    "Slice": read_slice,
    "Gather": read_gather,
    "GatherND": read_gather_nd,
    "Cast": read_cast,
    "Identity": read_identity,
    "Expand": read_expand,
}
