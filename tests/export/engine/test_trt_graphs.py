"""Attentions that TensorRT has a kernel for: the variant against the builder; the others are decomposed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from biased_attention import biased_graph, mask_of
from rtx import needs_rtx
from tiny_graphs import graph_of, normal, operators, relative_error
from transom.export.engine.build import build
from transom.export.engine.build_log import FUSED_ATTENTION, kernels_of
from transom.export.engine.build_process import build_engine
from transom.export.engine.profiles import Profile
from transom.export.engine.targets import find_targets
from transom.export.engine.trt_graphs import TensorRTGraph, without_kernel
from transom.export.passes.decompose_attention import decompose_attention
from transom.runtime.bundle import Bundle
from transom.runtime.errors import EngineError
from transom.runtime.graph_spec import Graph, Tensor

ROWS = (1, 2, 4)  # of a batch: a single row is what a bundle always allows
ENCODER = Graph("model", (), ())
DECODER = Graph("decoder", (), (Tensor("k.written", "float16", ("B",), aliases="k"),))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def attention(heads: int, size: int, *, mask: bool, dtype: str = "float16") -> ir.Model:
    shapes = [f"{dtype}[B, {heads}, {axis}, {size}]" for axis in "STT"]
    inputs = [f"{shape} {name}" for shape, name in zip(shapes, "qkv", strict=True)]
    inputs += ["bool[B, 1, S, T] m"] if mask else []
    return graph_of(
        f"model ({', '.join(inputs)}) => ({shapes[0]} y) {{\n"
        f"    d = Add (q, q)\n    a = Attention <scale = 0.1> (d, k, v{', m' if mask else ''})\n    y = Add (a, a)\n}}"
    )


@needs_rtx
@pytest.mark.parametrize(
    ("heads", "size", "mask", "step", "fuses"),
    [
        (1, 64, False, False, True),
        (1, 64, True, False, False),
        (2, 64, True, False, True),
        (3, 64, True, True, False),
        (4, 64, True, True, True),
        (4, 8, False, False, False),
        (4, 12, False, False, True),
        (4, 12, True, False, False),
        (4, 24, True, True, True),
        (4, 256, True, False, True),
        (4, 264, False, False, False),
    ],
)
def test_what_has_a_kernel(heads: int, size: int, mask: bool, step: bool, fuses: bool) -> None:
    model = attention(heads, size, mask=mask)
    (node,) = (node for node in model.graph if node.op_type == "Attention")
    assert (without_kernel(node, DECODER if step else ENCODER) is None) == fuses
    queries, keys = ((1, 1, 1), (128, 128, 128)) if step else ((1, 64, 128), (1, 64, 128))
    shapes = {"q": tuple((B, heads, n, size) for B, n in zip(ROWS, queries, strict=True))}
    shapes |= {name: tuple((B, heads, n, size) for B, n in zip(ROWS, keys, strict=True)) for name in "kv"}
    if mask:
        shapes["m"] = tuple((B, 1, n, m) for B, n, m in zip(ROWS, queries, keys, strict=True))
    data = TensorRTGraph(model).serialized()
    (target,) = find_targets(["rtx-sm86"])
    if not fuses:
        with pytest.raises(EngineError, match="cannot build the graph"):
            build_engine("model", data, (Profile("all", shapes),), target)  # type: ignore[arg-type]
        return
    built = build_engine("model", data, (Profile("all", shapes),), target)  # type: ignore[arg-type]
    assert sum(bool(FUSED_ATTENTION.search(kernel.name)) for kernel in kernels_of(built.log, 1)[0]) == 1


@needs_rtx
@pytest.mark.parametrize(
    ("heads", "side", "size", "windows", "precision", "fuses"),
    [
        (3, 7, 32, 0, "fp16", True),
        (3, 7, 32, 2, "bf16", True),
        (6, 12, 32, 0, "fp16", True),
        (1, 7, 32, 0, "fp16", False),
    ],
)
def test_a_bias_per_head_has_a_kernel(
    heads: int, side: int, size: int, windows: int, precision: str, fuses: bool
) -> None:
    """Swin's attention, of windows as rows and, shifted, as heads."""
    mask = mask_of(heads, side, windows)
    model = biased_graph(mask, size, precision)
    (node,) = (node for node in model.graph if node.op_type == "Attention")
    assert (without_kernel(node, ENCODER) is None) == fuses
    shapes = {name: tuple((B, mask.shape[1], side * side, size) for B in ROWS) for name in "qkv"}
    (target,) = find_targets(["rtx-sm86"])
    if not fuses:
        with pytest.raises(EngineError, match="cannot build the graph"):
            build_engine("model", TensorRTGraph(model).serialized(), (Profile("all", shapes),), target)  # type: ignore[arg-type]
        return
    built = build_engine("model", TensorRTGraph(model).serialized(), (Profile("all", shapes),), target)  # type: ignore[arg-type]
    assert sum(bool(FUSED_ATTENTION.search(kernel.name)) for kernel in kernels_of(built.log, 1)[0]) == 1


