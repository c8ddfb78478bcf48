#!/usr/bin/env bash
# openvino 2026.4.1: the ONNX frontend reads Attention of opset 25 as if it had no window, and says nothing.
#
# Opset 25 gave Attention left_window_size and right_window_size: a query sees that many keys before and behind itself.
# The frontend accepts the operator, ignores both attributes and computes full attention: the output is that of the node
# without them, not that of onnx's reference. Without windows OpenVINO and the reference agree.
#
# Needs python3 and the package registries. Leaves nothing behind. Exit status 1 where the behaviour is another than this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check openvino==2026.4.1 onnx==1.23.2 numpy

cat >"$folder/windows.py" <<'PYTHON'
import sys

import numpy as np
import onnx
import openvino
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

SHAPE = [1, 2, 8, 4]  # batch, heads, tokens, size of a head
rng = np.random.default_rng(0)
inputs = {name: rng.normal(size=SHAPE).astype(np.float32) for name in "qkv"}


def outputs(**attributes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what the reference and OpenVINO compute of one Attention node."""
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, SHAPE) for name in "qkvy"}
    node = helper.make_node("Attention", list("qkv"), ["y"], is_causal=1, **attributes)
    graph = helper.make_graph([node], "attention", [values[name] for name in "qkv"], [values["y"]])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)], ir_version=11)
    onnx.checker.check_model(model, full_check=True)
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return ReferenceEvaluator(model).run(None, inputs)[0], compiled(inputs)[0]


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())


reference, plain = outputs()
windowed_reference, windowed = outputs(left_window_size=2, right_window_size=0)
print(f"  without a window: OpenVINO is {difference(plain, reference):.1e} from the reference")
print(f"  a window of 2:    OpenVINO is {difference(windowed, windowed_reference):.1e} from the reference,")
print(f"                    {difference(windowed, plain):.1e} from its own output without one")
agree = difference(plain, reference) < 1e-5
ignored = np.array_equal(windowed, plain) and difference(windowed, windowed_reference) > 0.1
sys.exit(not (agree and ignored))
PYTHON
echo "openvino 2026.4.1, Attention-25 with left_window_size:"
"$folder/venv/bin/python" "$folder/windows.py"
