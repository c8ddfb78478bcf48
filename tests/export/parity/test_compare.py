"""The parity gate: it passes what is right, fails what is not, and leaves nothing behind."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load as parse
from safetensors.numpy import save

from bad_bundles import replaced
from command_line import as_quantized, changed_bundle
from transom.export import pipeline
from transom.export.parity.cases import grid
from transom.export.parity.compare import TOLERANCES, export_limit, require_parity
from transom.export.parity.results import CaseResult
from transom.export.verification import verify
from transom.runtime.compare import compare
from transom.runtime.errors import CheckpointError, ParityError, PrecisionError
from transom.runtime.golden_reference import REPEAT_TOLERANCE
from transom.runtime.graph_spec import Axis
from transom.runtime.manifest import manifest_sha256
from transom.runtime.selftest import selftest

MakeCheckpoint = Callable[..., Path]


def test_compare_by_pencil() -> None:
    theirs = np.array([[1.0, -4.0], [2.0, 0.5]], np.float32)
    ours = np.array([[1.0, -4.0], [2.5, 0.5]], np.float32)
    worst = compare("logits", ours, theirs)
    assert (worst.error, worst.index, worst.ours, worst.theirs) == (0.5 / 4.0, (1, 0), 2.5, 2.0)
    assert str(worst) == "logits[1, 0] is 2.5, expected 2 (error 1.25e-01)"


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["ours", "theirs", "both"])
def test_what_is_not_finite_is_an_infinite_error(bad: float, side: str) -> None:
    ours, theirs = np.ones((2, 2), np.float32), np.ones((2, 2), np.float32)
    if side != "theirs":
        ours[0, 1] = bad
    if side != "ours":
        theirs[0, 1] = bad
    worst = compare("x", ours, theirs)
    assert (worst.error, worst.index) == (math.inf, (0, 1))


def test_another_shape_and_zeros() -> None:
    assert compare("x", np.zeros((2,), np.float32), np.zeros((3,), np.float32)).error == math.inf
    assert compare("x", np.full((2,), 0.25, np.float32), np.zeros((2,), np.float32)).error == 0.25


def test_padding_does_not_count_but_must_be_finite() -> None:
    theirs = np.array([[[1.0], [90.0]], [[2.0], [4.0]]], np.float32)  # (B, S, 1)
    ours = np.array([[[1.0], [50.0]], [[2.5], [4.0]]], np.float32)
    real = np.array([[True, False], [True, True]])
    worst = compare("hidden", ours, theirs, real[:, :, None])
    assert (worst.error, worst.index) == (0.5 / 4.0, (1, 0, 0))
    ours[0, 1] = np.nan
    assert compare("hidden", ours, theirs, real[:, :, None]).error == math.inf


def test_the_grid_has_every_corner() -> None:
    shapes = grid({"B": Axis(1, 1, 16), "S": Axis(1, 128, 512)})
    for corner in ({"B": 1, "S": 1}, {"B": 16, "S": 512}, {"B": 1, "S": 512}, {"B": 16, "S": 1}):
        assert corner in shapes
    assert {"B": 1, "S": 128} in shapes
    assert {"B": 3, "S": 67} in shapes
    assert grid({"B": Axis(1, 1, 1)}) == [{"B": 1}]


def test_beyond_tolerance_names_the_worst_element() -> None:
    theirs = {"logits": np.ones((1, 3), np.float32)}
    ours = {"logits": np.array([[1.0, 1.0, 1.001]], np.float32)}
    case = CaseResult({"B": 1, "S": 7}, (compare("logits", ours["logits"], theirs["logits"]),))
    require_parity([case], TOLERANCES["fp16"], "x", "")
    expected = (
        r"x differs from PyTorch at B=1 S=7: logits\[0, 2\] is 1\.001, expected 1 .* below 2e-05\. Do something\."
    )
    with pytest.raises(ParityError, match=expected):
        require_parity([case], TOLERANCES["fp32"], "x", "Do something.")
    with pytest.raises(ParityError, match=r"x, simulated as another device computes it, differs"):
        require_parity([CaseResult(case.shape, case.comparisons, emulated=True)], TOLERANCES["fp32"], "x", "")


@pytest.mark.parametrize(("precision", "limit"), [("int8", 0.5), ("int4", 0.8)])
def test_integers_are_refused_from_half_the_largest_value_on(precision: str, limit: float) -> None:
    """Zeros are off by 1, the negative of everything by 2."""
    theirs = np.array([[1.0, -4.0]], np.float32)

    def parity(ours: NDArray[np.float32]) -> None:
        require_parity([CaseResult({"B": 1}, (compare("logits", ours, theirs),))], TOLERANCES[precision], "x", "")

    parity(theirs + np.float32(3.99 * limit))
    for wrong in (theirs + np.float32(4 * limit), 0 * theirs, -theirs):
        with pytest.raises(ParityError, match="x differs from PyTorch at B=1: logits"):
            parity(wrong)


def test_parity_over_no_case_proves_nothing() -> None:
    with pytest.raises(ParityError, match="x was compared with PyTorch in no case at all"):
        require_parity([], 1.0, "x", "")


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("weight", ["encoder.layer.1.attention.self.value.bias", "embeddings.LayerNorm.bias"])
def test_one_perturbed_weight_fails_the_export(
    bert_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight: str
) -> None:
    """One element of one weight of the graph: the artefact is no longer what PyTorch computes."""
    trace = pipeline.onnx_from_module

    def trace_then_perturb(*arguments: Any) -> ir.Model:
        model = trace(*arguments)
        value = model.graph.initializers[weight]
        assert value.const_value is not None
        perturbed = value.const_value.numpy().copy()
        perturbed[3] += 0.05  # weights have deviation 0.2
        value.const_value = ir.Tensor(perturbed)
        return model

    monkeypatch.setattr(pipeline, "onnx_from_module", trace_then_perturb)
    with pytest.raises(ParityError, match=r"differs from PyTorch at B=\d+ S=\d+: \w+\[\d+, .*\] is .*, expected"):
        pipeline.export(str(bert_checkpoint), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("traced_once")
def test_a_failed_export_keeps_the_old_bundle(
    bert_checkpoint: Path, bert_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(bert_bundle, tmp_path / "out"))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setitem(TOLERANCES, "fp32", 0.0)
    with pytest.raises(ParityError):
        pipeline.export(str(bert_checkpoint), out, force=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.usefixtures("traced_once")
def test_fp16_that_overflows_is_refused_with_the_tensor(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_checkpoint("ViTForImageClassification")
    tensors = load_file(folder / "model.safetensors")
    tensors["vit.encoder.layer.1.output.dense.weight"] *= 3e4
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(PrecisionError, match=r"fp16 cannot hold .* \(module encoder\.layer\.\d.*--precision bf16"):
        pipeline.export(str(folder), tmp_path / "fp16", precision="fp16", max_sizes={"B": 3})
    assert list(tmp_path.iterdir()) == []
    pipeline.export(str(folder), tmp_path / "bf16", precision="bf16", max_sizes={"B": 3})


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("architecture", ["BertForMaskedLM", "ViTModel", "CLIPModel"])
def test_every_precision_exports_verifies_and_passes_its_selftest(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, architecture: str, precision: str
) -> None:
    folder = make_checkpoint(architecture)
    manifest = pipeline.export(str(folder), tmp_path / "out", precision=precision, max_sizes={"B": 5})
    assert manifest.precision == precision
    assert 0 < manifest.parity["worst"]["error"] <= TOLERANCES[precision]
    cases = verify(tmp_path / "out").cases
    named = [{size for tensor in file.graph.inputs for size in tensor.shape} for file in manifest.graphs]
    grids = [grid({name: axis for name, axis in manifest.axes.items() if name in names}) for names in named]
    fused = [case for case in cases if case.native]
    assert len(cases) - len(fused) == sum(map(len, grids)) * (2 if precision == "fp16" else 1)  # again, as a GPU rounds
    assert len(fused) == sum(map(len, grids)) * any("native" in file.files for file in manifest.graphs)
    report = selftest(tmp_path / "out", kernels="onnxruntime")
    assert report.tolerance == TOLERANCES[precision]
    assert report.worst.error <= report.tolerance
    again = max(comparison.error for case in report.cases for comparison in case.against_build)
    assert again <= 1e-6  # the same machine computes the same
    assert selftest(tmp_path / "out").cases  # by lists of operators, where there are kernels


def test_the_selftest_fails_when_the_graph_is_another(bert_bundle: Path, tmp_path: Path) -> None:
    """Other weights under this bundle's golden values, with every hash made right again."""
    bundle = Path(shutil.copytree(bert_bundle, tmp_path / "bundle"))
    model = onnx.load(bundle / "model.onnx")
    (bias,) = (w for w in model.graph.initializer if w.name == "encoder.layer.1.attention.self.value.bias")
    perturbed = onnx.numpy_helper.to_array(bias).copy()
    perturbed[3] += 0.05  # weights have deviation 0.2
    bias.CopyFrom(onnx.numpy_helper.from_array(perturbed, bias.name))
    data = model.SerializeToString()
    (bundle / "model.onnx").write_bytes(data)
    words = json.loads((bundle / "bundle.json").read_text())
    words["files"]["model.onnx"] = {"size": len(data), "sha256": sha256(data).hexdigest()}
    words["manifest_sha256"] = manifest_sha256(words)
    (bundle / "bundle.json").write_text(json.dumps(words))
    with pytest.raises(ParityError, match="on cpu differs from PyTorch"):
        selftest(bundle, kernels="onnxruntime")


