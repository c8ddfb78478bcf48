"""Measure the accuracy cost of INT8 and INT4: the reference models by every quantization config of Transom.

    python benchmarks/int8_accuracy.py --work DIR [--json FILE] [NAME...]
    python benchmarks/int8_accuracy.py --work DIR --outliers            with injected outlier channels (outliers.py)
    python benchmarks/int8_accuracy.py --work DIR --peers FILE          beside what int8_peers.py wrote with --json

Every way is made as an export makes it but without its gate, so that the table shows what it costs: the graphs for the
CPU take the place of FP32's in one and the same bundle. ``default, gated`` is a whole export as a user gets it.
Figures are taken as int8_measures.py says. ``SmoothQuant + best`` has the method with the least relative error of the
four: chosen on the inputs it is then measured on, so a little flattered.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from earlier_figures import figures_with
from int8_cases import CASES, THREADS, Case, HeldOut, bundle_of, in_place, open_side, source_of
from int8_measures import HEAD, Row, first_line, line, machine, measured

from transom.calib.data import open_calibration_data
from transom.calib.table import RangeTable
from transom.export.quantization.calibrate import calibrate, smoothed
from transom.export.quantization.options import QuantizeOptions
from transom.export.quantization.quantizer import Quantizer
from transom.runtime.bundle import Bundle

METHODS = {"minmax": "min-max", "percentile": "percentile", "entropy": "entropy", "mse": "MSE"}
STATIC = {f"static, {shown}": QuantizeOptions(method=method, activations="static") for method, shown in METHODS.items()}
OTHERS = {
    "dynamic": ("int8", QuantizeOptions(activations="dynamic")),
    "weight-only INT8": ("int8", QuantizeOptions(activations="none")),
    "weight-only INT4": ("int4", QuantizeOptions()),
}
DEFAULT = "default, gated"
SAME_KIND = {  # of a peer's name -> ours to hold beside it; the first that fits
    "tuned": "static, min-max",
    "min-max": "static, min-max",
    "max": "static, min-max",
    "percentile": "static, percentile",
    "entropy": "static, entropy",
    "dynamic": "dynamic",
}


class Quantised:
    """A case's graphs, quantised by one config after another; calibrated once without smoothing and once with."""

    def __init__(self, case: Case, folder: Path) -> None:
        self._bundle = Bundle(folder)
        self._data = open_calibration_data([case.data])
        self._graphs = tuple(file.graph for file in self._bundle.manifest.graphs)
        self._canonical = {
            file.graph.name: ir.from_proto(onnx.load(folder / file.file_for("cpu")))
            for file in self._bundle.manifest.graphs
        }
        self._tables: dict[str, RangeTable] = {}

    def files(
        self, precision: str, options: QuantizeOptions, *, smooth: bool, folder: Path
    ) -> tuple[dict[str, Path], dict[str, str]]:
        """Return the CPU's graphs by name, written to ``folder``, and how a session treats their integers."""
        config = options.config(precision, self._graphs)
        table = self._table(options.method if smooth else "")
        models = smoothed(self._canonical, {name: table.graphs[name].smoothing for name in self._canonical})
        ranges = {
            name: {tensor: found.histogram for tensor, found in table.graphs[name].tensors.items()} for name in models
        }
        quantizer, found = Quantizer(models, self._graphs, config, ranges), {}
        for name, model in quantizer.cpu().items():
            found[name] = folder / f"{name}.onnx"
            found[name].write_bytes(ir.to_proto(model).SerializeToString())
        return found, quantizer.integers

    def _table(self, smoothing: str) -> RangeTable:
        """Return the ranges on all data; ``smoothing`` is the method that factors are searched for, or empty."""
        if smoothing not in self._tables:
            options = QuantizeOptions(method=smoothing or "minmax", activations="static")
            config = options.config("int8", self._graphs)
            self._tables[smoothing] = calibrate(
                self._bundle, self._canonical, config, self._data, smooth=bool(smoothing), report=lambda _: None
            )
        return self._tables[smoothing]


def exported(case: Case, work: Path, *, outliers: bool) -> Path:
    """Export the bundle as a user does, with the gate; an older one is replaced."""
    from transom.export.pipeline import export  # brings torch

    out = work / (f"{case.name}-outliers-int8" if outliers else f"{case.name}-int8")
    shutil.rmtree(out, ignore_errors=True)
    export(
        source_of(case, work, outliers=outliers),
        out,
        precision="int8",
        max_sizes=case.max_sizes,
        quantize=QuantizeOptions(calibration_data=(case.data,)),
    )
    return out


def excluded_layers(folder: Path) -> str:
    """Describe the gate's result."""
    quantization = json.loads((folder / "bundle.json").read_text())["quantization"]
    kept = [f"{layer['graph']}/{layer['name']}" for layer in quantization["layers"] if layer["kept"]]
    return f"{len(kept)} of {len(quantization['layers'])} layers kept{': ' if kept else ''}{', '.join(kept)}"


