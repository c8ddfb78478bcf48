"""Embed generated lines with examples/ray_batch.py on two workers, and beside it by two processes without Ray.

    python benchmarks/ray_batch.py bundles/minilm                       100,000 lines
    python benchmarks/ray_batch.py bundles/minilm --rows 5000
    python benchmarks/ray_batch.py bundles/minilm --write               ... and renew docs/results/ray-batch.md

By hand means: each process loads the bundle, reads an equal share of the lines, embeds them as many at a time as the
example does, and saves the vectors. In one run: by hand, Ray, by hand, Ray, and Ray with a worker that is killed when
half of the shards are there. Times are those of the commands from start to end, so with the start of Ray and of each
process. Ends with status 1 unless the vectors are the same bit for bit each time, and every row is there once. Needs
`pip install 'transom[ray]'` and Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from processes import descendants
from transom.runtime import load
from transom.runtime.host import processor

REPO = Path(__file__).resolve().parents[1]
PAGE = REPO / "docs" / "results" / "ray-batch.md"
BATCH, BLOCK = 256, 1000  # rows a call, rows of a shard: the example's own
WHO = ("the old captain", "a young girl", "her brother", "my neighbour", "the teacher", "two sailors", "some people")
DOES = ("saw", "found", "carried", "painted", "sold", "remembered", "lost", "described", "wanted", "repaired", "hid")
WHAT = ("a red boat", "the letter", "an empty house", "seven horses", "the broken clock", "a map of the coast")
WHERE = ("near the river", "in the city", "before the long winter", "on the way home", "behind the church", "")


def sentences(count: int) -> list[str]:
    """Return sentences of three to twenty-odd words, always the same ones."""
    chosen = random.Random(2026)
    pick = chosen.choice
    clauses = [1, 1, 1, 2, 2, 3]
    return [
        " and ".join(f"{pick(WHO)} {pick(DOES)} {pick(WHAT)} {pick(WHERE)}".strip() for _ in range(pick(clauses))) + "."
        for _ in range(count)
    ]


def embed_share(bundle: Path, lines: Path, out: Path, share: int, shares: int) -> None:
    """Embed an equal share of the lines in this process: what is compared with Ray."""
    texts = lines.read_text().splitlines()
    size = -(-len(texts) // shares)
    texts = texts[share * size : (share + 1) * size]
    with load(bundle, threads=1) as bert:
        parts = [bert.embed(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH)]
    np.save(out / f"{share}.npy", np.concatenate(parts))


def by_hand(bundle: Path, lines: Path, out: Path, workers: int) -> tuple[float, np.ndarray]:
    out.mkdir()
    command = [sys.executable, __file__, str(bundle), "--lines", str(lines), "--out", str(out)]
    begun = time.perf_counter()
    running = [subprocess.Popen([*command, "--share", f"{share}/{workers}"]) for share in range(workers)]
    statuses = [process.wait() for process in running]
    took = time.perf_counter() - begun
    if any(statuses):
        raise SystemExit(f"a process by hand ended with status {max(statuses)}")
    return took, np.concatenate([np.load(out / f"{share}.npy") for share in range(workers)])


def by_ray(bundle: Path, lines: Path, out: Path, workers: int, kill_at: int | None = None) -> tuple[float, np.ndarray]:
    """Return the seconds and the vectors; ``kill_at``: as soon as so many shards are there, a worker is killed."""
    command = [sys.executable, str(REPO / "examples" / "ray_batch.py"), str(bundle), str(lines), "--out", str(out)]
    options = ["--format", "npy", "--workers", str(workers), "--block", str(BLOCK), "--batch", str(BATCH)]
    begun = time.perf_counter()
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    if kill_at is not None:
        while process.poll() is None and len(list(out.glob("part-*.npy"))) < kill_at:
            time.sleep(0.01)
        workers_now = [pid for pid, title in descendants(process.pid).items() if "MapWorker" in title]
        os.kill(workers_now[0], signal.SIGKILL)
    stderr = process.communicate()[1]
    took = time.perf_counter() - begun
    if process.returncode:
        raise SystemExit(f"ray_batch ended with status {process.returncode}:\n{stderr}")
    return took, np.concatenate([np.load(path) for path in sorted(out.glob("part-*.npy"))])


def lines_found(out: Path) -> list[int]:
    return [json.loads(line)["line"] for path in sorted(out.glob("part-*.jsonl")) for line in path.open("rb")]


def share_of(word: str) -> tuple[int, int]:
    share, _, shares = word.partition("/")
    return int(share), int(shares)


def report(bundle: Path, rows: int, workers: int, times: Sequence[tuple[str, float]]) -> str:
    """Return the page: each time, and the ratio of the means."""
    means = {
        who: np.mean([took for name, took in times if name == who]).item() for who in ("processes by hand", "Ray Data")
    }
    ratio = means["processes by hand"] / means["Ray Data"]
    return "\n".join(
        [
            f"# {rows:,} lines on {workers} workers of Ray Data, and on {workers} processes by hand",
            "",
            f"`python benchmarks/ray_batch.py {bundle} --rows {rows} --write`, ray {version('ray')}, onnxruntime "
            f"{version('onnxruntime')}, {processor()}.",
            "One thread each, from the start of the command to its end. Vectors are the same bit for bit each time.",
            "",
            "| | seconds | rows/s |",
            "| --- | --- | --- |",
            *[f"| {name} | {took:.1f} | {rows / took:.0f} |" for name, took in times],
            "",
            f"Ray Data has {ratio:.2f} × the throughput of the processes by hand (means of the runs). With a worker "
            f"killed half-way,",
            f"{rows} of {rows} rows are there, none twice.",
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2, help="of both sides; then comes the run with a killed worker")
    parser.add_argument("--write", action="store_true", help=f"renew {PAGE.relative_to(REPO)}")
    for option, kind in (("--share", share_of), ("--lines", Path), ("--out", Path)):  # of a process by hand
        parser.add_argument(option, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.share:
        embed_share(options.bundle, options.lines, options.out, *options.share)
        return 0
    times: list[tuple[str, float]] = []
    with TemporaryDirectory() as folder:
        lines = Path(folder) / "lines.txt"
        lines.write_text("".join(f"{text}\n" for text in sentences(options.rows)))
        expected: np.ndarray | None = None
        for number, name in enumerate(
            ["processes by hand", "Ray Data"] * options.rounds + ["Ray Data, a worker killed"]
        ):
            out = Path(folder) / str(number)
            if name == "processes by hand":
                took, vectors = by_hand(options.bundle, lines, out, options.workers)
            else:
                killed = options.rows // BLOCK // 2 if "killed" in name else None
                took, vectors = by_ray(options.bundle, lines, out, options.workers, killed)
                if lines_found(out) != list(range(1, options.rows + 1)):
                    print(f"{name}: rows are missing or there twice")
                    return 1
            times.append((name, took))
            print(f"{name}: {len(vectors)} rows in {took:.1f} s, {len(vectors) / took:.0f} rows/s", flush=True)
            expected = vectors if expected is None else expected
            if vectors.tobytes() != expected.tobytes():
                print(f"{name}: the vectors differ from those of the first run")
                return 1
    page = report(options.bundle, options.rows, options.workers, times)
    print(f"\n{page}")
    if options.write:
        PAGE.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
