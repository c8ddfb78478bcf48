"""The attention that TensorRT has no kernel of, as the plugin's function: what it computes and refuses."""

from __future__ import annotations

import json
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from builder_logs import layer
from command_line import error_line, transom
from tiny_graphs import graph_of, normal
from transom.cli.build import print_kernels
from transom.export.engine import build
from transom.export.engine import build_process as builder
from transom.export.engine import build_worker as worker
from transom.export.engine.build_log import fusion_of, kernels_of
from transom.export.engine.targets import find_targets
from transom.export.engine.trt_graphs import tensorrt_graphs
from transom.export.engine.trt_parity import require_trt_parity
from transom.export.passes.decompose_attention import decompose_attention
from transom.export.passes.plugin_attention import (
    CAUSAL,
    DOMAIN,
    INPUTS,
    MASKED,
    PLAIN,
    function_of,
    inline_functions,
    plugin_attention,
    reason_against_plugin,
)
from transom.runtime.backends.trt_library import FULL
from transom.runtime.bundle import Bundle
from transom.runtime.errors import BackendError, EngineError
from transom.runtime.golden import read_golden
from transom.runtime.golden_reference import PYTORCH

ATTENTION = """model (float[B, 4, S, 8] q, float[B, 2, T, 8] k, float[B, 2, T, 8] v, bool[B, 1, S, T] m)
    => (float[B, 4, S, 8] y) {
    y = Attention <scale = 0.3> (q, k, v, m)
}"""


def run(model: ir.Model, feeds: dict[str, Any]) -> list[Any]:
    """By ONNX Runtime, which is given the file as it is."""
    data = ir.to_proto(model).SerializeToString()
    onnx.checker.check_model(onnx.load_model_from_string(data), full_check=True)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def ours(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph if node.domain == DOMAIN)


def test_onnx_runtime_runs_the_file_by_the_bodies() -> None:
    """The function's result is the operator's, bit for bit; a file without its bodies does not load."""
    feeds = {"q": normal(2, 4, 5, 8), "k": normal(2, 2, 7, 8, seed=1), "v": normal(2, 2, 7, 8, seed=2)}
    feeds["m"] = np.tril(np.ones((5, 7), bool), 2)[None, None].repeat(2, 0)
    expected = run(graph_of(ATTENTION), feeds)
    for source, operator in ((ATTENTION, MASKED), (ATTENTION.replace(", m)", ")"), PLAIN)):
        model = graph_of(source)
        assert plugin_attention(model, lambda node: True) == {}
        assert ours(model) == {operator: 1}
        (node,) = (node for node in model.graph if node.domain)
        assert node.attributes["plugin_namespace"].as_string() == "transom"
        assert node.attributes["scale"].as_float() == pytest.approx(0.3)
        found = run(model, feeds)
        np.testing.assert_array_equal(found[0], run(graph_of(source), feeds)[0])
        np.testing.assert_array_equal(run(inline_functions(model.clone()), feeds)[0], found[0])
    assert np.abs(found[0] - expected[0]).max() > 0.1  # without the mask it is something else
    model.functions.clear()
    with pytest.raises(Exception, match="FlashAttention"):
        run(model, feeds)


def test_lengths_mean_the_lower_right_corner() -> None:
    """Ones for scores, 2 queries, 4 keys of which 3 are there: the mean of the values up to key 1 + i."""
    call = ir.node(CAUSAL, [ir.Value(name=name) for name in INPUTS[CAUSAL]], {"scale": 1.0}, domain=DOMAIN)
    q, k, v, lengths = call.inputs
    for value, shape in ((q, (1, 1, 2, 4)), (k, (1, 1, 4, 4)), (v, (1, 1, 4, 4))):
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)  # type: ignore[union-attr]
    lengths.type, lengths.shape = ir.TensorType(ir.DataType.INT32), ir.Shape((1,))  # type: ignore[union-attr]
    call.outputs[0].name, call.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    call.outputs[0].shape = ir.Shape((1, 1, 2, 4))
    graph = ir.Graph(list(call.inputs), call.outputs, nodes=[call], opset_imports={"": 24, DOMAIN: 1}, name="g")  # type: ignore[arg-type]
    model = ir.Model(graph, ir_version=10, functions=[function_of(CAUSAL, 24)])
    values = np.array([1, 3, 8, 100], np.float32)[None, None, :, None].repeat(4, 3)
    feeds = {"query": np.ones((1, 1, 2, 4), np.float32), "key": np.ones((1, 1, 4, 4), np.float32), "value": values}
    (found,) = run(model, {**feeds, "lengths": np.array([3], np.int32)})
    np.testing.assert_allclose(found[0, 0, :, 0], [2, 4], rtol=1e-6)


