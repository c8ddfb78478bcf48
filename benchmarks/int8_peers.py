"""Measure INT8 by other tools beside FP32: onnxruntime.quantization and nvidia-modelopt's ONNX path, on FP32 graphs.

    python benchmarks/int8_peers.py --work DIR [--modelopt-python PYTHON] [--outliers] [--json FILE] [NAME...]

Each tool gets the bundle's canonical graph and real calibration samples, as the runtime feeds them, and is run with its
defaults; what it makes takes the graph's place inside the bundle, so that tokenising, batching and scoring are the
same. A tool that crashes, or makes a graph that does not load, has that as its row. Beside the defaults stand ways
round what they run into, so that there is something to compare with: ``one shape`` pads texts to the longest, because
percentile and entropy crash on samples of several shapes; ``MatMul alone`` keeps quantize_dynamic away from Attention;
``tuned`` is quantize_static as its documentation advises for this processor, on MatMul and Gemm alone: U8 activations,
S8 weights per channel.

nvidia-modelopt pins an older onnxruntime, so it runs in an environment of its own (``pip install
'nvidia-modelopt[onnx]'``), whose Python --modelopt-python names. It takes samples of one shape only: texts are padded
to the longest, and of a decoder's runs those of the most frequent shape are kept. What it makes is meant for TensorRT,
FP16 outside the quantised operators by its default: its speed on a CPU says nothing about it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import logging
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from int8_cases import CASES, THREADS, Case, HeldOut, Side, bundle_of, calibration_feeds, in_place, open_side
from int8_measures import HEAD, Row, first_line, line, machine, measured

from transom.runtime.backends import ort_library
from transom.runtime.backends.base import Array
from transom.runtime.bundle import Bundle

SAMPLES = 128
MODELOPT_S = 1800  # seconds it may take for one graph

Feeds = list[dict[str, Array]]
Quantize = Callable[[Path, Feeds, Path], None]  # a graph's file, its calibration feeds, the file to write


class PeerError(Exception):
    """The error that another tool ended with."""


@dataclass(frozen=True)
class Peer:
    """Another quantiser; ``quantize`` may raise anything. ``one_shape``: its samples have one shape."""

    name: str
    quantize: Quantize
    one_shape: bool = False


def onnxruntime_static(graph: Path, feeds: Feeds, out: Path, *, method: str, **options: Any) -> None:
    """Call quantize_static with its defaults except the calibration method and ``options``."""
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(feeds)

        def get_next(self) -> dict[str, Array] | None:
            return next(self._left, None)

    quantize_static(graph, out, Reader(), calibrate_method=CalibrationMethod[method], **options)


def onnxruntime_tuned(graph: Path, feeds: Feeds, out: Path) -> None:
    """Call quantize_static as advised for x86 with VNNI, and only for layers that gain from 8 bits."""
    from onnxruntime.quantization import QuantType

    linears = ["MatMul", "Gemm"]
    onnxruntime_static(
        graph, feeds, out, method="MinMax", activation_type=QuantType.QUInt8, per_channel=True,
        op_types_to_quantize=linears,
    )  # fmt: skip


def onnxruntime_dynamic(graph: Path, feeds: Feeds, out: Path, **options: Any) -> None:
    """Call quantize_dynamic with its defaults except ``options``; it needs no data."""
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(graph, out, **options)


def modelopt(graph: Path, feeds: Feeds, out: Path, *, python: Path, options: Sequence[str] = ()) -> None:
    """Run ``python -m modelopt.onnx.quantization`` on a CPU. Raises PeerError with the last line of its traceback."""
    same = uniform(feeds)
    data = graph.with_suffix(".npz")
    arrays: dict[str, Any] = {name: np.concatenate([feed[name] for feed in same]) for name in same[0]}
    np.savez(data, **arrays)
    shapes = ",".join(f"{name}:{'x'.join(map(str, array.shape))}" for name, array in same[0].items())
    command = [python, "-m", "modelopt.onnx.quantization", "--onnx_path", graph, "--quantize_mode", "int8"]
    command += ["--calibration_data_path", data, "--calibration_shapes", shapes, "--calibration_eps", "cpu"]
    command += ["--output_path", out, *options]
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=MODELOPT_S, check=False
    )
    if done.returncode or not out.is_file():
        lines = [text.strip() for text in (done.stdout + done.stderr).splitlines() if text.strip()]
        errors = [text for text in lines if "Error" in text.partition(":")[0] or "Exception" in text.partition(":")[0]]
        raise PeerError((errors or lines or [f"status {done.returncode}"])[-1])


def uniform(feeds: Feeds) -> Feeds:
    """Return feeds of one shape: an encoder's texts padded to the longest, or those of the most frequent shape."""
    if "attention_mask" in feeds[0] and all(array.ndim == 2 for array in feeds[0].values()):
        longest = max(array.shape[1] for feed in feeds for array in feed.values())
        return [
            {name: np.pad(array, ((0, 0), (0, longest - array.shape[1]))) for name, array in feed.items()}
            for feed in feeds
        ]
    shapes = [tuple(array.shape for array in feed.values()) for feed in feeds]
    most = Counter(shapes).most_common(1)[0][0]
    return [feed for feed, shape in zip(feeds, shapes, strict=True) if shape == most]


def shapes_of(feeds: Feeds) -> set[tuple[tuple[int, ...], ...]]:
    """Return the different shapes of a graph's feeds."""
    return {tuple(array.shape for array in feed.values()) for feed in feeds}


