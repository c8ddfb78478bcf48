"""The comparison of seq2seq's forms by length: what bundle.json records, in a table and an image."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from command_line import changed_bundle
from paths import REPO


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(REPO / "benchmarks")
    return import_module("list_lengths")


def scored(bundle: Path, folder: Path, *right: int) -> Path:
    """Return a copy of the bundle whose score has ``right`` of 10 lists of each length."""
    lengths = [
        {"name": f"{k} dates", "characters": [1, 20.4 * k, 99], "n": 10, "value": n / 10, "interval": [n / 20, 1]}
        for k, n in enumerate(right, 1)
    ]
    folder.mkdir()
    return changed_bundle(bundle, folder, lambda fields: fields.update(score={"bundle": {"by_length": lengths}}))


def test_a_column_for_each_form(
    random_seq2seq_bundle: Path, random_fixed_bundle: Path, benchmark: Any, tmp_path: Path
) -> None:
    with_attention = scored(random_seq2seq_bundle, tmp_path / "a", 10, 9)
    without = scored(random_fixed_bundle, tmp_path / "b", 8, 0)
    lines = benchmark.lines_of([with_attention, without])
    assert benchmark.table(lines).splitlines() == [
        "| list of | characters, mean | cases | with attention | one vector for the whole source |",
        "| --- | --- | --- | --- | --- |",
        "| 1 dates | 20 | 10 | 100.0 % (50.0 to 100.0) | 80.0 % (40.0 to 100.0) |",
        "| 2 dates | 41 | 10 | 90.0 % (45.0 to 100.0) | 0.0 % (0.0 to 100.0) |",
    ]
    with pytest.raises(SystemExit, match=r"is another bundle with attention\. Give one of each form"):
        benchmark.lines_of([with_attention, with_attention])
    with pytest.raises(SystemExit, match=r"has no score by length\. Export seq2seq or seq2seq-fixed by its name"):
        benchmark.lines_of([random_fixed_bundle])


def test_the_same_scores_give_the_same_image(random_seq2seq_bundle: Path, benchmark: Any, tmp_path: Path) -> None:
    """An interval that begins above its score by the last bit is drawn too."""
    lines = benchmark.lines_of([scored(random_seq2seq_bundle, tmp_path / "a", 10, 9, 0)])
    (found,) = lines.values()
    found[2] = replace(found[2], interval=(1e-18, 0.3))
    images = []
    for name in ("one.svg", "two.svg"):
        benchmark.draw(lines, tmp_path / name)
        images.append((tmp_path / name).read_bytes())
    assert images[0] == images[1]
    assert images[0].count(b"<!-- 0.900 -->") == 1  # what letters drawn as paths say


def test_equal_scores_have_their_numbers_apart(
    random_seq2seq_bundle: Path, random_fixed_bundle: Path, benchmark: Any, tmp_path: Path
) -> None:
    """The first form's number stands above its point, the second's below."""
    folders = [
        scored(bundle, tmp_path / name, 10)
        for bundle, name in ((random_seq2seq_bundle, "a"), (random_fixed_bundle, "b"))
    ]
    benchmark.draw(benchmark.lines_of(folders), tmp_path / "both.svg")
    places = re.findall(r"<!-- 1\.000 -->\s*<g [^>]*translate\([\d.]+ ([\d.]+)\)", (tmp_path / "both.svg").read_text())
    first, second = map(float, places)
    assert second - first > 10
