"""Measure lists of texts of mixed lengths, of one installation of Transom or several beside each other.

    python benchmarks/packing.py minilm minilm-int8
    python benchmarks/packing.py minilm minilm-int8 --side today=OLD/.venv/bin/python=OLD/bundles --side ours=PYTHON

Two sorts of lists between 4 and 256 tokens, seed 0: geometric, with a mean of 32 tokens, so that few are long; and
log-uniform, where the long ones have most of the tokens. Sides, each an installation's interpreter and, after another
=, the folder of bundles of the same names that it exported, alternate in processes of their own. Figures are medians
of the elapsed time of `embed` of a whole list; with `--cpu`, of CPU time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SHORTEST, LONGEST, MEAN = 4, 256, 32  # tokens
WORD = "people"  # a token of MiniLM's vocabulary
LISTS = {"geometric": (256, 1000), "log-uniform": (256, 1000)}


def lengths_of(kind: str, count: int) -> NDArray[np.int64]:
    rng = np.random.default_rng(0)
    if kind == "geometric":
        return np.clip(SHORTEST - 1 + rng.geometric(1 / (MEAN - SHORTEST + 1), count), SHORTEST, LONGEST)
    return np.exp(rng.uniform(np.log(SHORTEST), np.log(LONGEST), count)).astype(np.int64)


def measure(folder: str, threads: int, kind: str, count: int, cpu: bool) -> dict[str, Any]:
    """Return the seconds of one list, its batches, and its padding as a share of its tokens."""
    from transom.runtime import load

    clock = time.process_time if cpu else time.perf_counter
    with load(folder, threads=threads) as bundle:
        texts = [" ".join([WORD] * (length - 2)) for length in lengths_of(kind, count).tolist()]
        bundle.embed(texts[:16])
        backend = bundle._backends[0]
        inner, tokens = backend.run, []
        backend.run = lambda feeds, shapes: (tokens.append(feeds["input_ids"].size), inner(feeds, shapes))[1]
        started = clock()
        bundle.embed(texts)
        seconds = clock() - started
    return {"seconds": seconds, "batches": len(tokens), "padding": sum(tokens) / lengths_of(kind, count).sum() - 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", metavar="BUNDLE", help="of MiniLM")
    parser.add_argument("--side", action="append", default=[], metavar="NAME=PYTHON[=FOLDER]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="CPU time instead of elapsed time")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # KIND:COUNT, one side's process
    options = parser.parse_args()
    if options.measure:
        kind, count = options.measure.split(":")
        print(json.dumps(measure(options.bundles[0], options.threads, kind, int(count), options.cpu)))
        return
    sides = dict(side.split("=", 1) for side in options.side) or {"ours": sys.executable}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # a side is as installed
    first, *others = sides
    print(f"{processor()}, {options.threads} threads\n")
    print(f"| bundle | list | {' | '.join(f'{name}, batches, padding' for name in sides)} | {first} / others |")
    print(f"|---|---|{'---|' * len(sides)}---|")
    for bundle in options.bundles:
        for kind, counts in LISTS.items():
            for count in counts:
                found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
                settings = ["--measure", f"{kind}:{count}", "--threads", str(options.threads)]
                settings += ["--cpu"] if options.cpu else []
                for _ in range(options.rounds):
                    for name, side in sides.items():
                        python, _, folder = side.partition("=")
                        path = str(Path(folder) / Path(bundle).name) if folder else bundle
                        command = [python, str(Path(__file__)), path, *settings]
                        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
                        found[name].append(json.loads(done.stdout))
                seconds = {name: statistics.median(each["seconds"] for each in runs) for name, runs in found.items()}
                cells = [
                    f"{seconds[name]:.2f} s, {runs[0]['batches']}, {100 * runs[0]['padding']:.0f} %"
                    for name, runs in found.items()
                ]
                ratios = ", ".join(f"{seconds[first] / seconds[other]:.2f}" for other in others)
                print(f"| {Path(bundle).name} | {kind}, {count} | {' | '.join(cells)} | {ratios} |", flush=True)


def processor() -> str:
    from transom.runtime.host import processor

    return str(processor())


if __name__ == "__main__":
    main()
