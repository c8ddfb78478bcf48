"""Options and their configuration, both variants from one table, and the search for high-precision layers."""

from __future__ import annotations

from collections.abc import Collection, Iterator
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
from transom.calib.table import RANGES, GraphRanges, RangeTable, Smoothing, TensorRanges, load_table
from transom.export.bundle_graphs import canonical_graphs
from transom.export.metrics import Accuracy
from transom.export.quantization.calibrate import require_fitting
from transom.export.quantization.candidate import Candidate
from transom.export.quantization.fidelity import Fp32Outputs, RelativeError
from transom.export.quantization.gate import Gate
from transom.export.quantization.gate_result import SCORE, GateResult
from transom.export.quantization.layer_search import LayerSearchResult, search_layers
from transom.export.quantization.options import DEFAULTS, QuantizeOptions
from transom.export.quantization.quantizer import Layer, QuantizationConfig, Quantizer, calibrated_tensors
from transom.export.reference_models import REFERENCE_MODELS
from transom.export.variants import open_variants, pack
from transom.runtime import load
from transom.runtime.bundle import Bundle
from transom.runtime.errors import AccuracyError, CalibrationError, ExportError
from transom.runtime.graph_spec import Graph, Tensor
from transom.runtime.tasks.gpt import GPT

ENCODER = Graph("model", (Tensor("x", "float32", ("B", "S", 64)),), (Tensor("y", "float32", ("B", "S", 48)),))
DECODER = Graph(
    "decoder",
    (Tensor("input_ids", "int64", ("B", "S")), Tensor("cache", "float32", ("B", "C"), state=True)),
    (Tensor("cache_out", "float32", ("B", "C"), state=True, aliases="cache"),),
)
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


def test_the_models_a_quantizer_is_made_of_stay() -> None:
    made = quantizer(STATIC)
    before = graph_sha256(model())
    made.variants()
    assert graph_sha256(made.models["model"]) == before
    assert made.layers == [("model", "up"), ("model", "down")]
    assert made.sizes == {("model", "up"): 64 * 80, ("model", "down"): 80 * 48}


def test_rows_of_a_batch_are_answered_as_each_alone(gpt_bundle: Path) -> None:
    """The whole of the reference GPT with dynamic activations: the same logits bit for bit, whatever is beside it.

    A prompt of twelve tokens and a step of one.
    """
    bundle = Bundle(gpt_bundle)
    graphs = tuple(file.graph for file in bundle.manifest.graphs)
    made = Quantizer(canonical_graphs(bundle), graphs, QuantizationConfig({"decoder": "dynamic"}), {"decoder": {}})
    ids = np.random.default_rng(0).integers(0, 200, (3, 13))
    ids[2] = 3
    with open_variants(bundle, pack(graphs, made.cpu(), "float32")) as loaded:
        assert isinstance(loaded, GPT)

        def answers(rows: NDArray[np.int64]) -> Float:
            decoder = loaded.new_decoder(len(rows))
            return np.concatenate([decoder.forward_logits(rows[:, :12]), decoder.forward_logits(rows[:, 12:])], axis=1)

        together = answers(ids)
        for row in range(3):
            np.testing.assert_array_equal(together[row], answers(ids[row : row + 1])[0])


@pytest.mark.parametrize(
    ("precision", "options", "message"),
    [
        ("int8", {"method": "best"}, "--method is 'best'; expected one of minmax, percentile, entropy, mse."),
        ("int8", {"activations": "half"}, "--activations is 'half'; expected one of static, dynamic, none."),
        ("int8", {"weight_bits": 6}, "--weight-bits is 6; expected one of 8, 7."),
        ("int8", {"weight_bits": 4}, "--weight-bits is 4; expected one of 8, 7."),
        ("int4", {"block_size": 48}, "--block-size is 48; expected one of 32, 64, 128, 256."),
        ("int4", {"block_size": 16}, "--block-size is 16; expected one of 32, 64, 128, 256."),
        ("int8", {"optional_sites": ("softmax",)}, "--also is 'softmax'; expected one of attention, residual."),
        ("int4", {"activations": "static"}, "--precision int4 is of weights alone; leave out --activations"),
        ("int4", {"activations": "dynamic"}, "--precision int4 is of weights alone"),
        ("int4", {"weight_bits": 7}, "--precision int4 is of weights alone"),
        ("int4", {"weight_bits": 8}, "--precision int4 is of weights alone"),
        ("int8", {"weight_bits": 7, "activations": "none"}, "--weight-bits is 7, and --activations none stores"),
        ("int8", {"weight_bits": 8, "activations": "none"}, "--weight-bits is 8, and --activations none stores"),
        ("int8", {"block_size": 32}, "--block-size is 32, and weights in blocks are for weights alone; leave it out"),
        ("int8", {"block_size": 64, "activations": "dynamic"}, "--block-size is 64, and weights in blocks"),
        ("int4", {"optional_sites": ("attention",)}, "--precision int4 is of weights alone"),
        ("int8", {"optional_sites": ("attention",), "activations": "dynamic"}, "--also needs ranges fixed beforehand"),
        ("int8", {"optional_sites": ("residual",), "activations": "none"}, "--also needs ranges fixed beforehand"),
    ],
)
def test_options_that_mean_nothing_are_refused(precision: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError) as raised:
        QuantizeOptions(**options).config(precision, (ENCODER,))
    assert str(raised.value).startswith(message)


