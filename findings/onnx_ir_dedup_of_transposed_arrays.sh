#!/usr/bin/env bash
# onnx-ir 1.1.0: DeduplicateHashedInitializersPass raises ValueError at an initializer whose array is not contiguous.
#
# The pass hashes the buffer of each array. A transposed one, as torch.onnx.export of torch 2.13 keeps for the weight of a
# linear layer, has no buffer in one piece: "ndarray is not C-contiguous", though its values are equal to those of a
# contiguous one, of which the pass removes the second. DeduplicateInitializersPass, which compares copies, removes both.
#
# Needs python3 and the package registries. Leaves nothing behind. Exit status 1 where the behaviour is another than this.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check onnx-ir==1.1.0 onnx==1.23.2 numpy
cat >"$folder/dedup.py" <<'PYTHON'
import sys

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import DeduplicateHashedInitializersPass, DeduplicateInitializersPass


def left_by(make_pass, turned):
    """Return how many of two equal initializers are left, or the error."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    array = array.T if turned else np.ascontiguousarray(array.T)
    values = [ir.Value(name=name, const_value=ir.tensor(array, name=name)) for name in "ab"]
    nodes = [ir.node("Identity", [value]) for value in values]
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph([], outputs, nodes=nodes, initializers=values, opset_imports={"": 23})
    try:
        make_pass()(ir.Model(graph, ir_version=10))
    except Exception as error:
        return f"{type(error).__name__}: {error.__cause__ or error}"
    return len(graph.initializers)


found = {
    (make.__name__, turned): left_by(make, turned)
    for make in (DeduplicateInitializersPass, DeduplicateHashedInitializersPass)
    for turned in (False, True)
}
for (name, turned), left in found.items():
    print(f"{name}, {'transposed' if turned else 'contiguous'}: {left}")
raised = "contiguous" in str(found["DeduplicateHashedInitializersPass", True])
sys.exit(0 if raised and list(found.values())[:3] == [1, 1, 1] else 1)
PYTHON
"$folder/venv/bin/python" "$folder/dedup.py"
