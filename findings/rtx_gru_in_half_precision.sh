#!/usr/bin/env bash
# TensorRT-RTX 1.7.1: its ONNX parser does not read a GRU with sequence_lens in half precision; without them it does.
#
# A GRU with a length for each row, as padded batches have, in float16 or bfloat16: the parser ends in "ISelectLayer must
# have thenInput and elseInput of same types but has Half and Float". In float32 it reads it, and so it does the same GRU
# in float16 without sequence_lens. The table of operators of NVIDIA's parser lists GRU for FP32, FP16 and BF16. A Scan
# that does the same is read, in each of these types.
#
# No GPU is needed: nothing is built or executed. Needs Linux on x86-64, python3 and the package registries (146 MB).
# Leaves nothing behind. Exit status 1 where the behaviour is another than this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
    tensorrt-rtx-cu13-bindings==1.7.1.116 onnxruntime-ep-nv-tensorrt-rtx-cu13==0.5.0
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check onnx==1.23.2 numpy
cat >"$folder/gru.py" <<'PYTHON'
import ctypes
import sys
from importlib.util import find_spec
from pathlib import Path

from onnx import TensorProto, checker, helper

libraries = Path(next(iter(find_spec("onnxruntime_ep_nv_tensorrt_rtx").submodule_search_locations)))
for pattern in ("libtensorrt_rtx.so.*", "libtensorrt_onnxparser_rtx.so.*"):
    ctypes.CDLL(str(sorted(libraries.glob(pattern))[-1]), mode=ctypes.RTLD_GLOBAL)
import tensorrt_rtx_bindings as trt

S, B, E, H = 5, 2, 4, 3  # positions, rows, features of the input and of the state


def gru(kind, lengths):
    tensors = {"x": (S, B, E), "W": (2, 3 * H, E), "R": (2, 3 * H, H), "bias": (2, 6 * H)}
    inputs = [helper.make_tensor_value_info(name, kind, shape) for name, shape in tensors.items()]
    names = [*tensors]
    if lengths:
        inputs.append(helper.make_tensor_value_info("lengths", TensorProto.INT32, [B]))
        names.append("lengths")
    node = helper.make_node("GRU", names, ["y"], hidden_size=H, direction="bidirectional", linear_before_reset=1)
    graph = helper.make_graph([node], "gru", inputs, [helper.make_tensor_value_info("y", kind, [S, 2, B, H])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    checker.check_model(model, full_check=True)
    return model.SerializeToString()


logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
as_expected = True
for name, lengths, expected in (
    ("FLOAT", True, True),
    ("FLOAT16", True, False),
    ("BFLOAT16", True, False),
    ("FLOAT16", False, True),
):
    builder = trt.Builder(logger)  # which has to live as long as its network
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    read = parser.parse(gru(getattr(TensorProto, name), lengths))
    reason = "" if read else ": " + " ".join(parser.get_error(0).desc().split())[:210]
    print(f"{name}, {'with' if lengths else 'without'} lengths: {'read' if read else 'refused'}{reason}")
    as_expected &= read == expected and ("same types" in parser.get_error(0).desc() if not read else True)
sys.exit(not as_expected)
PYTHON
"$folder/venv/bin/python" "$folder/gru.py"
