"""Time and memory of loading a bundle, beside ONNX Runtime's session on the same files and one SHA-256 pass over them.

    python benchmarks/load.py BUNDLE... [--rounds 7] [--threads 2] [--earlier PYTHON]

Every measurement is a process of its own, in turn: ``load``; ``session``, onnxruntime.InferenceSession on the paths of
the files that ``load`` opens, with our options; ``hash``, hashlib.file_digest of every file, one after the other. Each
imports its libraries first. Peak is the largest resident memory (VmHWM) above that of the imported process, "after"
what is left of it when the bundle is loaded, "closed" when it is closed. ``--earlier`` is the Python of another
installation, measured in turn as well. Files are in the system's cache. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MIB = 1 << 20


def status_mib(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def measure(what: str, bundle: Path, threads: int) -> dict[str, float]:
    """Do it once in this process; return seconds and MiB."""
    import hashlib

    from transom.runtime import load
    from transom.runtime.backends.ort import PROVIDERS, SLOW_FUSIONS, session_entries
    from transom.runtime.backends.ort_library import FATAL, onnxruntime
    from transom.runtime.bundle import Bundle
    from transom.runtime.manifest import manifest_from_json

    library = onnxruntime()
    words = json.loads((bundle / "bundle.json").read_bytes())
    manifest = manifest_from_json(words)
    if what == "load":
        import transom.runtime.tasks  # noqa: F401 - and with it what the families share
    assert Bundle
    before, begun = status_mib("VmRSS"), time.perf_counter()
    held: Any = None
    if what == "hash":
        for name in ("bundle.json", *manifest.files):
            with (bundle / name).open("rb") as file:
                hashlib.file_digest(file, "sha256").hexdigest()
    elif what == "session":
        held = []
        for graph in manifest.graphs:
            options = library.SessionOptions()
            options.log_severity_level, options.inter_op_num_threads = FATAL, 1
            options.intra_op_num_threads = threads
            for key, value in session_entries(graph, "cpu").items():
                options.add_session_config_entry(key, value)
            path = str(bundle / graph.file_for("cpu"))
            held.append(
                library.InferenceSession(
                    path, options, providers=[PROVIDERS["cpu"]], disabled_optimizers=SLOW_FUSIONS["cpu"]
                )
            )
    else:
        held = load(bundle, threads=threads)
    seconds = time.perf_counter() - begun
    found = {"seconds": seconds, "peak": status_mib("VmHWM") - before, "after": status_mib("VmRSS") - before}
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
    print("| bundle | files MiB | | seconds | peak MiB | of the files | after | closed |")
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    sides = [("load", sys.executable), ("session", sys.executable), ("hash", sys.executable)]
    sides += [("load", options.earlier)] if options.earlier else []
    for bundle in options.bundles:
        names = {each for graph in read(bundle) for each in (graph.file_for("cpu"), graph.weights) if each}
        size = sum((bundle / name).stat().st_size for name in names) / MIB
        rows: list[list[dict[str, float]]] = [[] for _ in sides]
        for _ in range(options.rounds):
            for (what, python), found in zip(sides, rows, strict=True):
                found.append(measured(python, what, bundle, options.threads))
        for index, ((what, _), found) in enumerate(zip(sides, rows, strict=True)):
            seconds = [each["seconds"] for each in found]
            peak, after, closed = (
                statistics.median(each[key] for each in found) for key in ("peak", "after", "closed")
            )
            name = "earlier load" if index == 3 else what
            print(
                f"| {bundle.name} | {size:.0f} | {name} | {statistics.median(seconds):.2f} ({min(seconds):.2f}) | "
                f"{peak:.0f} | {peak / size:.2f} | {after:.0f} | {closed:.0f} |"
            )
        ours, session, digest = (statistics.median(each["seconds"] for each in found) for found in rows[:3])
        least = [min(each["seconds"] for each in found) for found in rows[:3]]
        print(
            f"\nload / (session + hash) {ours / (session + digest):.2f}, of the minima "
            f"{least[0] / (least[1] + least[2]):.2f}\n",
            flush=True,
        )


def read(bundle: Path) -> Any:
    """Return a bundle's graphs and their files."""
    from transom.runtime.manifest import manifest_from_json

    return manifest_from_json(json.loads((bundle / "bundle.json").read_bytes())).graphs


if __name__ == "__main__":
    main()
