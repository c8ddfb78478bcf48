"""Integer bundles from end to end: what is in them, what they compute with, and that a table makes them again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray

from command_line import document, transom
from conftest import export_to, reference, save_checkpoint
from shipped_lists import if_lists_are_made
from tiny_graphs import operators, relative_error
from transom.calib.data import Sample, open_calibration_data
from transom.calib.graph_hash import graph_sha256
from transom.calib.table import RANGES, load_table
from transom.export.bundle_graphs import canonical_graphs
from transom.export.parity.compare import TOLERANCES
from transom.export.quantization.options import QuantizeOptions
from transom.runtime import load
from transom.runtime.bundle import Bundle
from transom.runtime.errors import AccuracyError, CalibrationError, ParityError
from transom.runtime.golden import GOLDEN
from transom.runtime.manifest import MANIFEST
from transom.runtime.selftest import selftest

Once = Callable[[str, Callable[[Path], object]], Path]
LAYERS = 19  # of the reference ViT: three blocks of six, and the classifier

SUBJECTS = ("the people", "a city", "paris", "the first day", "who", "an oil", "she", "my word", "water", "each number")
TEXTS = [f"{subject} {verb} {rest}" for subject in SUBJECTS for verb, rest in (("made", "it"), ("would go", "down"))]


@pytest.fixture(scope="session")
def small(once: Once) -> Path:
    """A random BERT of one block and 20 texts: in FP32, calibrated, and in INT8 from those ranges and from the data."""

    def make(folder: Path) -> None:
        checkpoint = str(save_checkpoint(folder / "checkpoint", "BertModel", num_hidden_layers=1))
        texts = folder / "texts.txt"
        texts.write_text("\n".join(TEXTS))
        export_to(folder / "fp32", checkpoint, max_sizes={"B": 3})
        shutil.copytree(folder / "fp32" / "bundle", folder / "calibrated")
        result = transom("calibrate", folder / "calibrated", "--calibration-data", texts, "--json")
        (folder / "calibrated.json").write_text(result.stdout)
        for name, options in {
            "from-ranges": QuantizeOptions((str(texts),), ranges=folder / "calibrated" / RANGES),
            "from-data": QuantizeOptions((str(texts),)),
        }.items():
            export_to(folder / name, checkpoint, max_sizes={"B": 3}, precision="int8", quantize=options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transom.export.quantization.quantize.MAX_CANDIDATES", 2)
        return once("int8-small", make)


@pytest.fixture
def one_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few cases are held out, calibrate once."""
    monkeypatch.setattr("transom.export.quantization.quantize.MAX_CANDIDATES", 1)


def record(bundle: Path) -> dict[str, Any]:
    found = Bundle(bundle).manifest.quantization
    assert found is not None
    return dict(found)


def test_the_manifest_tells_how_it_was_made_and_what_it_costs(int8_bundle: Path) -> None:
    manifest = Bundle(int8_bundle).manifest
    assert manifest.precision == "int8"
    about = record(int8_bundle)
    assert about["activations"] == {"model": "static"}
    assert (about["method"], about["weight_bits"], about["block_size"], about["also"]) == ("mse", 8, None, [])
    assert about["elsewhere"] == {"cpu": "fp32", "default": "fp16"} | dict.fromkeys(if_lists_are_made("native"), "fp32")
    assert (about["data"]["name"], about["data"]["samples"], len(about["data"]["sha256"])) == ("digits", 512, 64)
    assert about["ranges"] == RANGES
    assert all(name.startswith("model/") and 0 < alpha < 1 for name, alpha in about["smoothing"].items())
    layers = about["layers"]
    assert len({layer["name"] for layer in layers}) == len(layers) == LAYERS
    assert {(layer["graph"], layer["kept"], layer["why"]) for layer in layers} == {("model", False, None)}
    assert (about["curve"], {layer["sensitivity"] for layer in layers}) == (None, {None}), (
        "ranked, though the gate holds"
    )
    assert {"encoder.layer.0.attention.attention.query", "classifier"} <= {layer["name"] for layer in layers}


