"""Replace the mask of attention over a KV cache by lengths, in ``TRT_Attention``: TensorRT reads written keys alone.

``TRT_Attention`` is an operator of TensorRT's parser alone: neither ONNX's checker nor ONNX Runtime knows it. It reads
Q, K, V, mask, query_lengths, kv_lengths, the last int32 (B,). With ``causal_kind="lower_right"`` query i of S sees the
keys j <= kv_length - S + i; it does not scale (documentation of TensorRT's ONNX parser and of ``CausalMaskKind``). So
does the parser of TensorRT-RTX 1.7 read it; that of TensorRT 11.0 is documented with other inputs and a scale. It was
not executed on a GPU here, and ``standard_attention`` tests our reading of it, not TensorRT's.

Cases:
1. The attention matches export/passes/cached_attention.py. With kv_length = write_indices + S the keys that query i
   sees are the same: kv_length - S + i = write_indices + i. Right padding of a row's prompt makes no difference: S
   counts it in both, and neither shows it to a query before it.

Left as it is, with the reason: cross-attention and encoders, whose masks are of padding.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from transom.export.passes._builder import NodeBuilder
from transom.export.passes._match import ATTENTION_INPUTS, inputs_of, is_standard
from transom.export.passes.cached_attention import match_cache_mask, reason_against_lengths, scale_of
from transom.runtime.errors import ExportError

OPERATOR = "TRT_Attention"
PADDED = "padded_bhnd"
KINDS = NONE, UPPER_LEFT, LOWER_RIGHT = "none", "upper_left", "lower_right"
INPUTS = 6
DEFAULTS = {"causal_kind": NONE, "query_form": PADDED, "kv_form": PADDED}
ATTRIBUTES = {**DEFAULTS, "causal_kind": LOWER_RIGHT}


def trt_attention(model: ir.Model) -> Mapping[str, str]:
    """Rewrite every attention of case 1 in place; return {node: why it was left} of the others."""
    left: dict[str, str] = {}
    for node in [node for node in model.graph if is_standard(node, "Attention")]:
        reason = reason_against_lengths(node)
        if reason is not None:
            left[str(node.name)] = reason
            continue
        query, key, value, mask = inputs_of(node, len(ATTENTION_INPUTS))
        matched = match_cache_mask(mask)
        assert query is not None
        assert query.dtype is not None
        assert matched is not None
        builder, name = NodeBuilder(model.graph, node), str(node.outputs[0].name)
        scale = builder.weight(f"{name}.scale", np.array(scale_of(node), query.dtype.numpy()))
        scaled = builder.add("Mul", [query, scale], f"{name}.query", dtype=query.dtype)
        ends = builder.add("Add", [matched.write_indices, matched.new], f"{name}.reached", dtype=ir.DataType.INT64)
        lengths = builder.add("Cast", [ends], f"{name}.lengths", {"to": ir.DataType.INT32}, dtype=ir.DataType.INT32)
        inputs = [scaled, key, value, None, None, lengths]
        builder.replace_node(builder.add(OPERATOR, inputs, f"{name}.attended", ATTRIBUTES, dtype=query.dtype))
    RemoveUnusedNodesPass()(model)
    return left


def standard_attention(model: ir.Model) -> int:
    """Replace each ``TRT_Attention`` by standard operators, as its documentation describes it; return how many.

    ``model`` is rewritten in place. It is the reference that ``trt_attention`` is checked with: it starts from
    ``kv_lengths`` and the node's attributes, and knows nothing of the mask that was there before. Raises ExportError
    for what is not described here: a mask, packed rows, no lengths.
    """
    nodes = [node for node in model.graph if node.op_type == OPERATOR]
    int64, true = ir.DataType.INT64, ir.DataType.BOOL
    for node in nodes:
        query, key, value, mask, query_lengths, lengths = inputs_of(node, INPUTS)
        given = {name: attribute.value for name, attribute in node.attributes.items()}
        kind, *forms = (given.get(name, default) for name, default in DEFAULTS.items())
        others = mask is not None or query_lengths is not None or lengths is None or len(node.inputs) > INPUTS
        if others or forms != [PADDED, PADDED] or kind not in KINDS:
            raise ExportError(
                f"the {OPERATOR} {str(node.name)!r} has {given} and the inputs "
                f"{[v if v is None else v.name for v in node.inputs]}; expected causal_kind one of {', '.join(KINDS)}, "
                f"{PADDED}, and Q, K, V, None, None, kv_lengths. Build with --attention mask, and report this."
            )
        assert query is not None
        assert query.dtype is not None
        builder, name = NodeBuilder(model.graph, node), str(node.outputs[0].name)
        zero = builder.weight("lengths.zero", np.array(0, np.int64))
        one = builder.weight("lengths.one", np.array(1, np.int64))

        def size(tensor: ir.Value | None, what: str, builder: NodeBuilder = builder, name: str = name) -> ir.Value:
            axis = builder.add("Shape", [tensor], f"{name}.{what}.shape", {"start": 2, "end": 3}, dtype=int64)
            return builder.add("Squeeze", [axis], f"{name}.{what}", dtype=int64)

        S, C = size(query, "queries"), size(key, "keys")
        column = builder.weight("lengths.column", np.array([1, 2, 3], np.int64))
        lengths64 = builder.add("Cast", [lengths], f"{name}.wide", {"to": int64}, dtype=int64)
        length = builder.add("Unsqueeze", [lengths64, column], f"{name}.length", dtype=int64)  # (B, 1, 1, 1)
        keys = builder.add("Range", [zero, C, one], f"{name}.j", dtype=int64)  # (C,)
        queries = builder.add("Range", [zero, S, one], f"{name}.i", dtype=int64)
        last_axis = builder.weight("lengths.last", np.array([1], np.int64))
        steps = builder.add("Unsqueeze", [queries, last_axis], f"{name}.i.2d", dtype=int64)  # (S, 1)
        before = builder.add("Sub", [length, S], f"{name}.before", dtype=int64)
        diagonal = {NONE: C, UPPER_LEFT: zero, LOWER_RIGHT: before}[kind]
        last_key = builder.add("Add", [diagonal, steps], f"{name}.most", dtype=int64)
        held = builder.add("Less", [keys, length], f"{name}.held", dtype=true)  # (B, 1, 1, C)
        causal = builder.add("LessOrEqual", [keys, last_key], f"{name}.causal", dtype=true)
        visible = builder.add("And", [held, causal], f"{name}.seen", dtype=true)  # (B, 1, S, C)
        inputs = [query, key, value, visible]
        builder.replace_node(builder.add("Attention", inputs, f"{name}.plain", {"scale": 1.0}, dtype=query.dtype))
    return len(nodes)
