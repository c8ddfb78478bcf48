#!/usr/bin/env bash
# kserve 0.21.0: an answer of arrays cannot be written for gRPC where outputs are to be binary, or where one is FP16.
#
# InferOutput takes a NumPy array as its data. InferResponse.to_grpc, which the server calls on what a model returns,
# asks that array whether it is true where use_binary_outputs is on or where any output is FP16: ValueError for an array
# of more than one element. One element passes, and so does the same array as a list, by set_data_from_numpy, without
# the option, and over REST with it.
#
# Needs python3 and the package registries. Leaves nothing behind. Exit status 1 where the behaviour is another than this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check kserve==0.21.0
cat >"$folder/arrays.py" <<'PYTHON'
import sys

import numpy as np
from kserve import InferOutput, InferResponse

TWO = np.array([1.5, -2.0], np.float32)


def output(array, data=None):
    datatype = {"float32": "FP32", "float16": "FP16"}[array.dtype.name]
    return InferOutput("y", list(array.shape), datatype, array if data is None else data)


def set_from_numpy(array):
    made = InferOutput("y", list(array.shape), "FP32")
    made.set_data_from_numpy(array)
    return made


def grpc(made, binary):
    try:
        message = InferResponse("1", "model", [made], use_binary_outputs=binary).to_grpc()
    except ValueError as error:
        return f"ValueError: {error}"
    return str(InferResponse.from_grpc(message).outputs[0].as_numpy().tolist())


def rest(made, binary):
    body, json_length = InferResponse("1", "model", [made], use_binary_outputs=binary).to_rest()
    return str(InferResponse.from_bytes(body, json_length).outputs[0].as_numpy().tolist())


found = {
    "gRPC, FP32 array, binary outputs": grpc(output(TWO), True),
    "gRPC, FP16 array": grpc(output(TWO.astype(np.float16)), False),
    "gRPC, FP32 array of one element, binary outputs": grpc(output(TWO[:1]), True),
    "gRPC, FP32 list, binary outputs": grpc(output(TWO, TWO.tolist()), True),
    "gRPC, set_data_from_numpy, binary outputs": grpc(set_from_numpy(TWO), True),
    "gRPC, FP32 array": grpc(output(TWO), False),
    "REST, FP32 array, binary outputs": rest(output(TWO), True),
}
for name, what in found.items():
    print(f"{name}: {what}")
both = str(TWO.tolist())
refused, written = list(found.values())[:2], list(found.values())[2:]
sys.exit(not (all("ValueError" in what for what in refused) and written == [str(TWO[:1].tolist()), *[both] * 4]))
PYTHON
"$folder/venv/bin/python" "$folder/arrays.py"
