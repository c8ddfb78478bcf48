"""Replace ``Attention`` by an ONNX function of Transom: a plugin to TensorRT, its body to ONNX Runtime.

A function of the domain ``transom`` has a body of standard operators: ONNX Runtime runs it as it runs the node that was
there before. To TensorRT's parser the node is a plugin, by its operator's name and ``plugin_namespace``, and the body
is not read where a plugin of that name is registered [TensorRT-RTX 1.7.1's parser, by its log].

Cases:
1. Keys and values are a cache that was written at ``write_indices``, under a mask of the written keys
   (export/passes/cached_attention.py): ``CausalFlashAttention`` by lengths, which reads written keys alone.
2. A mask that broadcasts to the scores along known axes: ``MaskedFlashAttention``. A mask that was expanded over the
   queries is taken before that, for the kernel reads it once for all of them.
3. No mask: ``FlashAttention``.

All others are left, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass, RemoveUnusedNodesPass

from transom.export.passes._builder import NodeBuilder
from transom.export.passes._match import ATTENTION_INPUTS, extra_inputs, inputs_of, is_standard, made_by, size_along
from transom.export.passes.cached_attention import HEAD_SIZE, TOKENS, match_cache_mask, reason_against_lengths, scale_of

DOMAIN, VERSION = "transom", 1
PLAIN, MASKED, CAUSAL = "FlashAttention", "MaskedFlashAttention", "CausalFlashAttention"
TENSORS = ("query", "key", "value")
INPUTS = {PLAIN: TENSORS, MASKED: (*TENSORS, "mask"), CAUSAL: (*TENSORS, "lengths")}
# What TensorRT's parser reads: which plugin, and that its kernel is compiled when the engine is built
PLUGIN: Mapping[str, Any] = {"plugin_namespace": DOMAIN, "plugin_version": "1", "aot": 1}
SCALE, MASK_AXES = "scale", "mask_axes"  # attributes that the plugin itself has
ATTRIBUTES: Mapping[str, Mapping[str, type]] = {
    PLAIN: {SCALE: float},
    MASKED: {SCALE: float, MASK_AXES: str},
    CAUSAL: {SCALE: float},
}
AXES = "bhmn"  # of the scores: rows, heads, queries, keys
HEADS = AXES.index("h")
DTYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
ATTRIBUTE_TYPES = {float: ir.AttributeType.FLOAT, str: ir.AttributeType.STRING, int: ir.AttributeType.INT}
MAX_HEAD_SIZE = 256


def plugin_attention(model: ir.Model, chosen: Callable[[ir.Node], bool]) -> Mapping[str, str]:
    """Rewrite every ``Attention`` that is ``chosen`` in place; return {node: why it was left} of the others."""
    left: dict[str, str] = {}
    used: set[str] = set()
    for node in [node for node in model.graph if is_attention(node) and chosen(node)]:
        reason = reason_against_plugin(node)
        if reason is not None:
            left[str(node.name)] = reason
            continue
        used.add(replace_by_call(model.graph, node))
    for operator in sorted(used):
        function = function_of(operator, model.graph.opset_imports[""])
        model.functions[function.identifier()] = function
    if used:
        model.graph.opset_imports[DOMAIN] = VERSION
        RemoveUnusedNodesPass()(model)
    return left


def is_attention(node: ir.Node) -> bool:
    """Return whether the node is ONNX's own ``Attention``."""
    return is_standard(node, "Attention")


def has_head_bias(node: ir.Node) -> bool:
    """Return whether an ``Attention`` adds numbers of each head to its scores: a relative position bias."""
    query, _, _, mask = inputs_of(node, len(ATTENTION_INPUTS))
    if query is None or mask is None or mask.shape is None or len(mask.shape) != len(AXES):
        return False
    return mask.dtype in DTYPES and size_along(mask, HEADS) != 1 and size_along(mask, HEADS) == size_along(query, HEADS)


def reason_against_plugin(node: ir.Node) -> str | None:
    """Return why the plugin's kernel does not compute an ``Attention``; None where it does."""
    query, key, value, mask = inputs_of(node, len(ATTENTION_INPUTS))
    others = [name for name, attribute in node.attributes.items() if name != "scale" and attribute.value != 0]
    if extra_inputs(node, len(ATTENTION_INPUTS)) or len(node.outputs) > 1:
        return "with a cache of its own"
    if others:
        return f"with {', '.join(others)}"
    if query is None or query.dtype not in DTYPES:
        return "of a dtype that the plugin does not have"
    heads, shared = size_along(query, 1), size_along(key, 1)
    if not isinstance(heads, int) or not isinstance(shared, int) or heads % shared:
        return "of heads whose number is not fixed"
    if size_along(value, 1) != shared or {each.dtype for each in (key, value) if each is not None} != {query.dtype}:
        return "of keys and values that do not fit the queries"
    sizes = [size_along(each, HEAD_SIZE) for each in (query, key, value)]
    if not isinstance(sizes[0], int) or sizes.count(sizes[0]) != len(sizes) or sizes[0] > MAX_HEAD_SIZE:
        return f"of heads of {sizes[0]}, which is not 1 to {MAX_HEAD_SIZE}, or of values of another size"
    if mask is not None and mask.dtype not in (ir.DataType.BOOL, query.dtype):
        return "with a mask that is neither boolean nor of the queries' dtype"
    if mask is not None and not broadcasts(mask, query, key):
        return "with a mask whose axes are not known to be those of the scores"
    return None