def test_every_attention_of_every_family_in_fp32(
    vit_bundle: Path, bert_bundle: Path, gpt_bundle: Path, dates_bundle: Path, clip_bundle: Path
) -> None:
    """By kind; each file as it is, in ONNX Runtime, gives the golden values; a cache is read by lengths."""
    expected = {
        vit_bundle: {"model": {PLAIN: 3}},
        bert_bundle: {"model": {MASKED: 3}},
        gpt_bundle: {"decoder": {CAUSAL: 4}},
        dates_bundle: {"encoder": {MASKED: 2}, "decoder": {CAUSAL: 2, MASKED: 2}},
        clip_bundle: {"image": {PLAIN: 3}, "text": {MASKED: 2}},
    }
    for folder, counts in expected.items():
        bundle = Bundle(folder)
        graphs = tensorrt_graphs(bundle, plugins=True)
        assert {name: dict(ours(graph.model)) for name, graph in graphs.items()} == counts
        for graph in graphs.values():
            assert set(graph.plugins.values()) == {"in FP32"}
            assert graph.decomposed == {}
            assert "Attention" not in graph.operators.values()
            assert {name for name, operator in graph.operators.items() if operator in INPUTS} == set(graph.plugins)
        assert require_trt_parity(bundle, graphs) < 2e-5
    (graph,) = tensorrt_graphs(Bundle(bert_bundle), plugins=True).values()
    (mask,) = {node.inputs[3] for node in graph.model.graph if node.op_type == MASKED}
    assert str(mask.shape) == "[B,1,1,S]"  # type: ignore[union-attr]  # one for all queries: the kernel reads it so
    assert "Expand" not in graph.operators.values()


def test_the_file_for_the_engine_gives_the_golden_values(vit_bundle: Path, bert_bundle: Path) -> None:
    for folder in (vit_bundle, bert_bundle):
        bundle = Bundle(folder)
        (graph,) = tensorrt_graphs(bundle, plugins=True).values()
        session = onnxruntime.InferenceSession(graph.serialized(), providers=["CPUExecutionProvider"])
        for arrays in read_golden(bundle).values():
            for name, theirs in arrays[PYTORCH].items():
                (found,) = session.run([name], arrays["input"])
                assert np.abs(found - theirs).max() <= 2e-5 * np.abs(theirs).max()


def test_half_precision_that_tensorrt_has_a_kernel_of_stays(half_gpt_bundle: Path) -> None:
    (graph,) = tensorrt_graphs(Bundle(half_gpt_bundle), plugins=True).values()
    assert graph.plugins == {} == graph.decomposed
    assert "Attention" in graph.operators.values()
    assert not graph.model.functions


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("float[B, 4, S, 8] q", "float[B, N, S, 8] q"), "of heads whose number is not fixed"),
        (("float[B, 2, T, 8] k", "float[B, 3, T, 8] k"), "of heads whose number is not fixed"),
        (("float[B, 2, T, 8] v", "float[B, 4, T, 8] v"), "of keys and values that do not fit the queries"),
        (("float[B, 2, T, 8] v", "float[B, 2, T, 9] v"), "of values of another size"),
        (("float[B, 4, S, 8]", "float[B, 4, S, 264]"), "of heads of 264, which is not 1 to 256"),
        (("bool[B, 1, S, T]", "bool[B, 1, S, U]"), "with a mask whose axes are not known to be those of the scores"),
        (("bool[B, 1, S, T]", "bool[B, 1, S, 1]"), "with a mask whose axes are not known to be those of the scores"),
        (("bool[B, 1, S, T]", "bool[S, T]"), "with a mask whose axes are not known to be those of the scores"),
        (("bool[B, 1, S, T]", "float16[B, 1, S, T]"), "with a mask that is neither boolean nor of the queries' dtype"),
        (("scale = 0.3", "is_causal = 1"), "with is_causal"),
        (("float[", "double["), "of a dtype that the plugin does not have"),
    ],
)
def test_what_our_kernel_does_not_compute_is_left(change: tuple[str, str], message: str) -> None:
    model = graph_of(ATTENTION.replace(*change))
    (node,) = model.graph
    assert message in str(reason_against_plugin(node))
    left = plugin_attention(model, lambda node: True)
    assert message in left[str(node.name)]
    assert not model.functions
    assert [node.op_type for node in model.graph] == ["Attention"]


def test_operators_of_others_stay() -> None:
    """ONNX Runtime has an Attention of its own, with other inputs."""
    model = graph_of(ATTENTION)
    (node,) = model.graph
    node.domain = "com.microsoft"
    assert plugin_attention(model, lambda node: True) == {}
    assert decompose_attention(model) == 0
    assert list(model.graph) == [node]


