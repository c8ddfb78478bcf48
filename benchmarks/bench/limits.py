"""Measure this machine's limits: operations per second in FP32, BF16 and INT8, and bytes per second read from memory.

limits.c is compiled by the system's C compiler: loops over registers, one per instruction set, of which the processor's
flags choose the fastest for exact sums. Without a compiler, products of matrices by numpy stand in, which reach less.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.paths import Paths
from bench.workloads import THREADS

SECONDS = 1.5  # for each kernel
FLAGS = ("-O3", "-std=gnu11", "-pthread")
# Per kind, the best first: the kernel of limits.c and the flags that it needs, by Linux's names
KERNELS: dict[str, tuple[tuple[str, frozenset[str]], ...]] = {
    "fp32": (
        ("fp32_avx512", frozenset({"avx512f"})),
        ("fp32_avx2", frozenset({"avx2", "fma"})),
        ("fp32_neon", frozenset({"asimd"})),
    ),
    "bf16": (
        ("bf16_amx", frozenset({"amx_bf16"})),
        ("bf16_avx512", frozenset({"avx512_bf16"})),
        ("bf16_bfmmla", frozenset({"bf16"})),
    ),
    "int8": (
        ("int8_amx", frozenset({"amx_int8"})),
        ("int8_avx512_vnni", frozenset({"avx512_vnni"})),
        ("int8_avx_vnni", frozenset({"avx_vnni"})),
        ("int8_avx2", frozenset({"avx2"})),
        ("int8_smmla", frozenset({"i8mm"})),
        ("int8_sdot", frozenset({"asimddp"})),
    ),
}
METHOD = (
    "best of 7 rounds on {threads} threads: multiply-adds (two operations each) on registers alone, {kernels}; "
    "a sum over 512 MiB for the read rate"
)


def kernels_of(flags: frozenset[str]) -> dict[str, str]:
    """Return the kernel of each kind that a processor with these flags has."""
    found = {}
    for kind, kernels in KERNELS.items():
        name = next((name for name, needed in kernels if needed <= flags), None)
        if name is not None:
            found[kind] = name
    return found


def program(paths: Paths) -> Path | None:
    """Return limits.c compiled, kept by its content; None without a compiler that takes it."""
    source = Path(__file__).with_name("limits.c")
    target = paths.root / f"limits-{hashlib.sha256(source.read_bytes()).hexdigest()[:12]}"
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if not target.exists() and compiler is not None:
        paths.root.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")
        done = subprocess.run([compiler, *FLAGS, str(source), "-o", str(partial)], capture_output=True, check=False)
        if done.returncode == 0:
            partial.replace(target)
    return target if target.exists() else None


def measure(paths: Paths, flags: frozenset[str], seconds: float = SECONDS) -> dict[str, Any]:
    """Return ``read`` in GB/s, the rates of each kind that there is in 1e9 operations/s, and the ``method``."""
    kernels = kernels_of(flags)
    tool = program(paths)
    if tool is None or "fp32" not in kernels:
        return by_numpy()
    command = [str(tool), str(seconds), str(THREADS), "read", *kernels.values()]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rates = {name: float(rate) for name, rate in map(str.split, done.stdout.splitlines())}
    method = METHOD.format(threads=THREADS, kernels=", ".join(kernels.values()))
    return {"read": rates["read"], **{kind: rates[name] for kind, name in kernels.items()}, "method": method}


def by_numpy() -> dict[str, Any]:
    """Return what one product of FP32 matrices and one sum reach, where limits.c cannot be used."""
    a = np.ones((2048, 2048), np.float32)
    product = min(timed(lambda: a @ a) for _ in range(5))
    long = np.ones(1 << 26)
    summed = min(timed(long.sum) for _ in range(5))
    return {
        "read": long.nbytes / summed / 1e9,
        "fp32": 2 * 2048**3 / product / 1e9,
        "method": "numpy, best of 5: a product of 2048x2048 matrices, a sum over 512 MiB on one thread",
    }


def timed(call: Any) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def larger(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Return the larger rate of two measurements: a limit is what was reached once."""
    numbers = {
        name: max(first[name], second[name]) for name in first if isinstance(first[name], float) and name in second
    }
    return {**first, **numbers}
