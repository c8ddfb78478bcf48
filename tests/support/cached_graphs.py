"""A causal attention over a cache, written out, for the tests of what becomes of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from tiny_graphs import graph_of

HEADS, SIZE, CAPACITY = 3, 8, 12
E = HEADS * SIZE
CACHE, TOKENS = f"float[B, {HEADS}, C, {SIZE}]", f"float[B, S, {E}]"
PACKED = f"float[B, S, {3 * E}] qkv"
SPLIT = "q, k, v = Split <axis = 2, num_outputs = 3> (qkv)"
GIVEN = f"{TOKENS} q, {TOKENS} k, {TOKENS} v"
ATTENTION = "Attention <scale = 0.3> (queries, keys, values, mask)"
GRAPH = f"""model (INPUTS, {CACHE} key_cache, {CACHE} value_cache, int64[B] write_indices)
    => ({TOKENS} y, {CACHE} keys, {CACHE} values) {{
    zero = Constant <value = int64 {{0}}> ()
    one = Constant <value = int64 {{1}}> ()
    axis = Constant <value = int64[1] {{1}}> ()
    last = Constant <value = int64[1] {{2}}> ()
    apart = Constant <value = int64[4] {{0, 0, {HEADS}, {SIZE}}}> ()
    whole = Constant <value = int64[3] {{0, 0, {E}}}> ()
    SPLIT
    q_apart = Reshape (q, apart)
    queries = Transpose <perm = [0, 2, 1, 3]> (q_apart)
    k_apart = Reshape (k, apart)
    new_keys = Transpose <perm = [0, 2, 1, 3]> (k_apart)
    v_apart = Reshape (v, apart)
    new_values = Transpose <perm = [0, 2, 1, 3]> (v_apart)
    steps_shape = Shape <start = 2, end = 3> (queries)
    S = Squeeze (steps_shape)
    held_shape = Shape <start = 2, end = 3> (key_cache)
    C = Squeeze (held_shape)
    columns = Range (zero, C, one)
    steps = Range (zero, S, one)
    starts = Unsqueeze (write_indices, axis)
    places = Add (starts, steps)
    most = Unsqueeze (places, last)
    seen = LessOrEqual (columns, most)
    mask = Unsqueeze (seen, axis)
    keys = TensorScatter <axis = -2> (key_cache, new_keys, write_indices)
    values = TensorScatter <axis = -2> (value_cache, new_values, write_indices)
    mixed = {ATTENTION}
    turned = Transpose <perm = [0, 2, 1, 3]> (mixed)
    y = Reshape (turned, whole)
}}"""


def attention(packed: bool = True, graph: str = GRAPH, weights: Mapping[str, Any] | None = None) -> ir.Model:
    """The graph of packed tokens or of three values, its constants as weights: so the exporter writes them."""
    inputs, split = (PACKED, SPLIT) if packed else (GIVEN, "")
    model = graph_of(graph.replace("INPUTS", inputs).replace("SPLIT", split), weights)
    model.graph.opset_imports[""] = 24
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return model
