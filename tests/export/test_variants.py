"""FP16's variant for the CPU: float32 arithmetic, weights stored once in half; and the file for GPUs beside it."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto

from bad_bundles import replaced, rewritten
from command_line import transom
from conftest import export_to
from tiny_graphs import graph_of, operators, relative_error
from transom.export import pipeline, variants
from transom.export.bundle_graphs import canonical_graphs, graph_file, stored_graphs
from transom.export.parity.backends import open_default_files
from transom.export.parity.fp16_range import RangeBackend, beyond_fp16, in_half
from transom.export.passes.compute_in_fp32 import compute_in_fp32
from transom.export.passes.half_precision import convert_precision
from transom.export.report.graphs import executed_operators
from transom.export.report.parity import fp16_range
from transom.export.variants import make_variants
from transom.export.verification import verify
from transom.export.weights_file import ALIGNMENT
from transom.runtime.bundle import Bundle
from transom.runtime.errors import ExportError, ParityError
from transom.runtime.graph_spec import ARANGE, Graph
from transom.runtime.loading import load
from transom.runtime.selftest import selftest

MakeCheckpoint = Callable[..., Path]
Exported = Callable[..., tuple[Path, Path]]
FAMILIES = ("BertForMaskedLM", "ViTForImageClassification", "CLIPModel", "GPT2LMHeadModel", "MarianMTModel")
HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


@pytest.fixture(scope="module")
def made(exported: Exported) -> Callable[[str], tuple[dict[str, ir.Model], variants.Variants]]:
    """``made("GPT2LMHeadModel")`` -> the FP32 graphs by name, and what ships of them in FP16."""
    kept: dict[str, Any] = {}

    def get(architecture: str) -> tuple[dict[str, ir.Model], variants.Variants]:
        if architecture not in kept:
            bundle = Bundle(exported(architecture)[1])
            canonical, graphs = canonical_graphs(bundle), tuple(file.graph for file in bundle.manifest.graphs)
            kept[architecture] = canonical, make_variants(canonical, graphs, "fp16")
        canonical, shipped = kept[architecture]
        return {name: model.clone() for name, model in canonical.items()}, shipped

    return get


def dtypes(model: onnx.ModelProto) -> dict[str, int]:
    """The element type of every value that is no weight."""
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    values = (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output)
    weights = {weight.name for weight in model.graph.initializer}
    found = {value.name: value.type.tensor_type.elem_type for value in values if value.name not in weights}
    results = {name for node in model.graph.node for name in node.output if name}
    assert results <= found.keys()
    return found


def sites(model: onnx.ModelProto) -> dict[str, tuple[int, int]]:
    """Where the weights that lie outside do: (offset, bytes)."""
    external = {w.name: {entry.key: entry.value for entry in w.external_data} for w in model.graph.initializer}
    return {name: (int(entry["offset"]), int(entry["length"])) for name, entry in external.items() if entry}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_no_operator_of_the_cpu_variant_computes_in_half_precision(made: Any, architecture: str) -> None:
    """No value of its graph is float16, but weights that a Cast to float32 reads and nothing else."""
    _, shipped = made(architecture)
    for file in shipped.graphs:
        assert dict(file.files) == {"default": f"{file.graph.name}.onnx", "cpu": f"{file.graph.name}.cpu.onnx"}
        model = onnx.load_from_string(shipped.files[file.files["cpu"]])
        assert not set(dtypes(model).values()) & {*HALVES}
        halves = {weight.name for weight in model.graph.initializer if weight.data_type in HALVES}
        readers = [node for node in model.graph.node if {*node.input} & halves]
        assert {node.op_type for node in readers} == {"Cast"}
        assert {node.attribute[0].i for node in readers} == {TensorProto.FLOAT}
        assert len(readers) == len(halves) > 30
        default = onnx.load_from_string(shipped.files[file.files["default"]])
        assert TensorProto.FLOAT16 in dtypes(default).values()
        assert [value.name for value in default.graph.output] == [value.name for value in model.graph.output]
        added = Counter(node.op_type for node in model.graph.node)
        added.subtract(node.op_type for node in default.graph.node)
        assert {name for name, count in added.items() if count} == {"Cast"}


@pytest.mark.parametrize("architecture", FAMILIES)
def test_weights_are_stored_once_and_in_half_precision(made: Any, architecture: str) -> None:
    canonical, shipped = made(architecture)
    models = {name: onnx.load_from_string(data) for name, data in shipped.files.items() if name.endswith(".onnx")}
    outside = {name: sites(model) for name, model in models.items()}
    for file in shipped.graphs:
        assert outside[file.files["default"]] == outside[file.files["cpu"]] != {}
    once = {place for found in outside.values() for place in found.values()}
    floats = [
        w for model in canonical.values() for w in model.graph.initializers.values() if w.dtype == ir.DataType.FLOAT
    ]
    half = sum(w.const_value.nbytes for w in floats if w.const_value is not None) // 2
    assert len(shipped.files["model.weights"]) <= half + ALIGNMENT * len(once)
    assert (
        sum(length for _, length in once) > 0.9 * half or architecture == "CLIPModel"
    )  # whose logit_scale is no weight


def feeds_for(graph: Graph) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    sizes = {"B": 2, "S": 7, "T": 7, "P": 7, "C": 11}
    feeds: dict[str, Any] = {}
    for tensor in graph.inputs:
        shape = tuple(sizes.get(size, size) if isinstance(size, str) else size for size in tensor.shape)
        whole = rng.integers(0, tensor.exclusive_max or 2, shape)
        feeds[tensor.name] = rng.standard_normal(shape).astype(np.float32) if tensor.dtype == "float32" else whole
        if tensor.default == ARANGE:
            feeds[tensor.name] = np.broadcast_to(np.arange(shape[-1]), shape)
        if "mask" in tensor.name:
            feeds[tensor.name] = np.ones(shape, np.int64)
        elif tensor.name == "write_indices":
            feeds[tensor.name] = np.zeros(shape, np.int64)
    return feeds


def computed(data: bytes, feeds: Mapping[str, Any], weights: bytes = b"") -> dict[str, Any]:
    """All outputs of a graph by ONNX Runtime's CPU."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    if weights:
        options.add_external_initializers_from_files_in_memory(["model.weights"], [weights], [len(weights)])
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_cpu_variant_computes_the_fp32_graph_of_rounded_weights(made: Any, architecture: str) -> None:
    """Nothing else is rounded: FP32's own graph with the same weights gives the same, and with its own does not."""
    canonical, shipped = made(architecture)
    for file in shipped.graphs:
        name, data = file.graph.name, shipped.files[file.files["cpu"]]
        graph = Graph(
            name, tuple(replace(t, dtype=t.dtype.replace("float16", "float32")) for t in file.graph.inputs), ()
        )
        feeds = feeds_for(graph)
        halves = {w.name for w in onnx.load_from_string(data).graph.initializer if w.data_type == TensorProto.FLOAT16}
        ours = computed(data, feeds, shipped.files["model.weights"])
        exact = computed(ir.to_proto(canonical[name]).SerializeToString(), feeds)
        for weight in halves:
            value = canonical[name].graph.initializers[weight]
            assert value.const_value is not None
            value.const_value = ir.Tensor(value.const_value.numpy().astype(np.float16).astype(np.float32))
        theirs = computed(ir.to_proto(canonical[name]).SerializeToString(), feeds)
        assert ours.keys() == theirs.keys() == exact.keys()
        for output, expected in theirs.items():
            assert ours[output].dtype == np.float32
            assert relative_error(ours[output], expected) < 2e-6
        assert max(relative_error(ours[output], exact[output]) for output in exact) > 1e-4


