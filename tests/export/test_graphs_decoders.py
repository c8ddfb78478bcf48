"""The decoders' graphs, as they ship: operators, axes, and what half precision leaves alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from transom.export.variants import make_variants
from transom.runtime.bundle import Bundle
from transom.runtime.manifest_graphs import GraphFile

Exported = Callable[..., tuple[Path, Path]]
# GPT-2 has three layers here, Marian's encoder three and its decoder two.
PINNED = {
    ("GPT2LMHeadModel", "decoder"): {
        "Attention": 3, "TensorScatter": 6, "Gelu": 3, "LayerNormalization": 7, "MatMul": 13, "Gather": 2,
        "Softmax": 0, "Where": 0, "Tile": 0, "Expand": 0,
    },
    ("MarianMTModel", "encoder"): {"Attention": 3, "TensorScatter": 0, "LayerNormalization": 6, "Softmax": 0},
    ("MarianMTModel", "decoder"): {"Attention": 4, "TensorScatter": 4, "LayerNormalization": 6, "Softmax": 0},
}  # fmt: skip


def shipped(exported: Exported, architecture: str, name: str) -> tuple[GraphFile, onnx.ModelProto]:
    folder = exported(architecture)[1]
    (graph,) = (graph for graph in Bundle(folder).manifest.graphs if graph.graph.name == name)
    return graph, onnx.load(folder / graph.file_for("cpu"))


@pytest.mark.parametrize(("architecture", "name"), PINNED)
def test_operator_counts(exported: Exported, architecture: str, name: str) -> None:
    _, model = shipped(exported, architecture, name)
    counts = Counter(node.op_type for node in model.graph.node)
    expected = PINNED[architecture, name]
    assert {operator: counts[operator] for operator in expected} == expected
    assert {node.domain for node in model.graph.node} == {""}
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 24 if name == "decoder" else 23)]


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "MarianMTModel"])
def test_each_cache_is_written_once_and_read_as_written(exported: Exported, architecture: str) -> None:
    """One TensorScatter from the cache's input to its output, which the layer's one Attention reads."""
    graph, model = shipped(exported, architecture, "decoder")
    nodes = model.graph.node
    scatters = {node.output[0]: node for node in nodes if node.op_type == "TensorScatter"}
    caches = {tensor.name: tensor.aliases for tensor in graph.graph.outputs if tensor.aliases}
    assert {name: node.input[0] for name, node in scatters.items()} == caches
    assert {node.input[2] for node in scatters.values()} == {"write_indices"}
    for node in scatters.values():
        found = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert found == {"axis": -2, "mode": b"linear"}
    readers = [node for node in nodes if set(node.input) & scatters.keys()]
    assert {node.op_type for node in readers} == {"Attention"}
    assert sorted(name for node in readers for name in node.input[1:3]) == sorted(scatters)
    others = {node.op_type for node in nodes if set(node.input) & set(caches.values())} - {"TensorScatter"}
    assert others == {"Shape"}  # of the first, for the mask


@pytest.mark.parametrize(("architecture", "name"), PINNED)
def test_axes_names_and_no_trace_of_the_machine(exported: Exported, architecture: str, name: str) -> None:
    graph, model = shipped(exported, architecture, name)
    declared = (*graph.graph.inputs, *graph.graph.outputs)
    for tensor, value in zip(declared, (*model.graph.input, *model.graph.output), strict=True):
        assert value.name == tensor.name
        shape = tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)
        assert shape == tensor.shape
    data = model.SerializeToString()
    assert str(Path.cwd()).encode() not in data
    assert b"site-packages" not in data
    modules = {entry.value for node in model.graph.node for entry in node.metadata_props}
    assert all(module.split(".")[0] in MODULES for module in modules), modules


MODULES = ("wte", "wpe", "h", "ln_f", "lm_head", "model")


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "MarianMTModel"])
def test_axes_and_their_likes(exported: Exported, architecture: str) -> None:
    axes = json.loads((exported(architecture)[1] / "bundle.json").read_text())["axes"]
    new = "S" if architecture == "GPT2LMHeadModel" else "T"
    assert set(axes) == {"B", "S", "C", "P", new}
    assert {name: axis.get("like") for name, axis in axes.items() if axis.get("like")} == {"C": new, "P": new}
    assert {name: axis["max"] for name, axis in axes.items()} == dict.fromkeys(axes, 67) | {"B": 3}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "MarianMTModel"])
def test_state_is_half_and_everything_else_at_the_edge_is_not(
    exported: Exported, architecture: str, precision: str
) -> None:
    names = [name for found, name in PINNED if found == architecture]
    found = [shipped(exported, architecture, name) for name in names]
    canonical = {graph.graph.name: ir.from_proto(model) for graph, model in found}
    variants = make_variants(canonical, tuple(graph.graph for graph, _ in found), precision)
    half = {"fp16": ("float16", onnx.TensorProto.FLOAT16), "bf16": ("bfloat16", onnx.TensorProto.BFLOAT16)}[precision]
    edge = {"float32": onnx.TensorProto.FLOAT, "int64": onnx.TensorProto.INT64, half[0]: half[1]}
    for graph in variants.graphs:
        model = onnx.load_from_string(variants.files[graph.files["default"]])
        declared = {tensor.name: tensor for tensor in (*graph.graph.inputs, *graph.graph.outputs)}
        for value in (*model.graph.input, *model.graph.output):
            tensor = declared[value.name]
            state = value.name.startswith(("key_cache.", "value_cache.", "cross_"))
            assert tensor.state == state
            assert tensor.dtype == (half[0] if state else "int64" if tensor.dtype == "int64" else "float32")
            assert value.type.tensor_type.elem_type == edge[tensor.dtype]
        scatters = {node.output[0] for node in model.graph.node if node.op_type == "TensorScatter"}
        assert scatters == {tensor.name for tensor in graph.graph.outputs if tensor.aliases}  # nothing cast behind them
        attention = [node for node in model.graph.node if node.op_type == "Attention"]
        assert scatters <= {name for node in attention for name in node.input}
        counts = Counter(node.op_type for node in model.graph.node)
        pinned = PINNED[architecture, graph.graph.name]
        assert {operator: counts[operator] for operator in pinned} == pinned


def test_bf16_has_a_variant_whose_state_the_cpu_can_hold(exported: Exported) -> None:
    """bundle.json says bfloat16, which is the default variant's; the CPU's own keeps float32."""
    graph, model = shipped(exported, "GPT2LMHeadModel", "decoder")
    variants = make_variants({"decoder": ir.from_proto(model)}, (graph.graph,), "bf16")
    assert dict(variants.graphs[0].files) == {"default": "decoder.onnx", "cpu": "decoder.cpu.onnx"}
    rounding = onnx.load_from_string(variants.files["decoder.cpu.onnx"])
    kinds = {value.type.tensor_type.elem_type for value in (*rounding.graph.input, *rounding.graph.output)}
    assert kinds == {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64}
    assert sum(node.op_type == "TensorScatter" for node in rounding.graph.node) == 6


def test_onnxruntime_adds_no_copy_of_a_cache(exported: Exported, tmp_path: Path) -> None:
    """After every optimisation for the CPU, caches still go from input to output through one TensorScatter."""
    path = exported("GPT2LMHeadModel")[1] / "decoder.onnx"
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    model = onnx.load(tmp_path / "optimized.onnx", load_external_data=False)
    touching = [node for node in model.graph.node if any("_cache." in name for name in (*node.input, *node.output))]
    assert Counter(node.op_type for node in touching) == {"TensorScatter": 6, "Attention": 3, "Shape": 1}
