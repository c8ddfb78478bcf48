"""Read what quantises activations, and weights in int8."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import onnx_ir as ir

from transom.export.native.meanings import (
    LARGEST,
    MAGNITUDE,
    SCALE,
    Image,
    Integers,
    Matrix,
    Meaning,
    Multiplied,
    Rows,
    RowScale,
)
from transom.export.native.reader import GraphReader, Handler, attribute
from transom.export.native.row_program import ActivationStep, CannotLowerError, QuantiseStep, Weight
from transom.export.passes._match import is_weight, made_by
from transom.runtime.native.operators import DYNAMIC_ZERO_POINT


def undone(reader: GraphReader, found: Integers, value: ir.Value | None) -> Rows:
    """Return what was quantised and dequantised, as it was before, and count that."""
    if not found.dequantised or not isinstance(found.source, Rows) or found.scale is None:
        raise CannotLowerError("it reads integers")
    assert value is not None
    reader.dropped.add(value)
    return found.source


def quantised(reader: GraphReader, found: Integers) -> QuantiseStep:
    """Return the step that quantises, made once for all that read it."""
    source = found.source
    assert not isinstance(source, Image)
    rows, multiplier = (source.rows, source.multiplier) if isinstance(source, Multiplied) else (source, None)
    for step in reader.steps:
        if isinstance(step, QuantiseStep) and step.source is rows.step:
            known = (step.scale, step.zero_point, step.multiplier and step.multiplier.tensor)
            if known == (found.scale, found.zero_point, multiplier and multiplier.tensor):
                return step
    step = QuantiseStep(
        f"{rows.step.name}.uint8",
        rows.step.rows,
        rows.step.columns,
        rows.step,
        found.scale,
        found.zero_point,
        multiplier,
    )
    reader.add(step)
    return step


def read_quantize(reader: GraphReader, node: ir.Node) -> Meaning:
    """Read ``QuantizeLinear``: by a fixed scale, or in blocks that are rows, by the scale of each."""
    found = reader.meaning(node.inputs[0])
    if not isinstance(found, Rows | Multiplied | Image):
        raise CannotLowerError("it quantises no activation")
    if not isinstance(found, Image):
        reader.require_whole(found if isinstance(found, Rows) else found.rows)
    scale = reader.number(node.inputs[1])
    if scale is not None:
        zeros = reader.integers(node.inputs[2]) if len(node.inputs) > 2 else None
        if zeros is None or len(zeros) != 1 or node.inputs[2] is None or node.inputs[2].dtype != ir.DataType.UINT8:
            raise CannotLowerError("it does not quantise to uint8 with one zero point")
        return Integers(found, scale, int(zeros[0]))
    rows_scale = reader.meaning(node.inputs[1])
    same = isinstance(rows_scale, RowScale) and rows_scale.stage == SCALE and is_same(rows_scale.rows, found)
    features_of = found.rows if isinstance(found, Multiplied) else found
    if not same or isinstance(features_of, Image) or attribute(node, "block_size", 0) != features_of.step.columns:
        raise CannotLowerError("it quantises by scales that are not those of whole rows")
    if zero_point_of_rows(reader, node) != DYNAMIC_ZERO_POINT:
        raise CannotLowerError(f"it quantises rows around another zero point than {DYNAMIC_ZERO_POINT}")
    return Integers(found, None, DYNAMIC_ZERO_POINT)


def is_same(one: Meaning, other: Meaning) -> bool:
    """Return whether both are the same rows, times the same vector."""
    if isinstance(one, Multiplied) and isinstance(other, Multiplied):
        return is_same(one.rows, other.rows) and one.multiplier.tensor is other.multiplier.tensor
    return isinstance(one, Rows) and isinstance(other, Rows) and one.step is other.step and one.dims == other.dims


def zero_point_of_rows(reader: GraphReader, node: ir.Node) -> int | None:
    """Return the zero point of all rows; None where they have several."""
    expand = made_by(node.inputs[2], "Expand") if len(node.inputs) > 2 else None
    zeros = reader.integers(expand.inputs[0]) if expand is not None else None
    return int(zeros[0]) if zeros is not None and len(zeros) == 1 else None


def read_dequantize(reader: GraphReader, node: ir.Node) -> Meaning:
    """Read ``DequantizeLinear`` of a weight, or of what was quantised by the same numbers."""
    stored = node.inputs[0]
    if stored is not None and is_weight(stored):
        return dequantised_weight(reader, node, stored)
    found = reader.meaning(stored)
    if not isinstance(found, Integers):
        raise CannotLowerError("it dequantises what a list keeps as it is")
    scale = reader.number(node.inputs[1])
    zeros = reader.integers(node.inputs[2]) if len(node.inputs) > 2 else None
    expected = 1.0 if found.scale is None else found.scale  # rows stay in units of their scales
    if scale != expected or zeros is None or zeros.tolist() != [found.zero_point]:
        raise CannotLowerError("it dequantises by other numbers than those that quantised")
    return replace(found, dequantised=True)


def dequantised_weight(reader: GraphReader, node: ir.Node, stored: ir.Value) -> Matrix:
    """Return an int8 weight with its scales: (K, N) by column, or a convolution's (O, ...) by row."""
    assert stored.const_value is not None
    shape = tuple(int(size) for size in stored.const_value.shape.numpy())
    axis = attribute(node, "axis", 1)
    zeros = node.inputs[2].const_value if len(node.inputs) > 2 and node.inputs[2] is not None else None
    if (
        stored.dtype != ir.DataType.INT8
        or attribute(node, "block_size", 0)
        or (zeros is not None and zeros.numpy().any())
    ):
        raise CannotLowerError("its weight is not int8 with zero points of 0 and a scale for each column")
    transposed = len(shape) > 2
    scale = reader.weight(node.inputs[1])
    if transposed:
        shape = (shape[0], prod(shape[1:]))
    if scale is None or (scale.shape and (axis != (0 if transposed else 1) or scale.shape != (shape[axis],))):
        raise CannotLowerError("its scales are not those of the weight's columns")
    return Matrix(Weight(str(stored.name), stored.const_value, shape), transposed, reader.float32(scale))


def read_magnitude(reader: GraphReader, node: ir.Node) -> Meaning:
    found = reader.meaning(node.inputs[0])
    if not isinstance(found, Rows | Multiplied):
        raise CannotLowerError("it is no magnitude of an activation")
    return RowScale(found, MAGNITUDE)


def read_largest(reader: GraphReader, node: ir.Node) -> Meaning:
    """Read ``ReduceMax`` of magnitudes along a row; what a Relu gave is its own."""
    found = reader.meaning(node.inputs[0])
    axes = reader.integers(node.inputs[1]) if len(node.inputs) > 1 else None
    if isinstance(found, Rows) and isinstance(found.step, ActivationStep) and found.step.function == "relu":
        found = RowScale(found, MAGNITUDE)
    if not isinstance(found, RowScale) or found.stage != MAGNITUDE or axes is None or axes.tolist() != [-1]:
        raise CannotLowerError("it is no largest magnitude of a row")
    return RowScale(found.rows, LARGEST)


def unquantised(reader: GraphReader, value: ir.Value | None) -> Rows:
    """Return rows, as they were before a Q/DQ pair where there is one."""
    found = reader.meaning(value)
    return undone(reader, found, value) if isinstance(found, Integers) else reader.rows(value)


HANDLERS: dict[str, Handler] = {
    "QuantizeLinear": read_quantize,
    "DequantizeLinear": read_dequantize,
    "Abs": read_magnitude,
    "ReduceMax": read_largest,
}
