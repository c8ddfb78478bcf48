"""Measure memory and time of calibration: Transom's histograms beside onnxruntime.quantization's entropy method.

    python benchmarks/calibration_memory.py BUNDLE [--samples 10000] [--limit-gib 14] [--lengths 8 128] [--json]

BUNDLE is a BERT-like encoder in FP32; of BERT-base size, with random weights, for the figures in docs. Both sides
get the same samples, one row each: windows of 8 to 128 tokens of the shipped Austen passages, in the word pieces
of the reference BERT. (Theirs fails at the very end where lengths differ; with equal --lengths it does not.) Both
observe the inputs, and theirs also the results, of MatMul and Gemm: that is what op_types_to_calibrate does. Each
runs in a process of its own on --threads cores, and is stopped when it is larger than --limit-gib. The slope is a
least-squares line through the resident memory, file pages left out, after the first tenth.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from transom.calib.collector import CollectingBackend
from transom.calib.data import open_calibration_data
from transom.calib.graph_hash import graph_sha256
from transom.calib.table import GraphRanges, RangeTable
from transom.export.passes.linear_layers import find_linears
from transom.export.reference_models import reference_folder
from transom.runtime.backends.ort_library import onnxruntime
from transom.runtime.bundle import Bundle
from transom.runtime.host import processor
from transom.runtime.loading import load_with_backends

SIDES = {"ours": "Transom, 4096 bins", "theirs": "onnxruntime.quantization, Entropy"}
LENGTHS = (8, 128)
Feeds = dict[str, NDArray[np.int64]]


def samples(bundle: Bundle, count: int, lengths: tuple[int, int]) -> Iterator[Feeds]:
    """Return random windows of the passages, the same for both sides."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    vocabulary = str(reference_folder("bert") / "vocab.txt")
    tokenizer = Tokenizer(models.WordPiece.from_file(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    texts = [sample.text for sample in open_calibration_data(["austen"]).samples]
    ids = np.array([token for text in texts if text for token in tokenizer.encode(text).ids], np.int64)
    names = {tensor.name for tensor in bundle.manifest.graphs[0].graph.inputs}
    chance = np.random.default_rng(0)
    for _ in range(count):
        length = int(chance.integers(lengths[0], lengths[1] + 1))
        start = int(chance.integers(0, len(ids) - length))
        row = ids[None, start : start + length]
        feeds = {"input_ids": row, "attention_mask": np.ones_like(row), "token_type_ids": np.zeros_like(row)}
        yield {name: value for name, value in feeds.items() if name in names}


def resident_mib() -> float:
    """Return this process's resident bytes, without the pages of mapped files."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("RssAnon:"))


class Watch:
    """Memory after every sample; ends the process with its figures above a limit."""

    def __init__(self, limit_gib: float) -> None:
        self._limit_mib = limit_gib * 1024
        self._started = time.perf_counter()
        self._mib: list[float] = []

    def note(self) -> None:
        self._mib.append(resident_mib())
        if len(self._mib) % 100 == 0:
            print(f"{len(self._mib)} samples, {self._mib[-1]:.0f} MiB, {self._seconds():.0f} s", file=sys.stderr)
        if self._mib[-1] > self._limit_mib:
            self.end(f"stopped at {self._limit_mib / 1024:g} GiB")

    def end(self, how: str, **more: Any) -> NoReturn:
        """Print the figures and exit at once, without freeing the memory piece by piece."""
        done = len(self._mib)
        settled = np.arange(done // 10, done)
        slope = np.polyfit(settled, np.array(self._mib)[settled], 1)[0] if done > 20 else float("nan")
        figures = {
            "samples": done,
            "seconds": round(self._seconds(), 1),
            "cpu_seconds": round(time.process_time(), 1),
            "first_mib": round(self._mib[0]),
            "last_mib": round(self._mib[-1]),
            "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            "slope_mib_per_sample": round(float(slope), 4),
            "ended": how,
            **more,
        }
        print(json.dumps(figures), flush=True)
        os._exit(0)

    def _seconds(self) -> float:
        return time.perf_counter() - self._started


def ours(options: argparse.Namespace) -> NoReturn:
    folder, count = options.bundle, options.samples
    bundle = Bundle(folder)
    file = bundle.manifest.graphs[0]
    model = ir.load(folder / file.file_for("default"))
    inputs = [str(linear.activation.name) for linear in find_linears(model)]
    backend = CollectingBackend(model, file.graph, inputs, threads=options.threads)
    watch = Watch(options.limit_gib)
    with load_with_backends(bundle, {file.graph.name: backend}) as loaded:
        for number, feeds in enumerate(samples(bundle, count, options.lengths)):
            backend.sample = f"window {number}"
            loaded.run(feeds, [file.graph.outputs[0].name])
            watch.note()
    graphs = {file.graph.name: GraphRanges(graph_sha256(model), backend.ranges)}
    table = RangeTable(graphs, {"name": "austen", "samples": count, "sha256": "0" * 64})
    watch.end("finished", tensors=len(backend.ranges), table_bytes=len(table.to_bytes()))


def theirs(options: argparse.Namespace) -> NoReturn:
    onnxruntime()  # with its telemetry off
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, create_calibrator

    bundle = Bundle(options.bundle)
    watch = Watch(options.limit_gib)

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = samples(bundle, options.samples, options.lengths)
            self._given = 0

        def get_next(self) -> Feeds | None:
            if self._given:
                watch.note()
            self._given += 1
            return next(self._left, None)

    try:
        calibrator = create_calibrator(
            options.bundle / bundle.manifest.graphs[0].file_for("default"),
            ["MatMul", "Gemm"],
            augmented_model_path="augmented.onnx",  # in the folder that ``measured`` made
            calibrate_method=CalibrationMethod.Entropy,
            use_external_data_format=True,
        )
        calibrator.collect_data(Reader())
        ranges = calibrator.compute_data()
    except Exception as error:  # theirs: any kind
        watch.end(f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    watch.end("finished", tensors=len(ranges.keys()))


def measured(side: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one side, from a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), str(options.bundle.resolve()), "--side", side]
    command += ["--samples", str(options.samples), "--limit-gib", str(options.limit_gib)]
    command += ["--threads", str(options.threads), "--lengths", *map(str, options.lengths)]
    cores = sorted(os.sched_getaffinity(0))[-options.threads :]
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            text=True,
            cwd=scratch,
            preexec_fn=partial(confine, cores, options.limit_gib),
        )
    if done.returncode:
        return {"ended": f"exit status {done.returncode}"}
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])  # theirs prints what it is doing
    return figures


def confine(cores: list[int], limit_gib: float) -> None:
    """Limit the process to some cores, and to 1.5 times the memory limit, for peaks between two measurements."""
    os.sched_setaffinity(0, cores)
    most = int(1.5 * limit_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--limit-gib", type=float, default=14.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lengths", type=int, nargs=2, default=LENGTHS, help="tokens of the shortest and longest")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--only", choices=SIDES)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        (ours if options.side == "ours" else theirs)(options)
    found = {side: measured(side, options) for side in SIDES if options.only in (None, side)}
    if options.json:
        print(json.dumps(found, indent=1))
        return
    print(f"on {processor()}", flush=True)
    print("| calibration | samples | s | CPU s per 100 | peak MiB | MiB more per sample | ended |")
    print(f"|{'---|' * 7}")
    for side, figures in found.items():
        numbers = ["-"] * 5
        if "samples" in figures:
            done = figures["samples"]
            numbers = [f"{done:,}", f"{figures['seconds']:,.0f}", f"{100 * figures['cpu_seconds'] / done:.1f}"]
            numbers += [f"{figures['peak_mib']:,}", f"{figures['slope_mib_per_sample']:.4f}"]
        print(f"| {SIDES[side]} | {' | '.join(numbers)} | {figures['ended']} |")


if __name__ == "__main__":
    main()
