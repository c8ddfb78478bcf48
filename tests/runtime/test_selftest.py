"""The self-test and the verification of INT8 bundles: bit for bit, by the simulated TensorRT graph, by PyTorch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load as parse
from safetensors.numpy import save

from bad_bundles import replaced
from command_line import as_quantized, changed_bundle, document, transom
from paths import KEPT
from transom.export.families import vit
from transom.export.families.evaluation import GateLimits
from transom.export.parity.cases import ParityCases
from transom.export.parity.compare import TOLERANCES, check_parity, export_limit
from transom.export.parity.inputs import parity_inputs
from transom.export.parity.results import Golden
from transom.export.verification import verify
from transom.runtime import load
from transom.runtime.backends.integer_sums import integer_sums
from transom.runtime.bundle import Bundle
from transom.runtime.errors import AccuracyError, BundleError, ParityError
from transom.runtime.golden import GOLDEN, read_golden
from transom.runtime.golden_reference import (
    BELOW_ALL_ZEROS,
    BUNDLE,
    ENGINE_TOLERANCE,
    NATIVE,
    PYTORCH,
    REPEAT_TOLERANCE,
    Reference,
    references,
)
from transom.runtime.manifest_graphs import SIMULATED
from transom.runtime.selftest import selftest

ALL_SIDES = (PYTORCH, BUNDLE, SIMULATED)
HEAD = "classifier.weight.transposed.scale"


def copied(bundle: Path, folder: Path) -> Path:
    return Path(shutil.copytree(bundle, folder / "copy"))


def with_weight(bundle: Path, name: str, change: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
    """Change one initializer of the CPU's graph, every hash made right again."""

    def rewritten(data: bytes) -> bytes:
        model = onnx.load_from_string(data)
        (weight,) = (each for each in model.graph.initializer if each.name == name)
        weight.CopyFrom(onnx.numpy_helper.from_array(change(onnx.numpy_helper.to_array(weight)), name))
        return bytes(model.SerializeToString())

    replaced("model.cpu.onnx", rewritten)(bundle)


def scales_of_layers(bundle: Path) -> dict[str, NDArray[np.float32]]:
    """The scales of the weights of each layer, one a channel, by name."""
    model = onnx.load(str(bundle / "model.cpu.onnx"))
    arrays = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    return {name: array for name, array in arrays.items() if name.endswith(".scale") and array.ndim == 1}


def test_the_export_keeps_the_worst_error_and_the_outputs_of_three_sides(int8_bundle: Path) -> None:
    parity = Bundle(int8_bundle).manifest.parity
    assert parity["tolerance"] == TOLERANCES["int8"] == 0.5
    assert 0.01 < parity["worst"]["error"] < 0.2
    cases = [case for case in parity["cases"] if not case.get("native")]
    assert sum(case.get("emulated", False) for case in cases) == len(cases) // 2
    golden = read_golden(Bundle(int8_bundle))
    for arrays in golden.values():
        assert {*arrays} - {NATIVE} == {"input", *ALL_SIDES}
        assert arrays[PYTORCH].keys() == arrays[BUNDLE].keys() == arrays[SIMULATED].keys()
    differ = [not np.array_equal(arrays[SIMULATED]["logits"], arrays[BUNDLE]["logits"]) for arrays in golden.values()]
    assert any(differ)  # two graphs of two signednesses


def test_the_references_of_an_int8_bundle(int8_bundle: Path, vit_bundle: Path) -> None:
    """Exported on this processor: bit for bit here; a GPU by its own graph; PyTorch within twice the worst error."""
    manifest = Bundle(int8_bundle).manifest
    pytorch = Reference(PYTORCH, 2 * manifest.parity["worst"]["error"])
    assert references(manifest, "cpu", ALL_SIDES) == (Reference(BUNDLE, 0.0), pytorch)
    for device in ("cuda", "tensorrt"):
        assert references(manifest, device, ALL_SIDES) == (Reference(SIMULATED, ENGINE_TOLERANCE), pytorch)
    for device in ("cpu", "tensorrt"):
        plain = references(Bundle(vit_bundle).manifest, device, ALL_SIDES)
        assert plain == (Reference(PYTORCH, TOLERANCES["fp32"]),)