def test_onnxruntime_executes_what_it_executes_of_fp32(exported: Exported, half_bundle: Path) -> None:
    """Every weight's Cast is folded when the file is loaded: the same operators are left, as many of each."""
    bundles = [Bundle(exported("ViTForImageClassification")[1]), Bundle(half_bundle)]
    theirs, ours = (executed_operators(bundle, graph_file(bundle, "model")) for bundle in bundles)
    assert ours == theirs
    assert ours["Attention"] == 3
    assert "Cast" not in ours


def test_each_case_of_the_pass() -> None:
    """A mask from bool, a filled constant, a weight with two readers, state that passes through, edges in float32."""
    model = graph_of(
        """
        pass (float[2] x, bool[2] m, float[2] kept) => (float[2] y, float[2] written) {
            mask = Cast<to = 1>(m)
            shape = Shape(x)
            ones = ConstantOfShape<value = float[1] {3.1}>(shape)
            a = Mul(x, w)
            b = Add(a, w)
            c = Mul(b, mask)
            y = Add(c, ones)
            written = Identity(kept)
        }
        """,
        {"w": [0.3, 0.7]},
    )
    before = operators(model)
    convert_precision(model, "fp16", {"kept", "written"})
    model = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model)))
    assert operators(model)["Cast"] == 3  # x comes in, y goes out
    assert compute_in_fp32(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert operators(model) == before + Counter(Cast=1)  # the weight's
    proto = ir.to_proto(model)
    assert [node.output[0] for node in proto.graph.node if "w" in node.input] == ["w_wide"]
    assert {value.type.tensor_type.elem_type for value in (*proto.graph.input, *proto.graph.output)} == {
        TensorProto.FLOAT,
        TensorProto.BOOL,
    }
    found = computed(
        proto.SerializeToString(),
        {"x": np.array([1e5, 2.0], np.float32), "m": np.array([True, False]), "kept": np.array([1.0, 1e6], np.float32)},
    )
    w = np.array([0.3, 0.7], np.float16).astype(np.float32)
    filled = np.float32(np.float16(3.1))
    np.testing.assert_array_equal(found["y"], np.float32([np.float32(1e5) * w[0] + w[0] + filled, filled]))
    assert found["written"].tolist() == [1.0, 1e6]


def test_fp32_has_nothing_to_widen(made: Any) -> None:
    (model,) = made("ViTForImageClassification")[0].values()
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert not compute_in_fp32(model)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_a_perturbed_variant_fails_the_export(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, traced_once: None
) -> None:
    """Parity sees the variant, not the file for GPUs alone."""

    def widen_then_perturb(model: ir.Model) -> bool:
        changed = compute_in_fp32(model)
        norm = next(node for node in model.graph if node.op_type == "LayerNormalization")
        norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", 0.1)
        return changed

    monkeypatch.setattr(variants, "compute_in_fp32", widen_then_perturb)
    folder = make_checkpoint("ViTForImageClassification")
    with pytest.raises(ParityError, match="differs from PyTorch"):
        pipeline.export(str(folder), tmp_path / "out", precision="fp16", max_sizes={"B": 3})
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def half_bundle(make_checkpoint: MakeCheckpoint, once: Any) -> Path:
    """A tiny random ViT in FP16."""
    folder = make_checkpoint("ViTForImageClassification")
    return once("half-vit", lambda out: export_to(out, folder, precision="fp16", max_sizes={"B": 3})) / "bundle"


def test_a_default_file_that_does_not_load_stops_the_export(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, traced_once: None
) -> None:
    write = pipeline.write_files

    def write_another(writer: Any, loaded: Any, converted: pipeline.Converted) -> None:
        write(writer, loaded, converted)  # what is written here is checked; this comes behind it
        writer.add(
            "model.onnx", converted.variants.files["model.onnx"].replace(b"LayerNormalization", b"LayerNormalisation")
        )

    monkeypatch.setattr(pipeline, "write_files", write_another)
    folder = make_checkpoint("ViTForImageClassification")
    with pytest.raises(
        ExportError, match=r"model\.onnx, which would ship for GPUs, does not load: .*LayerNormalisation"
    ):
        pipeline.export(str(folder), tmp_path / "out", precision="fp16", max_sizes={"B": 3})
    assert list(tmp_path.iterdir()) == []


def test_a_default_file_whose_state_is_not_as_bundle_json_says_is_refused(
    half_gpt_bundle: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(half_gpt_bundle, tmp_path / "bundle"))
    open_default_files(Bundle(bundle))
    replaced("decoder.onnx", lambda _: (bundle / "decoder.cpu.onnx").read_bytes())(bundle)
    with pytest.raises(ExportError, match=r"decoder\.onnx, .* has key_cache\.0, .* in another dtype"):
        open_default_files(Bundle(bundle))


def test_verify_rounds_the_default_file_as_a_gpu_would(half_bundle: Path, tmp_path: Path) -> None:
    """Its weights are the variant's; what else is in it, nothing else on a CPU computes."""
    parity = Bundle(half_bundle).manifest.parity
    cases = verify(half_bundle).cases
    assert len(cases) == len(parity["cases"])
    rounded, fused = sum(case.emulated for case in cases), sum(case.native for case in cases)
    assert (len(cases), fused) in ((2 * rounded, 0), (3 * rounded, rounded))  # without kernels here, and with them
    text = transom("verify", half_bundle).stdout
    assert len(re.findall(r"^B=\d+ +logits ", text, re.MULTILINE)) == rounded
    assert len(re.findall(r"^B=\d+ rounded +logits ", text, re.MULTILINE)) == rounded
    assert len(re.findall(r"^B=\d+ fused +logits ", text, re.MULTILINE)) == fused
    bundle = Path(shutil.copytree(half_bundle, tmp_path / "bundle"))

    def perturb(data: bytes) -> bytes:
        model = onnx.load_from_string(data)
        norm = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
        next(each for each in norm.attribute if each.name == "epsilon").f = 0.1
        return model.SerializeToString()

    replaced("model.onnx", perturb)(bundle)
    selftest(bundle)
    with pytest.raises(ParityError, match="differs from PyTorch"):
        verify(bundle)


def test_an_old_bundle_without_the_variant_loads_and_passes_its_selftest(half_gpt_bundle: Path, tmp_path: Path) -> None:
    """FP16 as it was exported before: one file, its weights inside, its caches in half precision."""
    bundle = Path(shutil.copytree(half_gpt_bundle, tmp_path / "bundle"))
    (model,) = stored_graphs(Bundle(bundle), "default").values()
    replaced("decoder.onnx", lambda _: ir.to_proto(model).SerializeToString())(bundle)

    def forget(words: dict[str, Any]) -> None:
        (graph,) = words["graphs"]
        del graph["files"]["cpu"], graph["weights"], words["native"]
        graph["files"].pop("native", None)  # where the export had kernels
        del words["files"]["decoder.cpu.onnx"], words["files"]["model.weights"]
        words["files"].pop("decoder.operators.json", None)

    rewritten(forget)(bundle)
    for name in ("decoder.cpu.onnx", "model.weights"):
        (bundle / name).unlink()
    report = selftest(bundle)
    assert report.worst.error <= report.tolerance == 1e-2
    with load(bundle) as gpt:
        assert {t.dtype for t in gpt.backend("decoder").graph.inputs if t.state} == {"float16"}
    with load(half_gpt_bundle) as gpt:
        assert {t.dtype for t in gpt.backend("decoder").graph.inputs if t.state} == {"float32"}


def sums_of(model: ir.Model, **feeds: Any) -> dict[str, float]:
    backend = RangeBackend(model, Graph("model", (), ()), sums=True)
    backend.run({name: np.asarray(feed, np.float32) for name, feed in feeds.items()}, {})
    return {name: value for name, (value, _) in backend.sums.items()}


def test_bounds_of_partial_sums_by_pencil() -> None:
    product = "g (float[2, 2] x) => (float[2, 1] y) { y = MatMul(x, w) }"
    assert sums_of(graph_of(product, {"w": [[100.0], [-70.0]]}), x=[[3, 4], [-1, 5]]) == {"y": 3 * 100 + 4 * 70}
    product = "g (float[1, 2] x) => (float[1, 1] y) { y = Gemm<transB = 1>(x, w, b) }"
    assert sums_of(graph_of(product, {"w": [[100.0, -70.0]], "b": [-9.0]}), x=[[3, 4]]) == {"y": 580 + 9}
    product = "g (float[1, 1, 1, 3] x) => (float[1, 1, 1, 2] y) { y = Conv(x, w) }"
    assert sums_of(graph_of(product, {"w": [[[[2.0, -3.0]]]]}), x=[[[[1, -5, 1]]]]) == {"y": 2 + 15}


def test_scores_of_attention_are_bounded_before_they_are_scaled() -> None:
    model = graph_of("g (float[1, 1, 1, 4] q, float[1, 1, 2, 4] k) => (float[1, 1, 1, 4] y) { y = Attention(q, k, k) }")
    q, k = [[[[1, -1, 2, 0]]]], [[[[5, 5, 0, 9], [1, -1, 3, 0]]]]
    backend = RangeBackend(model, Graph("model", (), ()), sums=True)
    backend.run({"q": np.float32(q), "k": np.float32(k)}, {})
    assert {name: value for name, (value, _) in backend.sums.items()} == {"y_scores": 10.0}  # 5 - 5 adds up to nothing
    assert backend.largest["y_scores"][0] == pytest.approx(8 / 2)  # scaled by 1 / sqrt(4)


def test_modules_that_stay_in_fp32_do_not_count() -> None:
    paths = ["sentence_pooling.product", "encoder.product"]
    model = graph_of(
        "g (float[1, 1] x) => (float[1, 1] z) { y = MatMul(x, w) z = MatMul(y, v) }",
        {"w": [[9.0]], "v": [[2.0]]},
        paths,
    )
    backend = RangeBackend(model, Graph("model", (), ()), sums=True)
    backend.run({"x": np.float32([[1.0]])}, {})
    assert {name: value for name, (value, _) in backend.sums.items()} == {"y": 9.0, "z": 18.0}
    assert in_half(backend.sums) == {"z": (18.0, "encoder.product")}
    assert beyond_fp16({"a": (7e4, "sentence_pooling"), "b": (6e4, ""), "c": (7e4, "")}) == {"c": (7e4, "")}


@pytest.fixture(scope="module")
def cancelling(make_checkpoint: MakeCheckpoint, once: Any) -> Path:
    """A ViT in FP16 two of whose features are equal, and cancel: 32,768 times the one, -32,768 times the other."""
    from safetensors.torch import load_file, save_file

    def make(folder: Path) -> None:
        checkpoint = Path(shutil.copytree(make_checkpoint("ViTForImageClassification"), folder / "checkpoint"))
        tensors = load_file(checkpoint / "model.safetensors")
        first, second = (f"vit.encoder.layer.1.{name}.dense" for name in ("intermediate", "output"))
        tensors[f"{first}.weight"][:2] = 0.0
        tensors[f"{first}.bias"][:2] = 4.0
        tensors[f"{second}.weight"][:, 0] = 2.0**15
        tensors[f"{second}.weight"][:, 1] = -(2.0**15)
        save_file(tensors, checkpoint / "model.safetensors")
        export_to(folder, checkpoint, precision="fp16", max_sizes={"B": 3})

    return once("cancelling-vit", make) / "bundle"


def test_a_sum_that_passes_65504_on_its_way_is_told_and_comes_out_right(cancelling: Path) -> None:
    parity = Bundle(cancelling).manifest.parity
    assert parity["fp16_largest"]["value"] < 1000  # no tensor comes near
    largest = parity["fp16_largest_sum"]
    assert largest["value"] > 3.99 * 2 * 2**15 > 65504
    assert largest["module"] == "encoder.layer.1.output.dense"
    report = selftest(cancelling)
    assert report.worst.error < 2e-3
    with load(cancelling) as vit:
        logits = vit.run({"pixel_values": np.ones((1, 3, 20, 20), np.float32)})["logits"]
    assert np.isfinite(logits).all()
    text = transom("inspect", cancelling).stdout
    expected = (
        r"largest sum +up to \S+ in \S+ \(module encoder\.layer\.1\.output\.dense\) on the way: a target that adds in"
    )
    assert re.search(expected, text)
    assert re.search(r"largest value +\S+ in \S+ \(module \S+\); fp16 ends at 65504", text)


def test_a_bundle_whose_sums_stay_small_is_told_so(half_bundle: Path, vit_bundle: Path) -> None:
    parity = Bundle(half_bundle).manifest.parity
    assert 0 < parity["fp16_largest"]["value"] < parity["fp16_largest_sum"]["value"] < 65504
    assert re.search(r"largest sum +no sum of products passes \S+ in ", transom("inspect", half_bundle).stdout)
    assert "largest sum" not in transom("inspect", vit_bundle).stdout
    assert "No sum of products passes" in fp16_range(parity)
    assert fp16_range(Bundle(vit_bundle).manifest.parity) == ""
