"""Make TensorRT's variant of a bundle's graphs, of standard operators, so that ONNX Runtime runs the same file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from transom.export.bundle_graphs import stored_graphs
from transom.export.engine.profiles import cache_sizes, require_tables
from transom.export.passes._match import ATTENTION_INPUTS, body_of, inputs_of
from transom.export.passes.decompose_attention import decompose_attention
from transom.export.passes.freeze_axes import freeze_dynamic_axes
from transom.export.passes.gru_scan import gru_scan
from transom.export.passes.one_row_per_group import one_row_per_group
from transom.export.passes.pad_heads import head_widths, pad_heads
from transom.export.passes.plugin_attention import MAX_HEAD_SIZE, has_head_bias, is_attention, plugin_attention
from transom.export.passes.split_fused_matmul import split_fused_matmul
from transom.export.passes.trt_attention import OPERATOR, trt_attention
from transom.runtime.bundle import Bundle
from transom.runtime.errors import ExportError
from transom.runtime.graph_spec import Axis, Graph, is_decoder

MASK, LENGTHS = "mask", "lengths"  # how attention knows which positions of a cache are filled
HEAD_BIAS = "with a bias per head"  # why an attention is Transom's plugin though TensorRT has a kernel
# Limits of TensorRT's attention kernels: heads for a single query, sizes of a head, multiple with a mask
STEP_HEADS = 4
LEAST_SIZE, MOST_SIZE, MASKED_SIZES = 9, 256, 8


@dataclass(frozen=True)
class TensorRTGraph:
    """A graph for TensorRT's builder; attentions by node, each with the reason of how it is computed."""

    model: ir.Model
    decomposed: Mapping[str, str] = field(default_factory=dict)  # attentions without a kernel
    plugins: Mapping[str, str] = field(default_factory=dict)  # those of Transom's kernel; HEAD_BIAS by choice
    masked: Mapping[str, str] = field(default_factory=dict)  # those with a mask though lengths were requested

    @property
    def operators(self) -> dict[str, str]:
        """Return the operator of each node by its name, as TensorRT's parser has it: ``scan.node`` in a loop's body."""
        found = {str(node.name): node.op_type for node in self.model.graph}
        loops = ((node, body) for node in self.model.graph if (body := body_of(node)) is not None)
        return found | {f"{loop.name}.{node.name}": node.op_type for loop, body in loops for node in body}

    @property
    def integer_products(self) -> tuple[str, ...]:
        """Return the names of products and convolutions of dequantised tensors, which TensorRT computes in integers."""
        return tuple(
            str(node.name)
            for node in self.model.graph
            if node.op_type in ("MatMul", "Gemm", "Conv") and all(is_dequantized(value) for value in node.inputs[:2])
        )

    def serialized(self) -> bytes:
        data: bytes = ir.to_proto(self.model).SerializeToString()
        return data


