"""Attention by lengths: the pass, the operator as its documentation describes it, and real engines of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from command_line import document, error_line, transom
from rtx import needs_rtx
from tiny_graphs import graph_of, normal, operators
from transom.export.bundle_graphs import stored_graphs
from transom.export.engine.profiles import cache_sizes
from transom.export.engine.trt_graphs import LENGTHS, TensorRTGraph, tensorrt_graphs
from transom.export.engine.trt_parity import require_trt_parity
from transom.export.passes.freeze_axes import freeze_dynamic_axes
from transom.export.passes.trt_attention import OPERATOR, standard_attention, trt_attention
from transom.runtime.backends.trt_library import RTX, library
from transom.runtime.bundle import Bundle
from transom.runtime.errors import ExportError, ParityError

CAPACITY, HEADS, SIZE = 12, 2, 8
NEW, HELD = f"float[B, {HEADS}, S, {SIZE}]", f"float[B, {HEADS}, C, {SIZE}]"
CACHED = f"""model ({NEW} q, {NEW} new, {HELD} cache, int64[B] write_indices) => ({NEW} y, {HELD} written) {{
    zero = Constant <value = int64 {{0}}> ()
    zero_axis = Constant <value = int64[1] {{0}}> ()
    one = Constant <value = int64 {{1}}> ()
    axis = Constant <value = int64[1] {{1}}> ()
    last = Constant <value = int64[1] {{2}}> ()
    steps_shape = Shape <start = 2, end = 3> (q)
    S = Squeeze (steps_shape)
    held_shape = Shape <start = 2, end = 3> (cache)
    C = Squeeze (held_shape)
    keys = Range (zero, C, one)
    queries = Range (zero, S, one)
    starts = Unsqueeze (write_indices, axis)
    places = Add (starts, queries)
    most = Unsqueeze (places, last)
    seen = LessOrEqual (keys, most)
    mask = Unsqueeze (seen, axis)
    written = TensorScatter <axis = 2> (cache, new, write_indices)
    y = Attention <scale = 0.3> (q, written, written, mask)
}}"""


def cached(text: str = CACHED) -> ir.Model:
    """The graph, its constants as weights: so the exporter writes them."""
    from onnx_ir.passes.common import LiftConstantsToInitializersPass

    model = graph_of(text.replace('"" : 23', '"" : 24'))
    model.graph.opset_imports[""] = 24
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return model


def run(model: ir.Model, **feeds: Any) -> Any:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(["y"], feeds)[0]


def cache_of(new: int, starts: tuple[int, ...]) -> dict[str, Any]:
    """Rows at their own places; what lies behind them in the cache is 100, which one wrong key would show."""
    cache = np.full((2, HEADS, CAPACITY, SIZE), 100, np.float32)
    for row, start in enumerate(starts):
        cache[row, :, :start] = normal(HEADS, start, SIZE, seed=2 + row)
    feeds = {"q": normal(2, HEADS, new, SIZE), "new": normal(2, HEADS, new, SIZE, seed=1)}
    return feeds | {"cache": cache, "write_indices": np.array(starts)}


def set_kind(model: ir.Model, kind: str) -> None:
    for node in model.graph:
        if node.op_type == OPERATOR:
            node.attributes["causal_kind"] = ir.AttrString("causal_kind", kind)


@pytest.mark.parametrize("text", [CACHED, CACHED.replace("<scale = 0.3> ", "")], ids=["scale", "usual scale"])
@pytest.mark.parametrize(
    ("new", "starts"),
    [(7, (0, 0)), (3, (4, 6)), (1, (0, 11)), (1, (5, 2)), (12, (0, 0))],
    ids=["prompt", "chunk", "first and last step", "steps", "full"],
)
def test_lengths_see_what_the_mask_shows(text: str, new: int, starts: tuple[int, ...]) -> None:
    masked, by_length = cached(text), cached(text)
    assert trt_attention(by_length) == {}
    assert operators(by_length)[OPERATOR] == 1
    assert operators(by_length)["LessOrEqual"] == 0  # the mask went
    assert standard_attention(by_length) == 1
    feeds = cache_of(new, starts)
    np.testing.assert_allclose(run(by_length, **feeds), run(masked, **feeds), atol=1e-6)


@pytest.mark.parametrize("kind", ["upper_left", "none"])
def test_another_causal_kind_is_another_result(kind: str) -> None:
    """A chunk of three in the middle: from the left its queries miss what is held, with none they see one another."""
    model = cached()
    trt_attention(model)
    set_kind(model, kind)
    standard_attention(model)
    feeds = cache_of(3, (4, 6))
    assert np.abs(run(model, **feeds) - run(cached(), **feeds)).max() > 0.1


def test_the_documented_operator_by_hand() -> None:
    """Three keys are held of four, two queries, equal scores: each sees a mean of 1, 2, 4; the fourth key is 100."""
    text = """model (float[1, 1, 2, 1] q, float[1, 1, 4, 1] k, float[1, 1, 4, 1] v, int32[1] held)
    => (float[1, 1, 2, 1] y) {
        y = TRT_Attention <causal_kind = "KIND"> (q, k, v, , , held)
    }"""
    values = np.array([1, 2, 4, 100], np.float32).reshape(1, 1, 4, 1)
    feeds = {"q": np.zeros((1, 1, 2, 1), np.float32), "k": np.zeros_like(values), "v": values, "held": np.int32([3])}
    for kind, expected in (("none", [7 / 3, 7 / 3]), ("upper_left", [1, 3 / 2]), ("lower_right", [3 / 2, 7 / 3])):
        model = ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 24]>{text}'))
        model.graph[0].inputs[0].dtype = ir.DataType.FLOAT
        set_kind(model, kind)
        standard_attention(model)
        np.testing.assert_allclose(run(model, **feeds).ravel(), expected, rtol=1e-6)


@pytest.mark.parametrize("wrong", ["packed_nhd", "sideways", "no lengths", "lengths as input 7"])
def test_what_the_reference_does_not_describe_is_refused(wrong: str) -> None:
    model = cached()
    trt_attention(model)
    (node,) = [node for node in model.graph if node.op_type == OPERATOR]
    if wrong == "packed_nhd":
        node.attributes["kv_form"] = ir.AttrString("kv_form", wrong)
    elif wrong == "sideways":
        set_kind(model, wrong)
    else:
        lengths = node.inputs[5]
        node.replace_input_with(5, None)
        if wrong == "lengths as input 7":
            node.resize_inputs(8)
            node.replace_input_with(7, lengths)
    with pytest.raises(
        ExportError, match=r"expected causal_kind one of none, .* padded_bhnd, and Q, K, V, None, None, kv"
    ):
        standard_attention(model)


STEPS, HELD_SHAPE = "steps_shape = Shape <start = 2, end = 3> (q)", "held_shape = Shape <start = 2, end = 3> (cache)"
MASK, QUERIES, KEYS = "its mask is another", "its mask counts other queries", "its mask counts other keys"


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("LessOrEqual (keys, most)", "Less (keys, most)", MASK),
        ("LessOrEqual (keys, most)", "LessOrEqual (most, keys)", MASK),
        ("Add (starts, queries)", "Sub (starts, queries)", MASK),
        ("Range (zero, S, one)", "Range (one, S, one)", MASK),
        ("mask = Unsqueeze (seen, axis)", "mask = Unsqueeze (seen, zero_axis)", MASK),
        ("most = Unsqueeze (places, last)", "most = Unsqueeze (places, axis)", MASK),
        ("starts = Unsqueeze (write_indices, axis)", "starts = Unsqueeze (write_indices, zero_axis)", MASK),
        ("S = Squeeze (steps_shape)", "S = Identity (one)", QUERIES),
        (STEPS, STEPS.replace("2, end = 3", "0, end = 1"), QUERIES),
        (HELD_SHAPE, HELD_SHAPE.replace("2, end = 3", "3, end = 4"), KEYS),
        ("(q, written, written, mask)", "(q, cache, cache, mask)", "its keys are no cache that is written"),
        ("(q, written, written, mask)", "(q, written, cache, mask)", "its keys are no cache that is written"),
        ("<axis = 2> (cache", '<axis = 2, mode = "circular"> (cache', "its keys are no cache that is written"),
        ("(q, written, written, mask)", "(q, written, written)", "it has no mask"),
        ("<scale = 0.3>", "<scale = 0.3, is_causal = 1>", "it has is_causal 1"),
        ("<scale = 0.3>", "<scale = 0.3, softcap = 2.0>", "it has softcap 2.0"),
    ],
)
def test_what_is_no_such_attention_stays(old: str, new: str, why: str) -> None:
    assert old in CACHED
    model = cached(CACHED.replace(old, new))
    (reason,) = trt_attention(model).values()
    assert reason.startswith(why)
    assert operators(model)["Attention"] == 1
    assert operators(model)[OPERATOR] == 0


def test_a_transformer_reads_its_own_cache_by_lengths(dates_bundle: Path) -> None:
    """Attention over its source stays, and a whole generation is what it was: in FP32, to see more than rounding."""
    bundle = Bundle(dates_bundle)
    models, specs = stored_graphs(bundle, "default"), {file.graph.name: file.graph for file in bundle.manifest.graphs}
    assert trt_attention(models["encoder"]).keys() == {
        node.name for node in models["encoder"].graph if node.op_type == "Attention"
    }
    decoder = models["decoder"]
    layers = operators(decoder)["Attention"] // 2
    freeze_dynamic_axes(decoder, cache_sizes(specs["decoder"], bundle.manifest.axes))
    assert list(trt_attention(decoder).values()) == ["its keys are no cache that is written"] * layers
    assert (operators(decoder)[OPERATOR], operators(decoder)["LessOrEqual"]) == (layers, 0)
    graphs = {name: TensorRTGraph(model) for name, model in models.items()}
    assert require_trt_parity(bundle, graphs) < 2e-5
    set_kind(decoder, "upper_left")
    with pytest.raises(ParityError, match="does not compute what the bundle does"):
        require_trt_parity(bundle, graphs)


@needs_rtx
def test_a_gpt_by_lengths_fuses(half_gpt_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = Path(shutil.copytree(half_gpt_bundle, tmp_path / "bundle"))
    listed = document(
        transom("build", folder, "--target", "rtx-sm75", "--target", "rtx-sm120", "--attention", "lengths", "--json")
    )
    for engine in listed["engines"]:
        assert [profile["attention"]["fused"] for profile in engine["profiles"]] == [4, 4]
    assert {engine["attention"] for engine in Bundle(folder).manifest.engines.values()} == {"lengths"}


@needs_rtx
def test_the_parser_takes_the_lengths_the_kind_and_no_scale(half_gpt_bundle: Path) -> None:
    """What TensorRT-RTX's parser makes of the operator, which drops an input that it does not know without a word."""
    (graph,) = tensorrt_graphs(Bundle(half_gpt_bundle), LENGTHS).values()
    trt = library(RTX)
    log = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(log).create_network(0)
    assert trt.OnnxParser(network, log).parse(graph.serialized())
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    readers = [layer for layer in layers if layer.type == trt.LayerType.ATTENTION_INPUT]
    assert len(readers) == 4
    makers = {layer.get_output(0).name: layer for layer in layers}
    for layer in readers:
        layer.__class__ = trt.IAttentionInputLayer
        attention = layer.attention
        assert (attention.causal_kind, attention.mask) == (trt.CausalMaskKind.LOWER_RIGHT, None)
        assert attention.key_value_lengths.dtype == trt.int32
        assert makers[layer.get_input(0).name].name.startswith("Mul_")  # ours, and no second one behind it
        assert makers[layer.get_input(1).name].type == trt.LayerType.KV_CACHE_UPDATE


