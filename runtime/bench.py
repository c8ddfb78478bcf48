"""How fast a bundle runs on this machine: latency, throughput, memory, and how long loading takes.

What is timed is ``LoadedBundle.run``, checks and copies included: what an application waits for. Of a bundle
that generates it is the steps of a generation (``transom.runtime.bench_generation``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any

from transom.runtime.cpu import instruction_set
from transom.runtime.errors import InputError, ShapeError
from transom.runtime.graph_spec import Axis, Graph, Tensor
from transom.runtime.host import cpu_name, peak_memory_mib, usable_cores

if TYPE_CHECKING:
    from transom.runtime.session import LoadedBundle

SEED = 0  # of the inputs: two benchmarks of one bundle compute the same

Progress = Callable[[str, int, int], None]  # what is measured, runs done, runs in all


def silent(what: str, done: int, total: int) -> None:
    """A ``Progress`` that tells nobody."""


@dataclass(frozen=True)
class Effort:
    """How long to measure: ``warmup`` calls first, then ``runs`` or until ``seconds`` are over."""

    runs: int = 100
    warmup: int = 10
    seconds: float = 10.0
    progress: Progress = silent


@dataclass(frozen=True)
class Timing:
    """One thing timed at one size: percentiles over ``runs`` calls, milliseconds each."""

    name: str  # of the graph that was run, or of the step of a generation: "prefill", "decode"
    sizes: Mapping[str, int]  # axis -> elements; "new" are the tokens generated
    runs: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    items_per_s: float  # axis B counted, 1 item per call where a graph has none; in a generation tokens
    items: str = "items"  # or "tokens"


@dataclass(frozen=True)
class BenchReport:
    """What ``bench`` found, and on what: a time without its machine says nothing."""

    device: str
    threads: int | None  # None: one per physical core
    cores: int  # that this process may use
    cpu: str
    instruction_set: str  # that INT8 is multiplied with: transom.runtime.cpu has the names
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
    progress: Progress = silent,
    new_tokens: int | None = None,
) -> BenchReport:
    """Load a bundle and time each of its graphs at each of ``shapes`` (axis -> size; the rest at opt).

    A shape is run ``warmup`` times, then ``runs`` times or until ``seconds`` are over, whichever comes
    first. Of a bundle that generates, S is the length of the prompt or source and ``new_tokens`` how many
    follow. Raises what ``load`` raises, InputError for an unknown axis, ShapeError for a size out of
    its bounds.
    """
    from transom.runtime.backends.ort_library import onnxruntime
    from transom.runtime.loading import load

    version = str(onnxruntime().__version__)
    before = peak_memory_mib()
    started = time.perf_counter()
    with load(path, device, threads) as loaded:
        load_s = time.perf_counter() - started
        plan = [one for shape in shapes or [{}] for one in measurements(loaded, shape, new_tokens)]
        effort = Effort(runs, warmup, seconds, progress)
        timings = tuple(timing for measurement in plan for timing in measurement(effort))
        return BenchReport(
            device=loaded.device,
            threads=threads,
            cores=usable_cores(),
            cpu=cpu_name(),
            instruction_set=instruction_set(),
            onnxruntime=version,
            load_s=load_s,
            memory_before_mib=before,
            memory_peak_mib=peak_memory_mib(),
            timings=timings,
        )


def measurements(
    loaded: LoadedBundle, asked: Mapping[str, int], new_tokens: int | None = None
) -> list[Callable[[Effort], list[Timing]]]:
    """What there is to time at the sizes asked for, which are checked before anything runs."""
    from transom.runtime.bench_generation import generation_sizes, measure_generation
    from transom.runtime.tasks.generator import Generator

    if isinstance(loaded, Generator):
        return [partial(measure_generation, loaded, generation_sizes(loaded, asked, new_tokens))]
    if new_tokens is not None:
        raise InputError(f"new_tokens is {new_tokens}, but a bundle for {loaded.manifest.task} generates nothing.")
    axes = loaded.axes
    return [partial(measure, loaded, file.graph, sizes_of(file.graph, axes, asked)) for file in loaded.manifest.graphs]


def sizes_of(graph: Graph, axes: Mapping[str, Axis], asked: Mapping[str, int]) -> dict[str, int]:
    """The size of each named axis of the graph's inputs: the one asked for, else its opt.

    Raises InputError for an axis that the bundle does not have, ShapeError for a size out of bounds.
    """
    for name, size in asked.items():
        if name not in axes:
            raise InputError(f"unknown axis {name!r}; this bundle has {', '.join(axes)}.")
        check_size(axes, name, size)
    named = [size for tensor in graph.inputs for size in tensor.shape if isinstance(size, str)]
    return {name: asked.get(name, axes[name].opt) for name in dict.fromkeys(named)}


def check_size(axes: Mapping[str, Axis], name: str, size: int) -> None:
    """Raise ShapeError for a size out of the bounds of an axis."""
    from transom.runtime.feeds import allowed_sizes

    if not axes[name].min <= size <= axes[name].max:
        raise ShapeError(f"axis {name} is {size}; this bundle allows {allowed_sizes(name, axes[name], size)}")


def measure(loaded: LoadedBundle, graph: Graph, sizes: Mapping[str, int], effort: Effort) -> list[Timing]:
    """Time one graph of a loaded bundle at one size, on inputs of ``example_feeds``."""
    feeds = example_feeds(graph, sizes)
    label = " ".join([graph.name, *(f"{name}={size}" for name, size in sizes.items())])
    effort.progress(label, 0, effort.runs)
    for _ in range(effort.warmup):
        loaded.run(feeds)
    times_ms: list[float] = []
    deadline = time.perf_counter() + effort.seconds
    while len(times_ms) < effort.runs:
        started = time.perf_counter()
        loaded.run(feeds)
        ended = time.perf_counter()
        times_ms.append((ended - started) * 1e3)
        effort.progress(label, len(times_ms), effort.runs)
        if ended > deadline:
            break
    return [timing_of(graph.name, sizes, times_ms, sizes.get("B", 1), "items")]


def timing_of(name: str, sizes: Mapping[str, int], times_ms: Sequence[float], each: int, items: str) -> Timing:
    """The percentiles of calls that took ``times_ms``, and the rate of items, ``each`` of them a call."""
    return Timing(
        name=name,
        sizes=dict(sizes),
        runs=len(times_ms),
        p50_ms=percentile(times_ms, 50),
        p95_ms=percentile(times_ms, 95),
        p99_ms=percentile(times_ms, 99),
        items_per_s=each * len(times_ms) * 1e3 / sum(times_ms),
        items=items,
    )


def example_feeds(graph: Graph, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Seeded inputs as the graph declares them: ids below their bound, floats of N(0, 1).

    An input with a default gets its default: a mask of ones is the work that one pays for.
    """
    import numpy as np

    from transom.runtime.feeds import filled, shape_of

    source = np.random.default_rng(SEED)

    def values(tensor: Tensor) -> Any:
        if tensor.default is not None:
            return filled(tensor, sizes)
        shape = shape_of(tensor, sizes)
        if tensor.dtype == "int64":
            return source.integers(0, tensor.exclusive_max or 1, shape, np.int64)
        return source.standard_normal(shape, np.float32)

    return {tensor.name: values(tensor) for tensor in graph.inputs}


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks, numpy's default."""
    ordered = sorted(values)
    rank = (len(ordered) - 1) * percent / 100
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)