def broadcasts(mask: ir.Value, query: ir.Value, key: ir.Value | None) -> bool:
    """Return whether every axis of ``mask`` is 1 or, by its number or name, that of the scores; keys are never 1."""
    wanted = [size_along(query, 0), size_along(query, 1), size_along(query, TOKENS), size_along(key, TOKENS)]
    if mask.shape is None or len(mask.shape) != len(wanted) or None in wanted:
        return False
    found = [size_along(mask, axis) for axis in range(len(wanted))]
    return found[-1] == wanted[-1] and all(a in (1, b) for a, b in zip(found, wanted, strict=True))


def replace_by_call(graph: ir.Graph, node: ir.Node) -> str:
    """Replace ``node`` by a call of a function; return the function's name."""
    query, key, value, mask = inputs_of(node, len(ATTENTION_INPUTS))
    assert query is not None
    assert query.dtype is not None
    builder, name = NodeBuilder(graph, node), str(node.outputs[0].name)
    inputs, operator = [query, key, value], PLAIN
    if mask is not None and reason_against_lengths(node) is None:
        matched = match_cache_mask(mask)
        assert matched is not None
        operator = CAUSAL
        ends = builder.add("Add", [matched.write_indices, matched.new], f"{name}.reached", dtype=ir.DataType.INT64)
        to_int32 = {"to": ir.DataType.INT32}
        inputs.append(builder.add("Cast", [ends], f"{name}.lengths", to_int32, dtype=ir.DataType.INT32))
    elif mask is not None:
        operator = MASKED
        before_expand = unexpanded(mask)
        mask = before_expand if broadcasts(before_expand, query, key) else mask
        inputs.append(mask)
    attributes = {SCALE: scale_of(node), **PLUGIN}
    if operator == MASKED and mask is not None:
        attributes[MASK_AXES] = axes_of(mask)
    result = builder.add(operator, inputs, f"{name}.attended", attributes, dtype=query.dtype, domain=DOMAIN)
    result.producer().name = node.name  # type: ignore[union-attr]  # by which reports and engines know it
    builder.replace_node(result)
    return operator


def axes_of(mask: ir.Value) -> str:
    """Return the axes of the scores that a mask has: "bn" is (B, 1, 1, T). It always has the keys'.

    They are an attribute of the node, for an engine's builder may know some sizes in one profile and not in another.
    """
    return "".join(axis for index, axis in enumerate(AXES) if axis == AXES[-1] or size_along(mask, index) != 1)


def unexpanded(mask: ir.Value) -> ir.Value:
    """Return the input, of as many axes, of the ``Expand`` that gave ``mask``; ``mask`` itself if none did."""
    made = made_by(mask, "Expand")
    source = made.inputs[0] if made is not None else None
    known = source is not None and source.shape is not None and mask.shape is not None
    return source if known and len(source.shape) == len(mask.shape) else mask  # type: ignore[union-attr, arg-type, return-value]


def function_of(operator: str, opset: int) -> ir.Function:
    """Return the function ``operator`` in standard operators of ``opset``, with the ``scale`` of the call."""
    inputs = [ir.Value(name=name) for name in INPUTS[operator]]
    query, key, value, *more = inputs
    nodes: list[ir.Node] = []

    def add(op_type: str, given: list[ir.Value | None], result: str, **attributes: Any) -> ir.Value:
        made = ir.node(op_type, given, attributes, name=f"{operator}_{result}")
        made.outputs[0].name = result
        nodes.append(made)
        return made.outputs[0]

    def constant(result: str, number: Any) -> ir.Value:
        return add("Constant", [], result, value=ir.tensor(np.array(number, np.int64), name=result))

    def size(of: ir.Value, result: str) -> ir.Value:
        return add("Squeeze", [add("Shape", [of], f"{result}.axis", start=TOKENS, end=TOKENS + 1)], result)

    mask = None
    if operator == MASKED:  # over all queries, which ONNX Runtime does not do by itself
        one, S = constant("one", [1]), add("Shape", [query], "S", start=TOKENS, end=TOKENS + 1)
        mask = add("Expand", [more[0], add("Concat", [one, one, S, one], "shape", axis=0)], "seen")
    if operator == CAUSAL:  # key j of the row's length shows to query i where j <= length - S + i
        zero, one, S, T = constant("zero", 0), constant("one", 1), size(query, "S"), size(key, "T")
        wide = add("Cast", [more[0]], "wide", to=ir.DataType.INT64)
        length = add("Unsqueeze", [wide, constant("rows", [1, 2, 3])], "length")  # (B, 1, 1, 1)
        columns = add("Range", [zero, T, one], "columns")  # (T,)
        steps = add("Unsqueeze", [add("Range", [zero, S, one], "queries"), constant("last", [1])], "steps")  # (S, 1)
        most = add("Add", [add("Sub", [length, S], "before"), steps], "most")
        held, reached = add("Less", [columns, length], "held"), add("LessOrEqual", [columns, most], "reached")
        mask = add("And", [held, reached], "seen")  # (B, 1, S, T)
    result = add("Attention", [query, key, value, mask] if mask is not None else [query, key, value], "result")
    result.producer().attributes[SCALE] = ir.RefAttr(SCALE, SCALE, ir.AttributeType.FLOAT)  # type: ignore[union-attr]
    graph = ir.Graph(inputs, [result], nodes=nodes, opset_imports={"": opset}, name=operator)
    kinds = {**ATTRIBUTES[operator], **{name: type(value) for name, value in PLUGIN.items()}}
    attributes = [ir.Attr(name, ATTRIBUTE_TYPES[kind], None) for name, kind in kinds.items()]
    return ir.Function(DOMAIN, operator, graph=graph, attributes=attributes)


def inline_functions(model: ir.Model) -> ir.Model:
    """Replace calls of functions by the functions' bodies, for passes that know standard operators alone.

    Return ``model`` itself where it has no functions.
    """
    return InlinePass()(model).model if model.functions else model