@pytest.mark.parametrize(
    ("where", "key", "there", "says"),
    [
        ("quantization", "instruction_set", "neon", "the instruction set is {here} here, at the export it was neon"),
        (
            "quantization",
            "integer_means",
            "magic",
            "what makes integer sums exact is {means} here, at the export it w",
        ),
        ("tools", "onnxruntime", "1.2.3", "onnxruntime is {ort} here, at the export it was 1.2.3"),
    ],
)
def test_what_differs_from_the_export_is_named(
    int8_bundle: Path, tmp_path: Path, where: str, key: str, there: str, says: str
) -> None:
    """There 0.1 is allowed in place of nothing."""
    import onnxruntime

    from transom.runtime.host import instruction_set

    def elsewhere(words: dict[str, Any]) -> None:
        words[where][key] = there

    report = selftest(changed_bundle(int8_bundle, tmp_path, elsewhere), kernels="onnxruntime")
    assert (report.side, report.tolerance) == (BUNDLE, REPEAT_TOLERANCE)
    expected = says.format(here=instruction_set(), means=integer_sums().way, ort=onnxruntime.__version__)
    (note,) = report.notes
    assert expected in note


def test_the_sign_of_one_channels_scale_fails(int8_bundle: Path, tmp_path: Path) -> None:
    """The median channel of each of 19 layers, one at a time: a tolerance of 0.1 let most of them pass."""
    scales = scales_of_layers(int8_bundle)
    assert len(scales) >= 19
    for number, (name, array) in enumerate(scales.items()):
        median = int(np.argsort(array.reshape(-1))[array.size // 2])
        bundle = copied(int8_bundle, tmp_path / str(number))

        def negated(values: NDArray[Any], channel: int = median) -> NDArray[Any]:
            changed = values.copy()
            changed.reshape(-1)[channel] *= -1
            return changed

        with_weight(bundle, name, negated)
        with pytest.raises(ParityError, match="differs from what it gave when it was built"):
            selftest(bundle, kernels="onnxruntime")


def edited(side: str, change: Callable[[NDArray[Any]], NDArray[Any]]) -> Callable[[Path], object]:
    def rewrite(data: bytes) -> bytes:
        return save({name: change(array) if f"/{side}/" in name else array for name, array in parse(data).items()})

    return replaced(GOLDEN, rewrite)


def test_pytorch_further_off_than_twice_the_exports_worst_fails_on_the_cpu_too(
    int8_bundle: Path, tmp_path: Path
) -> None:
    bundle = copied(int8_bundle, tmp_path)
    edited(PYTORCH, lambda array: array * np.float32(1.5))(bundle)
    with pytest.raises(ParityError, match=r"differs from PyTorch: .*; the bundle allows 0\.\d"):
        selftest(bundle)


@pytest.mark.parametrize("side", [PYTORCH, BUNDLE])
def test_golden_values_without_a_side_are_refused(int8_bundle: Path, tmp_path: Path, side: str) -> None:
    bundle = copied(int8_bundle, tmp_path)
    replaced(
        GOLDEN, lambda data: save({name: array for name, array in parse(data).items() if f"/{side}/" not in name})
    )(bundle)
    with pytest.raises(BundleError, match=f"a case has no outputs of the side '{side}'"):
        selftest(bundle)


@pytest.mark.parametrize("name", ["bert-int8", "clip-int8", "gpt-int8", "transformer-int8", "vit-int8"])
def test_bundles_of_before_are_compared_with_what_they_hold(name: str) -> None:
    """No simulated side, no means of exactness: within 0.1 on a CPU, with PyTorch elsewhere; the reason is given."""
    manifest = Bundle(KEPT / name).manifest
    worst = manifest.parity["worst"]["error"]
    report = selftest(KEPT / name, threads=1)
    assert report.tolerance == REPEAT_TOLERANCE
    assert "what makes integer sums exact is " in report.notes[0]
    (elsewhere,) = references(manifest, "tensorrt", (PYTORCH, BUNDLE))
    assert (elsewhere.side, elsewhere.tolerance) == (PYTORCH, 2 * worst)
    assert "hold no outputs of the simulated TensorRT graph; export again" in elsewhere.note


def test_weights_alone_have_one_graph_for_every_device() -> None:
    manifest = Bundle(KEPT / "gpt-int4").manifest
    assert [each.side for each in references(manifest, "cuda", (PYTORCH, BUNDLE))] == [BUNDLE, PYTORCH]


def test_two_unknown_processors_need_not_be_of_one_kind(
    int8_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(words: dict[str, Any]) -> None:
        words["quantization"]["instruction_set"] = "unknown"

    monkeypatch.setattr("transom.runtime.golden_reference.instruction_set", lambda: "unknown")
    manifest = Bundle(changed_bundle(int8_bundle, tmp_path, unknown)).manifest
    assert references(manifest, "cpu", ALL_SIDES)[0].tolerance == REPEAT_TOLERANCE


@pytest.mark.parametrize(("name", "here", "tolerance"), [("sse", True, REPEAT_TOLERANCE), ("avx2", False, 0.0)])
def test_weights_alone_repeat_bit_for_bit_where_blocks_are_integers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, here: bool, tolerance: float
) -> None:
    """Without AVX2 the logits of the reference GPT in INT4 differed by 7e-7 with one thread and with two."""
    import onnxruntime

    def made_here(words: dict[str, Any]) -> None:
        words["quantization"]["instruction_set"] = name
        words["tools"]["onnxruntime"] = onnxruntime.__version__

    monkeypatch.setattr("transom.runtime.golden_reference.instruction_set", lambda: name)
    manifest = Bundle(changed_bundle(KEPT / "gpt-int4", tmp_path, made_here)).manifest
    reference = references(manifest, "cpu", (PYTORCH, BUNDLE))[0]
    assert (reference.side, reference.tolerance) == (BUNDLE, tolerance)
    assert ("depend on the number of threads" in reference.note) is here


def test_nothing_allows_outputs_of_zeros(int8_bundle: Path, tmp_path: Path) -> None:
    """Whatever an export measured: zeros have an error of 1."""

    def worse(words: dict[str, Any]) -> None:
        words["parity"]["worst"]["error"] = 0.6

    pytorch = references(Bundle(changed_bundle(int8_bundle, tmp_path, worse)).manifest, "cpu", ALL_SIDES)[1]
    assert pytorch.tolerance == BELOW_ALL_ZEROS < 1


# ------------------------------------------------------------------------------------------------ verify


def without_score(words: dict[str, Any]) -> None:
    """A user's bundle: no reference model, whose held-out data would be known."""
    words["source"]["checkpoint"] = "/mine"


def test_verify_without_the_calibration_data_does_not_check_accuracy(int8_bundle: Path, tmp_path: Path) -> None:
    from conftest import reference

    bundle, vit = changed_bundle(int8_bundle, tmp_path, without_score), reference("vit")
    result = transom("verify", bundle, "--source", vit)
    assert result.exit_code == 1
    assert "accuracy not checked: give --calibration-data what the bundle was calibrated on" in result.stderr
    assert "agrees with PyTorch" not in result.stdout
    describe = transom("verify", bundle, "--source", vit, "--json")
    assert (describe.exit_code, document(describe)["accuracy"], document(describe)["gate"]) == (1, "not checked", None)
    result = transom("verify", bundle, "--source", vit, "--no-accuracy")
    assert (result.exit_code, "accuracy not checked" in result.stderr) == (0, True)
    assert document(transom("verify", bundle, "--source", vit, "--no-accuracy", "--json"))["accuracy"] == "not checked"


def test_verify_of_a_zeroed_head_fails_parity(int8_bundle: Path, tmp_path: Path) -> None:
    from conftest import reference

    bundle = changed_bundle(int8_bundle, tmp_path, without_score)
    with_weight(bundle, HEAD, np.zeros_like)
    result = transom("verify", bundle, "--source", reference("vit"), "--no-accuracy")
    assert result.exit_code == 1
    assert "ParityError: vit in int8 differs from PyTorch at B=" in result.stderr


def test_verify_compares_the_file_for_other_devices_too(int8_bundle: Path, tmp_path: Path) -> None:
    """Its weights and the CPU's lie in one file, its scales do not."""
    bundle = copied(int8_bundle, tmp_path)

    def wrong(data: bytes) -> bytes:
        model = onnx.load_from_string(data)
        scale = next(each for each in model.graph.initializer if each.name == HEAD)
        scale.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(scale), scale.name))
        return bytes(model.SerializeToString())

    replaced("model.onnx", wrong)(bundle)
    with pytest.raises(ParityError, match="vit in int8, simulated as another device computes it, differs from PyTorch"):
        verify(bundle, accuracy=False)
    with open(bundle / "bundle.json") as file:
        assert json.load(file)["precision"] == "int8"


