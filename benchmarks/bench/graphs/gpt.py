"""Lay out GPT-2 by hand for ONNX Runtime, and in standard operators with a growing cache.

``fused``: one MatMul of packed queries, keys and values; GroupQueryAttention on a cache of fixed size, read and written
in place; SkipLayerNormalization taking residual and bias; bias and GELU in one FastGelu; logits of the last position
alone; the tied head as an initialiser of its own, so that a quantiser sees a constant. ``plain``: the same mathematics
by MatMul, Softmax and Concat on the cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

LAYERS, HEADS, WIDTH, VOCABULARY, POSITIONS = 12, 12, 768, 50257, 1024
HEAD = WIDTH // HEADS
EPSILON = 1e-5
OPSET, IR = 17, 9
MICROSOFT = "com.microsoft"


@dataclass
class Graph:
    """Nodes and initialisers in the making."""

    weights: dict[str, Any]
    nodes: list[Any] = field(default_factory=list)
    constants: dict[str, Any] = field(default_factory=dict)

    def constant(self, name: str, array: Any) -> str:
        self.constants[name] = array
        return name

    def weight(self, name: str) -> str:
        return self.constant(name, self.weights[f"transformer.{name}"])

    def add(self, kind: str, inputs: list[str], outputs: int | list[str] = 1, domain: str = "", **settings: Any) -> Any:
        """Append a node; return its output's name, or the names."""
        stem = f"{kind}_{len(self.nodes)}"
        names = [f"{stem}_{i}" for i in range(outputs)] if isinstance(outputs, int) else outputs
        self.nodes.append(helper.make_node(kind, inputs, names, name=stem, domain=domain, **settings))
        return names[0] if len(names) == 1 else names

    def linear(self, x: str, name: str, *, bias: bool = True) -> str:
        """Multiply by a Conv1D's weight, (in, out), and add its bias."""
        product = self.add("MatMul", [x, self.weight(f"{name}.weight")])
        return str(self.add("Add", [product, self.weight(f"{name}.bias")]) if bias else product)

    def norm(self, x: str, name: str) -> str:
        scale, bias = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        return str(self.add("LayerNormalization", [x, scale, bias], axis=-1, epsilon=EPSILON))

    def skip_norm(self, x: str, skip: str, name: str, bias: str) -> list[str]:
        """Return (norm of the sum of both and the bias, that sum)."""
        inputs = [x, skip, self.weight(f"{name}.weight"), self.weight(f"{name}.bias"), self.weight(bias)]
        outputs = [f"{name}_norm", "", "", f"{name}_sum"]
        self.nodes.append(
            helper.make_node("SkipLayerNormalization", inputs, outputs, name=name, domain=MICROSOFT, epsilon=EPSILON)
        )
        return [outputs[0], outputs[3]]

    def head(self, x: str) -> None:
        """Write ``logits`` (B, vocabulary) of the last position."""
        last = self.add("Gather", [x, self.constant("last", np.array(-1, np.int64))], axis=1)
        table = np.ascontiguousarray(self.weights["transformer.wte.weight"].T)
        self.add("MatMul", [last, self.constant("lm_head.weight", table)], ["logits"])

    def model(self, inputs: list[Any], outputs: list[Any]) -> Any:
        stored = [numpy_helper.from_array(np.asarray(a, order="C"), name) for name, a in self.constants.items()]
        graph = helper.make_graph(self.nodes, "gpt2", inputs, outputs, stored)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR)


def value(name: str, kind: int, shape: list[Any]) -> Any:
    return helper.make_tensor_value_info(name, kind, shape)


def embedded(graph: Graph, positions: str) -> str:
    tokens = graph.add("Gather", [graph.weight("wte.weight"), "input_ids"])
    return str(graph.add("Add", [tokens, graph.add("Gather", [graph.weight("wpe.weight"), positions])]))


def fused(weights: dict[str, Any]) -> Any:
    """Return the graph for ONNX Runtime.

    Inputs: ``input_ids`` and ``positions`` int64 (1, S), ``seqlens_k`` int32 (1,), tokens before and in this call
    minus 1, ``total`` int32 (), their number; past.<i>.key and .value, (1, heads, capacity, 64), bound as outputs too.
    """
    g = Graph(weights)
    x = embedded(g, "positions")
    normed = g.norm(x, "h.0.ln_1")
    caches_in, caches_out = [], []
    for i in range(LAYERS):
        layer = f"h.{i}"
        packed = g.linear(normed, f"{layer}.attn.c_attn")
        q, k, v = g.add("Split", [packed, g.constant("three", np.array([WIDTH] * 3, np.int64))], 3, axis=-1)
        past = [f"past.{i}.key", f"past.{i}.value"]
        present = [f"present.{i}.key", f"present.{i}.value"]
        attended = g.add(
            "GroupQueryAttention", [q, k, v, *past, "seqlens_k", "total"], [f"attention_{i}", *present],
            domain=MICROSOFT, num_heads=HEADS, kv_num_heads=HEADS,
        )[0]  # fmt: skip
        projected = g.linear(attended, f"{layer}.attn.c_proj", bias=False)
        normed, x = g.skip_norm(projected, x, f"{layer}.ln_2", f"{layer}.attn.c_proj.bias")
        wide = g.linear(normed, f"{layer}.mlp.c_fc", bias=False)
        active = g.add("FastGelu", [wide, g.weight(f"{layer}.mlp.c_fc.bias")], domain=MICROSOFT)
        narrow = g.linear(active, f"{layer}.mlp.c_proj", bias=False)
        following = f"h.{i + 1}.ln_1" if i + 1 < LAYERS else "ln_f"
        normed, x = g.skip_norm(narrow, x, following, f"{layer}.mlp.c_proj.bias")
        caches_in += [value(name, TensorProto.FLOAT, [1, HEADS, "C", HEAD]) for name in past]
        caches_out += [value(name, TensorProto.FLOAT, [1, HEADS, "C", HEAD]) for name in present]
    g.head(normed)
    inputs = [
        value("input_ids", TensorProto.INT64, [1, "S"]),
        value("positions", TensorProto.INT64, [1, "S"]),
        value("seqlens_k", TensorProto.INT32, [1]),
        value("total", TensorProto.INT32, []),
    ]
    return g.model(inputs + caches_in, [value("logits", TensorProto.FLOAT, [1, VOCABULARY]), *caches_out])


