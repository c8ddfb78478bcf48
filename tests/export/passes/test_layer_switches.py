"""Layers of a shipped graph switched to FP32 while it runs."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from transom.calib.quantized_weights import QuantizedWeights
from transom.calib.scales import Scale
from transom.export.passes.convolutions import find_layers
from transom.export.passes.cpu import optimize_for_cpu
from transom.export.passes.layer_switches import SWITCHES, add_layer_switches, add_module_switches
from transom.export.passes.qdq_static import quantize_static
from transom.runtime.backends.ort_library import onnxruntime
from transom.runtime.errors import BundleError

# One linear layer of 2 inputs and 2 outputs whose weight ships wrong: the identity in place of (2, 1; 0, 3).


def tiny(weight: list[list[float]], names: dict[str, str] | None = None) -> ir.Model:
    """y = Relu(x) W + (1, 1), the result of the product called "product"; module paths as an export notes them."""
    arrays = {"W": np.array(weight, np.float32), "b": np.ones(2, np.float32)}
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 23]>
        g (float[N, 2] x) => (float[N, 2] y) {
            r = Relu(x)
            product = MatMul(r, W)
            y = Add(product, b)
        }"""
    )
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    for node, path in zip(model.graph.node, ("act", "dense", "dense"), strict=True):
        node.metadata_props.add(key="module", value=path)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model))


RIGHT, WRONG = [[2.0, 1.0], [0.0, 3.0]], [[1.0, 0.0], [0.0, 1.0]]


def outputs(model: ir.Model, *in_fp32: int) -> list[float]:
    session = onnxruntime().InferenceSession(ir.to_proto(model).SerializeToString())
    (found,) = session.run(None, {"x": np.array([[5, -1]], np.float32), SWITCHES: np.array(in_fp32, np.int64)})
    return [float(value) for value in found[0]]


def test_a_linear_layer_is_switched_to_fp32_while_the_graph_runs() -> None:
    shipped = tiny(WRONG)
    assert add_layer_switches(shipped, tiny(RIGHT)) == ["dense"]
    assert outputs(shipped, 0) == [6, 1]  # 5 + 1, 0 + 1
    assert outputs(shipped, 1) == [11, 6]  # 2 * 5 + 1, 1 * 5 + 1


def test_a_bias_inside_an_integer_product_is_switched_with_it() -> None:
    """Quantised, rewritten for the CPU, and its scales three times too large."""
    shipped = tiny(RIGHT)
    quantize_static(shipped, find_layers(shipped), QuantizedWeights(8), {"r": Scale(5 / 255, 0)}, signed=False)
    assert optimize_for_cpu(shipped)["integer_products"] == 1
    scales = shipped.graph.initializers["W.scale"]
    scales.const_value = ir.Tensor(3 * scales.const_value.numpy(), name="W.scale")  # type: ignore[union-attr]
    assert add_layer_switches(shipped, tiny(RIGHT)) == ["dense"]
    assert outputs(shipped, 0) == pytest.approx([31, 16], rel=0.01)  # 3 * 2 * 5 + 1, 3 * 1 * 5 + 1
    assert outputs(shipped, 1) == [11, 6]


def test_modules_of_a_half_precision_graph_are_switched_one_by_one() -> None:
    from transom.export.passes.half_precision import convert_precision

    shipped, right = tiny([[1 + 2**-12, 0.0], [0.0, 1.0]]), tiny(RIGHT)
    convert_precision(shipped, "fp16")
    names = add_module_switches(shipped, right)
    assert sorted(names) == ["act", "dense"]
    dense = [int(name == "dense") for name in names]
    assert outputs(shipped, 0, 0) == [6, 1]  # FP16 has no 1 + 2^-12
    assert outputs(shipped, *dense) == [11, 6]


def test_a_graph_of_something_else_is_refused() -> None:
    other = tiny(RIGHT)
    other.graph.node(1).outputs[0].name = "other"
    with pytest.raises(BundleError, match="no product, which belongs to the layer dense"):
        add_layer_switches(other, tiny(RIGHT))