def test_what_is_meant_where_nothing_is_said() -> None:
    assert DEFAULTS.config("int8", (ENCODER, DECODER)) == QuantizationConfig(
        {"model": "static", "decoder": "dynamic"}, "mse", 8, 32
    )
    assert DEFAULTS.config("int4", (ENCODER, DECODER)) == QuantizationConfig(
        {"model": "none", "decoder": "none"}, "mse", 4, 32
    )
    assert QuantizeOptions(activations="dynamic").config("int8", (ENCODER,)).activations == {"model": "dynamic"}
    assert DEFAULTS.data_for("vit") == ("digits",)
    assert QuantizeOptions(("reviews.txt",)).data_for("vit") == ("reviews.txt",)
    with pytest.raises(ExportError, match=r"quantising some/model needs inputs like .*--calibration-data"):
        DEFAULTS.data_for("some/model")


def table(**changes: Any) -> RangeTable:
    seen = activations(normal(2, 4, 64, seed=5))
    tensors = {name: TensorRanges(histogram_of(seen[name])) for name in ("n", "a")}
    ranges = GraphRanges(**({"sha256": graph_sha256(model()), "tensors": tensors, "smoothing": {}} | changes))
    return RangeTable({"model": ranges}, {"name": "words", "samples": 8, "sha256": "0" * 64})


def test_a_table_must_hold_what_the_config_needs() -> None:
    """A pair around the second layer's input needs its range; factors must be one per channel of a linear input."""
    assert calibrated_tensors(model(), STATIC) == ["n", "a"]
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


LAYERS = [("model", name) for name in "abcd"]
COST = {"a": 0.01, "b": 0.08, "c": 0.03, "d": 0.04}  # what quantising this layer loses


def lost(amount: float) -> GateResult:
    """Of 1,000 answers, 990 of them right in FP32; a point is allowed."""
    right = 990, 990 - round(1000 * amount)
    fp32, int8 = (Accuracy.of_each("top-1 accuracy", "scans", [each < most for each in range(1000)]) for most in right)
    return GateResult(SCORE, 0.01, fp32, int8, None, RelativeError((amount**2,), (1.0,)), "logits")


class FakeCandidate:
    """Each layer that is quantised costs what COST says, in both variants."""

    def __init__(self, sizes: Collection[int] = (1, 1, 1, 1), factor: float = 1.0) -> None:
        self.gate_modes = {"cpu": "static", "default": "static"}
        self.quantizer = self
        self.layers, self.sizes = LAYERS, dict(zip(LAYERS, sizes, strict=True))
        self.evaluated: list[tuple[str, str]] = []
        self._factor = factor

    def layer_errors(self, reference: object) -> Iterator[tuple[Layer, float]]:
        for layer in LAYERS:
            yield layer, COST[layer[1]]

    def evaluate(self, kind: str, kept: Collection[Layer]) -> GateResult:
        self.evaluated.append((kind, "".join(sorted(name for _, name in kept))))
        return lost(self._factor * sum(COST[name] for layer in LAYERS if layer not in kept for name in layer[1]))


def search(*candidates: FakeCandidate, gate: bool = True) -> LayerSearchResult:
    found = cast("list[Candidate]", candidates)
    return search_layers(found, cast(Fp32Outputs, None), gate=gate, same_inputs=False, report=lambda what: None)


