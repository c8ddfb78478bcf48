"""Calibrations that share samples share their runs, and give the tables that each would give alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from transom.calib.collector import CollectingBackend
from transom.calib.data import CalibrationData, open_calibration_data
from transom.calib.table import RangeTable
from transom.export.bundle_graphs import canonical_graphs
from transom.export.quantization import calibrate as stage
from transom.export.quantization.calibrate import SharedCalibration, calibrate
from transom.export.quantization.data_split import PARTS
from transom.export.quantization.options import DEFAULTS
from transom.export.quantization.quantize import parts_of
from transom.export.quantization.resume import KeepsNothing
from transom.runtime.backends.base import Array
from transom.runtime.bundle import Bundle
from transom.runtime.errors import CalibrationError
from transom.runtime.loading import load
from transom.runtime.tasks.bert import Bert


def test_each_sample_runs_once_for_all_tables(
    vit_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine images, two of them equal, in four parts: three tables of three parts each, in nine runs."""
    pixels = np.random.default_rng(0).standard_normal((9, 3, 8, 8)).cumsum(3).astype(np.float32)
    pixels[8] = pixels[0]
    np.savez(tmp_path / "images.npz", pixel_values=pixels)
    data = open_calibration_data([str(tmp_path / "images.npz")])
    bundle = Bundle(vit_bundle)
    canonical = canonical_graphs(bundle)
    config = DEFAULTS.config("int8", tuple(file.graph for file in bundle.manifest.graphs))
    runs: list[str] = []
    run_batch = stage.run_batch
    monkeypatch.setattr(
        stage,
        "run_batch",
        lambda loaded, batch, runner: (runs.extend(each.name for each in batch), run_batch(loaded, batch, runner)),
    )
    reported: list[str] = []
    shared = SharedCalibration(
        bundle, canonical, config, parts_of(data), {"model": {}}, reported.append, KeepsNothing()
    )
    kept = {part: data.split(PARTS, part)[0] for part in range(3)}
    tables = {part: shared.table(kept[part], [other for other in range(PARTS) if other != part]) for part in kept}
    assert sorted(runs) == sorted(entry.name for entry in data.entries)
    assert reported[-1].endswith(f"of {len(data.split(PARTS, 0)[1].entries)})"), "the part that was left out at first"
    for part in (0, 2):
        alone = calibrate(bundle, canonical, config, kept[part], smooth=False, report=lambda what: None)
        assert tables[part].to_bytes() == alone.to_bytes()
    assert tables[0].to_bytes() != tables[1].to_bytes()


TEXTS = [
    f"{who} {verb} the city {where}"
    for who in ("she", "who", "paris")
    for verb in ("made", "would go to")
    for where in ("down", "on the water")
]


def bert_table(bundle: Bundle, data: CalibrationData) -> RangeTable:
    config = DEFAULTS.config("int8", tuple(file.graph for file in bundle.manifest.graphs))
    return calibrate(bundle, canonical_graphs(bundle), config, data, smooth=False, report=lambda what: None)


def test_texts_that_run_together_give_the_ranges_of_each_alone(
    bert_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    data, bundle = open_calibration_data([str(tmp_path / "texts.txt")]), Bundle(bert_bundle)
    sizes: list[int] = []
    run_batch = stage.run_batch
    monkeypatch.setattr(
        stage,
        "run_batch",
        lambda loaded, batch, runner: (sizes.append(len(batch)), run_batch(loaded, batch, runner)),
    )
    together = bert_table(bundle, data)
    assert sum(sizes) == len(TEXTS)
    assert max(sizes) > 1
    monkeypatch.setattr(stage, "sample_batches", lambda loaded, samples, runner: ([each] for each in samples))
    assert bert_table(bundle, data).to_bytes() == together.to_bytes()


def test_of_texts_that_run_together_the_one_that_fails_is_named(
    bert_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    data, bundle = open_calibration_data([str(tmp_path / "texts.txt")]), Bundle(bert_bundle)
    failing = TEXTS.index("who would go to the city down")
    with load(bert_bundle) as bert:
        ids = cast(Bert, bert).tokenizer().encode([TEXTS[failing]], truncate=True).input_ids[0]
    run, sizes = CollectingBackend.run, []

    def fails(self: CollectingBackend, feeds: Mapping[str, Array], shapes: Mapping[str, Sequence[int]]) -> Any:
        sizes.append(len(feeds["input_ids"]))
        if (feeds["input_ids"][:, : len(ids)] == ids).all(1).any():
            raise CalibrationError(f"a tensor has NaN in sample {self.sample}.")
        return run(self, feeds, shapes)

    monkeypatch.setattr(CollectingBackend, "run", fails)
    with pytest.raises(CalibrationError, match=rf"in sample texts\.txt:{failing + 1}\.$"):
        bert_table(bundle, data)
    assert max(sizes) > 1
