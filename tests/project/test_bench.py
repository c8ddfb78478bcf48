"""`make bench`: judging, fractions and tables from figures that are given, and a real worker of a tiny peer."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paths import REPO

LIMITS = {"read": 25.0, "fp32": 200.0, "bf16": 400.0, "int8": 800.0, "method": "given"}
TINY_PEER = """
import time

import numpy as np

from bench.session import Calls


def versions():
    return {"tiny": "1"}


def prepare(variant, model, paths):
    print("a library's chatter")
    if variant == "broken":
        raise ValueError("it cannot\\nquantise this")
    return "made"


def open_session(variant, workload, inputs, paths):
    return Calls(workload, run=lambda: inputs["input_ids"] * 2.0)
"""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that imports a module of benchmarks/bench."""
    monkeypatch.syspath_prepend(REPO / "benchmarks")
    return lambda name: import_module(f"bench.{name}")


def timed(peer: str, precision: str, ms: float, **given: Any) -> dict[str, Any]:
    figures = {"median": ms, "min": ms, "q1": ms, "q3": ms, "n": 5}
    row = {"peer": peer, "title": peer.title(), "variant": precision, "label": "as it is", "precision": precision}
    row |= {"ours": peer == "transom", "error": 0.01, "tokens": None, "wrong": "", "ms": {"run": figures}}
    return row | given


def results(*rows: dict[str, Any]) -> dict[str, Any]:
    entry = {"title": "BERT-base S=128 B=1", "kind": "encoder", "rows": list(rows), "least_ms": {"run": {"int8": 26.8}}}
    return {
        "cpu": "AMD EPYC 9654 96-Core Processor", "instruction_set": "avx512_vnni", "threads": 2, "date": "2026-12-01",
        "rounds": 5, "seconds": 600, "sums": "exact", "limits": LIMITS, "versions": {"tiny": {"tiny": "1"}},
        "workloads": {"bert-s128-b1": entry},
    }  # fmt: skip


def test_a_fast_wrong_answer_is_marked_and_never_best(bench: Any) -> None:
    table = bench("table")
    fast = timed("tiny", "int8", 10.0, wrong="error 0.3 above 0.05", error=0.3)
    found = results(timed("transom", "int8", 40.0), fast, timed("openvino", "int8", 50.0))
    assert table.best(found["workloads"]["bert-s128-b1"]["rows"], "run", "int8", ours=False)["peer"] == "openvino"
    assert "| BERT-base S=128 B=1 | 40.0 | Openvino, as it is: 50.0 |" in table.summary(found)
    line = next(line for line in table.details(found).splitlines() if line.startswith("| Tiny"))
    figures = "10.0 | 10.0 | 10.0–10.0 | – | 0.3 | – | 4.00 ×"
    assert line == f"| Tiny, as it is | INT8 | {figures} | **wrong**: error 0.3 above 0.05 |"


def test_a_format_that_peers_alone_compute_has_a_column(bench: Any) -> None:
    found = results(timed("transom", "int8", 40.0), timed("openvino", "bf16", 60.0))
    head, _, row = bench("table").summary(found).splitlines()
    assert head.endswith("| BF16, best peer | INT8 |")
    assert row == "| BERT-base S=128 B=1 | Openvino, as it is: 60.0 | 40.0 |"


def test_what_did_not_run_is_named_with_its_reason(bench: Any) -> None:
    gone = {key: value for key, value in timed("llamacpp", "int8", 1.0).items() if key != "ms"}
    text = bench("table").table(results(timed("transom", "int8", 40.0), gone | {"failure": "not installed: no wheel"}))
    assert "| BERT-base S=128 B=1 | Llamacpp, as it is | not installed: no wheel |" in text


def test_an_earlier_installation_is_no_peer_and_has_its_ratio(bench: Any) -> None:
    found = results(timed("transom", "int8", 40.0), timed("earlier", "int8", 48.0))
    table = bench("table")
    assert table.best(found["workloads"]["bert-s128-b1"]["rows"], "run", "int8", ours=False) is None
    assert "| BERT-base S=128 B=1 | INT8 | 48.0 | 40.0 | 1.20 × |" in table.beside_earlier(found)


