"""Time and memory of loading a bundle, beside ONNX Runtime's session on the same files and one SHA-256 pass over them.

    python benchmarks/load.py BUNDLE... [--rounds 7] [--threads 2] [--earlier PYTHON]

Every measurement is a process of its own, in turn: ``load``; ``session``, onnxruntime.InferenceSession on the paths of
the files that ``load`` opens; ``hash``, hashlib.file_digest of every file, one after the other. Each imports its
libraries first, ``load`` the module of the native kernels where the bundle has lists of operators. CPU seconds are
those of all threads. Peak is the largest resident memory (VmHWM) above that of the imported process, "after" what is
left of it when the bundle is loaded, "closed" when it is closed. ``--earlier`` is the Python of another installation,
measured in turn as well. Files are in the system's cache. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

MIB = 1 << 20
FATAL, SKIPPED = 4, "SkipLayerNormFusion"  # of our sessions: log level, and the fusion that is left out


def status_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def measure(what: str, bundle: Path, threads: int) -> dict[str, float]:
    """Do it once in this process; return seconds and MiB."""
    import hashlib

    import onnxruntime as library

    from transom.runtime import load

    words = json.loads((bundle / "bundle.json").read_bytes())
    if any("native" in graph["files"] for graph in words["graphs"]):
        with suppress(ImportError):  # of an earlier installation
            importlib.import_module("transom.runtime.native.backend")
    before, begun, spent = status_mib("VmRSS"), time.perf_counter(), time.process_time()
    held: Any = None
    if what == "hash":
        for name in ("bundle.json", *words["files"]):
            with (bundle / name).open("rb") as file:
                hashlib.file_digest(file, "sha256").hexdigest()
    elif what == "session":
        held = []
        for graph in words["graphs"]:
            options = library.SessionOptions()
            options.log_severity_level, options.inter_op_num_threads = FATAL, 1
            options.intra_op_num_threads = threads
            path = str(bundle / (graph["files"].get("cpu") or graph["files"]["default"]))
            providers = ["CPUExecutionProvider"]
            held.append(library.InferenceSession(path, options, providers=providers, disabled_optimizers=[SKIPPED]))
    else:
        held = load(bundle, threads=threads)
    seconds = time.perf_counter() - begun
    spent = time.process_time() - spent
    peak, after = (status_mib(name) - before for name in ("VmHWM", "VmRSS"))
    found = {"seconds": seconds, "cpu": spent, "peak": peak, "after": after}
    if what == "load":
        held.close()
    del held
    gc.collect()
    return {**found, "closed": status_mib("VmRSS") - before}


def measured(python: str, what: str, bundle: Path, threads: int) -> dict[str, float]:
    command = [python, __file__, str(bundle), "--threads", str(threads), "--once", what]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--earlier", metavar="PYTHON")
    parser.add_argument("--once", choices=("load", "session", "hash"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        print(json.dumps(measure(options.once, options.bundles[0], options.threads)))
        return
    from transom.runtime.host import processor

    print(f"on {processor()}, {options.threads} threads, medians of {options.rounds}, minima in brackets\n")
    print("| bundle | files MiB | | seconds | CPU seconds | peak MiB | of the files | after | closed |")
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    sides = [("load", sys.executable), ("session", sys.executable), ("hash", sys.executable)]
    sides += [("load", options.earlier)] if options.earlier else []
    for bundle in options.bundles:
        graphs = json.loads((bundle / "bundle.json").read_bytes())["graphs"]
        names = {graph["files"].get("cpu") or graph["files"]["default"] for graph in graphs}
        names |= {graph["weights"] for graph in graphs if "weights" in graph}
        size = sum((bundle / name).stat().st_size for name in names) / MIB
        rows: list[list[dict[str, float]]] = [[] for _ in sides]
        for _ in range(options.rounds):
            for (what, python), found in zip(sides, rows, strict=True):
                found.append(measured(python, what, bundle, options.threads))
        for index, ((what, _), found) in enumerate(zip(sides, rows, strict=True)):
            seconds = [each["seconds"] for each in found]
            spent, peak, after, closed = (
                statistics.median(each[key] for each in found) for key in ("cpu", "peak", "after", "closed")
            )
            name = "earlier load" if index == 3 else what
            print(
                f"| {bundle.name} | {size:.0f} | {name} | {statistics.median(seconds):.2f} ({min(seconds):.2f}) | "
                f"{spent:.2f} | {peak:.0f} | {peak / size:.2f} | {after:.0f} | {closed:.0f} |"
            )
        ours, session, digest = (statistics.median(each["seconds"] for each in found) for found in rows[:3])
        least = [min(each["seconds"] for each in found) for found in rows[:3]]
        print(
            f"\nload / (session + hash) {ours / (session + digest):.2f}, of the minima "
            f"{least[0] / (least[1] + least[2]):.2f}\n",
            flush=True,
        )


if __name__ == "__main__":
    main()
