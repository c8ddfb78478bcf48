"""No case of a parity run vanishes: every side has each, with the same outputs, and every graph is run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import numpy as np
import pytest

from paths import KEPT
from tiny_graphs import graph_of
from transom.export.bundle_graphs import canonical_graphs
from transom.export.engine.trt_graphs import tensorrt_graphs
from transom.export.engine.trt_parity import require_trt_parity
from transom.export.parity.cases import ParityCases, Run, run_parts
from transom.export.parity.compare import check_parity, export_limit, in_step
from transom.export.parity.fp16_range import RangeBackend, measure_ranges, require_fp16_range
from transom.export.parity.inputs import ParityInputs, parity_inputs
from transom.export.parity.results import Golden
from transom.runtime import load
from transom.runtime.bundle import Bundle
from transom.runtime.errors import ExportError, ParityError, PrecisionError
from transom.runtime.graph_spec import Graph, Tensor

GRAPH = Graph("g", (Tensor("x", "float32", (1,)),), (Tensor("y", "float32", (1,)),))


def runs(count: int, *names: str) -> Iterator[Run]:
    """``count`` cases with the outputs ``names``, "y" by default."""
    for number in range(count):
        yield Run({"B": number}, GRAPH, {}, {name: np.zeros(1, np.float32) for name in names or ("y",)})


def test_sides_go_in_step() -> None:
    found = list(in_step([runs(3), runs(3), runs(3)], 3))
    assert [[run.sizes["B"] for run in case] for case in found] == [[0] * 3, [1] * 3, [2] * 3]


@pytest.mark.parametrize(
    "counts",
    [(3, 3, 2), (3, 3, 0), (3, 2, 3), (2, 3, 3), (3, 3, 4), (4, 3, 3), (2, 2, 2), (4, 4, 4), (0, 0, 0)],
    ids=str,
)
def test_every_side_has_every_case(counts: tuple[int, ...]) -> None:
    with pytest.raises(ParityError, match=r"expected 3 cases, at least one, of each\. Nothing was proven"):
        list(in_step([runs(count) for count in counts], 3))


def test_no_cases_prove_nothing() -> None:
    with pytest.raises(ParityError, match="0 of 2 sides have a case 1; expected 0 cases, at least one"):
        list(in_step([runs(0), runs(0)], 0))


@pytest.mark.parametrize("outputs", [("y", "z"), ("z",)], ids=str)
def test_every_side_gives_the_same_outputs(outputs: tuple[str, ...]) -> None:
    with pytest.raises(ParityError, match=r"the sides of a case give .*; expected the same outputs"):
        list(in_step([runs(1), runs(1, *outputs)], 1))


def test_a_case_without_outputs_proves_nothing() -> None:
    nothing = [replace(run, outputs={}) for run in runs(1)]
    with pytest.raises(ParityError, match="the sides of a case give nothing and nothing; expected the same"):
        list(in_step([iter(nothing), iter(nothing)], 1))


class Cut(ParityCases):
    """The third side, which runs row by row, has ``change`` more cases than the others."""

    change = 0

    def runs(self, bundle: Any, *, by_row: bool = False, most: int | None = None) -> Iterator[Run]:
        found = super().runs(bundle, by_row=by_row, most=most)
        if not by_row:
            return found
        return islice(found, len(self) + self.change) if self.change < 1 else chain(found, runs(self.change))


@pytest.mark.parametrize("change", [0, -1, -3, 1])
def test_a_third_side_that_ends_early_fails_parity(exported: Any, monkeypatch: pytest.MonkeyPatch, change: int) -> None:
    """The artefact beside itself: whatever is compared is equal."""
    monkeypatch.setattr(Cut, "change", change)
    with load(KEPT / "bert-fp32") as side:
        parity_cases = Cut(side.manifest, parity_inputs((file.graph for file in side.manifest.graphs), None, None))
        assert len(parity_cases) > 3
        if change:
            with pytest.raises(ParityError, match=r"[01] of 1 sides have a case"):
                check_parity(side, side, side, parity_cases, Golden(), export_limit("fp32"), lambda what: None)
        else:
            cases = check_parity(side, side, side, parity_cases, Golden(), export_limit("fp32"), lambda what: None)
            assert [case.emulated for case in cases] == [False, True] * len(parity_cases)


def test_a_graph_that_no_case_runs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with load(KEPT / "gpt-fp32") as gpt:
        samples = parity_inputs((file.graph for file in gpt.manifest.graphs), None, None)
        assert len(ParityCases(gpt.manifest, samples))
        monkeypatch.setattr("transom.export.parity.cases.Generator", type(None))
        with pytest.raises(ExportError, match="no case runs the graph 'decoder' of this gpt"):
            ParityCases(gpt.manifest, samples)


def test_ranges_of_a_graph_that_never_ran_are_not_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle(KEPT / "bert-fp32")
    with load(KEPT / "bert-fp32") as side:
        inputs = parity_inputs((file.graph for file in side.manifest.graphs), None, None)
        parity_cases = ParityCases(side.manifest, inputs)
    assert measure_ranges(bundle, canonical_graphs(bundle), parity_cases).tensors
    monkeypatch.setattr(parity_cases, "runs", lambda side, by_row: runs(0))
    with pytest.raises(PrecisionError, match="the graph model was never run, so no range of its tensors is known"):
        measure_ranges(bundle, canonical_graphs(bundle), parity_cases)


@pytest.mark.parametrize("values", [[[math.nan], [1.0]], [[1.0], [math.nan]], [[math.inf], [1.0]]], ids=str)
def test_a_tensor_that_was_once_not_finite_fits_no_half(values: list[list[float]]) -> None:
    model = graph_of("g (float[1] x) => (float[1] y) { y = Neg (x) }", {}, ["layer"])
    backend = RangeBackend(model, GRAPH)
    for feed in values:
        backend.run({"x": np.array(feed, np.float32)}, {"y": (1,)})
    with pytest.raises(PrecisionError, match=r"first y \(module layer\) reaches (nan|inf)"):
        require_fp16_range(backend.largest)


@pytest.mark.parametrize(
    ("found", "said"),
    [([], "the golden case .* has no outputs"), ([("logits", (1, 10), (1, 1))], r"as \(1, 10\), the bundle \(1, 1\)")],
    ids=["nothing", "another shape"],
)
def test_what_cannot_be_compared_checks_no_engine(monkeypatch: pytest.MonkeyPatch, found: list[Any], said: str) -> None:
    """Arrays of two shapes may have a difference all the same."""
    arrays = [(name, *(np.ones(shape, np.float32) for shape in shapes)) for name, *shapes in found]
    monkeypatch.setattr("transom.export.engine.trt_parity.outputs", lambda *sides: iter(arrays))
    bundle = Bundle(KEPT / "vit-fp32")
    with pytest.raises(ExportError, match=said):
        require_trt_parity(bundle, tensorrt_graphs(bundle))


def test_a_large_batch_runs_in_parts() -> None:
    """Five rows of six tokens and as many of a mask, 60 elements, in parts of 24: two rows each."""
    sizes: list[int] = []

    class Side:
        def run(self, feeds: Any) -> Any:
            sizes.append(len(feeds["input_ids"]))
            return {"y": feeds["input_ids"] * 2}

    ids = np.arange(30).reshape(5, 6)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for most, expected in ((24, [2, 2, 1]), (0, [1] * 5), (60, [5]), (None, [5])):
        sizes.clear()
        assert np.array_equal(run_parts(Side(), feeds, most)["y"], ids * 2)  # type: ignore[arg-type]
        assert sizes == expected


def test_ids_that_a_graph_looks_for_stand_in_the_inputs() -> None:
    """Each row but the last of several, among its real tokens; of random ids hardly one is of them."""
    graph = Graph(
        "text",
        (
            Tensor("input_ids", "int64", ("B", "S"), exclusive_max=49408),
            Tensor("attention_mask", "int64", ("B", "S"), default=1),
        ),
        (Tensor("text_embeds", "float32", ("B", 8)),),
    )
    inputs = ParityInputs(graph, None, None, marks=(49407,))
    places = set()
    for S in (1, 5, 16, 77):
        feeds = inputs.feeds({"B": 4, "S": S})
        marked = (feeds["input_ids"] == 49407) & (feeds["attention_mask"] == 1)
        assert marked.any(1).tolist() == [True, True, True, False]
        places |= set(marked.argmax(1)[:3].tolist())
    assert len(places) > 4
    assert (inputs.feeds({"B": 1, "S": 3})["input_ids"] == 49407).any()
