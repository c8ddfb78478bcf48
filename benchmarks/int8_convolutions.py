"""Measure which convolutions gain by INT8 on this CPU: what export/passes/convolutions.py decides by their shapes.

    python benchmarks/int8_convolutions.py [--threads 1] [--json FILE]

Each convolution runs alone at B = 1, on normally distributed values, in FP32 and in three forms of INT8 that quantise
its FP32 input and return FP32, in blocks that alternate:

- result quantised: the form that an export writes, which ONNX Runtime makes a QLinearConv of;
- result in floats: the same without the Q/DQ pair behind it, as linear layers are quantised;
- ConvInteger: the operator that returns sums in 32 bits, scaled afterwards.

The shapes are those of R50+ViT-B/16 at 384 pixels, small maps as of the reference models, and ViT-B/16's patches.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from int8_measures import alternating, machine, relative_error

from transom.calib.quantized_weights import QuantizedWeights
from transom.calib.scales import activation_scale
from transom.export.passes._builder import clean_up
from transom.export.passes.convolutions import Convolution, gains, multiply_adds_per_value
from transom.export.passes.qdq_static import quantize_static
from transom.runtime.backends.integer_sums import integer_sums

SIGMAS = 4.0  # of the normal distribution: the range of activations, and of results
FORMS = ("result quantised", "result in floats", "ConvInteger")


@dataclass(frozen=True)
class Shape:
    """A square convolution: output channels, input channels, kernel, stride, and the side of its input."""

    outputs: int
    inputs: int
    kernel: int
    stride: int
    side: int

    @property
    def title(self) -> str:
        step = f", stride {self.stride}" if self.stride > 1 else ""
        return f"{self.kernel}x{self.kernel}{step}, {self.inputs} to {self.outputs}, {self.side}x{self.side}"


R50 = (
    *(Shape(64, 3, 7, 2, 384), Shape(64, 64, 1, 1, 96), Shape(64, 64, 3, 1, 96), Shape(256, 64, 1, 1, 96)),
    *(Shape(64, 256, 1, 1, 96), Shape(512, 256, 1, 2, 96), Shape(128, 128, 3, 2, 96), Shape(128, 512, 1, 1, 48)),
    *(Shape(128, 128, 3, 1, 48), Shape(512, 128, 1, 1, 48), Shape(256, 256, 3, 2, 48), Shape(256, 1024, 1, 1, 24)),
    *(Shape(256, 256, 3, 1, 24), Shape(1024, 256, 1, 1, 24), Shape(768, 1024, 1, 1, 24)),
)
SMALL = (Shape(32, 16, 3, 1, 16), Shape(32, 32, 3, 1, 8), Shape(64, 32, 3, 1, 8), Shape(64, 64, 3, 2, 8))
PATCHES = (Shape(768, 3, 16, 16, 224),)


def graph_of(shape: Shape) -> ir.Model:
    """Return a graph of one convolution, x to y, whose results have a deviation of one."""
    pad = 0 if shape.stride == shape.kernel else shape.kernel // 2
    attributes = f"strides = [{shape.stride}, {shape.stride}], pads = [{pad}, {pad}, {pad}, {pad}]"
    side = (shape.side + 2 * pad - shape.kernel) // shape.stride + 1
    proto = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 23]>
        g (float[B, {shape.inputs}, {shape.side}, {shape.side}] x) => (float[B, {shape.outputs}, {side}, {side}] y)
        {{ y = Conv <{attributes}> (x, W) }}"""
    )
    weight = np.random.default_rng(0).standard_normal((shape.outputs, shape.inputs, shape.kernel, shape.kernel))
    weight /= np.sqrt(shape.inputs * shape.kernel**2)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight.astype(np.float32), "W"))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def in_form(shape: Shape, form: str) -> ir.Model:
    """Return the graph in FP32, or in one of FORMS."""
    model = graph_of(shape)
    if form == "FP32":
        return model
    node = model.graph[0]
    layer = Convolution("conv", node, model.graph.initializers["W"])
    scale = activation_scale(-SIGMAS, SIGMAS, signed=False)
    if form == "ConvInteger":
        return conv_integer(shape, layer, scale.scale, scale.zero_point)
    quantize_static(model, [layer], QuantizedWeights(8), {"x": scale, "y": scale}, signed=False)
    if form == "result in floats":
        product = next(each for each in model.graph if each.op_type == "Conv").outputs[0]
        model.graph.outputs[0] = product
        clean_up(model)
    return model


