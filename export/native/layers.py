"""Read linear layers, biases, activation functions and residuals."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import numpy as np
import onnx_ir as ir

from transom.export.native.axes import Dims, features
from transom.export.native.integers import is_same, quantised, undone, unquantised
from transom.export.native.meanings import (
    LARGEST,
    SCALE,
    Image,
    Integers,
    MaskedRows,
    Matrix,
    Meaning,
    Multiplied,
    Product,
    Rows,
    RowScale,
    Scaled,
)
from transom.export.native.norms import masked_sums, padding_mask
from transom.export.native.reader import GraphReader, Handler, attribute, name_of
from transom.export.native.row_program import (
    PATCHES,
    TOKENS,
    ActivationStep,
    BiasStep,
    CannotLowerError,
    EmbedStep,
    LinearStep,
    PrependStep,
    ResidualStep,
    Step,
    View,
    Weight,
)

LEVELS = 127.0
QUICK_GELU = 1.702


def read_matmul(reader: GraphReader, node: ir.Node) -> Meaning:
    """Read ``MatMul`` and ``Gemm`` of an activation and a weight, the bias of a Gemm with it."""
    weight = reader.meaning(node.inputs[1])
    if isinstance(weight, Rows) and node.op_type == "MatMul":
        return masked_sums(reader, node.inputs[0], weight)
    if not isinstance(weight, Matrix) or len(weight.weight.shape) != 2:
        raise CannotLowerError("it is a product of two activations")
    if node.op_type == "Gemm":
        plain = attribute(node, "transA", 0) == 0 and attribute(node, "alpha", 1.0) == attribute(node, "beta", 1.0) == 1
        if not plain:
            raise CannotLowerError("it has a factor, or reads its activation transposed")
        weight = replace(weight, transposed=weight.transposed != bool(attribute(node, "transB", 0)))
    found = reader.meaning(node.inputs[0])
    result = linear(reader, name_of(node), found, weight, node.inputs[0])
    bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
    if bias is None:
        return result
    if not isinstance(result, Rows):
        raise CannotLowerError("it has a bias and rows with scales of their own")
    return biased(reader, result, bias, f"{name_of(node)}.biased")


def linear(reader: GraphReader, name: str, found: Meaning, weight: Matrix, value: ir.Value | None) -> Meaning:
    """Return the product of an activation, quantised or not, and a weight."""
    k, n = reversed(weight.weight.shape) if weight.transposed else weight.weight.shape
    if weight.scale is None:
        rows = undone(reader, found, value) if isinstance(found, Integers) else found
        if not isinstance(rows, Rows):
            raise CannotLowerError("it multiplies what is no activation of its own")
        reader.require_whole(rows)
        source: Step = rows.step
    else:
        if not isinstance(found, Integers) or not found.dequantised or isinstance(found.source, Image):
            raise CannotLowerError("its weight is int8 and its activation is not quantised to uint8")
        rows = found.source if isinstance(found.source, Rows) else found.source.rows
        reader.require_whole(rows)
        source = quantised(reader, found)
    if source.columns != k:
        raise CannotLowerError(f"its weight has {k} rows, its activation {source.columns} columns")
    step = LinearStep(name, source.rows, n, source, weight.weight, weight.transposed, weight.scale)
    dims: Dims = (*rows.dims[:-1], features(n))
    view = reader.add(step)
    if isinstance(found, Integers) and weight.scale is not None and found.scale is None:
        assert not isinstance(found.source, Image)
        return Product(step, dims, found.source)
    return Rows(view, dims)


def read_mul(reader: GraphReader, node: ir.Node) -> Meaning:
    """Read ``Mul``: by a number, a vector, the scale of each row, a gate of its own, or a mask."""
    sides = [(node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])]
    for one, other in sides:
        factor = reader.number(other)
        if factor is not None:
            return times_number(reader, reader.meaning(one), factor, name_of(node))
    for one, other in sides:
        mask = padding_mask(reader, other)
        if mask is not None:
            return MaskedRows(reader.tokens(reader.rows(one)), mask)
    for one, other in sides:
        x, y = reader.meaning(one), reader.meaning(other)
        if isinstance(x, Product) and isinstance(y, RowScale) and y.stage == SCALE and is_same(y.rows, x.source):
            return Rows(View(x.step, 0, x.step.columns), x.dims)
        if isinstance(x, Rows) and isinstance(y, Scaled) and y.gate and is_same(y.rows, x):
            return gated(reader, x, y.factor, name_of(node))
        if isinstance(x, Rows) and isinstance(y, Matrix):
            reader.require_whole(x)
            vector = reader.vector(other, x.step.columns)
            if vector is not None:
                return Multiplied(x, vector)
    raise CannotLowerError("it multiplies two activations")


def times_number(reader: GraphReader, found: Meaning, factor: float, name: str) -> Meaning:
    """Return the product with a number: of the embedding, of a gate, of the largest magnitude."""
    if isinstance(found, RowScale) and found.stage == LARGEST and np.float32(factor) == np.float32(1 / LEVELS):
        return RowScale(found.rows, SCALE)
    if isinstance(found, Rows) and isinstance(found.step, EmbedStep) and found.view.whole:
        lookups = tuple(replace(each, scale=each.scale * factor) for each in found.step.lookups)
        return Rows(reader.add(EmbedStep(name, found.step.rows, found.step.columns, lookups)), found.dims)
    if isinstance(found, Rows):
        return Scaled(found, factor)
    raise CannotLowerError("it multiplies by a number what a list keeps as it is")


def gated(reader: GraphReader, rows: Rows, factor: float, name: str) -> Rows:
    """Return ``x * sigmoid(factor * x)``."""
    if factor == 1:
        return activated(reader, rows, "silu", name)
    if factor in (QUICK_GELU, float(np.float32(QUICK_GELU)), float(np.float16(QUICK_GELU))):  # as it is stored
        return activated(reader, rows, "quick_gelu", name)
    raise CannotLowerError(f"x * sigmoid({factor:g} x) is none of the activation functions of a list")


def activated(reader: GraphReader, rows: Rows, function: str, name: str) -> Rows:
    if not rows.view.whole:
        raise CannotLowerError(f"it computes with some of the columns of {rows.step.name!r} alone")
    return Rows(reader.add(ActivationStep(name, rows.step.rows, rows.step.columns, rows.step, function)), rows.dims)


def read_sigmoid(reader: GraphReader, node: ir.Node) -> Meaning:
    found = reader.meaning(node.inputs[0])
    if isinstance(found, Scaled) and not found.gate:
        return replace(found, gate=True)
    return Scaled(reader.rows(node.inputs[0]), 1.0, gate=True)


def read_gelu(reader: GraphReader, node: ir.Node) -> Meaning:
    function = "gelu_tanh" if attribute(node, "approximate", "none") == "tanh" else "gelu"
    return activated(reader, reader.rows(node.inputs[0]), function, name_of(node))


def read_relu(reader: GraphReader, node: ir.Node) -> Meaning:
    return activated(reader, reader.rows(node.inputs[0]), "relu", name_of(node))


def read_tanh(reader: GraphReader, node: ir.Node) -> Meaning:
    return activated(reader, reader.rows(node.inputs[0]), "tanh", name_of(node))


def read_add(reader: GraphReader, node: ir.Node) -> Meaning:
    """Read ``Add``: of embeddings, of a bias, of positions, of a residual."""
    sides = [(node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])]
    for one, other in sides:
        if reader.weight(other) is not None:
            rows = reader.whole_rows(one) if not isinstance(reader.meaning(one), Integers) else unquantised(reader, one)
            if reader.vector(other, rows.step.columns) is not None:
                return biased(reader, rows, other, name_of(node))
            return positioned(reader, rows, other, name_of(node))
    x, y = (unquantised(reader, value) for value in node.inputs)
    if isinstance(x.step, EmbedStep) and isinstance(y.step, EmbedStep) and x.step.columns == y.step.columns:
        dims = max(x.dims, y.dims, key=len)  # one of positions alone has no batch
        if min(x.dims, y.dims, key=len) in (dims, dims[1:]):
            step = EmbedStep(name_of(node), TOKENS, x.step.columns, x.step.lookups + y.step.lookups)
            return Rows(reader.add(step), dims)
    for rows in (x, y):
        reader.require_whole(rows)
    if x.dims != y.dims or x.step.rows != y.step.rows or x.step is y.step:
        raise CannotLowerError("it adds activations of other shapes")
    return Rows(reader.add(ResidualStep(name_of(node), x.step.rows, x.step.columns, x.step, y.step)), x.dims)


def read_sub(reader: GraphReader, node: ir.Node) -> Meaning:
    """Read ``Sub`` of a negated bias, which quantising made of a bias."""
    rows = reader.whole_rows(node.inputs[0])
    vector = reader.vector(node.inputs[1], rows.step.columns)
    if vector is None:
        raise CannotLowerError("it subtracts what is no bias")
    name = vector.name.removesuffix(".negated") + ".bias"
    bias = Weight(name, ir.Tensor(-vector.tensor.numpy(), name=name), vector.shape)
    return Rows(reader.add(BiasStep(name_of(node), rows.step.rows, rows.step.columns, rows.step, bias)), rows.dims)


def biased(reader: GraphReader, rows: Rows, value: ir.Value | None, name: str) -> Rows:
    vector = reader.vector(value, rows.step.columns)
    if vector is None:
        raise CannotLowerError("its bias is no vector of weights")
    return Rows(reader.add(BiasStep(name, rows.step.rows, rows.step.columns, rows.step, vector)), rows.dims)


def positioned(reader: GraphReader, rows: Rows, value: ir.Value | None, name: str) -> Rows:
    """Return an image's rows with a table of positions added."""
    weight, step = reader.weight(value), rows.step
    assert weight is not None
    tokens = rows.dims[1] if len(rows.dims) == 3 else ()
    count = prod(axis.sizes[0] for axis in tokens)
    batchless = weight.shape[1:] if len(weight.shape) == 3 and weight.shape[0] == 1 else weight.shape
    is_image = (isinstance(step, PrependStep) and step.position is None) or step.rows == PATCHES
    if not is_image or batchless != (count, step.columns) or rows.dims[0] != reader.batch:
        raise CannotLowerError("it adds a weight that is neither a bias nor the positions of an image")
    position = reader.float32(weight, (count, step.columns))
    source, first = (step.source, step.first) if isinstance(step, PrependStep) else (step, None)
    reader.image_tokens = tokens
    return Rows(reader.add(PrependStep(name, TOKENS, step.columns, source, first, position)), rows.dims)


HANDLERS: dict[str, Handler] = {
    "MatMul": read_matmul,
    "Gemm": read_matmul,
    "Mul": read_mul,
    "Sigmoid": read_sigmoid,
    "Gelu": read_gelu,
    "Relu": read_relu,
    "Tanh": read_tanh,
    "Add": read_add,
    "Sub": read_sub,
}