def test_verify_judges_the_gate_again(int8_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate that allows nothing: of 540 scans some are answered otherwise than by PyTorch, or none."""
    monkeypatch.setattr(vit, "FAMILY", replace(vit.FAMILY, gate=GateLimits(points=-1.0)))
    with pytest.raises(AccuracyError, match=r"vit in int8: top-1 accuracy .* of -100"):
        verify(int8_bundle)


# ------------------------------------------------------------------------------------------ golden values


def test_a_new_export_keeps_the_simulated_side(vit_bundle: Path, tmp_path: Path) -> None:
    """Three times the same bundle, of which the manifest says INT8."""
    bundle = changed_bundle(vit_bundle, tmp_path, as_quantized)
    golden = Golden()
    with load(bundle) as side:
        inputs = parity_inputs((file.graph for file in side.manifest.graphs), None, None)
        parity_cases = ParityCases(side.manifest, inputs)
        cases = check_parity(side, side, side, parity_cases, golden, export_limit("int8"), lambda said: None)
    assert [case.emulated for case in cases] == [False, True] * len(parity_cases)
    sides = {name.split("/")[1] for name in parse(golden.to_bytes())}
    assert sides == {"input", *ALL_SIDES}


def without_logits(data: bytes) -> bytes:
    return save({name: array for name, array in parse(data).items() if f"/{BUNDLE}/logits" not in name})


def test_a_case_with_fewer_outputs_on_one_side_is_refused(int8_bundle: Path, tmp_path: Path) -> None:
    bundle = copied(int8_bundle, tmp_path)
    replaced(GOLDEN, without_logits)(bundle)
    with pytest.raises(BundleError, match="has not the same outputs on all sides"):
        selftest(bundle)


def test_a_bundle_without_golden_values_is_refused(vit_bundle: Path, tmp_path: Path) -> None:
    def without(words: dict[str, Any]) -> None:
        del words["files"][GOLDEN]

    with pytest.raises(BundleError, match="holds no golden values; export it again"):
        selftest(changed_bundle(vit_bundle, tmp_path, without))


@pytest.mark.parametrize(("name", "case", "graph"), [("dates", "generation", "decoder"), ("clip", "B=", "image")])
def test_golden_values_run_every_graph(
    name: str, case: str, graph: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Without its generation a decoder, without its images a tower would be tested by nothing."""
    bundle = copied(request.getfixturevalue(f"{name}_bundle"), tmp_path)

    def rewrite(data: bytes) -> bytes:
        found = parse(data).items()
        return save({key: array for key, array in found if not key.startswith(case) or " S=" in key.split("/")[0]})

    replaced(GOLDEN, rewrite)(bundle)
    with pytest.raises(BundleError, match=f"no case runs the graph '{graph}'"):
        selftest(bundle)


def test_native_kernels_repeat_their_bits_where_they_are_those_of_the_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another instruction set, other sources, or a bundle that records none: nearly the same values."""
    kept = Bundle(KEPT / "bert-int8-native").manifest
    monkeypatch.setattr("transom.runtime.golden_reference.native_sources", lambda: "abc")

    def first(sources: str | None, isa: str = "avx2") -> Reference:
        record = {"fused": {}, "kernels": "avx2", **({} if sources is None else {"sources": sources})}
        manifest = replace(kept, native={"model": record})
        return references(manifest, "cpu", ("native", *ALL_SIDES), {"model": isa})[0]

    assert first("abc") == Reference("native", 0.0)
    version = "not bit for bit: kernels of model are of another version than at the export"
    assert first("abd") == first(None) == Reference("native", REPEAT_TOLERANCE, version)
    assert first("abc", "plain").note.endswith("kernels of model are for plain here, at the export they were for avx2")
    monkeypatch.setattr("transom.runtime.golden_reference.native_sources", lambda: "")
    assert first("").tolerance == REPEAT_TOLERANCE