def test_layers_stay_in_high_precision_in_order_of_their_cost_until_the_gate_holds() -> None:
    """All cost 0.04: with b 0.02, with b and d 0.01, which is allowed."""
    candidate = FakeCandidate(factor=0.25)
    found = search(candidate)
    assert found.high_precision == (("model", "b"), ("model", "d"))
    assert found.sensitivities == {layer: COST[layer[1]] for layer in LAYERS}
    assert [kept for kind, kept in candidate.evaluated if kind == "default"] == ["", "b", "bd"]
    assert found.why == {
        ("model", "b"): "top-1 accuracy: 0.04 lost without it, 0.01 allowed",
        ("model", "d"): "top-1 accuracy: 0.02 lost without it, 0.01 allowed",
    }
    assert {kind: result.holds for kind, result in found.results.items()} == {"cpu": True, "default": True}
    curve = [(point["quantized"], round(point["relative_error"], 4)) for point in found.curve]
    assert curve == [(0, 0.0), (1, 0.0025), (2, 0.01), (3, 0.02), (4, 0.04)]
    assert [round(point["score"], 3) for point in found.curve] == [0.99, 0.988, 0.98, 0.97, 0.95]


def test_where_the_gate_holds_at_once_all_is_quantised() -> None:
    found = search(FakeCandidate(factor=0.05))
    assert (found.high_precision, found.why) == ((), {})
    assert [point["quantized"] for point in found.curve] == [0, 1, 2, 3, 4]


def test_without_a_gate_all_is_quantised_and_the_result_recorded() -> None:
    found = search(FakeCandidate(), gate=False)
    assert found.high_precision == ()
    assert not found.results["cpu"].holds
    assert found.results["cpu"].found == pytest.approx(0.16)


@pytest.mark.parametrize(
    ("sizes", "kept"),
    [
        ((1, 1, 1, 1), 2),  # b and d are half
        ((1, 4, 1, 1), 0),  # b alone is more than half
        ((9, 1, 1, 1), 3),  # b, d and c are a quarter
    ],
)
def test_beyond_half_of_the_weights_it_is_an_error(sizes: tuple[int, ...], kept: int) -> None:
    with pytest.raises(AccuracyError) as raised:
        search(FakeCandidate(sizes, factor=10))
    message = str(raised.value)
    assert f"with {kept} of 4 layers in high precision; more than half of the weights would have to be" in message
    assert "Most sensitive: b (0.08), d (0.04), c (0.03), a (0.01)." in message
    assert "1.0 allowed, n = 1000" in message


def test_one_variant_that_fails_is_enough() -> None:
    class Uneven(FakeCandidate):
        def evaluate(self, kind: str, kept: Collection[Layer]) -> GateResult:
            return lost(0.0) if kind == "cpu" else super().evaluate(kind, kept)

    assert search(Uneven(factor=0.25)).high_precision == (("model", "b"), ("model", "d"))


def test_the_gate_holds_for_what_ships_and_for_all_candidates_pooled() -> None:
    """What ships loses nothing, another calibration 0.04: 0.02 of 2,000, and one layer more has to be kept.

    The other way round its own loss counts, whatever the others do.
    """
    found = search(FakeCandidate(factor=0.0), FakeCandidate(factor=0.25))
    assert found.high_precision == (("model", "b"),)
    assert found.why == {("model", "b"): "top-1 accuracy: 0.02 lost without it, 0.01 allowed"}
    result = found.results["cpu"]
    assert (result.n, result.found) == (1000, 0)
    assert result.repeated is not None
    assert (result.repeated.repetitions, result.repeated.n, result.repeated.found) == (2, 2000, 0.01)
    assert search(FakeCandidate(factor=0.25), FakeCandidate(factor=0.0)).high_precision == (
        ("model", "b"),
        ("model", "d"),
    )


def test_layers_are_ranked_by_what_each_costs_alone(vit_bundle: Path, int8_bundle: Path) -> None:
    """In one session with a switch for every layer: the same errors as of graphs made with all others in FP32."""
    bundle = Bundle(vit_bundle)
    graphs = tuple(file.graph for file in bundle.manifest.graphs)
    samples = REFERENCE_MODELS["vit"].held_out()[:16]
    with load(vit_bundle, threads=1) as fp32:
        gate, reference = Gate(fp32, samples, "scans"), Fp32Outputs(fp32, samples, "scans")
    config, ranges = DEFAULTS.config("int8", graphs), load_table(int8_bundle / RANGES)
    candidate = Candidate(bundle, canonical_graphs(bundle), config, ranges, gate, half=True)
    errors = dict(candidate.layer_errors(reference))
    assert list(errors) == candidate.quantizer.layers
    for layer in [max(errors, key=lambda each: errors[each]), candidate.quantizer.layers[-1]]:
        with candidate.open_variant("cpu", [other for other in errors if other != layer]) as alone:
            assert errors[layer] == pytest.approx(reference.compare(alone).error.value, rel=0.02)
