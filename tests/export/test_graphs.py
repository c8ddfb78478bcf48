"""The exported graphs: operators, axes, precisions, and the passes that make them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from transom.export.checkpoint import load_checkpoint
from transom.export.onnx_export import onnx_from_module
from transom.export.parity.fp16_range import RangeBackend, require_fp16_range
from transom.export.passes.cpu import optimize_for_cpu
from transom.export.passes.fake_half import fake_half
from transom.export.passes.half_precision import convert_precision
from transom.export.variants import make_variants
from transom.runtime.backends.ort import OrtBackend
from transom.runtime.errors import PrecisionError
from transom.runtime.graph_spec import Graph

MakeCheckpoint = Callable[..., Path]
# Per encoder layer: one fused attention, one GELU; two norms per layer, and one more for embeddings or the end.
PINNED = {
    "BertModel": {"Attention": 3, "Gelu": 3, "LayerNormalization": 7, "Tanh": 1, "Softmax": 0},
    "BertForMaskedLM": {"Attention": 3, "Gelu": 4, "LayerNormalization": 8, "Tanh": 0, "Softmax": 0},
    "BertForQuestionAnswering": {"Attention": 3, "Gelu": 3, "LayerNormalization": 7, "Softmax": 0},
    "ViTForImageClassification": {"Attention": 3, "Gelu": 3, "LayerNormalization": 7, "Conv": 1, "Softmax": 0},
    "ViTModel": {"Attention": 3, "Gelu": 3, "LayerNormalization": 7, "Conv": 1, "Softmax": 0},
}


def load(folder: Path) -> Any:
    return load_checkpoint(str(folder), task=None, max_sizes={}, image_size=None, ignore_unused=False)


def canonical(loaded: Any) -> ir.Model:
    return onnx_from_module(loaded.module, loaded.graphs[0], loaded.axes)


@pytest.fixture(scope="module")
def traced(make_checkpoint: MakeCheckpoint) -> Callable[[str], tuple[Any, ir.Model]]:
    """Each architecture traced once for the whole file; tests take copies."""
    kept: dict[str, tuple[Any, ir.Model]] = {}

    def get(architecture: str) -> tuple[Any, ir.Model]:
        if architecture not in kept:
            loaded = load(make_checkpoint(architecture))
            kept[architecture] = loaded, canonical(loaded)
        loaded, model = kept[architecture]
        return loaded, model.clone()

    return get


def run(model: ir.Model | bytes, feeds: Mapping[str, Any]) -> dict[str, Any]:
    data = model if isinstance(model, bytes) else ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


@pytest.mark.parametrize("architecture", PINNED)
def test_operator_counts(traced: Any, architecture: str) -> None:
    _, model = traced(architecture)
    counts = Counter(node.op_type for node in model.graph)
    assert {name: counts[name] for name in PINNED[architecture]} == PINNED[architecture]
    assert {node.domain for node in model.graph} == {""}
    assert model.opset_imports[""] == 23
    assert optimize_for_cpu(model)["attention_layout"] == counts["Attention"]


@pytest.mark.parametrize("architecture", PINNED)
def test_axes_names_and_no_trace_of_the_machine(traced: Any, architecture: str) -> None:
    loaded, model = traced(architecture)
    for tensor, value in zip(loaded.graphs[0].inputs, model.graph.inputs, strict=True):
        assert value.name == tensor.name
        assert tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape) == tensor.shape
    data = ir.to_proto(model).SerializeToString()
    assert str(Path.cwd()).encode() not in data
    assert b"site-packages" not in data
    modules = {node.metadata_props.get("module", "") for node in model.graph}
    assert any(module.startswith("encoder.layer.2.attention") for module in modules)


def test_an_axis_of_one_is_constant(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint("BertModel", num_hidden_layers=1)
    loaded = load_checkpoint(str(folder), task=None, max_sizes={"B": 1}, image_size=None, ignore_unused=False)
    model = canonical(loaded)
    shape = model.graph.inputs[0].shape
    assert shape is not None
    assert shape[0] == 1


def feeds_for(loaded: Any, B: int, S: int) -> dict[str, Any]:
    rng = np.random.default_rng(S)
    sizes = {"B": B, "S": S}
    feeds: dict[str, Any] = {}
    for tensor in loaded.graphs[0].inputs:
        shape = tuple(sizes.get(size, size) for size in tensor.shape)
        random = rng.standard_normal(shape).astype(np.float32)
        feeds[tensor.name] = random if tensor.dtype == "float32" else rng.integers(0, tensor.exclusive_max or 2, shape)
    if "attention_mask" in feeds:
        feeds["attention_mask"][:, 0] = 1
    return feeds


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 5e-3), ("bf16", 4e-2)])
@pytest.mark.parametrize("architecture", ["BertModel", "ViTForImageClassification"])
def test_half_precision(traced: Any, architecture: str, precision: str, tolerance: float) -> None:
    loaded, model = traced(architecture)
    feeds = feeds_for(loaded, 3, 13)
    with torch.inference_mode():
        outputs = loaded.module(*(torch.from_numpy(feeds[tensor.name]) for tensor in loaded.graphs[0].inputs))
    assert convert_precision(model, precision)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert {value.dtype for value in model.graph.outputs} == {ir.DataType.FLOAT}
    rounded = model.clone()
    assert fake_half(rounded)
    onnx.checker.check_model(ir.to_proto(rounded), full_check=True)
    found = run(rounded, feeds)
    for tensor, theirs in zip(loaded.graphs[0].outputs, outputs, strict=True):
        error = np.abs(found[tensor.name] - theirs.numpy()).max() / np.abs(theirs.numpy()).max()
        assert 1e-6 < error <= tolerance  # it does round, and not by more than it must


def test_fp32_is_left_alone(traced: Any) -> None:
    _, model = traced("BertModel")
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert not convert_precision(model, "fp32")
    assert not fake_half(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_the_sentence_embedding_is_pooled_in_fp32(traced: Any) -> None:
    _, model = traced("BertModel")
    convert_precision(model, "fp16")
    pooling = [node for node in model.graph if node.metadata_props.get("module") == "sentence_pooling"]
    kinds = {output.dtype for node in pooling for output in node.outputs} - {ir.DataType.INT64}
    assert len(pooling) >= 5
    assert kinds == {ir.DataType.FLOAT}


def small_model(weight: float) -> ir.Model:
    """y = gelu(x) * weight, with a weight of one element."""
    graph = helper.make_graph(
        [helper.make_node("Gelu", ["x"], ["g"]), helper.make_node("Mul", ["g", "w"], ["y"])],
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
        [helper.make_tensor("w", TensorProto.FLOAT, [1], [weight])],
        value_info=[helper.make_tensor_value_info("g", TensorProto.FLOAT, [2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return ir.from_proto(model)


def test_emulation_rounds_to_nearest_even_after_every_node() -> None:
    model = small_model(weight=3.0)
    convert_precision(model, "bf16")
    fake_half(model)
    # In BF16, 8 significant bits: x = 100.3 -> 100.5, gelu(100.5) = 100.5, * 3 = 301.5 -> 302 (steps of 2, even).
    assert run(model, {"x": np.array([100.3, 1.0], np.float32)})["y"].tolist()[0] == 302.0


def largest_values(model: ir.Model, feeds: list[dict[str, Any]]) -> dict[str, tuple[float, str]]:
    backend = RangeBackend(model, Graph("model", (), ()))
    for feed in feeds:
        backend.run(feed, {})
    return backend.largest


def test_a_weight_past_the_end_of_fp16_is_named() -> None:
    with pytest.raises(
        PrecisionError, match=r"weight w \(module top\) reaches 70000, fp16 ends at 65504; export with --precision bf16"
    ):
        convert_precision(small_model(weight=70_000.0), "fp16")
    assert convert_precision(small_model(weight=70_000.0), "bf16")


def test_the_range_of_every_tensor_is_measured() -> None:
    feeds = [{"x": np.array([1.0, 2.0], np.float32)}, {"x": np.array([-9.0, 400.0], np.float32)}]
    largest = largest_values(small_model(weight=-200.0), feeds)
    assert {name: value for name, (value, _) in largest.items()} == {"g": 400.0, "y": 80_000.0}
    with pytest.raises(PrecisionError, match=r"1 tensor\(s\), first y .* reaches 80000, fp16 ends at 65504"):
        require_fp16_range(largest)


def test_scores_inside_attention_are_measured_too(traced: Any) -> None:
    loaded, model = traced("BertModel")
    largest = largest_values(model, [feeds_for(loaded, 2, 7)])
    scores = {name: module for name, (_, module) in largest.items() if name.endswith("_scores")}
    assert sorted(scores.values()) == [f"encoder.layer.{i}.attention.self" for i in range(3)]


def test_an_overflow_in_the_middle_of_a_model_is_named(traced: Any) -> None:
    loaded, model = traced("ViTForImageClassification")
    bias = model.graph.initializers["encoder.layer.1.output.dense.bias"]
    bias.const_value = ir.Tensor(bias.const_value.numpy() * 1e6)  # the stream grows, the last LayerNorm hides it
    largest = largest_values(model, [feeds_for(loaded, 1, 1)])
    with pytest.raises(PrecisionError, match=r"encoder\.layer\.1"):
        require_fp16_range(largest)


def test_bf16_ships_a_variant_that_the_cpu_runs_and_shares_its_weights(traced: Any) -> None:
    loaded, model = traced("ViTForImageClassification")
    variants = make_variants({"model": model}, loaded.graphs, "bf16")
    assert dict(variants.graphs[0].files) == {"default": "model.onnx", "cpu": "model.cpu.onnx"}
    sizes = {name: len(data) for name, data in variants.files.items()}
    assert sizes["model.onnx"] + sizes["model.cpu.onnx"] < 0.2 * sizes["model.weights"]
    stored = onnx.load_from_string(variants.files["model.onnx"])
    assert {w.data_type for w in stored.graph.initializer} == {TensorProto.BFLOAT16, TensorProto.INT64}


def test_large_weights_lie_outside_and_compute_the_same(traced: Any) -> None:
    loaded, model = traced("BertForMaskedLM")
    feeds = feeds_for(loaded, 2, 7)
    shapes = {"logits": (2, 7, loaded.config.vocab_size)}
    answers = []
    for above in (0, 1 << 30):
        variants = make_variants({"model": model}, loaded.graphs, "fp32", external_above=above)
        assert (variants.graphs[0].weights is None) == (above > 0)
        backend = OrtBackend(variants.graphs[0], variants.files.__getitem__, "cpu", 1)
        answers.append(backend.run(feeds, shapes)["logits"])
    np.testing.assert_array_equal(*answers)


def test_equal_weights_are_stored_once(traced: Any) -> None:
    from transom.export.weights_file import externalize

    _, model = traced("BertModel")
    weights = [w for w in model.graph.initializers.values() if w.const_value is not None]
    total = sum(w.const_value.nbytes for w in weights if w.const_value is not None)
    blob, _ = externalize([model, copy.copy(model.clone())], "model.weights")
    assert len(blob) < 1.01 * total