@pytest.mark.parametrize(
    ("precision", "scale", "wrong"),
    [
        ("fp32", 1.0005, ""),
        ("fp32", 1.01, "error 0.01 above 0.001"),
        ("int8", 1.01, ""),
        ("int8", 1.3, "error 0.3 above 0.1"),
    ],
)
def test_outputs_are_judged_by_their_relative_error(bench: Any, precision: str, scale: float, wrong: str) -> None:
    judge, workloads = bench("judge"), bench("workloads").WORKLOADS
    reference = {"output": np.arange(1.0, 7.0).reshape(2, 3)}
    ours = {"output": reference["output"] * scale}
    assert judge.judged(workloads["bert-s128-b1"], precision, ours, reference, saturates=False).wrong == wrong
    clip = judge.judged(workloads["clip-image-b1"], precision, ours, reference, saturates=False)
    assert clip.wrong == ""  # embeddings are normalised first


def test_nan_another_shape_and_saturating_sums_are_wrong(bench: Any) -> None:
    judge, workload = bench("judge"), bench("workloads").WORKLOADS["bert-s128-b1"]
    ones = {"output": np.ones((2, 3))}
    assert judge.judged(workload, "int8", {"output": np.full((2, 3), np.nan)}, ones, saturates=False).wrong
    assert "shape" in judge.judged(workload, "int8", {"output": np.ones((3, 2))}, ones, saturates=False).wrong
    assert judge.judged(workload, "int8", ones, ones, saturates=True).wrong == "sums of products saturate"


def test_tokens_that_differ_are_counted(bench: Any) -> None:
    judge, workload = bench("judge"), bench("workloads").WORKLOADS["gpt2-64-64"]
    reference = {"tokens": np.arange(10)}
    ours = {"tokens": np.array([0, 1, 2, 3, 4, 5, 9, 9, 9, 9])}
    right = judge.judged(workload, "int8", ours, reference, saturates=False)
    assert (right.tokens, right.wrong) == ((7, 10), "")
    assert judge.judged(workload, "fp32", ours, reference, saturates=False).wrong == "7 of 10 tokens are PyTorch's"


def test_least_times_of_bert_and_of_a_step(bench: Any) -> None:
    """BERT-base S=128: 85 M weights x 2 x 128 operations and attention; a step of GPT-2 reads 124 M weights."""
    costs, workloads = bench("costs"), bench("workloads").WORKLOADS
    linear, attention = 2 * 128 * 12 * 12 * 768**2, 4 * 128**2 * 768 * 12
    least = costs.least_seconds(workloads["bert-s128-b1"], "run", "int8", LIMITS)
    assert least == pytest.approx((linear / 800 + attention / 400) / 1e9)
    step = costs.least_seconds(workloads["gpt2-64-64"], "step", "fp32", LIMITS)
    weights, cache = 12 * 12 * 768**2 + 50257 * 768, 2 * 12 * 96 * 768
    assert step == pytest.approx(4 * (weights + cache) / 25e9)


def test_kernels_of_limits_are_those_that_the_processor_has(bench: Any) -> None:
    kernels_of = bench("limits").kernels_of
    assert kernels_of(frozenset({"avx2", "fma"})) == {"fp32": "fp32_avx2", "int8": "int8_avx2"}
    assert kernels_of(frozenset({"avx2", "fma", "avx512f", "avx512_vnni"}))["int8"] == "int8_avx512_vnni"
    assert kernels_of(frozenset({"asimd", "asimddp"})) == {"fp32": "fp32_neon", "int8": "int8_sdot"}


