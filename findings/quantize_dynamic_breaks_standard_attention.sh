#!/usr/bin/env bash
# onnxruntime 1.32.0: quantize_dynamic rewrites the standard operator Attention into an invalid com.microsoft.QAttention.
#
# The quantiser goes by the operator's name. It takes Attention of opset 23, whose inputs are query, key and value, for
# com.microsoft.Attention, whose inputs are activations, weights and bias, and returns without a warning a model that no
# session loads. With op_types_to_quantize=["MatMul"] the same model is quantised as it should be.
#
# Needs python3 and the package registries. Leaves nothing behind. Exit status 1 where the behaviour is another than this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check onnxruntime==1.32.0 onnx==1.23.2 numpy

cat >"$folder/quantize.py" <<'PYTHON'
import logging
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

SHAPE, WIDTH = [1, 5, 16], 16  # batch, tokens, channels
logging.disable(logging.WARNING)  # advice to preprocess the model
folder = Path(sys.argv[1])
rng = np.random.default_rng(0)
weights = [numpy_helper.from_array(rng.normal(size=(WIDTH, WIDTH)).astype(np.float32), f"w{name}") for name in "qkv"]
nodes = [helper.make_node("MatMul", ["x", f"w{name}"], [name]) for name in "qkv"]
nodes.append(helper.make_node("Attention", list("qkv"), ["y"], q_num_heads=2, kv_num_heads=2))
x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, SHAPE) for name in "xy")
graph = helper.make_graph(nodes, "attention", [x], [y], weights)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
onnx.checker.check_model(model, full_check=True)
onnx.save(model, folder / "fp32.onnx")


def loads(name: str) -> str:
    """Return "loads", or the first words of the session's error."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(folder / name, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        return " ".join(str(error).split())[:44]
    return "loads"


quantize_dynamic(folder / "fp32.onnx", folder / "all.onnx", weight_type=QuantType.QInt8)
quantize_dynamic(folder / "fp32.onnx", folder / "matmul.onnx", weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"])
kinds = [(node.domain, node.op_type) for node in onnx.load(folder / "all.onnx").graph.node]
found = {name: loads(f"{name}.onnx") for name in ("fp32", "all", "matmul")}
print(f"  before:                            {found['fp32']}")
print(f"  quantised, all operators:          {found['all']}; QAttention: {('com.microsoft', 'QAttention') in kinds}")
print(f"  quantised, MatMul alone:           {found['matmul']}")
expected = found["fp32"] == found["matmul"] == "loads" and "INVALID_GRAPH" in found["all"]
sys.exit(not (expected and ("com.microsoft", "QAttention") in kinds))
PYTHON
echo "onnxruntime 1.32.0, quantize_dynamic of MatMul, MatMul, MatMul, Attention (opset 23):"
"$folder/venv/bin/python" "$folder/quantize.py" "$folder"