def test_the_gate_was_held_by_both_variants(int8_bundle: Path) -> None:
    """1.3 points of top-1 over 540 held-out scans, FP32 is right on 535 of them; another calibration holds it too."""
    gate = record(int8_bundle)["gate"]
    assert {*gate} == {"cpu", "default"} | if_lists_are_made("native")
    for result in gate.values():
        assert (result["measure"], result["allowed"], result["holds"]) == ("top-1 accuracy", 0.013, True)
        assert (result["n"], result["repeated"]["n"], result["repeated"]["calibrations"]) == (540, 540, 2)
        assert result["score"]["fp32"]["correct"] == 535
        lost = result["score"]["fp32"]["correct"] - result["score"]["int8"]["correct"]
        assert result["found"] == pytest.approx(lost / 540)
        assert result["agreement"]["correct"] >= 0.99 * 540
        assert 0 < result["relative_error"]["value"] < 0.03
        assert result["interval"][0] < result["found"] < result["interval"][1]
    about = document(transom("inspect", int8_bundle, "--json"))
    assert about["quantization"]["gate"] == gate


def test_what_lies_in_the_bundle(int8_bundle: Path) -> None:
    names = {MANIFEST, "model.onnx", "model.cpu.onnx", "model.weights", RANGES, GOLDEN} | if_lists_are_made(
        "model.operators.json"
    )
    assert {path.name for path in int8_bundle.iterdir()} == names
    assert {*Bundle(int8_bundle).manifest.files} == names - {MANIFEST}
    report = selftest(int8_bundle)
    assert report.worst.error <= report.tolerance
    assert transom("selftest", int8_bundle).exit_code == 0