@pytest.fixture
def tiny(bench: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Yield a starter of real workers whose peer is TINY_PEER."""
    modules = tmp_path / "modules"
    (modules / "bench").mkdir(parents=True)
    for entry in (REPO / "benchmarks" / "bench").glob("*.py"):
        (modules / "bench" / entry.name).symlink_to(entry)
    (modules / "bench" / "peers").mkdir()
    (modules / "bench" / "peers" / "tiny.py").write_text(TINY_PEER)
    process = bench("process")
    monkeypatch.setattr(process, "BENCHMARKS", modules)
    paths = bench("paths").Paths(tmp_path / "work")
    started = []

    def start(variant: str) -> Any:
        started.append(process.WorkerProcess("tiny", variant, "tiny", Path(sys.executable), paths))
        return started[-1]

    start.paths = paths  # type: ignore[attr-defined]
    start.error = process.WorkerError  # type: ignore[attr-defined]
    yield start
    for worker in started:
        worker.end()


def test_a_worker_answers_rests_and_survives_an_error(tiny: Any, tmp_path: Path) -> None:
    inputs = tiny.paths.inputs("bert-s16-b1")
    inputs.parent.mkdir(parents=True)
    np.savez(inputs, input_ids=np.arange(4.0))
    worker = tiny("as-it-is")
    assert worker.ask(do="versions") == {"versions": {"tiny": "1"}}
    assert worker.ask(do="prepare", model="bert") == {"note": "made"}  # its prints are no answers
    with pytest.raises(tiny.error, match="'outputs' came before 'open'"):
        worker.ask(do="outputs", file=str(tmp_path / "x.npz"))
    worker.ask(do="open", workload="bert-s16-b1")
    worker.rest()  # stopped; the next request wakes it
    worker.ask(do="outputs", file=str(tmp_path / "x.npz"))
    with np.load(tmp_path / "x.npz") as found:
        assert found["output"].tolist() == [0, 2, 4, 6]
    assert len(worker.ask(do="time", seconds=0.0)["seconds"]["run"]) >= 1


def test_a_worker_that_fails_or_ends_is_an_error_with_a_reason(tiny: Any) -> None:
    worker = tiny("broken")
    with pytest.raises(tiny.error, match="ValueError: it cannot quantise this"):
        worker.ask(do="prepare", model="bert")
    worker.end()
    with pytest.raises(tiny.error, match="the worker ended by signal 9"):
        worker.ask(do="versions")


def test_a_run_that_was_interrupted_goes_on_only_with_the_same_key(bench: Any, tmp_path: Path) -> None:
    run, paths = bench("run"), bench("paths").Paths(tmp_path)
    assert run.resumed(paths, "k") is None
    run.save(paths.partial(), {"key": "k", "workloads": {"bert-s16-b1": {}}})
    assert list(run.resumed(paths, "k")["workloads"]) == ["bert-s16-b1"]
    assert run.resumed(paths, "another") is None
    paths.partial().write_text('{"key": "k"')
    assert run.resumed(paths, "k") is None


def test_the_readme_gets_the_table_between_its_markers(bench: Any) -> None:
    publish = bench("publish")
    found = results(timed("transom", "int8", 40.0), timed("openvino", "int8", 50.0))
    begin, end = publish.MARKERS
    once = publish.readme_with(found, f"# Title\n{begin}\nold\n{end}\nafter\n")
    assert once.startswith(f"# Title\n{begin}\n")
    assert once.endswith(f"{end}\nafter\n")
    assert "old" not in once
    assert "docs/results/bench-amd-epyc-9654-avx512_vnni.md" in once
    assert publish.readme_with(found, once) == once
    with pytest.raises(publish.PublishError, match="lacks the lines"):
        publish.readme_with(found, "# Title\n")
    assert publish.readme_with(found, (REPO / "README.md").read_text("utf-8"))


def test_a_peer_that_cannot_be_installed_has_pips_reason(bench: Any) -> None:
    said = "Looking in links\nERROR: Could not find a version that satisfies it\nERROR: No matching distribution\n"
    assert bench("environments").reason_of(said) == "ERROR: Could not find a version that satisfies it"


def test_published_results_are_those_of_their_json(bench: Any) -> None:
    """Whatever lies in docs/results/ was written from the JSON beside it."""
    for path in (REPO / "docs" / "results").glob("bench-*.json"):
        page = path.with_suffix(".md").read_text("utf-8")
        assert page == bench("table").page(json.loads(path.read_text("utf-8")), f"{path.stem}.svg")
