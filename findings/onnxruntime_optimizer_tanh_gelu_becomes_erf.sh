#!/usr/bin/env bash
# onnxruntime 1.32.0: transformers.optimizer fuses a bias and a tanh Gelu into BiasGelu, which computes the erf form.
#
# Gelu of opset 20 with approximate="tanh" is GPT-2's. With an Add of a bias in front, optimize_model replaces both by
# com.microsoft.BiasGelu, which knows no approximation, so that the model computes another function. The session's own
# optimiser, which runs as the model is loaded, keeps the tanh form: its outputs are those without any optimisation.
# With approximate="none" the same fusion is right.
#
# Needs python3 and the package registries. Leaves nothing behind. Exit status 1 where the behaviour is another than this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check onnxruntime==1.32.0 onnx==1.23.2 numpy sympy

cat >"$folder/gelu.py" <<'PYTHON'
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnxruntime.transformers import optimizer

WIDTH, HIDDEN = 16, 64
folder = Path(sys.argv[1])
rng = np.random.default_rng(0)
x = rng.normal(size=(1, 5, WIDTH)).astype(np.float32)


def model_of(approximate: str) -> onnx.ModelProto:
    """Return Gelu(x w + b)."""
    arrays = {"w": rng.normal(size=(WIDTH, HIDDEN)), "b": rng.normal(size=HIDDEN)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Add", ["product", "b"], ["sum"]),
        helper.make_node("Gelu", ["sum"], ["y"], approximate=approximate),
    ]
    given, found = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 5, s]) for n, s in (("x", WIDTH), ("y", HIDDEN)))
    weights = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "gelu", [given], [found], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: onnx.ModelProto) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


errors = {}
for approximate in ("tanh", "none"):
    model = model_of(approximate)
    expected = ReferenceEvaluator(model).run(None, {"x": x})[0]
    onnx.save(model, folder / "model.onnx")
    fused = optimizer.optimize_model(str(folder / "model.onnx"), model_type="bert", num_heads=2, hidden_size=WIDTH, opt_level=0)
    kinds = [node.op_type for node in fused.model.graph.node]
    errors[approximate] = tuple(float(np.abs(run(each) - expected).max()) for each in (model, fused.model))
    print(f"  approximate={approximate}: {' '.join(kinds)}; from the reference: session {errors[approximate][0]:.1e}, fused {errors[approximate][1]:.1e}")
    assert kinds == ["MatMul", "BiasGelu"], kinds
right = max(errors["none"]) < 1e-5 and errors["tanh"][0] < 1e-5
sys.exit(not (right and errors["tanh"][1] > 1e-4))
PYTHON
echo "onnxruntime 1.32.0, onnxruntime.transformers.optimizer on MatMul, Add, Gelu:"
"$folder/venv/bin/python" "$folder/gelu.py" "$folder"
