"""Simulate requests that wait for replicas and are answered in batches.

Requests of one row each arrive independently of each other: a Poisson process. They wait in one queue, in the order of
their arrival. A replica that is free takes what waits, up to the batch limit, and is busy for the service time of that
many rows. With a queue delay it first waits for more, until a batch is full or its oldest request has waited that long:
the dynamic batching of Triton. Nothing is dropped, and replicas are equal and independent.

With a limit of one these are the queues of the textbooks: M/D/1, M/M/c.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heapreplace
from math import inf

import numpy as np
from numpy.typing import NDArray

SEED = 0  # of arrivals and service times: one rate and one table give one answer
RUNS = 5  # of every simulation, independent of each other: their p99 differ by what chance does
REQUESTS = 20_000  # of each run, at least
REQUESTS_PER_REPLICA = 40  # where there are many: the queue has to fill
SETTLING = 10  # the first tenth of a run is not counted, since it begins with an empty queue

Times = NDArray[np.float64]  # milliseconds


@dataclass(frozen=True)
class Batching:
    """The replicas of a bundle, the most requests in a batch, and how long a batch waits for more of them."""

    replicas: int
    limit: int
    delay_ms: float = 0.0


@dataclass(frozen=True)
class Served:
    """Requests that were answered: (N,) in the order of arrival, and their batches (M,) in the order of their start."""

    latency_ms: Times  # from a request's arrival to the end of its batch
    waiting_ms: Times  # of that, what passed before the batch began
    batch_sizes: NDArray[np.int64]
    service_ms: Times


@dataclass(frozen=True)
class Expected:
    """Latency that requests at a rate have to expect, and how busy replicas are, over all runs of a simulation."""

    batching: Batching
    p50_ms: float
    p95_ms: float
    p99_ms: float
    p99_lowest_ms: float  # of the single runs
    p99_highest_ms: float
    busy: float  # utilisation: the part of the time that a replica works
    mean_batch: float  # requests


def service_table(measured: Mapping[int, Sequence[float]], most: int) -> Times:
    """Return service times of batches of 1 to ``most`` rows, (most, K) in ms, each row of the table sorted.

    ``measured`` has those of some sizes, 1 and ``most`` among them. K is the largest number of calls of a size;
    fewer calls are repeated evenly. Sizes between two measured ones are interpolated, quantile by quantile.
    """
    sizes = sorted(size for size in measured if size <= most)
    if not sizes or sizes[0] != 1 or sizes[-1] != most:
        raise ValueError(f"service times of batches of {sizes} were measured; expected 1 and {most} among them")
    columns = max(len(measured[size]) for size in sizes)
    ranks = (np.arange(columns) + 0.5) / columns
    known = np.stack([np.quantile(measured[size], ranks, method="inverted_cdf") for size in sizes])
    every = np.arange(1, most + 1)
    return np.stack([np.interp(every, sizes, column) for column in known.T], 1)


def serve(arrivals_ms: Times, table_ms: Times, draws: NDArray[np.int64], batching: Batching) -> Served:
    """Answer requests that arrive at ``arrivals_ms`` (N,), ascending, with service times from a table (limit, K).

    ``draws`` (N,) has the column of each batch's service time, in the order of the batches.
    """
    arrivals, columns, limit, delay = arrivals_ms.tolist(), draws.tolist(), batching.limit, batching.delay_ms
    table = table_ms[:limit].tolist()
    count = len(arrivals)
    free = [-inf] * batching.replicas  # when each replica is free again: a heap
    starts: list[float] = []
    sizes: list[int] = []
    times: list[float] = []
    first = 0
    while first < count:
        oldest = arrivals[first]
        start = max(free[0], oldest)
        if delay:
            full = arrivals[first + limit - 1] if first + limit <= count else inf
            start = max(start, min(oldest + delay, full))
        size = bisect_right(arrivals, start, first, min(first + limit, count)) - first
        took = table[size - 1][columns[len(starts)]]
        heapreplace(free, start + took)
        starts.append(start)
        sizes.append(size)
        times.append(took)
        first += size
    batch_sizes, service = np.array(sizes, np.int64), np.array(times)
    waiting = np.repeat(starts, batch_sizes) - arrivals_ms
    return Served(waiting + np.repeat(service, batch_sizes), waiting, batch_sizes, service)


def poisson_arrivals(rng: np.random.Generator, rate_per_s: float, requests: int) -> Times:
    """Return the times (requests,) in ms at which independent callers ask ``rate_per_s`` times a second."""
    return np.cumsum(rng.exponential(1e3 / rate_per_s, requests))


def runs_of(rate_per_s: float, table_ms: Times, batching: Batching, requests: int = REQUESTS) -> list[Served]:
    """Simulate RUNS independent runs of ``requests`` requests each; of equal arguments always the same."""
    found = []
    for seed in np.random.SeedSequence(SEED).spawn(RUNS):
        rng = np.random.default_rng(seed)
        arrivals = poisson_arrivals(rng, rate_per_s, requests)
        found.append(serve(arrivals, table_ms, rng.integers(0, table_ms.shape[1], requests), batching))
    return found


def simulate(rate_per_s: float, table_ms: Times, batching: Batching) -> Expected:
    """Return what requests at a rate have to expect from replicas with the service times of a table.

    Percentiles are of the requests of all runs, without those of the beginning. A rate beyond ``most_per_s`` has no
    steady state: the longer the run, the longer they wait.
    """
    requests = max(REQUESTS, REQUESTS_PER_REPLICA * batching.replicas)
    runs = runs_of(rate_per_s, table_ms, batching, requests)
    settled = [run.latency_ms[requests // SETTLING :] for run in runs]
    p50, p95, p99 = np.percentile(np.concatenate(settled), [50, 95, 99]).tolist()
    single = [float(np.percentile(latency, 99)) for latency in settled]
    batches = sum(len(run.batch_sizes) for run in runs)
    span_ms = RUNS * requests * 1e3 / rate_per_s
    return Expected(
        batching=batching,
        p50_ms=p50,
        p95_ms=p95,
        p99_ms=p99,
        p99_lowest_ms=min(single),
        p99_highest_ms=max(single),
        busy=min(1.0, float(sum(run.service_ms.sum() for run in runs)) / (batching.replicas * span_ms)),
        mean_batch=RUNS * requests / batches,
    )


def most_per_s(table_ms: Times, batching: Batching) -> float:
    """Return the requests per second that replicas can answer: all batches full, no pause between them."""
    return batching.replicas * batching.limit * 1e3 / float(table_ms[batching.limit - 1].mean())