def test_the_cpu_multiplies_integers(int8_bundle: Path, tmp_path: Path) -> None:
    """What ONNX Runtime makes of the graph: every linear layer an integer product, no product left in FP32."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(int8_bundle / "model.cpu.onnx"), options, providers=["CPUExecutionProvider"])
    counts = operators(tmp_path / "optimised.onnx")
    assert counts["MatMulIntegerToFloat"] == LAYERS
    assert (counts["MatMul"], counts["Gemm"], counts["FusedMatMul"]) == (0, 0, 0)


def test_both_variants_read_the_same_integers(int8_bundle: Path) -> None:
    """Each weight once in model.weights, but the classifier's 640 bytes; TensorRT's is around zero, and in FP16."""
    sites: list[dict[str, tuple[int, int]]] = []
    for name, integer in (("model.onnx", np.int8), ("model.cpu.onnx", np.uint8)):
        initializers = onnx.load(str(int8_bundle / name), load_external_data=False).graph.initializer
        zeros = [onnx.numpy_helper.to_array(each) for each in initializers if each.name.endswith(".zero_point")]
        assert {zero.dtype for zero in zeros} == {np.dtype(integer)}
        assert integer is np.uint8 or not any(int(zero) for zero in zeros)
        outside = {each.name: {e.key: e.value for e in each.external_data} for each in initializers}
        weights = {each: found for each, found in outside.items() if each.endswith(".int8") and found}
        sites.append({each: (int(found["offset"]), int(found["length"])) for each, found in weights.items()})
        floats = {each.data_type for each in initializers} & {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16}
        assert (floats == {onnx.TensorProto.FLOAT16}) == (integer is np.int8)
    assert sites[0] == sites[1]
    assert len({*sites[0].values()}) == len(sites[0]) == LAYERS - 1
    assert sorted({length for _, length in sites[0].values()}) == [64 * 64, 64 * 128]


def test_the_table_is_of_this_graph(int8_bundle: Path, vit_bundle: Path) -> None:
    """It is bound to the FP32 graph, which an FP32 export of the same checkpoint holds."""
    table = load_table(int8_bundle / RANGES)
    canonical = canonical_graphs(Bundle(vit_bundle))["model"]
    ranges = table.require("model", graph_sha256(canonical))
    assert dict(table.data) == record(int8_bundle)["data"]
    assert {f"model/{name}": found.alpha for name, found in ranges.smoothing.items()} == record(int8_bundle)[
        "smoothing"
    ]
    assert all(found.histogram.count % (512 * 64) == 0 for found in ranges.tensors.values())  # 512 scans, 64 channels


def test_it_answers_as_fp32_does(int8_bundle: Path, vit_bundle: Path) -> None:
    """Sixteen scans of digits: the same labels, features within 5 %, and not the same bits."""
    scans = [np.repeat(np.asarray(sample.image)[..., None], 3, axis=2) for sample in calibration_scans(16)]
    with load(int8_bundle) as ours, load(vit_bundle) as theirs:
        labels = [[best[0][0] for best in each.classify(scans, top_k=1)] for each in (ours, theirs)]
        error = relative_error(ours.features(scans), theirs.features(scans))
    assert labels[0] == labels[1]
    assert 0 < error < 0.05


def calibration_scans(count: int) -> Sequence[Sample]:
    return open_calibration_data(["digits"]).samples[:count]


def test_a_table_makes_the_same_integers_again(small: Path) -> None:
    """Calibrated on its own, then quantised by the table: every file as from calibrating within the export."""
    ours, theirs = small / "from-ranges" / "bundle", small / "from-data" / "bundle"
    for name in ("model.onnx", "model.cpu.onnx", "model.weights", RANGES):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    assert (small / "calibrated" / RANGES).read_bytes() == (theirs / RANGES).read_bytes()
    assert record(ours)["layers"] == record(theirs)["layers"]


def test_other_data_than_was_calibrated_on_are_refused(small: Path, tmp_path: Path) -> None:
    """It would not be known whether the held-out part of them was seen."""
    others = tmp_path / "others.txt"
    others.write_text("\n".join(TEXTS[::-1]))
    options = QuantizeOptions((str(others),), ranges=small / "calibrated" / RANGES)
    with pytest.raises(CalibrationError, match=r"the table of ranges was calibrated on texts\.txt \(15 of 20"):
        export_to(tmp_path / "out", small / "checkpoint", max_sizes={"B": 3}, precision="int8", quantize=options)
    result = transom("verify", small / "from-data" / "bundle", "--calibration-data", others)
    assert result.exit_code == 1
    assert (
        "was calibrated on texts.txt (15 of 20, for calibration); the data given now makes others.txt" in result.stderr
    )
    assert transom("verify", small / "from-data" / "bundle", "--calibration-data", small / "texts.txt").exit_code == 0


def test_calibrate_says_what_it_saw_and_leaves_a_sound_bundle(small: Path) -> None:
    """Three quarters of 20 texts; a quarter is left for the gate."""
    about = json.loads((small / "calibrated.json").read_text())
    assert about["data"]["samples"] == 15
    assert about["graphs"]["model"]["tensors"] == 5  # query, key and value read one; output, two of the MLP, pooler
    assert RANGES in Bundle(small / "calibrated").manifest.files
    assert transom("selftest", small / "calibrated").exit_code == 0


def test_users_texts_are_measured_on_what_was_held_out(small: Path) -> None:
    """No reference model: the error of its embeddings decides, on 5 of 20 texts, then with other 5."""
    about = record(small / "from-data" / "bundle")
    assert about["data"]["name"] == "texts.txt (15 of 20, for calibration)"
    result = about["gate"]["cpu"]
    assert (result["measure"], result["n"]) == ("relative error of sentence_embedding", 5)
    assert (result["repeated"]["calibrations"], result["repeated"]["n"]) == (2, 2 * 5)
    assert (result["score"], result["holds"]) == (None, True)
    assert record(small / "from-ranges" / "bundle")["gate"]["cpu"]["repeated"] is None


@pytest.mark.usefixtures("one_candidate")
def test_without_a_gate_parity_is_required_all_the_same(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that is usual in INT8, and a limit below it."""
    monkeypatch.setitem(TOLERANCES, "int8", 1e-3)
    options = QuantizeOptions((str(small / "texts.txt"),), ranges=small / "calibrated" / RANGES, gate=False)
    with pytest.raises(
        ParityError, match=r"in int8.* differs from PyTorch .* must be below 0\.001\. Nothing was written"
    ):
        export_to(tmp_path / "out", small / "checkpoint", max_sizes={"B": 3}, precision="int8", quantize=options)
    assert not (tmp_path / "out" / "bundle").exists()


