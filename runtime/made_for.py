"""Say which devices a bundle was exported for, and the command that exports it for the others too."""

from __future__ import annotations

import shlex
from os import PathLike
from typing import TYPE_CHECKING

from transom.runtime.manifest_graphs import CPU_ALONE

if TYPE_CHECKING:
    from transom.runtime.manifest import Manifest


def no_tensorrt(manifest: Manifest, folder: str | PathLike[str]) -> str | None:
    """Return why the bundle at ``folder`` has no engines and gets none; None where it was made for TensorRT too."""
    if manifest.made_for != CPU_ALONE:
        return None
    return (
        f"{folder} was exported with --for cpu and has no graph for TensorRT. Export it again: "
        f"{export_command(manifest, folder)}"
    )


def export_command(manifest: Manifest, folder: str | PathLike[str]) -> str:
    """Return the command, ready for a shell, that replaces the bundle at ``folder`` by one for every device.

    Options that bundle.json does not keep are not in it, and of calibration data it has the name, not the place.
    """
    made = manifest.quantization
    data = made.get("data") if made is not None else None
    name = data.get("name") if isinstance(data, dict) else None
    words = ["transom", "export", str(manifest.source.get("checkpoint")), "--out", str(folder), "--force"]
    words += ["--precision", manifest.precision, "--task", manifest.task, "--for", "both"]
    if isinstance(name, str):
        words += ["--calibration-data", name.partition(" (")[0]]  # without how many of its samples were taken
    return shlex.join(words)