def moved(side: str, by: float) -> Callable[[Path], object]:
    """Golden values of one side, each further off by a share of its tensor's largest."""

    def change(data: bytes) -> bytes:
        tensors = parse(data)
        found = {name: array for name, array in tensors.items() if f"/{side}/" in name}
        return save(tensors | {name: array + by * np.abs(array).max() for name, array in found.items()})

    return replaced("golden.safetensors", change)


def test_a_quantised_bundle_is_compared_with_its_own_build(vit_bundle: Path, tmp_path: Path) -> None:
    """PyTorch is further away, and may be by twice what the export measured."""
    bundle = changed_bundle(vit_bundle, tmp_path, as_quantized)
    moved("pytorch", 0.45)(bundle)
    report = selftest(bundle, threads=1, kernels="onnxruntime")
    assert (report.side, report.tolerance) == ("bundle", REPEAT_TOLERANCE)
    assert report.worst.error <= 1e-6
    assert 0.3 < report.worst_against("pytorch").error < 0.5
    moved("bundle", 0.5 * REPEAT_TOLERANCE)(bundle)
    assert (
        0.4 * REPEAT_TOLERANCE < selftest(bundle, threads=1, kernels="onnxruntime").worst.error < 0.6 * REPEAT_TOLERANCE
    )
    moved("bundle", REPEAT_TOLERANCE)(bundle)
    expected = r"on cpu differs from what it gave when it was built: .* 0\.1 is allowed .* 8-bit products on this "
    with pytest.raises(ParityError, match=expected):
        selftest(bundle, threads=1, kernels="onnxruntime")


