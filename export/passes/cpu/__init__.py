"""Rewrite graphs for ONNX Runtime's CPU in operators that it executes faster: one rewrite per module.

Each is found by the structure of the graph, and applied only where it computes what the graph did, or what parity
allows. The canonical graph and TensorRT's are not rewritten. Rewritten graphs run on every CPU that ONNX Runtime has,
x86 with and without VNNI and Arm: a module says which forms its operator has there.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

from transom.export.passes._builder import clean_up
from transom.export.passes.cpu.attention_layout import flatten_heads
from transom.export.passes.cpu.group_query_attention import group_query_attention
from transom.export.passes.cpu.integer_products import write_integer_products
from transom.export.passes.weight_only import DOMAIN

Rewrite = Callable[[ir.Model], int]  # rewrites a model in place; returns how many places it changed

REWRITES: dict[str, Rewrite] = {  # in the order in which they are applied
    "group_query_attention": group_query_attention,
    "integer_products": write_integer_products,
    "attention_layout": flatten_heads,
}


def optimize_for_cpu(model: ir.Model) -> dict[str, int]:
    """Rewrite ``model`` in place for ONNX Runtime's CPU; return how many places each rewrite changed."""
    counts = {name: rewrite(model) for name, rewrite in REWRITES.items()}
    if any(counts.values()):
        model.graph.opset_imports[DOMAIN] = 1
        clean_up(model)
    return counts