@pytest.mark.usefixtures("one_candidate")
def test_raw_inputs_dynamic_rows_and_seven_bits(tmp_path: Path) -> None:
    """The reference ViT as anybody's folder, pixels from a .npz, no gate: 24 images to calibrate on, 8 held out."""
    pixels = np.random.default_rng(0).standard_normal((32, 3, 8, 8)).cumsum(3).astype(np.float32)
    np.savez(tmp_path / "images.npz", pixel_values=pixels)
    options = QuantizeOptions(
        (str(tmp_path / "images.npz"),), method="percentile", activations="dynamic", weight_bits=7, gate=False
    )
    export_to(tmp_path, reference("vit"), max_sizes={"B": 16}, precision="int8", quantize=options)
    bundle = tmp_path / "bundle"
    about = record(bundle)
    assert (about["activations"], about["method"], about["weight_bits"]) == ({"model": "dynamic"}, "percentile", 7)
    assert about["data"]["name"] == "images.npz (24 of 32, for calibration)"
    assert [layer["kept"] for layer in about["layers"]] == [False] * LAYERS
    assert {reached(integers) for integers in integer_weights(bundle)} == {63}
    with load(bundle) as loaded:  # neighbours change nothing
        loud = pixels[:3] * np.array([1, 10, 1000], np.float32).reshape(3, 1, 1, 1)
        together, alone = (loaded.run({"pixel_values": rows})["logits"] for rows in (loud, loud[:1]))
    np.testing.assert_array_equal(together[0], alone[0])


def integer_weights(bundle: Path) -> list[NDArray[np.int8]]:
    model = onnx.load(str(bundle / "model.cpu.onnx"))
    return [onnx.numpy_helper.to_array(each) for each in model.graph.initializer if each.name.endswith(".int8")]


def reached(integers: NDArray[np.int8]) -> int:
    return int(np.abs(integers).max())


@pytest.mark.usefixtures("one_candidate")
def test_four_bits_of_weights_alone(tmp_path: Path) -> None:
    """A random GPT-2 of one block with raw ids: one variant, blocks of 32."""
    checkpoint = save_checkpoint(tmp_path / "checkpoint", "GPT2LMHeadModel", n_layer=1)
    np.savez(tmp_path / "ids.npz", input_ids=np.random.default_rng(0).integers(0, 100, (16, 9)))
    options = QuantizeOptions((str(tmp_path / "ids.npz"),), smooth=False, gate=False)
    export_to(tmp_path, checkpoint, max_sizes={"B": 3}, precision="int4", quantize=options)
    about = record(tmp_path / "bundle")
    assert (about["activations"], about["weight_bits"], about["block_size"]) == ({"decoder": "none"}, 4, 32)
    assert about["elsewhere"] == {"cpu": "fp32"}
    assert {*about["gate"]} == {"cpu"}
    assert operators(tmp_path / "bundle" / "decoder.onnx")["MatMulNBits"] == 4 + 1
    assert transom("selftest", tmp_path / "bundle").exit_code == 0


@pytest.mark.usefixtures("one_candidate")
def test_a_gate_that_cannot_be_met(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where embeddings may be off by nothing at all."""
    monkeypatch.setattr("transom.export.quantization.gate.EMBEDDING_ERROR", 1e-9)
    options = QuantizeOptions((str(small / "texts.txt"),), smooth=False)
    with pytest.raises(AccuracyError) as raised:
        export_to(tmp_path, small / "checkpoint", precision="int8", quantize=options)
    message = str(raised.value)
    assert message.startswith("relative error of sentence_embedding ")
    assert "of 7 layers in high precision; more than half of the weights would have to be" in message
    assert "Most sensitive: " in message
    assert list(tmp_path.iterdir()) == []