def plain(weights: dict[str, Any]) -> Any:
    """Return the graph in standard operators: past.<i>.key and .value (1, heads, P, 64) in, present.<i>.* out."""
    g = Graph(weights)
    x = embedded(g, "positions")
    split = g.constant("split", np.array([1, -1, HEADS, HEAD], np.int64))
    merge = g.constant("merge", np.array([1, -1, WIDTH], np.int64))
    keys_at = g.add("Unsqueeze", [
        g.add("Range", [g.constant("zero", np.array(0, np.int64)), g.add("Add", [
            g.add("ReduceMax", ["positions"], keepdims=0), g.constant("one", np.array(1, np.int64))]),
            "one"]), g.constant("front", np.array([0, 1], np.int64))])  # fmt: skip
    queries_at = g.add("Unsqueeze", ["positions", g.constant("second", np.array([2], np.int64))])
    seen = g.add("LessOrEqual", [keys_at, queries_at])
    mask = g.add("Unsqueeze", [
        g.add("Where", [seen, g.constant("nothing", np.float32(0)), g.constant("never", np.float32(-1e9))]),
        g.constant("heads_axis", np.array([1], np.int64))])  # fmt: skip
    scale = g.constant("scale", np.float32(HEAD**-0.5))
    caches_in, caches_out = [], []
    for i in range(LAYERS):
        layer = f"h.{i}"
        packed = g.linear(g.norm(x, f"{layer}.ln_1"), f"{layer}.attn.c_attn")
        q, k, v = (
            g.add("Transpose", [g.add("Reshape", [part, split])], perm=[0, 2, 1, 3])
            for part in g.add("Split", [packed, g.constant("three", np.array([WIDTH] * 3, np.int64))], 3, axis=-1)
        )
        names = [(f"past.{i}.{kind}", f"present.{i}.{kind}") for kind in ("key", "value")]
        keys = g.add("Concat", [names[0][0], k], [names[0][1]], axis=2)
        values = g.add("Concat", [names[1][0], v], [names[1][1]], axis=2)
        scores = g.add("MatMul", [g.add("Mul", [q, scale]), g.add("Transpose", [keys], perm=[0, 1, 3, 2])])
        weights_of = g.add("Softmax", [g.add("Add", [scores, mask])], axis=-1)
        attended = g.add("Transpose", [g.add("MatMul", [weights_of, values])], perm=[0, 2, 1, 3])
        x = g.add("Add", [x, g.linear(g.add("Reshape", [attended, merge]), f"{layer}.attn.c_proj")])
        wide = g.linear(g.norm(x, f"{layer}.ln_2"), f"{layer}.mlp.c_fc")
        x = g.add("Add", [x, g.linear(gelu(g, wide), f"{layer}.mlp.c_proj")])
        caches_in += [value(past, TensorProto.FLOAT, [1, HEADS, "P", HEAD]) for past, _ in names]
        caches_out += [value(present, TensorProto.FLOAT, [1, HEADS, "T", HEAD]) for _, present in names]
    g.head(g.norm(x, "ln_f"))
    inputs = [value("input_ids", TensorProto.INT64, [1, "S"]), value("positions", TensorProto.INT64, [1, "S"])]
    return g.model(inputs + caches_in, [value("logits", TensorProto.FLOAT, [1, VOCABULARY]), *caches_out])


def gelu(g: Graph, x: str) -> str:
    """Write GPT-2's GELU by tanh: x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    cube = g.add("Mul", [g.add("Mul", [x, x]), x])
    inner = g.add("Add", [x, g.add("Mul", [cube, g.constant("c3", np.float32(0.044715))])])
    tanh = g.add("Tanh", [g.add("Mul", [inner, g.constant("c1", np.float32(np.sqrt(2 / np.pi)))])])
    half = g.add("Mul", [x, g.constant("half", np.float32(0.5))])
    return str(g.add("Mul", [half, g.add("Add", [tanh, g.constant("unit", np.float32(1))])]))


def weights_of(checkpoint: Path) -> dict[str, Any]:
    from safetensors.numpy import load_file

    return dict(load_file(checkpoint / "model.safetensors"))


def write(model: Any, target: Path) -> None:
    """Write the graph whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    onnx.save(model, partial)
    partial.replace(target)
