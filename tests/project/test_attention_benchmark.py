"""What the attention benchmark computes without a GPU: cases, costs, ratios, the rows of the table it would write."""

from __future__ import annotations

from dataclasses import asdict, replace
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'transom[plugin]'")

from paths import REPO
from transom.export.plugins.kernel_spec import TileSizes


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    """All names of the script, whose modules lie beside it."""
    monkeypatch.syspath_prepend(REPO / "benchmarks")
    modules = [import_module(name) for name in ("attention_cases", "attention_tables", "gpu_attention")]
    return SimpleNamespace(**{name: value for module in modules for name, value in vars(module).items()})


def test_the_benchmark_s_arithmetic_by_hand(benchmark: Any) -> None:
    """FLOP and bytes of small cases, the roofline, what is tried; and no case twice."""
    Case = benchmark.Case
    whole = Case("prompt", "fp16", 2, 4, 4, 3, 64)
    assert whole.flops == 4 * 2 * 3 * 64 * 16  # two products of 16 pairs, a multiplication and an addition each
    assert replace(whole, causal=True).flops == 4 * 2 * 3 * 64 * 10  # 1 + 2 + 3 + 4 pairs
    assert replace(whole, causal=True, S=1).flops == replace(whole, S=1).flops  # a step sees every key
    assert whole.bytes == 2 * (2 * 3 * 4 * 64) * 4  # Q, K, V, O
    assert replace(whole, kind="biased").bytes == whole.bytes + 2 * 3 * 16
    assert replace(whole, kind="masked").bytes == whole.bytes + 2 * 4
    windows = Case("windows", "fp16", 64, 49, 49, 3, 32)
    assert windows.bytes == 4 * 64 * 3 * 49 * 32 * 2 + 3 * 49 * 49 * 2
    assert (windows.aim, replace(windows, kind="prompt").aim) == (1.5, 0.9)
    assert windows.tiles(TileSizes(128, 32, 8, 2)) == TileSizes(64, 32, 4, 2)  # of a plugin; all else has the table's
    assert replace(windows, kind="biased").tiles(TileSizes(128, 32, 8, 2)) == TileSizes(128, 32, 8, 2)
    step = Case("step", "fp16", 1, 1, 100, 4, 64, groups=2)
    assert step.bytes == 2 * 2 * 4 * 64 + 2 * 2 * 2 * 100 * 64
    assert replace(step, int8=True).bytes == 2 * 2 * 4 * 64 + 2 * 2 * 100 * (64 + 4)
    roofline = benchmark.Roofline({"fp16": 1e12}, 1e9)
    assert roofline.least_ms(replace(step, B=10)) == pytest.approx(1e3 * 10 * step.bytes / 1e9)
    row = benchmark.row_of(whole, "ours", [1.0, 2.0, 3.0], roofline)
    assert (row["p50_ms"], row["p10_ms"], row["p90_ms"]) == (2.0, 1.2, 2.8)
    sides = [
        {"side": "ours", "p50_ms": 2.0},
        {"side": "torch flash", "p50_ms": 3.0},
        {"side": "torch math", "p50_ms": 9},
    ]
    assert benchmark.ratio_of(sides) == (1.5, "torch flash")
    assert benchmark.ratio_of(sides[:1]) == (None, "none")
    assert benchmark.splits_of(replace(step, T=1100)) == [1, 2, 4, 8]
    names = [case.name for case in benchmark.cases(quick=False)]
    assert len(names) == len({*names}) == 4 * (6 + 3 + 3 + 3 + 4 + 2 + 11) + 4 * 2 * (2 * 7 + 3) + 2 * 2 * 4 * 3
    assert [case.name for case in benchmark.cases(quick=True, only=["biased"])] == [
        "biased fp16 head 64 B=16 S=1024 T=1024"
    ]
    tried = benchmark.candidates(TileSizes(128, 64, 8, 2), step=False, quick=False)
    assert tried[0] == TileSizes(128, 64, 8, 2)
    assert {TileSizes(128, 32, 8, 2), TileSizes(128, 64, 4, 2), TileSizes(64, 64, 8, 2), TileSizes(128, 64, 8, 3)} <= {
        *tried
    }
    assert all(each.m == 16 for each in benchmark.candidates(TileSizes(16, 64, 4, 3), step=True, quick=False))


def test_rows_of_the_table_that_would_be_better(benchmark: Any) -> None:
    """A column that was tuned, beside what stands there; none for what is 1% faster."""
    found = {"precision": "fp16", "width": 64, "column": "prompt", "best": asdict(TileSizes(128, 128, 8, 3))}
    assert benchmark.better_rows([found | {"entry_ms": 1.0, "best_ms": 0.8}], 90) == [
        "HALVES['wgmma'], from fp16: 64: (TileSizes(128, 128, 8, 3), TileSizes(64, 64, 4, 2), TileSizes(16, 64, 4, 3)),"
    ]
    assert benchmark.better_rows([found | {"entry_ms": 1.0, "best_ms": 0.99}], 90) == []
