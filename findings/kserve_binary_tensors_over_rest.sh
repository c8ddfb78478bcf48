#!/usr/bin/env bash
# kserve 0.21.0: bytes behind the JSON of a REST message are read as UTF-8, so that no PNG can be sent or received so.
#
# The binary tensor data extension of the Open Inference Protocol puts a tensor's bytes behind the JSON of a message; an
# element of the datatype BYTES is its length and then any bytes. kserve's own classes write a PNG so, and the way back,
# which its server takes for a request and its REST client for an answer, raises InferenceError with the advice to use
# binary_data=True, which was used: the bytes are decoded as UTF-8, and 0x89, with which each PNG begins, begins no
# character. Text that is UTF-8 arrives, but as str instead of bytes. FP32 arrives, and so does the PNG over gRPC, whose
# tensors stay as they came.
#
# Needs python3 and the package registries. Leaves nothing behind. Exit status 1 where the behaviour is another than this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check kserve==0.21.0
cat >"$folder/binary.py" <<'PYTHON'
import struct
import sys
import zlib

import numpy as np
from kserve import InferInput, InferOutput, InferRequest, InferResponse, ModelRepository
from kserve.errors import InferenceError
from kserve.protocol.dataplane import DataPlane


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


HEADER = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)  # one pixel by one, 8 bits of grey
PIXEL = zlib.compress(b"\x00\xff")  # a row without a filter, and white
PNG = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", HEADER) + chunk(b"IDAT", PIXEL) + chunk(b"IEND", b"")


def request(element):
    array = np.array([element], np.float32 if isinstance(element, float) else object)
    given = InferInput("x", [1], "FP32" if isinstance(element, float) else "BYTES")
    given.set_data_from_numpy(array, binary_data=True)
    return InferRequest("model", [given])


def by_server(element):
    body, json_length = request(element).to_rest()
    headers = {"inference-header-content-length": str(json_length)}
    return DataPlane(ModelRepository()).decode(body, headers, "v2", "model")[0].inputs[0].as_numpy().item()


def by_client(element):
    answer = InferOutput("y", [1], "BYTES", np.array([element], object))
    body, json_length = InferResponse("1", "model", [answer], use_binary_outputs=True).to_rest()
    return InferResponse.from_bytes(body, json_length).outputs[0].as_numpy().item()


def by_grpc(element):
    return InferRequest.from_grpc(request(element).to_grpc()).inputs[0].as_numpy().item()


def outcome(read, element):
    try:
        found = read(element)
    except InferenceError as error:
        return f"InferenceError: {error}".replace(str(element), "...")
    return "the PNG" if found == PNG else repr(found)


found = {
    "REST request, a PNG": outcome(by_server, PNG),
    "REST answer, a PNG": outcome(by_client, PNG),
    "REST request, b'text'": outcome(by_server, b"text"),
    "REST request, 1.5": outcome(by_server, 1.5),
    "gRPC request, a PNG": outcome(by_grpc, PNG),
}
for name, what in found.items():
    print(f"{name}: {what}")
*refused, text, number, png = found.values()
errors = all(what.startswith("InferenceError") and "UTF-8" in what for what in refused)
sys.exit(not (errors and text == "'text'" and number == "1.5" and png == "the PNG"))
PYTHON
"$folder/venv/bin/python" "$folder/binary.py"