def conv_integer(shape: Shape, layer: Convolution, scale: float, zero_point: int) -> ir.Model:
    """Return x quantised, ConvInteger with the same int8 weight, and its sums in units of both scales."""
    stored, scales = QuantizedWeights(8).int8(layer)
    proto = ir.to_proto(graph_of(shape))
    (node,) = proto.graph.node
    arrays = {
        "W": layer.stored_form(stored),
        "scale": np.array(scale, np.float32),
        "zero": np.array(zero_point, np.uint8),
        "units": (scales * np.float32(scale)).reshape(1, -1, 1, 1),
    }
    del proto.graph.node[:], proto.graph.initializer[:], proto.graph.value_info[:]
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    make = onnx.helper.make_node
    product = make("ConvInteger", ["q", "W", "zero"], ["sums"])
    product.attribute.extend(node.attribute)
    proto.graph.node.extend(
        [
            make("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
            product,
            make("Cast", ["sums"], ["real"], to=onnx.TensorProto.FLOAT),
            make("Mul", ["real", "units"], ["y"]),
        ]
    )
    return ir.from_proto(proto)


def opened(model: ir.Model, threads: int) -> onnxruntime.InferenceSession:
    """Return a session as the runtime opens a quantised graph for the CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, threads
    for key, setting in integer_sums().entries.items():
        options.add_session_config_entry(key, setting)
    data = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def figures_of(shape: Shape, threads: int) -> dict[str, object]:
    """Return FP32's milliseconds, how many times as fast each form is, and its relative error."""
    x = np.random.default_rng(1).standard_normal((1, shape.inputs, shape.side, shape.side)).astype(np.float32)
    sessions = {form: opened(in_form(shape, form), threads) for form in ("FP32", *FORMS)}
    outputs = {form: session.run(None, {"x": x}) for form, session in sessions.items()}
    calls: dict[str, Callable[[], object]] = {
        form: lambda session=session: session.run(None, {"x": x})  # type: ignore[misc]
        for form, session in sessions.items()
    }
    seconds = alternating(calls)
    node = graph_of(shape).graph[0]
    weight = node.inputs[1]
    assert weight is not None
    return {
        "convolution": shape.title,
        **asdict(shape),
        "multiply_adds_per_value": round(multiply_adds_per_value(node, weight), 1),
        "quantised": gains(node, weight),
        "fp32_ms": 1e3 * seconds["FP32"],
        **{form: {"speed": seconds["FP32"] / seconds[form]} for form in FORMS},
        "error": {form: relative_error(outputs[form], outputs["FP32"]) for form in FORMS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="the figures as JSON as well")
    options = parser.parse_args()
    about = {**machine(), "threads": options.threads, "onnxruntime": version("onnxruntime")}
    print(json.dumps(about))
    print(f"\n| convolution | multiply-adds per value | FP32, ms | {' | '.join(FORMS)} | by the rule |\n|{'---|' * 7}")
    rows = []
    for shape in (*R50, *SMALL, *PATCHES):
        row = figures_of(shape, options.threads)
        rows.append(row)
        speeds = " | ".join(f"{row[form]['speed']:.2f}" for form in FORMS)  # type: ignore[index]
        rule = "INT8" if row["quantised"] else "FP32"
        print(
            f"| {shape.title} | {row['multiply_adds_per_value']} | {row['fp32_ms']:.2f} | {speeds} | {rule} |",
            flush=True,
        )
    if options.json is not None:
        options.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
