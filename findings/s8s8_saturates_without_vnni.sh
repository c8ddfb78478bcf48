#!/usr/bin/env bash
# onnxruntime 1.32.0: products of int8 activations and int8 weights saturate on x86 without VNNI, as uint8 activations do.
#
# Its documentation on quantization warns of saturation for U8 x S8 and recommends S8 x S8 in QDQ form as the default.
# Here a MatMul of two dequantised int8 tensors, all scales 1, is compared with the integer sums, which float32 holds
# exactly. Seen on an emulated Haswell (qemu 7.2, AVX2 alone): most sums are wrong, by up to a quarter of the largest.
# "session.x64quantprecision" = "1" mends it, and so does "session.disable_quant_qdq" = "1", which computes in float32.
# On a processor with VNNI, or with neither AVX2 nor AVX-512 (Nehalem), the same sums are right.
#
# Needs Debian or Ubuntu on x86-64, python3 and the package registries. Leaves nothing behind. Exit status 1 where the
# behaviour is another than this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check onnxruntime==1.32.0 onnx==1.23.2 numpy
mkdir -p "$folder/lists/partial" "$folder/cache/archives/partial"
apt="-qq -o Dir::State::Lists=$folder/lists -o Dir::Cache=$folder/cache -o APT::Sandbox::User=root"
(cd "$folder" && apt-get $apt update && apt-get $apt download qemu-user-static >/dev/null && dpkg -x qemu-user-static_*.deb qemu)

cat >"$folder/sums.py" <<'PYTHON'
import sys

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

K, N, ROWS = 64, 33, 8
rng = np.random.default_rng(0)
weights, activations = (rng.integers(-127, 128, shape).astype(np.int8) for shape in ((K, N), (ROWS, K)))
nodes = [
    helper.make_node("QuantizeLinear", ["x", "one", "zero"], ["q"]),
    helper.make_node("DequantizeLinear", ["q", "one", "zero"], ["d"]),
    helper.make_node("DequantizeLinear", ["w", "ones"], ["f"], axis=1),
    helper.make_node("MatMul", ["d", "f"], ["y"]),
]
constants = {"w": weights, "ones": np.ones(N, np.float32), "one": np.float32(1), "zero": np.int8(0)}
graph = helper.make_graph(
    nodes,
    "sums",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, [ROWS, K])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, [ROWS, N])],
    [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()
exact = activations.astype(np.int64) @ weights.astype(np.int64)
found = []
for entry in (None, "session.x64quantprecision", "session.disable_quant_qdq"):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if entry:
        options.add_session_config_entry(entry, "1")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    y = session.run(None, {"x": activations.astype(np.float32)})[0]
    wrong, largest = int((y != exact).sum()), int(np.abs(y - exact).max())
    print(f"  {entry or 'as by default':27s} {wrong:3d} of {exact.size} sums wrong, by up to {largest} (largest sum {np.abs(exact).max()})")
    found.append(wrong)
expected = sys.argv[1] == "saturates"
sys.exit(not ((found[0] > exact.size // 2) == expected and found[1:] == [0, 0]))
PYTHON

status=0
for pair in "Haswell saturates" "Nehalem exact"; do
    read -r cpu expected <<<"$pair"
    echo "onnxruntime 1.32.0 on an emulated $cpu, expected: $expected"
    ORT_DISABLE_TELEMETRY=1 OMP_NUM_THREADS=1 "$folder/qemu/usr/bin/qemu-x86_64-static" -cpu "$cpu" \
        "$folder/venv/bin/python" "$folder/sums.py" "$expected" 2>/dev/null || { echo "  not as expected"; status=1; }
done
exit $status