def rows_of(case: Case, work: Path, *, outliers: bool, gated: bool) -> list[Row]:
    """Return FP32 and every config of one model, printed as they finish."""
    bundle = bundle_of(case, work, outliers=outliers)
    with open_side(case, bundle) as fp32:
        held_out = HeldOut(fp32)
        rows: list[Row] = []
        add(rows, case, "FP32", lambda: measured("FP32", fp32, fp32, held_out))
        ours = Quantised(case, bundle)

        def way(who: str, precision: str, options: QuantizeOptions, *, smooth: bool) -> None:
            def measure() -> Row:
                with tempfile.TemporaryDirectory() as folder:
                    files, integers = ours.files(precision, options, smooth=smooth, folder=Path(folder))
                    size = sum(path.stat().st_size for path in files.values())
                    with open_side(case, bundle, in_place(files, integers), size=size) as side:
                        return measured(who, side, fp32, held_out)

            add(rows, case, who, measure)

        def default() -> Row:
            out = exported(case, work, outliers=outliers)
            with open_side(case, out) as side:
                return measured(DEFAULT, side, fp32, held_out, note=excluded_layers(out))

        for who, options in STATIC.items():
            way(who, "int8", options, smooth=False)
        best = min(STATIC, key=lambda who: next(error_of(row) for row in rows if row.who == who))
        way(f"SmoothQuant + {best.removeprefix('static, ')}", "int8", STATIC[best], smooth=True)
        for who, (precision, options) in OTHERS.items():
            way(who, precision, options, smooth=False)
        if gated:
            add(rows, case, DEFAULT, default)
    return rows


def add(rows: list[Row], case: Case, who: str, measure: Callable[[], Row]) -> None:
    """Append and print the result of ``measure``; a failure is a row too."""
    try:
        row = measure()
    except Exception as error:
        row = Row(case.name, who, failure=first_line(error))
    rows.append(row)
    print(line(row), flush=True)


def error_of(row: Row) -> float:
    """Return the relative error; infinite for a failure."""
    return float("inf") if row.relative_error is None else row.relative_error


def beside_peers(ours: list[Row], theirs: list[dict[str, Any]]) -> list[str]:
    """Print a table: each peer, Transom's config of the same kind and its default, marked where those are worse."""
    found = {(row.model, row.who): row for row in ours}
    lines = [
        "| model | peer | its error | ours of that kind | our default | its score | ours | default |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for peer in theirs:
        if peer["who"] == "FP32" or (peer["model"], DEFAULT) not in found:
            continue
        same = next((name for word, name in SAME_KIND.items() if word in peer["who"]), DEFAULT)
        rows = [found[peer["model"], name] for name in (same, DEFAULT)]
        errors = [shown(row.relative_error, peer["relative_error"], lower_is_better=True) for row in rows]
        scores = [shown(row.score, peer["score"], lower_is_better=row.lower_is_better) for row in rows]
        its = ["failed", "failed"] if peer["failure"] else [f"{peer[key]:.4f}" for key in ("relative_error", "score")]
        cells = [peer["model"], peer["who"], its[0], *errors, its[1], *scores]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def shown(ours: float | None, theirs: float | None, *, lower_is_better: bool) -> str:
    """Return a figure of Transom's for a cell, marked where the peer's is better."""
    if ours is None:
        return "failed"
    worse = theirs is not None and (ours > theirs if lower_is_better else ours < theirs)
    return f"{ours:.4f}{' (worse)' if worse else ''}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(CASES), metavar="NAME", help=f"of {', '.join(CASES)}")
    parser.add_argument("--work", type=Path, required=True, help="where bundles go")
    parser.add_argument("--outliers", action="store_true", help="with injected outlier channels")
    parser.add_argument("--ungated", action="store_true", help="leave the whole exports out, which take minutes each")
    parser.add_argument("--peers", type=figures_with("rows"), help="what int8_peers.py wrote with --json")
    parser.add_argument("--json", type=Path, help="the figures as JSON as well")
    options = parser.parse_args()
    about = {**machine(), "threads": THREADS, "onnxruntime": version("onnxruntime"), "outliers": options.outliers}
    print(json.dumps(about), f"\n\n{HEAD}\n{'|---' * (HEAD.count('|') - 1)}|", sep="")
    rows: list[Row] = []
    for name in options.names:
        rows += rows_of(CASES[name], options.work, outliers=options.outliers, gated=not options.ungated)
        if options.json is not None:
            options.json.write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1))
    if options.peers is not None:
        print("", *beside_peers(rows, options.peers["rows"]), sep="\n")


if __name__ == "__main__":
    main()
