"""Replace initializers of equal contents by one of them: a block of layers that is applied twice has its weights once.

The exporter transposes the weight of a linear layer wherever it is used, and shares no result of more than 1,024
elements. onnx-ir 1.1 has such a pass (``DeduplicateHashedInitializersPass``); it raises ValueError at an array that is
not contiguous, as a transposed one (findings/onnx_ir_dedup_of_transposed_arrays.sh).

Cases:
1. Equal dtype, shape and bytes: all but the first are replaced and removed.
"""

from __future__ import annotations

import hashlib

import onnx_ir as ir


def share_initializers(model: ir.Model) -> int:
    """Rewrite every initializer of case 1 in place; return how many were removed."""
    first: dict[tuple[object, ...], ir.Value] = {}
    removed = 0
    for name, value in list(model.graph.initializers.items()):
        if value.const_value is None or value.is_graph_output():
            continue
        array = value.const_value.numpy()
        key = (value.const_value.dtype, array.shape, hashlib.sha256(array.tobytes()).digest())
        kept = first.setdefault(key, value)
        if kept is not value:
            value.replace_all_uses_with(kept)
            del model.graph.initializers[name]
            removed += 1
    return removed
