"""Quantised graphs of both targets from one table of ranges, and the tables that fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from tiny_graphs import Float, graph_of, histogram_of, normal, operators, run, weights_of
from transom.calib.graph_hash import graph_sha256
from transom.calib.scales import activation_scale, clip_range
from transom.calib.table import GraphRanges, RangeTable, Smoothing, TensorRanges
from transom.export.bundle_graphs import canonical_graphs, operator_counts, parse_graph
from transom.export.quantization.calibrate import require_fitting
from transom.export.quantization.quantizer import QuantizationConfig, Quantizer, calibrated_tensors
from transom.export.variants import WEIGHTS, emulated_variants, open_variants, pack
from transom.runtime.bundle import Bundle
from transom.runtime.errors import CalibrationError
from transom.runtime.graph_spec import Graph, Tensor
from transom.runtime.manifest_graphs import BLOCKS
from transom.runtime.tasks.gpt import GPT

ENCODER = Graph("model", (Tensor("x", "float32", ("B", "S", 64)),), (Tensor("y", "float32", ("B", "S", 48)),))
TEXT = """model (float[B, S, 64] x) => (float[B, S, 48] y) {
    n = LayerNormalization <axis = -1> (x, gain, shift)
    h = MatMul (n, up)
    a = Relu (h)
    y = MatMul (a, down)
}"""


def model() -> ir.Model:
    weights = {"gain": np.ones(64), "shift": np.zeros(64), "up": normal(64, 80) / 8, "down": normal(80, 48, seed=1) / 8}
    return graph_of(TEXT, weights, ["norm", "up", "act", "down"])


def activations(x: Float) -> dict[str, Float]:
    instrumented = model()
    instrumented.graph.outputs.extend(node.outputs[0] for node in list(instrumented.graph)[:3])
    return run(instrumented, x=x)


def quantizer(config: QuantizationConfig, **options: Any) -> Quantizer:
    seen = activations(normal(4, 10, 64, seed=5))
    ranges = {"model": {name: histogram_of(seen[name]) for name in ("n", "a")}}
    return Quantizer({"model": model()}, (ENCODER,), config, ranges, **options)


STATIC = QuantizationConfig({"model": "static"}, "minmax")


def test_one_table_two_variants() -> None:
    """TensorRT's is in int8 around zero, with scales that FP16 holds; the CPU's in uint8; int8 weights are the same."""
    made = quantizer(STATIC)
    signed, unsigned = made.tensorrt()["model"], made.cpu()["model"]
    theirs, ours = weights_of(signed), weights_of(unsigned)
    seen = activations(normal(4, 10, 64, seed=5))
    for name in ("n", "a"):
        assert (theirs[f"{name}.zero_point"].dtype, int(theirs[f"{name}.zero_point"])) == (np.int8, 0)
        assert theirs[f"{name}.quantization_scale"].dtype == np.float16
        largest = float(np.abs(seen[name]).max())
        assert float(theirs[f"{name}.quantization_scale"]) == pytest.approx(largest / 127, rel=1e-3)
        assert (ours[f"{name}.zero_point"].dtype, ours[f"{name}.quantization_scale"].dtype) == (np.uint8, np.float32)
    assert int(ours["a.zero_point"]) == 0  # of Relu, nothing is below
    assert float(ours["a.quantization_scale"]) == pytest.approx(float(seen["a"].max()) / 255)
    for name in ("up", "down"):
        np.testing.assert_array_equal(theirs[f"{name}.int8"], ours[f"{name}.int8"])
        assert theirs[f"{name}.int8"].dtype == np.int8
        assert theirs[f"{name}.scale"].dtype == np.float16
        np.testing.assert_array_equal(theirs[f"{name}.scale"].astype(np.float32), ours[f"{name}.scale"])
    assert operators(signed)["MatMul"] == operators(unsigned)["MatMul"] == 2
    assert weights_of(made.tensorrt({("model", "down")})["model"])["down"].dtype == np.float16
    assert weights_of(made.cpu({("model", "down")})["model"])["down"].dtype == np.float32


def test_scales_follow_the_method() -> None:
    """One value of 400,001 is far out, and "mse" clips it: around zero for TensorRT, both ends free for the CPU."""
    histogram = histogram_of(normal(400_000), [20.0])
    ranges = {"model": {"n": histogram, "a": histogram}}
    found = Quantizer({"model": model()}, (ENCODER,), QuantizationConfig({"model": "static"}, "mse"), ranges)
    for signed in (False, True):
        expected = activation_scale(*clip_range(histogram, "mse", symmetric=signed), signed=signed)
        assert found.scales(signed=signed)["model"]["n"] == expected
        assert expected.scale < 0.8 * activation_scale(histogram.minimum, 20.0, signed=signed).scale


def test_without_half_precision_the_rest_stays_in_fp32() -> None:
    weights = weights_of(quantizer(STATIC, half=False).tensorrt()["model"])
    assert {array.dtype for array in weights.values()} == {np.dtype(np.int8), np.dtype(np.float32)}


def test_integer_weights_are_stored_once() -> None:
    """64 * 80 + 80 * 48 bytes, each of them at a place that both files name."""
    variants = quantizer(STATIC).variants()
    assert {*variants.files} == {"model.onnx", "model.cpu.onnx", "model.weights"}
    sites = []
    for file in ("model.onnx", "model.cpu.onnx"):
        initializers = onnx.load_from_string(variants.files[file]).graph.initializer
        entries = {each.name: {e.key: e.value for e in each.external_data} for each in initializers}
        sites.append([entries[name] for name in ("up.int8", "down.int8")])
        assert {int(entry["length"]) for entry in sites[-1]} == {64 * 80, 80 * 48}
        assert {entry["location"] for entry in sites[-1]} == {"model.weights"}
    assert sites[0] == sites[1]
    assert len(variants.files["model.weights"]) == 64 * 80 + 80 * 48
    (graph,) = variants.graphs
    assert graph.files == {"default": "model.onnx", "cpu": "model.cpu.onnx"}


def test_seven_bits_use_half_of_the_levels() -> None:
    """63 on either side; the step is twice as large."""
    eight, seven = (
        weights_of(quantizer(QuantizationConfig({"model": "static"}, weight_bits=bits)).cpu()["model"])
        for bits in (8, 7)
    )
    for name in ("up", "down"):
        assert int(np.abs(eight[f"{name}.int8"]).max()) == 127
        assert int(np.abs(seven[f"{name}.int8"]).max()) == 63
        np.testing.assert_allclose(seven[f"{name}.scale"], eight[f"{name}.scale"] * 127 / 63, rtol=2e-3)


@pytest.mark.parametrize(("bits", "stored"), [(8, "up.int8"), (4, "up.int4")])
def test_weights_alone_ship_one_variant(bits: int, stored: str) -> None:
    made = quantizer(QuantizationConfig({"model": "none"}, weight_bits=bits))
    assert made.config.weights_only
    assert stored in weights_of(made.cpu()["model"])
    variants = made.variants()
    assert [graph.files for graph in variants.graphs] == [{"default": "model.onnx"}]
    assert operators(made.cpu({("model", "up")})["model"])["MatMulNBits"] == 1


def test_the_weights_of_what_is_measured_lie_in_a_folder(tmp_path: Path) -> None:
    """None of them is held in memory beside the session."""
    for number, make in enumerate((quantizer(STATIC).cpu_variant, quantizer(STATIC).tensorrt_variant)):
        folder = tmp_path / str(number)
        folder.mkdir()
        variants = make(folder)
        assert [*variants.stored] == [WEIGHTS]
        assert (folder / WEIGHTS).stat().st_size >= 64 * 80 + 80 * 48
        assert sum(map(len, variants.files.values())) < 64 * 80


def test_the_models_a_quantizer_is_made_of_stay() -> None:
    made = quantizer(STATIC)
    before = graph_sha256(model())
    made.variants()
    assert graph_sha256(made.models["model"]) == before
    assert made.layers == [("model", "up"), ("model", "down")]
    assert made.sizes == {("model", "up"): 64 * 80, ("model", "down"): 80 * 48}


def test_rows_of_a_batch_are_answered_as_each_alone(gpt_bundle: Path) -> None:
    """The whole of the reference GPT with dynamic activations: the same logits bit for bit, whatever is beside it.

    The graph as it ships: a prompt of eight tokens, a chunk of four and a step of one.
    """
    bundle = Bundle(gpt_bundle)
    graphs = tuple(file.graph for file in bundle.manifest.graphs)
    made = Quantizer(canonical_graphs(bundle), graphs, QuantizationConfig({"decoder": "dynamic"}), {"decoder": {}})
    ids = np.random.default_rng(0).integers(0, 200, (3, 13))
    ids[2] = 3
    with open_variants(bundle, pack(graphs, made.optimized_cpu(), "float32")) as loaded:
        assert isinstance(loaded, GPT)

        def answers(rows: NDArray[np.int64]) -> Float:
            decoder = loaded.new_decoder(len(rows))
            return np.concatenate([decoder.forward_logits(part) for part in np.split(rows, [8, 12], axis=1)], axis=1)

        together = answers(ids)
        for row in range(3):
            np.testing.assert_array_equal(together[row], answers(ids[row : row + 1])[0])


def test_decoders_of_weights_alone_have_a_file_for_the_cpu(gpt_bundle: Path) -> None:
    """GPUs get the other one, which is compared with PyTorch as well: it computes the same."""
    bundle = Bundle(gpt_bundle)
    graphs = tuple(file.graph for file in bundle.manifest.graphs)
    config = QuantizationConfig({"decoder": "none"}, weight_bits=4)
    variants = Quantizer(canonical_graphs(bundle), graphs, config, {"decoder": {}}).variants()
    assert [file.files for file in variants.graphs] == [{"default": "decoder.onnx", "cpu": "decoder.cpu.onnx"}]
    assert variants.files.keys() == {"decoder.onnx", "decoder.cpu.onnx", WEIGHTS}
    default, cpu = (
        operator_counts(parse_graph(variants.files[name], name)) for name in variants.graphs[0].files.values()
    )
    assert "com.microsoft::GroupQueryAttention" not in default
    assert cpu["com.microsoft::GroupQueryAttention"] == 2 * 4, "of 4 layers"
    found = []
    for made in (variants, emulated_variants(variants)):
        assert {file.integers for file in made.graphs} == {BLOCKS}
        with open_variants(bundle, made) as loaded:
            assert isinstance(loaded, GPT)
            found.append(loaded.new_decoder(2).forward_logits(np.arange(20).reshape(2, 10)))
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=0.05 * float(np.abs(found[1]).max()))


def table(**changes: Any) -> RangeTable:
    seen = activations(normal(2, 4, 64, seed=5))
    tensors = {name: TensorRanges(histogram_of(seen[name])) for name in ("n", "a")}
    ranges = GraphRanges(**({"sha256": graph_sha256(model()), "tensors": tensors, "smoothing": {}} | changes))
    return RangeTable({"model": ranges}, {"name": "words", "samples": 8, "sha256": "0" * 64})


def test_a_table_must_hold_what_the_config_needs() -> None:
    """A pair around the second layer's input needs its range; factors must be one per channel of a linear input."""
    assert calibrated_tensors(model(), STATIC, "model") == ["n", "a"]
    require_fitting(table(), {"model": model()}, STATIC)
    require_fitting(table(smoothing={"n": Smoothing(0.5, np.ones(64, np.float32))}), {"model": model()}, STATIC)
    require_fitting(table(tensors={}), {"model": model()}, QuantizationConfig({"model": "none"}, weight_bits=4))
    for changes, message in [
        ({"tensors": {"n": table().graphs["model"].tensors["n"]}}, "has none of 'a' of the graph 'model'"),
        ({"sha256": "0" * 64}, "is from another graph 'model'"),
        ({"smoothing": {"n": Smoothing(0.5, np.ones(63, np.float32))}}, "by 63 factors; expected 64"),
        ({"smoothing": {"h": Smoothing(0.5, np.ones(80, np.float32))}}, "by 80 factors; expected none"),
    ]:
        with pytest.raises(CalibrationError, match=message):
            require_fitting(table(**cast("dict[str, Any]", changes)), {"model": model()}, STATIC)
