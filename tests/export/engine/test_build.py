"""Engines for GPUs that are not here: TensorRT's variant computes what the bundle does; real plans are built of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from command_line import document, error_line, transom
from rtx import needs_rtx
from tiny_graphs import graph_of, normal, operators, relative_error
from transom.export.engine import build_process as builder
from transom.export.engine.build import build
from transom.export.engine.targets import find_targets
from transom.export.engine.trt_graphs import TensorRTGraph, tensorrt_graphs
from transom.export.engine.trt_parity import require_trt_parity
from transom.export.passes.decompose_attention import decompose_attention
from transom.runtime import load
from transom.runtime.backends.trt_library import FULL
from transom.runtime.bundle import Bundle
from transom.runtime.errors import BundleError, EngineError, ExportError, ParityError
from transom.runtime.selftest import selftest

ATTENTION = """model (float[B, 2, S, 8] q, float[B, 2, T, 8] k, float[B, 2, T, 8] v, bool[B, 1, S, T] m)
    => (float[B, 2, S, 8] y) {
    y = Attention <scale = 0.3> (q, k, v, m)
}"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return


def session_of(model: ir.Model) -> onnxruntime.InferenceSession:
    data = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])


def copied(bundle: Path, folder: Path) -> Path:
    return Path(shutil.copytree(bundle, folder / "bundle"))


def test_attention_written_out_computes_the_same() -> None:
    feeds: dict[str, Any] = {"q": normal(2, 2, 5, 8), "k": normal(2, 2, 7, 8, seed=1), "v": normal(2, 2, 7, 8, seed=2)}
    feeds["m"] = np.tril(np.ones((5, 7), bool), 2)[None, None].repeat(2, 0)
    fused, plain = graph_of(ATTENTION, {}, ["attend"]), graph_of(ATTENTION, {}, ["attend"])
    assert decompose_attention(plain) == 1
    assert operators(plain)["Attention"] == 0
    found, expected = (session.run(["y"], feeds)[0] for session in map(session_of, (plain, fused)))
    assert relative_error(found, expected) < 1e-6
    with pytest.raises(ExportError, match=r"is_causal 1 and softcap 0; expected four axes"):
        decompose_attention(graph_of(ATTENTION.replace("scale = 0.3", "is_causal = 1"), {}, ["attend"]))


def test_the_variant_computes_what_the_bundle_does(vit_bundle: Path, gpt_bundle: Path, dates_bundle: Path) -> None:
    """In FP32, attention decomposed, caches of one length, through a whole generation; another scale is seen."""
    for folder in (vit_bundle, gpt_bundle, dates_bundle):
        bundle = Bundle(folder)
        graphs = tensorrt_graphs(bundle)
        assert all("Attention" not in graph.operators.values() for graph in graphs.values())
        assert require_trt_parity(bundle, graphs) < 2e-5
    for graph in graphs.values():
        for name, weight in graph.model.graph.initializers.items():
            if name.endswith(".scale"):
                weight.const_value = ir.Tensor(np.array(0.1, np.float32), name=name)
    with pytest.raises(ParityError, match="does not compute what the bundle does: "):
        require_trt_parity(bundle, graphs)


def test_caches_have_one_length(gpt_bundle: Path) -> None:
    bundle = Bundle(gpt_bundle)
    (graph,) = tensorrt_graphs(bundle).values()
    caches = [value for value in graph.model.graph.inputs if "cache" in str(value.name)]
    assert {value.shape[2] for value in caches if value.shape is not None} == {bundle.manifest.axes["C"].max}


@needs_rtx
def test_an_int8_encoder_for_two_generations_of_gpus(int8_bundle: Path, tmp_path: Path) -> None:
    """Three attentions, three GELUs, nineteen linear layers of ViT, all fused, all of integers; then from the cache."""
    folder = copied(int8_bundle, tmp_path)
    told = document(transom("build", folder, "--target", "rtx-sm86", "--target", "rtx-sm120", "--json"))
    assert [engine["target"] for engine in told["engines"]] == ["rtx-sm86", "rtx-sm120"]
    for engine in told["engines"]:
        (profile,) = engine["profiles"]
        assert (profile["attention"]["fused"], profile["attention"]["of"]) == (3, 3)
        assert profile["gelu"] == {"fused": 3, "of": 3}
        assert (profile["int8"]["products"], profile["int8"]["of"]) == (19, 19)
    manifest = Bundle(folder).manifest
    assert manifest.engines["rtx-sm86"]["plans"] == {"model": "engines/rtx-sm86.plan"}
    assert manifest.engines["rtx-sm86"]["library"] == "TensorRT-RTX"
    assert (folder / "engines/rtx-sm86.plan").read_bytes() != (folder / "engines/rtx-sm120.plan").read_bytes()
    assert selftest(folder).worst.error <= 0.1  # the bundle is sound as before
    before = Bundle(folder).read("engines/rtx-sm86.plan")
    result = transom("build", folder, "--target", "rtx-sm86", "--report")
    assert "attention 3 of 3" in result.stdout
    assert "_gemm_mha_v2" in result.stdout
    assert Bundle(folder).read("engines/rtx-sm86.plan") == before
    assert len(list((tmp_path / "cache/transom/engines").iterdir())) == 2


