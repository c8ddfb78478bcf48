"""Read norms of rows, and the mean of a sequence's rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from transom.export.native.axes import features
from transom.export.native.integers import is_same, unquantised
from transom.export.native.meanings import Length, MaskedRows, Meaning, Rows
from transom.export.native.reader import GraphReader, Handler, attribute, name_of
from transom.export.native.row_program import SEQUENCES, CannotLowerError, NormStep, PoolStep
from transom.runtime.native.operators import L2, LAYER, RMS

SMALLEST_LENGTH = 1e-12  # torch's own of F.normalize, which FP16 stores as 0


def read_layer_norm(reader: GraphReader, node: ir.Node) -> Meaning:
    """Read ``LayerNormalization`` and ``RMSNormalization`` along the columns."""
    rows = unquantised(reader, node.inputs[0])
    reader.require_whole(rows)
    axis, columns = attribute(node, "axis", -1), rows.step.columns
    if axis not in (-1, len(rows.dims) - 1):
        raise CannotLowerError("it normalises other axes than the last")
    weight = reader.vector(node.inputs[1], columns)
    bias = reader.vector(node.inputs[2], columns) if len(node.inputs) > 2 else None
    if weight is None or (bias is None and len(node.inputs) > 2 and node.inputs[2] is not None):
        raise CannotLowerError("its gain is no weight")
    kind = LAYER if node.op_type == "LayerNormalization" else RMS
    epsilon = float(attribute(node, "epsilon", 1e-5))
    return Rows(
        reader.add(NormStep(name_of(node), rows.step.rows, columns, rows.step, kind, epsilon, weight, bias)), rows.dims
    )


def read_length(reader: GraphReader, node: ir.Node) -> Meaning:
    """Read ``ReduceL2`` along the columns."""
    rows = reader.whole_rows(node.inputs[0])
    axes = reader.integers(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is None or axes.tolist() not in ([-1], [len(rows.dims) - 1]) or attribute(node, "keepdims", 1) != 1:
        raise CannotLowerError("it takes the length of something else than rows")
    return Length(rows, None)


def read_clip(reader: GraphReader, node: ir.Node) -> Meaning:
    found = reader.meaning(node.inputs[0])
    low = reader.number(node.inputs[1]) if len(node.inputs) > 1 else None
    if not isinstance(found, Length) or low is None or (len(node.inputs) > 2 and node.inputs[2] is not None):
        raise CannotLowerError("it limits an activation")
    return replace(found, epsilon=max(low, SMALLEST_LENGTH))


def read_div(reader: GraphReader, node: ir.Node) -> Meaning:
    """Read ``Div`` by the length of each row, or of a sum of token rows by how many count."""
    found = reader.meaning(node.inputs[0])
    if isinstance(found, MaskedRows) and found.summed and not found.repeated:
        if not counts_tokens(reader, node.inputs[1], found.mask):
            raise CannotLowerError("it divides a sum of rows by something else than their number")
        step = found.rows.step
        view = reader.add(PoolStep(name_of(node), SEQUENCES, step.columns, step))
        return Rows(view, (reader.batch, features(step.columns)))
    length = reader.meaning(node.inputs[1])
    if (
        not isinstance(length, Length)
        or not isinstance(found, Rows)
        or not is_same(length.rows, found)
        or length.epsilon is None
    ):
        raise CannotLowerError("it divides by an activation")
    step = found.step
    return Rows(reader.add(NormStep(name_of(node), step.rows, step.columns, step, L2, length.epsilon)), found.dims)


def padding_mask(reader: GraphReader, value: ir.Value | None) -> str | None:
    """Return the input that a value (B, tokens, 1) of zeros and ones is; None for anything else."""
    found = reader.index.of(value)
    if found is None or found[0].ndim != 3 or found[0].shape[2] != 1:
        return None
    squeezed = (found[0][..., 0], found[1][..., 0])
    return next((name for name in reader.index.inputs if reader.is_input(squeezed, name)), None)


def masked_sums(reader: GraphReader, value: ir.Value | None, rows: Rows) -> MaskedRows:
    """Return the product of masks (B, m, tokens) and token rows: the sums of those that count, m times the same."""
    found = reader.index.of(value)
    if found is not None and found[0].ndim == 3:
        for name, given in reader.index.inputs.items():
            if all(
                mask.ndim == 2
                and array.shape[::2] == mask.shape
                and np.array_equal(array, np.broadcast_to(mask[:, None], array.shape))
                for array, mask in zip(found, given, strict=True)
            ):
                reader.use_mask(name)
                return MaskedRows(reader.tokens(rows), name, summed=True, repeated=True)
    raise CannotLowerError("it is a product of two activations")


def counts_tokens(reader: GraphReader, value: ir.Value | None, mask: str) -> bool:
    """Return whether a value (B, 1) is how many tokens of each sequence count, or a little where none does."""
    found = reader.index.of(value)
    if found is None:
        return False
    counts = [given.sum(1, keepdims=True) for given in reader.index.inputs[mask]]
    return all(
        here.shape == count.shape and np.array_equal(np.where(count > 0, count, here), here)
        for here, count in zip(found, counts, strict=True)
    )


def read_sum(reader: GraphReader, node: ir.Node) -> Meaning:
    found = reader.meaning(node.inputs[0])
    axes = reader.integers(node.inputs[1]) if len(node.inputs) > 1 else None
    if not isinstance(found, MaskedRows) or axes is None or axes.tolist() != [1] or attribute(node, "keepdims", 1):
        raise CannotLowerError("it sums an activation")
    reader.use_mask(found.mask)
    return replace(found, summed=True)


HANDLERS: dict[str, Handler] = {
    "LayerNormalization": read_layer_norm,
    "RMSNormalization": read_layer_norm,
    "ReduceL2": read_length,
    "Clip": read_clip,
    "Div": read_div,
    "ReduceSum": read_sum,
}