@pytest.mark.parametrize("wrong", ["one key too few", "no scale", "upper left"])
def test_a_wrong_rewrite_is_seen_in_a_whole_generation(half_gpt_bundle: Path, wrong: str) -> None:
    bundle = Bundle(half_gpt_bundle)
    graphs = tensorrt_graphs(bundle, LENGTHS)
    assert require_trt_parity(bundle, graphs) < 5e-3
    (graph,) = graphs.values()
    if wrong == "no scale":
        for name, weight in graph.model.graph.initializers.items():
            if name.endswith(".scale"):
                weight.const_value = ir.Tensor(np.array(1, np.float16), name=name)
    elif wrong == "upper left":
        set_kind(graph.model, "upper_left")
    else:
        for node in graph.model.graph:
            if node.op_type == OPERATOR:  # write_indices alone: the newest token is not seen
                added = node.inputs[5].producer().inputs[0].producer()  # type: ignore[union-attr]
                node.inputs[5].producer().replace_input_with(0, added.inputs[0])  # type: ignore[union-attr]
    with pytest.raises(ParityError, match="does not compute what the bundle does"):
        require_trt_parity(bundle, graphs)


def test_lengths_without_such_a_cache_are_refused(gpt_bundle: Path, vit_bundle: Path) -> None:
    for folder in (gpt_bundle, vit_bundle):  # FP32 has no kernel; an encoder no cache
        with pytest.raises(ExportError, match="is for caches in half precision that a fused attention reads"):
            tensorrt_graphs(Bundle(folder), LENGTHS)


def test_lengths_are_for_the_targets_whose_parser_was_seen_to_read_them(gpt_bundle: Path) -> None:
    line = error_line(transom("build", gpt_bundle, "--target", "tensorrt", "--attention", "lengths"))
    assert "--attention lengths is for the targets of TensorRT-RTX, and --target is 'tensorrt'" in line