@needs_rtx
def test_a_decoder_has_a_profile_for_prompts_and_one_for_steps(half_gpt_bundle: Path, tmp_path: Path) -> None:
    (engine,) = build(
        Bundle(copied(half_gpt_bundle, tmp_path)), find_targets(["rtx-sm89"]), allow_unfused=False, tell=print
    )
    prefill, decode = engine.fusions
    assert (prefill.profile, prefill.attention, prefill.attentions, prefill.gelus_fused) == ("prefill", 4, 4, 4)
    assert (decode.profile, decode.attention, decode.attentions, decode.gelus_fused) == ("decode", 4, 4, 4)
    assert any("_gemv_mha" in name for name in decode.kernel_counts)
    with load(tmp_path / "bundle") as gpt:
        assert gpt.manifest.engines["rtx-sm89"]["plans"] == {"decoder": "engines/rtx-sm89.plan"}


@needs_rtx
def test_an_fp32_bundle_of_two_graphs(dates_bundle: Path, tmp_path: Path) -> None:
    folder = copied(dates_bundle, tmp_path)
    engines = build(Bundle(folder), find_targets(["rtx-sm80"]), allow_unfused=False, tell=print)
    assert [(engine.graph, len(engine.fusions)) for engine in engines] == [("encoder", 1), ("decoder", 2)]
    assert Bundle(folder).manifest.engines["rtx-sm80"]["plans"] == {
        "encoder": "engines/rtx-sm80.encoder.plan",
        "decoder": "engines/rtx-sm80.decoder.plan",
    }


def test_what_cannot_be_built_is_said_before_anything_is(vit_bundle: Path, tmp_path: Path) -> None:
    folder = copied(vit_bundle, tmp_path)
    assert "--target is 'rtx-sm90'; expected one" in error_line(transom("build", folder, "--target", "rtx-sm90"))
    assert "no FP32 matrix product for Turing" in error_line(transom("build", folder, "--target", "rtx-sm75"))
    assert Bundle(folder).manifest.engines == {}


@pytest.mark.skipif(find_spec(FULL) is not None, reason="TensorRT is installed")
def test_a_library_that_is_not_installed_comes_with_its_command(vit_bundle: Path) -> None:
    assert "TensorRT is not installed. Run `pip" in error_line(transom("build", vit_bundle, "--target", "tensorrt"))


@needs_rtx
def test_no_plan_is_written_through_a_link_that_leaves_the_bundle(int8_bundle: Path, tmp_path: Path) -> None:
    folder, elsewhere = copied(int8_bundle, tmp_path), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (folder / "engines").symlink_to(elsewhere)
    result = transom("build", folder, "--target", "rtx-sm86")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "is a link that leaves the bundle" in result.stderr.splitlines()[-1]
    assert list(elsewhere.iterdir()) == []
    assert Bundle(folder).manifest.engines == {}


@needs_rtx
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model (float[2, 4, 4] x) => (float[2] y) { y = Det (x) }", r"cannot read the node 'twist' \(Det\) of the"),
        (
            ATTENTION.replace("B", "1").replace("S", "5").replace("T", "7"),
            "cannot build the graph 'model' for rtx-sm86",
        ),
    ],
)
def test_what_tensorrt_cannot_read_or_build_is_said_with_the_reason(text: str, said: str) -> None:
    """An operator that it does not have, by its node; attention in FP32 that was not decomposed."""
    graph = graph_of(text, {}, ["twist"])
    next(iter(graph.graph)).name = "twist"
    with pytest.raises(EngineError, match=f"TensorRT-RTX {said}"):
        builder.build_engine("model", TensorRTGraph(graph).serialized(), (), find_targets(["rtx-sm86"])[0])


@needs_rtx
def test_a_plan_with_a_changed_byte_is_refused(int8_bundle: Path, tmp_path: Path) -> None:
    folder = copied(int8_bundle, tmp_path)
    build(Bundle(folder), find_targets(["rtx-sm86"]), allow_unfused=False, tell=print)
    with (folder / "engines/rtx-sm86.plan").open("r+b") as plan:
        plan.seek(1000)
        plan.write(b"\0\1\2\3")
    with pytest.raises(BundleError, match=r"rtx-sm86\.plan does not have the SHA-256"):
        Bundle(folder)