@needs_rtx
@pytest.mark.parametrize(
    ("heads", "values", "message"),
    [
        (1, 64, "cannot build the graph"),
        (3, 64, "cannot build the graph"),
        (4, 64, ""),
        (4, 32, "cannot read the node"),
    ],
)
def test_what_has_a_kernel_for_a_single_query(heads: int, values: int, message: str) -> None:
    """As a Perceiver's output asks; of values narrower than the queries, too, which the parser does not read."""
    model = graph_of(
        f"model (float16[B, {heads}, 1, 64] q, float16[B, {heads}, T, 64] k, float16[B, {heads}, T, {values}] v) => "
        f"(float16[B, {heads}, 1, {values}] y) {{\n"
        "    d = Add (q, q)\n    a = Attention (d, k, v)\n    y = Add (a, a)\n}"
    )
    (node,) = (node for node in model.graph if node.op_type == "Attention")
    assert (without_kernel(node, ENCODER) is None) == (not message)
    widths = {"q": 64, "k": 64, "v": values}
    shapes = {
        name: tuple((B, heads, 1 if name == "q" else n, width) for B, n in zip(ROWS, (1, 64, 128), strict=True))
        for name, width in widths.items()
    }
    data = TensorRTGraph(model).serialized()
    (target,) = find_targets(["rtx-sm86"])
    if message:
        with pytest.raises(EngineError, match=message):
            build_engine("model", data, (Profile("all", shapes),), target)  # type: ignore[arg-type]
        return
    built = build_engine("model", data, (Profile("all", shapes),), target)  # type: ignore[arg-type]
    assert sum(bool(FUSED_ATTENTION.search(kernel.name)) for kernel in kernels_of(built.log, 1)[0]) == 1


def test_fp32_never_has_one() -> None:
    model = attention(4, 64, mask=False, dtype="float")
    assert [without_kernel(node, ENCODER) for node in model.graph if node.op_type == "Attention"] == ["in FP32"]


def test_written_out_in_half_precision_it_computes_the_same() -> None:
    """Within FP16's rounding; logits of 300 pass through a softmax that is taken in FP32."""
    fused, plain = attention(2, 8, mask=True), attention(2, 8, mask=True)
    assert decompose_attention(plain) == 1
    assert operators(plain)["Attention"] == 0
    assert operators(plain)["Softmax"] == 1
    widths = {str(v.name): v.dtype for node in plain.graph for v in node.outputs if node.op_type == "Softmax"}
    assert set(widths.values()) == {ir.DataType.FLOAT}
    q, k, v = (normal(2, 2, 5, 8, seed=seed).astype(np.float16) for seed in range(3))
    feeds = {"q": 30 * q, "k": 6 * k, "v": v, "m": np.tril(np.ones((2, 1, 5, 5), bool))}
    found, expected = (ort_run(model, feeds) for model in (plain, fused))
    assert relative_error(found.astype(np.float32), expected.astype(np.float32)) < 2e-3


def ort_run(model: ir.Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    import onnxruntime

    data = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return session.run(["y"], feeds)[0]  # type: ignore[no-any-return]


@needs_rtx
def test_a_bundle_of_few_heads_is_built_all_the_same(
    exported: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    """A GPT of two heads in FP16: no kernel for its steps, so no attention that should have fused."""
    from conftest import export_to

    export_to(tmp_path, exported("GPT2LMHeadModel")[0], precision="fp16", max_sizes={"B": 3})
    targets = find_targets(["rtx-sm75"])
    (engine,) = build(Bundle(tmp_path / "bundle"), targets, allow_unfused=False, tell=lambda _: None)
    assert set(engine.decomposed.values()) == {"of fewer than 4 heads in steps of one token"}
    assert [fusion.attentions for fusion in engine.fusions] == [0, 0]
    assert Bundle(tmp_path / "bundle").manifest.engines["rtx-sm75"]["graphs"]["decoder"]["written_out"]