def is_dequantized(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == "DequantizeLinear"


def tensorrt_graphs(
    bundle: Bundle, attention: str = MASK, *, plugins: bool = False, axes: Mapping[str, Axis] | None = None
) -> dict[str, TensorRTGraph]:
    """Return the default graphs by name, rewritten for TensorRT's builder.

    A KV cache gets its greatest length, the only one that TensorRT writes to. Groups of rows that share images become
    single rows (export/passes/one_row_per_group.py). Attention without a TensorRT kernel is decomposed, or with
    ``plugins``, which full TensorRT supports, becomes a function that Transom's kernel computes; so does attention with
    a bias per head, which otherwise stays TensorRT's (docs/decisions.md has the reasons). Heads of two widths are
    padded to one where that gives them a kernel. A fused integer product that is split becomes a product for each
    output, for TensorRT dequantises the fused one. A GRU becomes a loop of one product a step, for the parser does not
    read it in half precision. With ``attention`` LENGTHS a cache is read by lengths instead of a mask. ``axes`` are the
    engine's bounds, by default the bundle's. All else is unchanged. Raises BundleError for axes beyond the graph's
    tables, ExportError for LENGTHS without a cache to read.
    """
    models = stored_graphs(bundle, "default")
    axes = bundle.manifest.axes if axes is None else axes
    graphs = {}
    for file in bundle.manifest.graphs:
        model = models[file.graph.name]
        require_tables(model, file.graph, axes)
        if is_decoder(file.graph):
            freeze_dynamic_axes(model, cache_sizes(file.graph, axes))
            one_row_per_group(model, axes)
        pad_heads(model, lambda node, graph=file.graph: gains_by_padding(node, graph, plugins))  # type: ignore[misc]
        reasons = {node: without_kernel(node, file.graph) for node in model.graph if is_attention(node)}
        refused = {node: reason for node, reason in reasons.items() if reason is not None}
        decomposed = {str(node.name): reason for node, reason in refused.items()}
        ours: dict[str, str] = {}
        if plugins:
            chosen = {node: HEAD_BIAS for node in reasons if has_head_bias(node)} | refused
            left = plugin_attention(model, chosen.__contains__)
            ours = {str(node.name): reason for node, reason in chosen.items() if str(node.name) not in left}
            lost = {name: reason for name, reason in left.items() if name in decomposed}
            decomposed = {name: f"{decomposed[name]}, and ours none {reason}" for name, reason in lost.items()}
        decompose_attention(model, refused.__contains__)
        split_fused_matmul(model)
        gru_scan(model)
        masked = trt_attention(model) if attention == LENGTHS else {}
        graphs[file.graph.name] = TensorRTGraph(model, decomposed, ours, masked)
    if attention == LENGTHS and not any(OPERATOR in graph.operators.values() for graph in graphs.values()):
        raise ExportError(
            f"--attention {LENGTHS} is for caches in half precision that a fused attention reads, and {bundle.folder} "
            "has none. Leave it out, or export a decoder with --precision fp16."
        )
    return graphs


def gains_by_padding(node: ir.Node, graph: Graph, plugins: bool) -> bool:
    """Return whether an ``Attention`` whose heads have two widths has a kernel once the narrower ones are padded."""
    widths = head_widths(node)
    if widths is None or widths[0] == widths[1]:
        return False
    ours = plugins and max(widths) <= MAX_HEAD_SIZE
    return ours or without_kernel(node, graph, padded=True) is None


def without_kernel(node: ir.Node, graph: Graph, *, padded: bool = False) -> str | None:
    """Return why TensorRT has no fused kernel for an ``Attention``; None where it has one.

    Determined by building one of each (docs/tensorrt.md has the table): TensorRT-RTX 1.7.1. With ``padded`` as if
    its heads had one width, the larger.
    """
    query, _, value, mask = inputs_of(node, len(ATTENTION_INPUTS))
    if query is None or query.shape is None:
        return None
    _, heads, queries, size = query.shape
    width = size if value is None or value.shape is None else value.shape[3]
    if padded and isinstance(size, int) and isinstance(width, int):
        size = width = max(size, width)
    if query.dtype == ir.DataType.FLOAT:
        return "in FP32"
    if isinstance(size, int) and not LEAST_SIZE <= size <= MOST_SIZE:
        return f"of heads of {size}, which is not {LEAST_SIZE} to {MOST_SIZE}"
    if isinstance(size, int) and mask is not None and size % MASKED_SIZES:
        return f"of heads of {size} with a mask, which is no multiple of {MASKED_SIZES}"
    if isinstance(size, int) and isinstance(width, int) and size != width:
        return f"of heads of {size} for queries and of {width} for values"
    if isinstance(heads, int) and heads < STEP_HEADS and queries == 1:
        return f"of fewer than {STEP_HEADS} heads for a single query"
    if heads == 1 and mask is not None:
        return "of one head with a mask"
    if isinstance(heads, int) and heads < STEP_HEADS and is_decoder(graph):
        return f"of fewer than {STEP_HEADS} heads in steps of one token"
    return None