def test_what_neither_computes_is_written_out_with_both_reasons(
    vit_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transom.export.passes.plugin_attention.MAX_HEAD_SIZE", 4)
    (graph,) = tensorrt_graphs(Bundle(vit_bundle), plugins=True).values()
    assert graph.plugins == {}
    (reason,) = set(graph.decomposed.values())
    assert reason.startswith("in FP32, and ours none of heads of ")
    assert "Attention" not in graph.operators.values()


def test_the_engine_must_hold_the_plugin_and_not_the_body() -> None:
    """By the layers that the builder lists: a plugin of that name, or one that computes that node."""
    operators = {"a": MASKED, "b": CAUSAL, "c": MASKED}
    log = [
        layer("a", kind="PluginV3"),
        layer("transom_plugin_1", "b", kind="plugin_v3"),
        layer("_gemm_mha_v2_myl0_3", "c"),  # what TensorRT made of the body
    ]
    (kernels,) = kernels_of(log, 1)
    fusion = fusion_of("all", kernels, operators, [])
    assert fusion.unfused == ("c",)
    assert fusion.summary() == "all: attention 2 of 3, 3 kernels"
    engine = build.Engine("tensorrt", "model", 1, 0.0, (fusion,), {}, {}, dict.fromkeys(operators, "in FP32"), {})
    with pytest.raises(EngineError, match="2 of 3 attentions became one kernel each in the profile all; c did not"):
        build.require_fused(engine)
    assert engine.to_json()["plugins"]["a"] == "in FP32"


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("groups", [(0, 1, 3, 4), (0, 3)])
def test_plugins_of_two_profiles(marked: bool, groups: tuple[int, ...]) -> None:
    """Layers outside of the compiled subgraphs, with the marks that those of TensorRT-RTX have, and without."""
    first, second = groups[: len(groups) // 2], groups[len(groups) // 2 :]
    mark = " [profile 1]" if marked else ""
    log = [layer(f"__myl_Fc_myl{group}_1", "up") for group in first]
    log += [layer(name, kind="PluginV3") for name in "ab"]
    log += [layer(f"up.product [profile 1]_myl{group}_1", "up", kind="gemm") for group in second]
    log += [layer(f"{name}{mark}", name, kind="PluginV3") for name in "ab"]
    operators = {"a": CAUSAL, "b": CAUSAL, "up": "MatMul"}
    fusions = [fusion_of(name, kernels, operators, []) for name, kernels in zip("pd", kernels_of(log, 2), strict=True)]
    assert [fusion.attention for fusion in fusions] == [2, 2]
    assert [fusion.kernels for fusion in fusions] == [2 + len(first), 2 + len(second)]
    lost = [line for line in log if "Name: b" not in line]
    assert [fusion_of("p", kernels, operators, []).unfused for kernels in kernels_of(lost, 2)] == [("b",), ("b",)]


def test_the_report_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    reasons = ({"a": "in FP32", "b": "in FP32"}, {"c": "in FP32"}, {"d": "it has no mask"})
    print_kernels(build.Engine("tensorrt", "decoder", 1, 0.0, (), {}, *reasons))
    assert [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip()] == [
        "tensorrt, decoder: 2 attentions are decomposed, TensorRT has no kernel in FP32",
        "tensorrt, decoder: 1 attentions are our plugin: in FP32",
        "tensorrt, decoder: 1 attentions read a mask instead of lengths: it has no mask",
    ]


class Layers:
    """A network as a parser leaves it."""

    def __init__(self, *layers: tuple[str, str]) -> None:
        self._layers = [type("Layer", (), {"name": name, "type": kind}) for name, kind in layers]
        self.num_layers = len(layers)

    def get_layer(self, index: int) -> Any:
        return self._layers[index]


def test_the_parser_must_have_taken_the_plugin(tmp_path: Path) -> None:
    network = Layers(("a", "plugin"), ("b", "attention"), ("x", "plugin"))
    assert worker.without_plugin(network, ["a"], "plugin") is None
    assert worker.without_plugin(network, ["a", "b"], "plugin") == "b"
    (tmp_path / worker.ERROR).write_text(json.dumps({"kind": "plugin", "message": "no plugin of the node 'b'."}))
    (target,) = find_targets(["tensorrt"])
    with pytest.raises(EngineError, match=r"with our attention: no plugin of the node 'b'\. Build with --no-plugin"):
        raise builder.failure(tmp_path, "model", target, 1, "")


def test_without_triton_the_build_says_what_to_do(vit_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = tensorrt_graphs(Bundle(vit_bundle), plugins=True)
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    match = r"3 attentions in FP32 are Transom.s kernel, which is compiled by triton, and triton is not installed"
    with pytest.raises(BackendError, match=match):
        build.require_compiler(graphs)
    build.require_compiler(tensorrt_graphs(Bundle(vit_bundle)))  # decomposed: nothing is compiled


@pytest.mark.skipif(find_spec(FULL) is not None, reason="TensorRT is installed here")
def test_the_option_is_known(vit_bundle: Path) -> None:
    for option in ("--plugin", "--no-plugin"):
        message = error_line(transom("build", vit_bundle, "--target", "tensorrt", option))
        assert "TensorRT is not installed" in message
