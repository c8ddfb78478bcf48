#!/usr/bin/env bash
# onnxruntime 1.32.0: the bias of a convolution between Q and DQ becomes int32 whether it fits or not, and the result is wrong.
#
# Two output channels with a bias of 1.5 each, of an input of zeros: the result is 1.5 in both, and is so without
# optimisations. With them the convolution becomes a QLinearConv whose bias is int32, in steps of activation scale times
# weight scale: 1.5 is 24,576 steps in the first channel, and 1.03e11, beyond int32, in the second, whose weights are
# small. Its result was -0.03125. Folding a batch normalisation leaves such channels.
#
# Needs python3 and the package registries. Leaves nothing behind. Exit status 1 where the behaviour is another than this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check onnxruntime==1.32.0 onnx==1.23.2 numpy
cat >"$folder/bias.py" <<'PYTHON'
import sys

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

C, O, STEP = 4, 2, 2.0**-6  # input and output channels; of the activation, and of the result
SCALES = np.array([2.0**-8, 2.0**-30], np.float32)  # of the weights: an ordinary channel, and one that is almost zero
BIAS = 1.5


def session(level):
    tensors = {
        "x_scale": np.float32(STEP), "x_zero": np.uint8(128), "w": np.full((O, C, 1, 1), 64, np.int8),
        "w_scale": SCALES, "w_zero": np.zeros(O, np.int8), "b": np.full(O, BIAS, np.float32),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "x_scale", "x_zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["wd"], axis=0),
        helper.make_node("Conv", ["xd", "wd", "b"], ["c"]),
        helper.make_node("QuantizeLinear", ["c", "x_scale", "x_zero"], ["yq"]),
        helper.make_node("DequantizeLinear", ["yq", "x_scale", "x_zero"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "bias",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, C, 1, 1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, O, 1, 1])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


x = np.zeros((1, C, 1, 1), np.float32)  # so that the result is the bias
levels = onnxruntime.GraphOptimizationLevel
found = {}
for level in (levels.ORT_DISABLE_ALL, levels.ORT_ENABLE_ALL):
    found[level] = session(level).run(None, {"x": x})[0].ravel().tolist()
    print(f"{level.name}: {found[level]}, expected {[BIAS] * O}")
plain, optimised = found.values()
sys.exit(not (plain == [BIAS] * O and optimised[0] == BIAS and optimised[1] != BIAS))
PYTHON
"$folder/venv/bin/python" "$folder/bias.py"
