"""Measure the cost of a cache buffer's length, and the step it should grow by (runtime/kv_cache.py: STEP).

    python benchmarks/cache_step.py BUNDLE       a decoder-only bundle, GPT-2 of 124 M parameters for example

First the time of one decode step at several capacities; then whole generations of several lengths with several
steps, interleaved. Medians; compare within one run only.
"""

from __future__ import annotations

import statistics
import sys
import time

import numpy as np

from transom.runtime import kv_cache as cache
from transom.runtime import load
from transom.runtime.decoder import Decoder
from transom.runtime.host import processor

STEPS = (32, 64, 128, 256, 1024)
ROUNDS = 3


def step_ms(decoder: Decoder, runs: int = 20) -> float:
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        decoder.decode_step(np.zeros(decoder.rows, np.int64))
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def main() -> None:
    print(f"on {processor()}", flush=True)
    with load(sys.argv[1], threads=2) as gpt:
        context = gpt.context
        print("| capacity | decode step, ms |\n|---|---|")
        for capacity in (128, 256, 512, 1024):
            if capacity > context:
                continue
            cache.STEP = capacity
            decoder = Decoder(gpt.backend("decoder"), 1, context)
            decoder.prefill(np.zeros((1, 8), np.int64))
            decoder.decode_step(np.zeros(1, np.int64))
            print(f"| {decoder.capacity} | {step_ms(decoder):.2f} |")
        lengths = [length for length in (60, 200, 500) if length + 8 <= context]
        print("\n| step | " + " | ".join(f"8 + {length} tokens, s" for length in lengths) + " |")
        print("|---|" + "---|" * len(lengths))
        seconds: dict[tuple[int, int], list[float]] = {}
        for _ in range(ROUNDS):
            for length in lengths:
                for step in STEPS:
                    cache.STEP = step
                    started = time.perf_counter()
                    gpt.generate([1] * 8, max_new_tokens=length, min_new_tokens=length)
                    seconds.setdefault((step, length), []).append(time.perf_counter() - started)
        for step in STEPS:
            row = [f"{statistics.median(seconds[step, length]):.2f}" for length in lengths]
            print(f"| {step} | " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
