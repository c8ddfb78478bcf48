"""``transom verify``: a bundle against the PyTorch definition it came from."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import Annotated

import typer

from transom.cli.extras import export_extra
from transom.cli.options import BundlePath, Device, Json, Threads
from transom.cli.progress import progress
from transom.cli.show import comparison_cells, print_json, print_table, sizes_text


def verify(
    bundle: BundlePath,
    source: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE", help="The checkpoint to compare with.", show_default="the one it was exported from"
        ),
    ] = None,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Hold a bundle against PyTorch again.

    Over a grid of shapes, on real inputs. Needs torch and the checkpoint; on a device without
    them there is `transom selftest`. Exit status 1
    and the worst element where an output is beyond the tolerance of the bundle's precision.
    """
    with progress(quiet=as_json) as report, redirect_stdout(sys.stderr), export_extra():
        from transom.export import pipeline

        cases = pipeline.verify(bundle, source=source, device=device, threads=threads, progress=report)
    if as_json:
        print_json(
            {
                "bundle": bundle,
                "cases": [
                    {"shape": case.shape, "comparisons": [each.to_json() for each in case.comparisons]}
                    for case in cases
                ],
            }
        )
        return
    rows = [[sizes_text(case.shape), *comparison_cells(each)] for case in cases for each in case.comparisons]
    print_table(("shape", "output", "error", "worst at", "bundle", "PyTorch"), rows, ("error", "bundle", "PyTorch"))
    worst = max((each for case in cases for each in case.comparisons), key=lambda each: each.error)
    print(f"agrees with PyTorch; the worst element: {worst}")
