"""Run a thousand generations of random lengths on one bundle: is memory flat, are answers those of a fresh one?

    python benchmarks/soak.py BUNDLE [--generations 1000]

Greedy, sampled and beam searches, batches of one to four prompts, some streams left half-way. Every answer is
compared with the same call on a bundle loaded anew. Prints the resident memory along the way.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from typing import Any

import numpy as np

from transom.runtime import load
from transom.runtime.host import processor


def resident_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS:"))


def calls(seed: int, context: int, vocabulary: int) -> tuple[list[list[int]], dict[str, Any]]:
    """Return prompts and keywords of one call, deterministic for a seed."""
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(1, 5))
    longest = int(rng.integers(1, context - 2))
    prompts = [rng.integers(0, vocabulary, rng.integers(1, longest + 1)).tolist() for _ in range(rows)]
    keywords: dict[str, Any] = {"max_new_tokens": int(rng.integers(1, min(40, context - longest) + 1))}
    kind = rng.integers(3)
    if kind == 1:
        keywords |= {"do_sample": True, "seed": seed, "temperature": 0.8}
    if kind == 2:
        keywords |= {"num_beams": 3}
    return prompts, keywords


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--generations", type=int, default=1000)
    options = parser.parse_args()
    print(f"on {processor()}", flush=True)
    answers = {}
    memory = []
    with load(options.bundle, threads=1) as model:
        context, vocabulary = model.context, model.prompt_tokens().exclusive_max
        for seed in range(options.generations):
            prompts, keywords = calls(seed, context, vocabulary)
            answers[seed] = model.generate(prompts, **keywords)
            if "num_beams" not in keywords:
                next(iter(model.stream(prompts[0], **keywords)), None)  # and leave
            if (seed + 1) % max(options.generations // 10, 1) == 0:
                gc.collect()
                memory.append(resident_mib())
                print(f"{seed + 1:6d} generations: {memory[-1]:.1f} MiB resident", flush=True)
    different = 0
    for first in range(0, options.generations, 100):  # a fresh bundle for every hundred, in reverse order
        with load(options.bundle, threads=1) as fresh:
            for seed in reversed(range(first, min(first + 100, options.generations))):
                prompts, keywords = calls(seed, context, vocabulary)
                different += fresh.generate(prompts, **keywords) != answers[seed]
    print(f"memory from the second tenth to the last: {memory[-1] - memory[1]:+.1f} MiB")
    print(f"answers unlike those of a fresh bundle: {different} of {options.generations}")


if __name__ == "__main__":
    main()
