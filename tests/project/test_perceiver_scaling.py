"""The comparison of a Perceiver's cost with a ViT's: its table and image, from figures that are given."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from paths import REPO

SIZES = (1024, 2048, 4096, 8192, 16384)


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(REPO / "benchmarks")
    return import_module("perceiver_scaling")


def results(benchmark: Any) -> dict[str, Any]:
    """Return figures in which one time is quadratic and the other linear."""
    figures = {
        "ViT": [benchmark.point(size, size, [(size / 1024) ** 2 * 10] * 5, 1) for size in SIZES],
        "Perceiver": [benchmark.point(size, size, [size / 1024 * 2] * 5, 1) for size in SIZES],
    }
    return {
        "cpu": "a processor",
        "threads": 1,
        "onnxruntime": "1.32.0",
        "date": "2026-11-30",
        "rounds": 5,
        "width": 64,
        "layers": 2,
        "latents": 128,
        "ms": figures,
    }


def test_slopes_are_those_of_the_figures(benchmark: Any) -> None:
    lines = benchmark.table(results(benchmark)).splitlines()
    assert lines[3:] == [
        "| pixels | 1024 | 2048 | 4096 | 8192 | 16384 | slope, all | slope, 4k to 16k |",
        "|---|---|---|---|---|---|---|---|",
        "| ViT | 10 | 40 | 160 | 640 | 2560 | 2.00 | 2.00 |",
        "| Perceiver | 2 | 4 | 8 | 16 | 32 | 1.00 | 1.00 |",
        "| ViT / Perceiver | 5.0 | 10.0 | 20.0 | 40.0 | 80.0 | | |",
    ]


def test_counted_costs_are_quadratic_and_linear(benchmark: Any) -> None:
    """Doubling long inputs: four times the products of the ViT, twice those of the Perceiver."""
    vit, perceiver = benchmark.SERIES
    assert vit.multiply_adds(1 << 20) / vit.multiply_adds(1 << 19) == pytest.approx(4, abs=0.01)
    assert perceiver.multiply_adds(1 << 20) / perceiver.multiply_adds(1 << 19) == pytest.approx(2, abs=0.01)


def test_the_same_figures_give_the_same_image(benchmark: Any, tmp_path: Path) -> None:
    images = []
    for name in ("one.svg", "two.svg"):
        benchmark.draw(results(benchmark), benchmark.SERIES, tmp_path / name)
        images.append((tmp_path / name).read_bytes())
    assert images[0] == images[1]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (None, "cannot be read: No such file"),
        ("{", "holds no JSON; expected the figures of a run"),
        ('{"cpu": "a processor"}', "has no 'ms'; expected the figures of such a run"),
    ],
)
def test_figures_that_cannot_be_read(
    contents: str | None, message: str, benchmark: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "figures.json"
    if contents is not None:
        path.write_text(contents)
    monkeypatch.setattr("sys.argv", ["perceiver_scaling.py", "--results", str(path)])
    with pytest.raises(SystemExit) as stopped:
        benchmark.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
