"""How fast a bundle runs on this machine: latency, throughput, memory, and how long loading takes.

What is timed is ``LoadedBundle.run``, checks and copies included: what an application waits for.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.runtime.errors import InputError, ShapeError
from transom.runtime.spec import Axis, Graph, Tensor

if TYPE_CHECKING:
    from transom.runtime.session import LoadedBundle

SEED = 0  # of the inputs: two benchmarks of one bundle compute the same
MIB = 1 << 20

Progress = Callable[[str, int, int], None]  # what is measured, runs done, runs in all


@dataclass(frozen=True)
class Timing:
    """One graph at one size: percentiles over ``runs`` calls, milliseconds each."""

    graph: str
    sizes: Mapping[str, int]  # axis -> elements
    runs: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    items_per_s: float  # axis B counted; 1 item per call where a graph has none


@dataclass(frozen=True)
class BenchReport:
    """What ``bench`` found, and on what: a time without its machine says nothing."""

    device: str
    threads: int | None  # None: one per physical core
    cores: int  # that this process may use
    cpu: str
    onnxruntime: str
    load_s: float  # hashing every file and building the sessions; importing the libraries is not in it
    memory_before_mib: float | None  # peak of the process until the bundle was loaded, libraries included
    memory_peak_mib: float | None  # peak of the process at the end; None where the system does not say
    timings: tuple[Timing, ...]


def bench(
    path: str | PathLike[str],
    shapes: Sequence[Mapping[str, int]] = (),
    *,
    runs: int = 100,
    warmup: int = 10,
    seconds: float = 10.0,
    device: str = "cpu",
    threads: int | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """Load a bundle and time each of its graphs at each of ``shapes`` (axis -> size; the rest at opt).

    A shape is run ``warmup`` times, then ``runs`` times or until ``seconds`` are over, whichever comes
    first. Raises what ``load`` raises, InputError for an unknown axis, ShapeError for a size out of
    its bounds.
    """
    from transom.runtime.ort import onnxruntime
    from transom.runtime.session import load

    version = str(onnxruntime().__version__)
    before = peak_memory_mib()
    started = time.perf_counter()
    with load(path, device, threads) as loaded:
        load_s = time.perf_counter() - started
        plan = [
            (file.graph, sizes_of(file.graph, loaded.manifest.axes, shape))
            for shape in shapes or [{}]
            for file in loaded.manifest.graphs
        ]
        timings = tuple(
            measure(loaded, graph, sizes, runs=runs, warmup=warmup, seconds=seconds, progress=progress)
            for graph, sizes in plan
        )
        return BenchReport(
            device=loaded.device,
            threads=threads,
            cores=usable_cores(),
            cpu=cpu_name(),
            onnxruntime=version,
            load_s=load_s,
            memory_before_mib=before,
            memory_peak_mib=peak_memory_mib(),
            timings=timings,
        )


def sizes_of(graph: Graph, axes: Mapping[str, Axis], asked: Mapping[str, int]) -> dict[str, int]:
    """The size of each named axis of the graph's inputs: the one asked for, else its opt.

    Raises InputError for an axis that the bundle does not have, ShapeError for a size out of bounds.
    """
    from transom.runtime.inputs import allowed_sizes

    for name, size in asked.items():
        if name not in axes:
            raise InputError(f"unknown axis {name!r}; this bundle has {', '.join(axes)}.")
        if not axes[name].min <= size <= axes[name].max:
            raise ShapeError(f"axis {name} is {size}; this bundle allows {allowed_sizes(name, axes[name], size)}")
    named = [size for tensor in graph.inputs for size in tensor.shape if isinstance(size, str)]
    return {name: asked.get(name, axes[name].opt) for name in dict.fromkeys(named)}


def measure(
    loaded: LoadedBundle,
    graph: Graph,
    sizes: Mapping[str, int],
    *,
    runs: int,
    warmup: int,
    seconds: float,
    progress: Progress | None = None,
) -> Timing:
    """Time one graph of a loaded bundle at one size, on inputs of ``example_feeds``."""
    feeds = example_feeds(graph, sizes)
    label = " ".join([graph.name, *(f"{name}={size}" for name, size in sizes.items())])
    report = progress or (lambda what, done, total: None)
    report(label, 0, runs)
    for _ in range(warmup):
        loaded.run(feeds)
    times_ms: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(times_ms) < runs:
        started = time.perf_counter()
        loaded.run(feeds)
        ended = time.perf_counter()
        times_ms.append((ended - started) * 1e3)
        report(label, len(times_ms), runs)
        if ended > deadline:
            break
    return Timing(
        graph=graph.name,
        sizes=dict(sizes),
        runs=len(times_ms),
        p50_ms=percentile(times_ms, 50),
        p95_ms=percentile(times_ms, 95),
        p99_ms=percentile(times_ms, 99),
        items_per_s=sizes.get("B", 1) * len(times_ms) * 1e3 / sum(times_ms),
    )


def example_feeds(graph: Graph, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Seeded inputs as the graph declares them: ids below their bound, floats of N(0, 1).

    An input with a default gets its default: a mask of ones is the work that one pays for.
    """
    import numpy as np

    from transom.runtime.inputs import filled, shape_of

    source = np.random.default_rng(SEED)

    def values(tensor: Tensor) -> Any:
        if tensor.default is not None:
            return filled(tensor, sizes)
        shape = shape_of(tensor, sizes)
        if tensor.dtype == "int64":
            return source.integers(0, tensor.below or 1, shape, np.int64)
        return source.standard_normal(shape, np.float32)

    return {tensor.name: values(tensor) for tensor in graph.inputs}


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks, numpy's default."""
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def peak_memory_mib() -> float | None:
    """The most physical memory this process ever held, in MiB; None where the system does not say.

    Linux's VmHWM comes first: getrusage there starts from the size of the process that started this one.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))  # in kB
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if platform.system() == "Darwin" else peak / 1024  # bytes there, KiB elsewhere


def usable_cores() -> int:
    """Logical cores that this process may run on: a container or taskset may leave it fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_info() -> dict[str, str]:
    """The fields of /proc/cpuinfo's first core; empty where there is none."""
    try:
        first = Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_name() -> str:
    """The processor as the system calls it; on ARM boards that do not say, the board."""
    name = cpu_info().get("model name")
    if name:
        return name
    board = Path("/proc/device-tree/model")  # "NVIDIA Jetson Orin Nano Developer Kit", with a trailing NUL
    if board.is_file():
        return board.read_text(errors="replace").strip("\0 \n")
    return platform.processor() or platform.machine() or "unknown"