def peers(modelopt_python: Path | None) -> list[Peer]:
    """Return the quantisers that are compared with FP32."""
    found = [
        Peer("onnxruntime static, min-max", partial(onnxruntime_static, method="MinMax")),
        *(
            Peer(f"onnxruntime static, {method.lower()}{shown}", partial(onnxruntime_static, method=method), one_shape)
            for method in ("Percentile", "Entropy")
            for shown, one_shape in (("", False), (", one shape", True))
        ),
        Peer("onnxruntime static, tuned", onnxruntime_tuned),
        Peer("onnxruntime dynamic", onnxruntime_dynamic),
        Peer("onnxruntime dynamic, MatMul alone", partial(onnxruntime_dynamic, op_types_to_quantize=["MatMul"])),
    ]
    if modelopt_python is not None:
        run = partial(modelopt, python=modelopt_python)
        found += [
            Peer("modelopt, entropy (default)", run),
            Peer("modelopt, max", partial(run, options=("--calibration_method", "max"))),
            Peer("modelopt, entropy, FP32 elsewhere", partial(run, options=("--high_precision_dtype", "fp32"))),
        ]
    return found


def canonical_graphs(bundle: Path, folder: Path) -> dict[str, Path]:
    """Write the bundle's FP32 graphs as plain ONNX files with their weights inside."""
    opened, found = Bundle(bundle), {}
    for file in opened.manifest.graphs:
        found[str(file.graph.name)] = path = folder / f"{file.graph.name}.onnx"
        onnx.save(onnx.load(bundle / file.files["default"]), path)
    return found


def row_of(peer: Peer, case: Case, fp32: Side, held_out: HeldOut, bundle: Path, feeds: Mapping[str, Feeds]) -> Row:
    """Quantise every graph by ``peer`` and measure; a failure is a row too."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            files = {}
            for name, graph in canonical_graphs(bundle, Path(folder)).items():
                files[name] = graph.with_suffix(".int8.onnx")
                try:
                    with contextlib.redirect_stdout(io.StringIO()):  # the calibrators print
                        given = uniform(feeds[name]) if peer.one_shape else feeds[name]
                        peer.quantize(graph, given, files[name])
                except Exception as error:
                    raise PeerError(f"quantising {name}: {said(error)}") from error
            note = f"{time.monotonic() - began:.0f} s; " + "; ".join(
                f"{name}: {counts(path)}" for name, path in files.items()
            )
            size = sum(path.stat().st_size for path in files.values())
            with open_side(case, bundle, in_place(files), size=size) as side:
                return measured(peer.name, side, fp32, held_out, note=note)
        except Exception as error:
            return Row(case.name, peer.name, failure=said(error), note=f"{time.monotonic() - began:.0f} s")


def said(error: BaseException) -> str:
    """Return the first line of an error, without our own wrapper's name."""
    return first_line(error).removeprefix("PeerError: ")


def counts(path: Path) -> str:
    """Return the operators of a quantised graph that show how it was quantised."""
    found = Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)
    shown = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "MatMul", "Gemm")
    return ", ".join(f"{found[kind]} {kind}" for kind in shown if found[kind])


def modelopt_versions(python: Path) -> dict[str, str]:
    """Return the versions installed in the other environment."""
    names = ["nvidia-modelopt", "onnx", "onnxruntime-gpu", "onnxruntime"]
    script = (
        "import sys, json, importlib.metadata as m\n"
        "have = {d.metadata['Name']: d.version for d in m.distributions()}\n"
        "print(json.dumps({n: have[n] for n in sys.argv[1:] if n in have}))"
    )
    done = subprocess.run([str(python), "-c", script, *names], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(CASES), metavar="NAME", help=f"of {', '.join(CASES)}")
    parser.add_argument("--work", type=Path, required=True, help="where FP32 bundles are, or go")
    parser.add_argument("--modelopt-python", type=Path, help="of an environment with nvidia-modelopt[onnx]")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of the calibration data")
    parser.add_argument("--outliers", action="store_true", help="with injected outlier channels (outliers.py)")
    parser.add_argument("--only", default="", help="peers whose name has this")
    parser.add_argument("--json", type=Path, help="the figures as JSON as well")
    options = parser.parse_args()
    ort_library.onnxruntime().set_default_logger_severity(
        ort_library.FATAL
    )  # a calibrating session warns of every cache it copies
    logging.getLogger().setLevel(logging.ERROR)  # onnxruntime.quantization advises about pre-processing in every call
    chosen = [peer for peer in peers(options.modelopt_python) if options.only in peer.name]
    versions = {name: version(name) for name in ("onnxruntime", "onnx", "numpy")}
    about: dict[str, Any] = {**machine(), "threads": THREADS, "samples": options.samples, "versions": versions}
    if options.modelopt_python is not None:
        about["modelopt"] = modelopt_versions(options.modelopt_python)
    print(json.dumps(about), f"\n\n{HEAD}\n{'|---' * (HEAD.count('|') - 1)}|", sep="")
    rows: list[Row] = []
    for case in (CASES[name] for name in options.names):
        bundle = bundle_of(case, options.work, outliers=options.outliers)
        feeds = calibration_feeds(case, bundle, options.samples)
        with open_side(case, bundle) as fp32:
            held_out = HeldOut(fp32)
            rows.append(measured("FP32", fp32, fp32, held_out))
            print(line(rows[-1]), flush=True)
            for peer in chosen:
                if peer.one_shape and all(len(shapes_of(fed)) == 1 for fed in feeds.values()):
                    continue  # as without
                rows.append(row_of(peer, case, fp32, held_out, bundle, feeds))
                print(line(rows[-1]), flush=True)
                gc.collect()
                if options.json is not None:
                    options.json.write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1))


if __name__ == "__main__":
    main()
