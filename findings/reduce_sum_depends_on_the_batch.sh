#!/usr/bin/env bash
# onnxruntime 1.32.0: ReduceSum over the middle axis gives a row other bits alone than in a batch, and with zeros behind it.
#
# A sum over axis 1 of (B, S, 64), as sentence embeddings are pooled: the first row of a batch of four is summed up once
# more alone, and once with three rows of zeros behind it, which change no sum. On x86 with AVX2 or more the lone row
# differs at 59 of 64 lengths, the padded one at 15 of 64, by some units in the last place; so a text's vector depends on
# what it is batched with. A MatMul with two equal rows of ones in place of the sum depends on neither. Without AVX2 nothing
# differs. Seen on an Intel Xeon with AVX-512, with all of it and with all but AVX2 hidden from the process.
#
# Needs x86-64 with AVX2, python3 and the package registries. Leaves nothing behind. Exit status 1 where the behaviour is
# another than this.
set -euo pipefail
grep -qw avx2 /proc/cpuinfo || { echo "this processor has no AVX2: there nothing differs"; exit 0; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check onnxruntime==1.32.0 onnx==1.23.2 numpy
cat >"$folder/rows.py" <<'PYTHON'
import sys

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

ROWS, E, LENGTHS, PADDING = 4, 64, 64, 3


def session(node, *inputs, constants=()):
    graph = helper.make_graph(
        [node],
        "rows",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


x_shape = ("x", ["B", "S", E])
axis = numpy_helper.from_array(np.array([1], np.int64), "axis")
reduce_sum = session(helper.make_node("ReduceSum", ["x", "axis"], ["y"], keepdims=0), x_shape, constants=[axis])
product = session(helper.make_node("MatMul", ["ones", "x"], ["y"]), ("ones", ["B", 2, "S"]), x_shape)
ways = {
    "ReduceSum": lambda x: reduce_sum.run(None, {"x": x})[0],
    "MatMul with two rows of ones": lambda x: product.run(
        None, {"ones": np.ones((len(x), 2, x.shape[1]), np.float32), "x": x}
    )[0],
}
rng = np.random.default_rng(0)
rows = [rng.standard_normal((ROWS, length, E)).astype(np.float32) for length in range(1, LENGTHS + 1)]
zeros = np.zeros((ROWS, PADDING, E), np.float32)
as_expected = True
for name, add in ways.items():
    alone = sum(not np.array_equal(add(x[:1]), add(x)[:1]) for x in rows)
    padded = sum(not np.array_equal(add(np.concatenate([x, zeros], 1)), add(x)) for x in rows)
    print(f"{name}: a lone row differs at {alone} of {LENGTHS} lengths, a padded one at {padded}")
    as_expected &= (alone > 0 and padded > 0) if name == "ReduceSum" else (alone == 0 and padded == 0)
sys.exit(not as_expected)
PYTHON
"$folder/venv/bin/python" "$folder/rows.py"