def test_verify_wants_the_same_checkpoint(bert_bundle: Path, bert_checkpoint: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(bert_checkpoint, tmp_path / "moved"))
    assert verify(bert_bundle, source=str(moved))
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-3}))
    with pytest.raises(CheckpointError, match=r"not the checkpoint that .* was made from"):
        verify(bert_bundle, source=str(moved))


@pytest.mark.parametrize("sizes", [{"B": 1, "S": 1}, {"S": 2}])
def test_the_smallest_bounds_export(make_checkpoint: MakeCheckpoint, tmp_path: Path, sizes: dict[str, int]) -> None:
    shallow = make_checkpoint("BertModel", num_hidden_layers=1)
    manifest = pipeline.export(str(shallow), tmp_path / "out", max_sizes=sizes)
    assert {name: manifest.axes[name].max for name in sizes} == sizes


def test_an_image_processor_that_does_not_resize(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = make_checkpoint("ViTForImageClassification", num_hidden_layers=1)
    (folder / "preprocessor_config.json").write_text(json.dumps({"do_resize": False}))
    pipeline.export(str(folder), tmp_path / "out", max_sizes={"B": 3})


@pytest.mark.parametrize("seed", range(3))
def test_one_logit_near_zero_has_the_scale_of_the_others(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, seed: int
) -> None:
    """A single logit has no scale of its own: at one shape it may happen to be a thousandth of what it is elsewhere."""
    folder = make_checkpoint("BertForSequenceClassification", num_labels=1, seed=seed, num_hidden_layers=1)
    manifest = pipeline.export(str(folder), tmp_path / "out", precision="fp16", max_sizes={"B": 3})
    assert set(manifest.parity["scales"]) == {"logits", "last_hidden_state", "sentence_embedding"}
    selftest(tmp_path / "out")


def worst_of(*errors: float) -> CaseResult:
    """One output for each error, of a largest value of 1."""
    theirs = np.ones((1,), np.float32)
    return CaseResult({"B": 1}, tuple(compare(f"y{i}", theirs + np.float32(e), theirs) for i, e in enumerate(errors)))


def test_the_worst_of_all_cases_is_judged() -> None:
    with pytest.raises(ParityError, match=r"y1\[0\] is 1\.5"):
        require_parity([worst_of(0.0), worst_of(0.125, 0.5), worst_of(0.25)], 0.4, "x", "")


def test_an_error_that_is_no_number_fails() -> None:
    case = worst_of(0.0)
    (found,) = case.comparisons
    with pytest.raises(ParityError, match="x differs from PyTorch"):
        require_parity([replace(case, comparisons=(replace(found, difference=math.nan),))], 0.4, "x", "")


def test_the_limit_of_an_export_is_that_of_its_precision() -> None:
    assert {precision: export_limit(precision).tolerance for precision in TOLERANCES} == {
        "fp32": 2e-5,
        "fp16": 1e-2,
        "bf16": 8e-2,
        "int8": 0.5,
        "int4": 0.8,
    }
