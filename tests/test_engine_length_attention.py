"""Attention by lengths: the pass, the operator as its documentation describes it, and real engines of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from command_line import document, transom
from conftest import export_to, reference
from rtx import needs_rtx
from tiny_graphs import graph_of, normal, operators
from transom.export.engine.check import check_flavour
from transom.export.engine.flavour import LENGTHS, tensorrt_graphs
from transom.export.passes.length_attention import OPERATOR, length_attention, standard_attention
from transom.runtime.bundle import Bundle
from transom.runtime.errors import ExportError, ParityError

CAPACITY, HEADS, SIZE = 12, 2, 8
NEW, HELD = f"float[B, {HEADS}, S, {SIZE}]", f"float[B, {HEADS}, C, {SIZE}]"
CACHED = f"""model ({NEW} q, {NEW} new, {HELD} cache, int64[B] write_indices) => ({NEW} y, {HELD} written) {{
    zero = Constant <value = int64 {{0}}> ()
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


@pytest.mark.parametrize(
    ("new", "starts"),
    [(7, (0, 0)), (3, (4, 6)), (1, (0, 11)), (1, (5, 2)), (12, (0, 0))],
    ids=["prompt", "chunk", "first and last step", "steps", "full"],
)
def test_lengths_see_what_the_mask_shows(new: int, starts: tuple[int, ...]) -> None:
    """Rows at their own places; what lies behind them in the cache is 100, which one wrong key would show."""
    masked, by_length = cached(), cached()
    assert length_attention(by_length) == {}
    assert operators(by_length)[OPERATOR] == 1
    assert operators(by_length)["LessOrEqual"] == 0  # the mask went
    assert standard_attention(by_length) == 1
    feeds = {"q": normal(2, HEADS, new, SIZE), "new": normal(2, HEADS, new, SIZE, seed=1)}
    cache = np.full((2, HEADS, CAPACITY, SIZE), 100, np.float32)
    for row, start in enumerate(starts):
        cache[row, :, :start] = normal(HEADS, start, SIZE, seed=2 + row)
    feeds |= {"cache": cache, "write_indices": np.array(starts)}
    np.testing.assert_allclose(run(by_length, **feeds), run(masked, **feeds), atol=1e-6)


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("LessOrEqual (keys, most)", "Less (keys, most)", "its mask is another"),
        ("Range (zero, S, one)", "Range (one, S, one)", "its mask is another"),
        ("(q, written, written, mask)", "(q, cache, cache, mask)", "its keys are no cache that is written"),
        ("(q, written, written, mask)", "(q, written, written)", "it has no mask"),
        ("<scale = 0.3> ", "", "its scale is not written down"),
    ],
)
def test_what_is_no_such_attention_stays(old: str, new: str, why: str) -> None:
    assert old in CACHED
    model = cached(CACHED.replace(old, new))
    (reason,) = length_attention(model).values()
    assert reason.startswith(why)
    assert operators(model)["Attention"] == 1


@pytest.fixture(scope="module")
def half_gpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("half")
    export_to(folder, reference("gpt"), precision="fp16", max_sizes={"B": 2})
    return folder / "bundle"


@needs_rtx
def test_a_gpt_by_lengths_fuses(half_gpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = Path(shutil.copytree(half_gpt, tmp_path / "bundle"))
    told = document(
        transom("build", folder, "--target", "rtx-sm75", "--target", "rtx-sm120", "--attention", "lengths", "--json")
    )
    for engine in told["engines"]:
        assert [profile["attention"]["fused"] for profile in engine["profiles"]] == [4, 4]
    assert {engine["attention"] for engine in Bundle(folder).manifest.engines.values()} == {"lengths"}


@pytest.mark.parametrize("wrong", ["one key too few", "no scale"])
def test_a_wrong_rewrite_is_seen_in_a_whole_generation(half_gpt: Path, wrong: str) -> None:
    bundle = Bundle(half_gpt)
    graphs = tensorrt_graphs(bundle, LENGTHS)
    assert check_flavour(bundle, graphs) < 5e-3
    (graph,) = graphs.values()
    if wrong == "no scale":
        for name, weight in graph.model.graph.initializers.items():
            if name.endswith(".scale"):
                weight.const_value = ir.Tensor(np.array(1, np.float16), name=name)
    else:
        for node in graph.model.graph:
            if node.op_type == OPERATOR:  # write_indices alone: the newest token is not seen
                added = node.inputs[5].producer().inputs[0].producer()  # type: ignore[union-attr]
                node.inputs[5].producer().replace_input_with(0, added.inputs[0])  # type: ignore[union-attr]
    with pytest.raises(ParityError, match="does not compute what the bundle does"):
        check_flavour(bundle, graphs)


def test_lengths_without_such_a_cache_are_refused(gpt_bundle: Path, vit_bundle: Path) -> None:
    for folder in (gpt_bundle, vit_bundle):  # FP32 has no kernel; an encoder no cache
        with pytest.raises(ExportError, match="is for caches in half precision that a fused attention reads"):
            tensorrt_graphs(Bundle(folder), LENGTHS)
