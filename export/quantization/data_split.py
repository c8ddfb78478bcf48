"""Split calibration data into the samples that are calibrated on and those that are held out for the gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transom.calib.data import CalibrationData, open_calibration_data
from transom.runtime.errors import CalibrationError
from transom.runtime.manifest import Manifest

PARTS = 4  # of the calibration data; one is held out


def split_for_gate(data: CalibrationData, *, scored: bool) -> tuple[CalibrationData, CalibrationData | None]:
    """Return (calibration, held out): all of ``data`` and None where a task score brings held-out data of its own."""
    return (data, None) if scored else data.split(PARTS)


def held_out_part(manifest: Manifest, data: Sequence[str]) -> CalibrationData:
    """Return the part of ``data`` that the calibration of a bundle left out.

    Raises CalibrationError where it was calibrated on other data: then it may have seen every sample of these.
    """
    calibration, held_out = open_calibration_data(data).split(PARTS)
    if manifest.quantization is not None:
        require_same_data(calibration, manifest.quantization["data"], f"{manifest.name} in {manifest.precision}")
    return held_out


def require_same_data(calibration: CalibrationData, recorded: Mapping[str, Any], whose: str) -> None:
    """Raise CalibrationError unless ``calibration`` is, sample by sample, the data that was ``recorded``."""
    if calibration.sha256 != recorded.get("sha256"):
        raise CalibrationError(
            f"{whose} was calibrated on {recorded.get('name')}; the data given now makes {calibration.name} of other "
            "contents, so that it is not known what was held out. Give the same --calibration-data, unchanged and in "
            "the same order, or calibrate anew."
        )
