"""Read images cut into patches by a convolution, and the class row before them."""

from __future__ import annotations

from math import prod

import onnx_ir as ir

from transom.export.native.axes import Axis, Dims, features
from transom.export.native.layers import biased, linear
from transom.export.native.meanings import ClassRow, Image, Integers, Matrix, Meaning, Rows
from transom.export.native.reader import GraphReader, Handler, attribute, name_of
from transom.export.native.row_program import PATCHES, TOKENS, CannotLowerError, PatchesStep, PrependStep, Weight


def read_conv(reader: GraphReader, node: ir.Node) -> Meaning:
    """Read ``Conv`` whose patches do not overlap: a linear layer of patches."""
    found, weight = reader.meaning(node.inputs[0]), reader.meaning(node.inputs[1])
    image = found.source if isinstance(found, Integers) else found
    if not isinstance(image, Image) or not isinstance(weight, Matrix):
        raise CannotLowerError("it is a convolution of something else than an image")
    channels, height, width = image.shape
    out, _, *kernel = (int(size) for size in weight.weight.tensor.shape.numpy())
    strides, pads = list(attribute(node, "strides", [])), attribute(node, "pads", [])
    cuts = (
        len(kernel) == 2
        and strides == kernel
        and not any(pads)
        and attribute(node, "group", 1) == 1
        and all(size == 1 for size in attribute(node, "dilations", [1]))
        and attribute(node, "auto_pad", "NOTSET") in ("NOTSET", "VALID")
        and height % kernel[0] == width % kernel[1] == 0
    )
    if not cuts:
        raise CannotLowerError("its windows overlap, or do not cover the image")
    reader.use_ids(image.name)
    columns = channels * prod(kernel)
    flat = Weight(weight.weight.name, weight.weight.tensor, (out, columns))
    view = reader.add(PatchesStep(f"{name_of(node)}.patches", PATCHES, columns, image.name, kernel[0], kernel[1]))
    high, wide = (Axis(f"patch {way}", (count, count)) for way, count in
                  (("rows", height // kernel[0]), ("columns", width // kernel[1])))  # fmt: skip
    grid: tuple[Axis, ...] = tuple(axis for axis in (high, wide) if axis.sizes[0] > 1)
    dims: Dims = (reader.batch, grid, features(columns))
    cut: Meaning = Rows(view, dims)
    if isinstance(found, Integers):
        cut = Integers(Rows(view, dims), found.scale, found.zero_point, found.dequantised)
    result = linear(reader, name_of(node), cut, Matrix(flat, transposed=True, scale=weight.scale), node.inputs[0])
    if not isinstance(result, Rows):
        raise CannotLowerError("it has patches with scales of their own")
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        result = biased(reader, result, node.inputs[2], f"{name_of(node)}.biased")
    rows_axis, columns_axis = ((high,) if high.sizes[0] > 1 else ()), ((wide,) if wide.sizes[0] > 1 else ())
    return Rows(result.view, (reader.batch, features(out), rows_axis, columns_axis))


def read_concat(reader: GraphReader, node: ir.Node) -> Meaning:
    """Read ``Concat`` of a class row and an image's patches."""
    if attribute(node, "axis", 0) != 1 or len(node.inputs) != 2:
        raise CannotLowerError("it joins activations")
    first, rows = reader.meaning(node.inputs[0]), reader.whole_rows(node.inputs[1])
    if not isinstance(first, ClassRow) or rows.step.rows != PATCHES or len(rows.dims) != 3:
        raise CannotLowerError("it joins activations")
    if rows.dims[0] != reader.batch or first.weight.shape != (rows.step.columns,):
        raise CannotLowerError("it joins rows of other sizes")
    tokens = prod(axis.sizes[0] for axis in rows.dims[1]) + 1
    reader.image_tokens = (Axis("image tokens", (tokens, tokens)),)
    step = PrependStep(name_of(node), TOKENS, rows.step.columns, rows.step, first.weight, None)
    return Rows(reader.add(step), (reader.batch, reader.image_tokens, features(rows.step.columns)))


HANDLERS: dict[str, Handler] = {"Conv": read_conv, "Concat": read_concat}
