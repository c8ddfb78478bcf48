"""The plugin calls of a graph: their kernels for a GPU that need not be here, and inputs to try them with.

What TensorRT is told of a call (export/plugins/trt_plugin.py) is a function of its types and shapes, and so known
before TensorRT is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from transom.export.passes.plugin_attention import AXES, DOMAIN, INPUTS, MASK_AXES, SCALE, function_of
from transom.export.plugins.compiled import Compiled
from transom.export.plugins.kernel_spec import TileSizes, Variant
from transom.export.plugins.layout import Layout
from transom.export.plugins.trt_plugin import candidates, kernel_of, layout_of, variant_of
from transom.runtime.errors import EngineError

TRT_DTYPES = {  # names of trt.DataType
    ir.DataType.FLOAT: "FLOAT",
    ir.DataType.FLOAT16: "HALF",
    ir.DataType.BFLOAT16: "BF16",
    ir.DataType.BOOL: "BOOL",
    ir.DataType.INT32: "INT32",
}
ROWS, TOKENS = 2, 40  # of an axis that the graph leaves open: more than one block of most tiles
FEW_HEADS = 32  # with more, as of shifted windows, one row is enough: the interpreter is slow
VISIBLE = -0.5  # of a normal number: a random boolean mask shows seven keys of ten


@dataclass(frozen=True)
class PluginCall:
    """A call of one of the operators, by the types and shapes of its inputs; None is a size that is not fixed.

    ``mask`` is in FP32, of a call whose mask is a constant of the graph. ``nodes`` are all that call the same kernel.
    """

    operator: str
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int | None, ...], ...]
    scale: float
    axes: str = AXES
    opset: int = 24
    mask: NDArray[np.float32] | None = field(default=None, compare=False)
    nodes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def variant(self) -> Variant:
        return variant_of(self.operator, self.dtypes, self.shapes, self.scale)

    @property
    def layout(self) -> Layout:
        return layout_of(self.operator, self.shapes, self.axes)

    def tiles(self, sm: int) -> tuple[TileSizes, ...]:
        """Return the tile sizes of the kernels that TensorRT chooses from."""
        return candidates(sm, self.variant, self.shapes[0][2], self.shapes[1][2])

    def kernels(self, sm: int) -> list[Compiled]:
        """Compile the kernels that TensorRT chooses from. Raises EngineError where one cannot be compiled."""
        return [kernel_of(self.variant, self.layout, sm, tiles) for tiles in self.tiles(sm)]


def plugin_calls(model: ir.Model) -> list[PluginCall]:
    """Return the calls in a graph, one for all nodes that are alike. Raises EngineError for types with no kernel."""
    found: dict[PluginCall, PluginCall] = {}
    for node in model.graph:
        if node.domain != DOMAIN or node.op_type not in INPUTS:
            continue
        call = call_of(node, model.graph.opset_imports[""])
        before = found.get(call)
        found[call] = call if before is None else replace(before, nodes=(*before.nodes, *call.nodes))
    return list(found.values())


def call_of(node: ir.Node, opset: int) -> PluginCall:
    """Describe one call."""
    dtypes, shapes, mask = [], [], None
    for name, value in zip(INPUTS[node.op_type], node.inputs, strict=True):
        if value is None or value.shape is None or value.dtype not in TRT_DTYPES:
            raise EngineError(
                f"the plugin {node.op_type} of {node.name} has no shape or no type for {name}; expected both. "
                "Build with --no-plugin, and report this."
            )
        dtypes.append(TRT_DTYPES[value.dtype])
        shapes.append(tuple(size if isinstance(size, int) else None for size in value.shape))
        if name == "mask" and value.const_value is not None:
            mask = value.const_value.numpy().astype(np.float32)
    axes = node.attributes[MASK_AXES].as_string() if MASK_AXES in node.attributes else AXES
    scale, names = node.attributes[SCALE].as_float(), (str(node.name),)
    return PluginCall(node.op_type, tuple(dtypes), tuple(shapes), scale, axes, opset, mask, names)


def example_inputs(call: PluginCall, seed: int = 0) -> list[NDArray[Any]]:
    """Return random inputs of a call, in FP32, bool or int32; its own mask where that is a constant."""
    rng = np.random.default_rng(seed)
    open_sizes = (ROWS, 1, TOKENS, TOKENS)
    rows, heads = call.shapes[0][0], call.shapes[0][1] or 1
    rows = rows or (ROWS if heads <= FEW_HEADS else 1)
    inputs: list[NDArray[Any]] = []
    for name, dtype, shape in zip(INPUTS[call.operator], call.dtypes, call.shapes, strict=True):
        sizes = [size or rows if axis == 0 else size or open_sizes[axis] for axis, size in enumerate(shape)]
        if name == "mask" and call.mask is not None:
            inputs.append(call.mask)
        elif name == "mask":
            scores = (rows, heads, inputs[0].shape[2], inputs[1].shape[2])
            sizes = [wanted if axis in call.axes else 1 for axis, wanted in zip(AXES, scores, strict=True)]
            numbers = rng.standard_normal(sizes).astype(np.float32)
            seen = numbers > VISIBLE
            seen[..., 0] = True  # every query sees a key
            inputs.append(seen if dtype == "BOOL" else numbers)
        elif name == "lengths":
            inputs.append(rng.integers(inputs[0].shape[2], inputs[1].shape[2] + 1, sizes).astype(np.int32))
        else:
            inputs.append(rng.standard_normal(sizes).astype(np.float32))
    return inputs


def by_the_body(call: PluginCall, inputs: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
    """Return what the function's body gives for ``inputs``, in FP32, in ONNX Runtime."""
    values = []
    for name, array in zip(INPUTS[call.operator], inputs, strict=True):
        dtype = ir.DataType.from_numpy(array.dtype)
        values.append(ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(array.shape)))
    node = ir.node(call.operator, values, {SCALE: call.scale}, domain=DOMAIN)
    (result,) = node.outputs
    result.name, result.type, result.shape = "result", ir.TensorType(ir.DataType.FLOAT), values[0].shape
    graph = ir.Graph(values, [result], nodes=[node], opset_imports={"": call.opset, DOMAIN: 1}, name=call.operator)
    model = ir.Model(graph, ir_version=10, functions=[function_of(call.operator, call.opset)])
    data = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    feeds = dict(zip(INPUTS[call.operator], inputs, strict=True))
    return np.asarray(session.run(None, feeds)[0], np.float32)
