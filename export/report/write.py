"""From a bundle's folder to its report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transom.export.report.family_figure import draw_figure
from transom.export.report.latency import RUNS, SECONDS, WARMUP
from transom.export.report.page import page
from transom.runtime.atomic_write import write_bytes
from transom.runtime.bench import bench
from transom.runtime.bundle import Bundle
from transom.runtime.errors import ExportError


def write_report(folder: Path, inputs: Sequence[str], out: Path, prompts: Sequence[str] = ()) -> None:
    """Write the report of the bundle in ``folder`` to ``out``, whole or not at all.

    ``inputs`` are the texts or image files that its picture is drawn of, ``prompts`` the texts that CLIP holds its
    images against; examples where there are none. Raises BundleError for a bundle that cannot be loaded, InputError
    for inputs that cannot be drawn, ExportError where ``out`` cannot be written.
    """
    bundle = Bundle(folder)
    pictures = draw_figure(bundle, inputs, prompts)
    timed = bench(folder, runs=RUNS, warmup=WARMUP, seconds=SECONDS)
    try:
        write_bytes(out, page(bundle, pictures, timed).encode())
    except OSError as error:
        raise ExportError(f"cannot write {out}: {error.strerror}. Check the folder and its permissions.") from None
