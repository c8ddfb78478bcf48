"""``transom calibrate``: collect the ranges of an FP32 bundle's activations, for later quantised exports."""

from __future__ import annotations

import shlex
import sys
from contextlib import redirect_stdout
from typing import Annotated

import typer

from transom.cli.export import CalibrationData, Method, MethodOption, SmoothQuant
from transom.cli.extras import export_extra
from transom.cli.options import BundlePath, Json
from transom.cli.output import print_json, print_table, printable
from transom.cli.progress import progress


def calibrate(
    bundle: BundlePath,
    calibration_data: CalibrationData = None,
    method: MethodOption = Method.mse,
    smooth_quant: SmoothQuant = True,
    force: Annotated[bool, typer.Option("--force", help="Replace the ranges that the bundle has.")] = False,
    as_json: Json = False,
) -> None:
    """Run real inputs through an FP32 bundle and write the ranges of its activations into it.

    `transom export ... --precision int8 --ranges BUNDLE/ranges.json` quantises with these ranges, as often as you
    like and with any --method, without running the data again. They are valid for the graph that they were collected
    on: a table of another graph is refused. --method and --smooth-quant decide how outliers are moved into the weights
    first.
    """
    with progress(quiet=as_json) as report, redirect_stdout(sys.stderr), export_extra():
        from transom.calib.table import RANGES
        from transom.export.quantization.calibrate import calibrate_bundle
        from transom.export.quantization.options import QuantizeOptions
        from transom.runtime.bundle import Bundle
        from transom.runtime.progress import ProgressReporter

        steps = ProgressReporter(report, 0)
        options = QuantizeOptions(tuple(calibration_data or ()), method.value, smooth_quant)
        table = calibrate_bundle(Bundle(bundle), options, force=force, report=steps.more)
    path = bundle / RANGES
    if as_json:
        print_json(
            {
                "bundle": bundle,
                "ranges": path,
                "data": table.data,
                "graphs": {
                    name: {"sha256": graph.sha256, "tensors": len(graph.tensors), "smoothed": len(graph.smoothing)}
                    for name, graph in table.graphs.items()
                },
            }
        )
        return
    rows = [[name, str(len(graph.tensors)), str(len(graph.smoothing))] for name, graph in table.graphs.items()]
    print_table(("graph", "tensors", "smoothed"), rows, right=("tensors", "smoothed"))
    print(printable(f"{path}: from {table.data['samples']} samples of {table.data['name']}"))
    source = str(Bundle(bundle).manifest.source.get("checkpoint"))
    words = ["transom", "export", source, "--precision", "int8", "--ranges", str(path)]
    words += [word for data in calibration_data or () for word in ("--calibration-data", data)]  # the gate's share
    print(printable(f"try: {shlex.join([*words, '--out', f'{bundle}-int8'])}"))
