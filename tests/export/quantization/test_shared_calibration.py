"""Calibrations that share samples share their runs, and give the tables that each would give alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from transom.calib.data import open_calibration_data
from transom.export.bundle_graphs import canonical_graphs
from transom.export.quantization import calibrate as stage
from transom.export.quantization.calibrate import SharedCalibration, calibrate
from transom.export.quantization.data_split import PARTS
from transom.export.quantization.options import DEFAULTS
from transom.export.quantization.quantize import parts_of
from transom.export.quantization.resume import KeepsNothing
from transom.runtime.bundle import Bundle


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
    run_sample = stage.run_sample
    monkeypatch.setattr(
        stage,
        "run_sample",
        lambda loaded, sample, runner: (runs.append(sample.name), run_sample(loaded, sample, runner)),
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
