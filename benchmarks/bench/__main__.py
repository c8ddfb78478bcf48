"""Prepare and run the comparison with other tools.

    make bench-env                                   environments, exports and quantised models; kept in build/bench
    make bench                                       core workloads; docs/results/bench-PROCESSOR.{md,json,svg}
    make bench BENCH_ARGS="--all"                    the other lengths too
    make bench BENCH_ARGS="--only bert --json FILE"  a part, into FILE alone
    make bench BENCH_ARGS="--earlier OLD/.venv/bin/python"      an earlier installation as one more peer

One variant computes at a time, on two threads; the others are stopped. Ctrl-C keeps what was measured: the same command
goes on from there.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from bench.measure import BLOCK_S, ROUNDS
from bench.paths import REPO, Paths
from bench.prepare import chosen_workloads, prepare
from bench.publish import publish
from bench.registry import BY_NAME, PEERS, PRECISIONS, Peer
from bench.run import run, save
from bench.table import table

INTERRUPTED = 130


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("do", choices=("prepare", "run", "publish"))
    parser.add_argument("--dir", type=Path, default=REPO / "build" / "bench", help="of everything that is prepared")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="workloads whose name has this")
    parser.add_argument("--all", action="store_true", help="all workloads, not the core ones alone")
    parser.add_argument("--peers", nargs="+", choices=sorted(BY_NAME), help="these alone")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=[], help="these alone")
    parser.add_argument("--earlier", type=Path, metavar="PYTHON", help="of an environment with an earlier version")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--block", type=float, default=BLOCK_S, help="seconds of one variant at a time")
    parser.add_argument("--again", action="store_true", help="forget what an interrupted run measured")
    parser.add_argument("--json", type=Path, help="the results into this file, and docs/ stays as it is")
    parser.add_argument("--pip-args", default="", help="for pip install in the peers' environments")
    return parser.parse_args()


def chosen_peers(options: argparse.Namespace) -> list[Peer]:
    """Return the peers; the earlier installation only where --earlier names one."""
    names = options.peers or [peer.name for peer in PEERS]
    found = [peer for peer in PEERS if peer.name in names and peer.name != "earlier"]
    if options.earlier is not None:
        found.insert(1, BY_NAME["earlier"])
    return found


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def machine() -> tuple[dict[str, Any], frozenset[str], bool]:
    """Return what names this machine, its flags, and whether U8 x S8 saturates here."""
    from transom.runtime.backends.integer_sums import integer_sums
    from transom.runtime.host import cpu_flags, cpu_name, instruction_set, usable_cores

    sums = integer_sums()
    about = {"cpu": cpu_name(), "instruction_set": instruction_set(), "cores": usable_cores(), "sums": sums.means}
    return about, cpu_flags(), sums.saturates_alone


def main() -> None:
    options = arguments()
    paths = Paths(options.dir.resolve())
    if options.do == "publish":
        publish(REPO, paths)
        return
    workloads = chosen_workloads(options.only, everything=options.all)
    if not workloads:
        sys.exit(f"no workload's name has {' or '.join(options.only)}")
    if options.earlier is not None and not options.earlier.exists():
        sys.exit(f"--earlier {options.earlier} does not exist; it names the Python of an environment with transom")
    about, flags, saturates = machine()
    peers = chosen_peers(options)
    if options.do == "prepare":
        prepare(
            peers, workloads, paths, say, saturates=saturates, earlier=options.earlier, precisions=options.precisions,
            pip_arguments=options.pip_args.split(),
        )  # fmt: skip
        return
    if options.again:
        paths.partial().unlink(missing_ok=True)
    results = run(
        peers, workloads, paths, about, flags, say, rounds=options.rounds, block=options.block, saturates=saturates,
        earlier=options.earlier, precisions=options.precisions,
    )  # fmt: skip
    print(f"\n{table(results)}\n")
    if options.json is not None:
        save(options.json, results)
    elif not (options.only or options.peers or options.precisions):
        for file in publish(REPO, paths, results):
            say(f"wrote {file.relative_to(REPO)}")
    paths.partial().unlink(missing_ok=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on after the workloads that are done", file=sys.stderr)
        sys.exit(INTERRUPTED)
