"""The search for layers that have to stay in high precision, and the ranking that it starts from."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import cast

import pytest

from transom.calib.table import RANGES, load_table
from transom.export.bundle_graphs import canonical_graphs
from transom.export.metrics import Accuracy
from transom.export.quantization.candidate import Candidate, quantizer_of_table, rank_layers
from transom.export.quantization.fidelity import Fp32Outputs, RelativeError
from transom.export.quantization.gate import Gate
from transom.export.quantization.gate_result import SCORE, GateResult
from transom.export.quantization.layer_search import LayerSearchResult, search_layers
from transom.export.quantization.options import DEFAULTS
from transom.export.quantization.quantizer import Layer
from transom.export.quantization.resume import KeepsNothing
from transom.export.reference_models import REFERENCE_MODELS
from transom.runtime import load
from transom.runtime.bundle import Bundle
from transom.runtime.errors import AccuracyError

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

    def evaluate(self, kind: str, kept: Collection[Layer]) -> GateResult:
        self.evaluated.append((kind, "".join(sorted(name for _, name in kept))))
        return lost(self._factor * sum(COST[name] for layer in LAYERS if layer not in kept for name in layer[1]))


def search(*candidates: FakeCandidate, gate: bool = True, rank: bool = False) -> LayerSearchResult:
    def ranked(candidate: object) -> dict[Layer, float]:
        assert candidate is candidates[0]
        candidates[0].evaluated.append(("ranked", ""))
        return {layer: COST[layer[1]] for layer in LAYERS}

    found = cast("list[Candidate]", candidates)
    return search_layers(found, ranked, gate=gate, always_rank=rank, same_inputs=False, report=lambda what: None)


def test_layers_stay_in_high_precision_in_order_of_their_cost_until_the_gate_holds() -> None:
    """All cost 0.04: with b 0.02, with b and d 0.01, which is allowed."""
    candidate = FakeCandidate(factor=0.25)
    found = search(candidate)
    assert found.high_precision == (("model", "b"), ("model", "d"))
    assert found.sensitivities == {layer: COST[layer[1]] for layer in LAYERS}
    assert candidate.evaluated[:2] == [("cpu", ""), ("ranked", "")]
    assert [kept for kind, kept in candidate.evaluated if kind == "default"] == ["bd"]
    assert found.why == {
        ("model", "b"): "top-1 accuracy: 0.04 lost without it, 0.01 allowed",
        ("model", "d"): "top-1 accuracy: 0.02 lost without it, 0.01 allowed",
    }
    assert {kind: result.holds for kind, result in found.results.items()} == {"cpu": True, "default": True}
    assert curve_of(found) == [(0, 0.0), (2, 0.01), (3, 0.02), (4, 0.04)], "what the search measured, and no more"
    assert {kept for kind, kept in candidate.evaluated if kind == "cpu"} == {"", "b", "bd"}


def curve_of(found: LayerSearchResult) -> list[tuple[int, float]]:
    assert found.curve is not None
    return [(point["quantized"], round(point["relative_error"], 4)) for point in found.curve]


def test_where_the_gate_holds_at_once_nothing_is_ranked() -> None:
    candidate = FakeCandidate(factor=0.05)
    found = search(candidate)
    assert (found.high_precision, found.why, found.sensitivities, found.curve) == ((), {}, None, None)
    assert candidate.evaluated == [("cpu", ""), ("default", "")]


def test_where_the_gate_misses_the_ranking_is_recorded() -> None:
    """One evaluation of one variant is enough to know; then layers are ranked, however little is lost."""
    found = search(FakeCandidate(factor=0.07))  # 0.0112 of 0.01 allowed
    assert found.sensitivities == {layer: COST[layer[1]] for layer in LAYERS}
    assert found.high_precision == (("model", "b"),)


def test_ranking_on_request_changes_nothing_else() -> None:
    found = search(FakeCandidate(factor=0.05), rank=True)
    assert (found.high_precision, found.why) == ((), {})
    assert found.sensitivities == {layer: COST[layer[1]] for layer in LAYERS}
    assert curve_of(found) == [(0, 0.0), (1, 0.0005), (2, 0.002), (3, 0.004), (4, 0.008)]
    assert [round(point["score"], 3) for point in found.curve or ()] == [0.99, 0.99, 0.988, 0.986, 0.982]


def test_without_a_gate_nothing_is_ranked_and_every_result_recorded() -> None:
    candidate = FakeCandidate()
    found = search(candidate, gate=False)
    assert (found.high_precision, found.sensitivities, found.curve) == ((), None, None)
    assert candidate.evaluated == [("cpu", ""), ("default", "")], "the second too, though the first does not hold"
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


def test_layers_are_ranked_by_what_each_costs_alone(vit_bundle: Path, int8_bundle: Path, tmp_path: Path) -> None:
    """In one session with a switch for every layer: the same errors as of graphs made with all others in FP32."""
    bundle = Bundle(vit_bundle)
    graphs = tuple(file.graph for file in bundle.manifest.graphs)
    samples = REFERENCE_MODELS["vit"].held_out()[:16]
    with load(vit_bundle, threads=1) as fp32:
        gate, reference = Gate(fp32, samples, "scans"), Fp32Outputs(fp32, samples, "scans")
    config, ranges = DEFAULTS.config("int8", graphs), load_table(int8_bundle / RANGES)
    quantizer = quantizer_of_table(bundle, canonical_graphs(bundle), config, ranges, half=True)
    released: list[list[Path]] = []
    candidate = Candidate(bundle, quantizer, gate, tmp_path, lambda: released.append([*tmp_path.iterdir()]))
    errors = rank_layers(candidate, bundle, samples, "scans", lambda what: None, KeepsNothing())
    assert list(errors) == candidate.quantizer.layers
    for layer in [max(errors, key=lambda each: errors[each]), candidate.quantizer.layers[-1]]:
        with candidate.open_variant("cpu", [other for other in errors if other != layer]) as alone:
            assert errors[layer] == pytest.approx(reference.compare(alone).error.value, rel=0.02)
    candidate.evaluate("cpu", ())
    assert released == [[]], "once, and the files of weights are gone by then"
