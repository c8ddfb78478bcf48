"""Measure service times by batch size: how long a replica is busy with one row, with two, with four.

Of an encoder a batch is one call of ``run``. Of a bundle that generates it is a whole generation, as ``generate`` makes
it: the prompts are read together, and every row takes the same number of new tokens, choosing them included. Rows that
end sooner would wait for the longest one, so that this number is that of the longest answer of a batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from transom.runtime.bench import SEED, Effort, check_size, example_feeds, generation_sizes, sizes_of
from transom.runtime.errors import InputError
from transom.runtime.generation import GenerationConfig, with_keywords
from transom.runtime.graph_spec import IMAGES
from transom.runtime.session import LoadedBundle
from transom.runtime.tasks.generator import Generator

ROWS = "B"
Calls = Mapping[int, Callable[[], object]]  # batch size -> a call of that many rows


@dataclass(frozen=True)
class Work:
    """The work of a batch: a graph or a whole generation, at what sizes, as a call for each batch size."""

    name: str  # "graph model", "generation"
    sizes: Mapping[str, int]  # axis -> elements, the rows apart; "new" are the tokens generated
    calls: Calls
    note: str = ""  # why batches are not as large as the bundle allows


def work_of(
    loaded: LoadedBundle,
    asked: Mapping[str, int],
    *,
    graph: str | None = None,
    max_batch: int | None = None,
    new_tokens: int | None = None,
) -> Work:
    """Return what a replica of a loaded bundle does for a batch, at the sizes ``asked`` for.

    Raises InputError for a graph or axis that the bundle does not have and for rows among the sizes, ShapeError for a
    size out of its bounds.
    """
    if ROWS in asked:
        raise InputError(
            f"{ROWS} is {asked[ROWS]}; batches of 1, 2, 4, ... rows are measured. Limit them with max_batch."
        )
    if max_batch is not None:
        check_size(loaded.axes, ROWS, max_batch)
    if isinstance(loaded, Generator):
        if graph is not None:
            raise InputError(f"graph is {graph!r:.60}, but this bundle generates: its whole generations are measured.")
        return generation_work(loaded, asked, max_batch, new_tokens)
    if new_tokens is not None:
        raise InputError(f"new_tokens is {new_tokens}, but a bundle for {loaded.manifest.task} generates nothing.")
    graphs = {file.graph.name: file.graph for file in loaded.manifest.graphs}
    chosen = graphs.get(graph or next(iter(graphs)))
    if chosen is None:
        raise InputError(f"unknown graph {graph!r:.60}; this bundle has {', '.join(graphs)}.")
    sizes = sizes_of(chosen, loaded.axes, asked)
    most = (max_batch or loaded.max_size(ROWS)) if ROWS in sizes else 1
    feeds = {rows: example_feeds(chosen, sizes | {ROWS: rows}) for rows in batch_sizes(most)}
    rest = {name: size for name, size in sizes.items() if name != ROWS}
    return Work(f"graph {chosen.name}", rest, {rows: partial(loaded.run, each) for rows, each in feeds.items()})


def generation_work(loaded: Generator, asked: Mapping[str, int], max_batch: int | None, new_tokens: int | None) -> Work:
    """Return whole generations by the checkpoint's own config, beams included, of exactly ``new_tokens`` tokens."""
    sizes = generation_sizes(loaded, asked, new_tokens)
    new, S = sizes["new"], sizes.get("S", 1)
    stored = GenerationConfig.from_json(loaded.manifest.generation or {})
    config = with_keywords(stored, max_new_tokens=new, min_new_tokens=new)
    most, note = loaded.prompts_at_once(config), ""
    if max_batch is not None:
        most = min(most, max_batch)
    if config.do_sample:
        most, note = 1, "this bundle samples: its random numbers are of one request, which is answered alone"
    rng = np.random.default_rng(SEED)

    def call(prompts: int) -> Callable[[], object]:
        prefill = loaded.prefill_call(loaded.random_prompts(rng, prompts, S, sizes.get(IMAGES, 0)))
        return lambda: loaded.continued(prefill(), config)

    rest = {name: size for name, size in sizes.items() if name != ROWS}
    return Work("generation", rest, {rows: call(rows) for rows in batch_sizes(most)}, note)


def batch_sizes(most: int) -> list[int]:
    """Return 1, 2, 4, ... and ``most`` itself."""
    return sorted({2**power for power in range(most.bit_length()) if 2**power <= most} | {most})


def measure_service_times(calls: Calls, effort: Effort) -> dict[int, list[float]]:
    """Time the calls of every batch size, in ms: ``effort.runs`` of each, or until each took ``effort.seconds``.

    Sizes take turns, so that what else the machine does falls on all of them alike. Warm-up is ``effort.warmup`` calls
    of each, or a tenth of those seconds, and one call at least.
    """
    label = f"service times of batches of {', '.join(map(str, calls))}"
    effort.progress(label, 0, effort.runs)
    for call in calls.values():
        deadline = time.perf_counter() + effort.seconds / 10
        for _ in range(max(1, effort.warmup)):
            call()
            if time.perf_counter() > deadline:
                break
    found: dict[int, list[float]] = {rows: [] for rows in calls}
    left = dict.fromkeys(calls, effort.seconds * 1e3)
    for run in range(effort.runs):
        for rows, call in calls.items():
            if run and left[rows] <= 0:
                continue
            started = time.perf_counter()
            call()
            took = (time.perf_counter() - started) * 1e3
            found[rows].append(took)
            left[rows] -= took
        effort.progress(label, run + 1, effort.runs)
        if max(left.values()) <= 0:
            break
    return found


@dataclass(frozen=True)
class ServiceTime:
    """The spread of the service times of one batch size, milliseconds."""

    batch: int
    runs: int
    mean_ms: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    most_ms: float
    rows_per_s: float  # of one replica with batches of this size, without a pause


def service_time(batch: int, times_ms: Sequence[float]) -> ServiceTime:
    """Return the spread of the times of one batch size; percentiles are linear between the two nearest ranks."""
    mean = float(np.mean(times_ms))
    p50, p95, p99, most = np.percentile(times_ms, [50, 95, 99, 100]).tolist()
    return ServiceTime(batch, len(times_ms), mean, p50, p95, p99, most, batch * 1e3 / mean)
