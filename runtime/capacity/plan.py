"""Find how many replicas of a bundle keep a latency at a rate of requests: measure service times, then simulate.

A replica is one process that has the bundle loaded and answers one batch at a time, with a number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import ceil, floor, isfinite, log10
from os import PathLike
from typing import Any

import numpy as np

from transom.runtime.backends.ort_library import onnxruntime
from transom.runtime.bench import Effort
from transom.runtime.capacity.neighbours import neighbours
from transom.runtime.capacity.queueing import Batching, Expected, Times, most_per_s, service_table, simulate
from transom.runtime.capacity.service_times import ServiceTime, measure_service_times, service_time, work_of
from transom.runtime.errors import InputError
from transom.runtime.host import cpu_name, instruction_set, usable_cores
from transom.runtime.loading import load
from transom.runtime.progress import Progress, silent

MOST_REPLICAS = 1000  # beyond, replicas grow in proportion to the rate
RATES_PER_S = 1e-6, 1e9  # one request in 11 days, and more than any number of replicas here answers
ALIKE = 1.02  # a p99 within 2 % of another is no better than it
DELAYS = (0.25, 0.5)  # tried, as parts of what p99 leaves beside the service time of a full batch


@dataclass(frozen=True)
class Alternative:
    """A batch limit and a number of replicas, what to expect of them, and whether that keeps the p99 asked for."""

    expected: Expected
    most_per_s: float  # requests; at this rate they wait for ever
    keeps: bool


@dataclass(frozen=True)
class Plan:
    """The alternatives, by batch limit and replicas, and among them the one with the fewest replicas."""

    answer: Alternative
    alternatives: tuple[Alternative, ...]


@dataclass(frozen=True)
class CapacityReport:
    """The answer of ``capacity`` with the service times and the machine that they were measured on."""

    rate_per_s: float
    p99_ms: float
    work: str  # measured: "graph model", "generation"
    sizes: Mapping[str, int]
    note: str
    service: tuple[ServiceTime, ...]
    plan: Plan
    device: str
    threads: int | None  # of a replica; None: one per physical core
    busy_replicas: int  # others, that were at work while this was measured
    cores: int  # that this process may use
    replicas_here: int | None  # that this machine has cores for; None where the device is no CPU
    cpu: str
    instruction_set: str
    onnxruntime: str


def capacity(
    path: str | PathLike[str],
    rate_per_s: float,
    p99_ms: float,
    shape: Mapping[str, int] | None = None,
    *,
    graph: str | None = None,
    max_batch: int | None = None,
    new_tokens: int | None = None,
    queue_delay_ms: float | None = None,
    runs: int = 300,
    seconds: float = 5.0,
    device: str = "cpu",
    threads: int | None = None,
    busy_replicas: int = 0,
    progress: Progress = silent,
) -> CapacityReport:
    """Measure a bundle's service times here, and return how many replicas answer ``rate_per_s`` within ``p99_ms``.

    ``shape`` has sizes of axes but the rows (the rest at opt), ``graph`` names one where there are several, and
    ``max_batch`` limits the batch sizes that are measured, 1, 2, 4, ... up to the bundle's own limit. Each is called
    ``runs`` times or for ``seconds``, while ``busy_replicas`` other processes do the same. ``queue_delay_ms`` None
    tries whether a delay saves a replica. Of a bundle that generates, S is the length of the prompt or source and
    ``new_tokens`` how many follow.

    Raises what ``load`` raises, InputError for a rate out of RATES_PER_S, a p99 that is no number above zero or that no
    number of replicas keeps, and for unknown axes and graphs, ShapeError for a size out of its bounds.
    """
    check_target(rate_per_s, p99_ms, queue_delay_ms)
    with load(path, device, threads) as loaded:
        options: dict[str, Any] = {"graph": graph, "max_batch": max_batch, "new_tokens": new_tokens}
        work = work_of(loaded, shape or {}, **options)
        with neighbours(busy_replicas, path, shape or {}, options, device, threads, progress):
            measured = measure_service_times(work.calls, Effort(runs, 10, seconds, progress))
        used = loaded.device
    return CapacityReport(
        rate_per_s=rate_per_s,
        p99_ms=p99_ms,
        work=work.name,
        sizes=work.sizes,
        note=work.note,
        service=tuple(service_time(rows, times) for rows, times in measured.items()),
        plan=plan_replicas(measured, rate_per_s, p99_ms, queue_delay_ms, progress),
        device=used,
        threads=threads,
        busy_replicas=busy_replicas,
        cores=usable_cores(),
        replicas_here=replicas_here(threads, usable_cores()) if used == "cpu" else None,
        cpu=cpu_name(),
        instruction_set=instruction_set(),
        onnxruntime=str(onnxruntime().__version__),
    )


def check_target(rate_per_s: float, p99_ms: float, queue_delay_ms: float | None = None) -> None:
    """Raise InputError for a rate out of RATES_PER_S, a p99 that is no number above zero, and a delay as long as it."""
    if not (isfinite(rate_per_s) and rate_per_s > 0):
        raise InputError(f"the rate is {rate_per_s:g}; expected requests per second, above 0, such as 200.")
    lowest, highest = RATES_PER_S
    if not lowest <= rate_per_s <= highest:
        raise InputError(f"the rate is {rate_per_s:g} requests per second; expected {lowest:g} to {highest:g}.")
    if not (isfinite(p99_ms) and p99_ms > 0):
        raise InputError(f"p99 is {p99_ms:g} ms; expected a time above 0, such as 50 ms.")
    if queue_delay_ms is not None and not 0 <= queue_delay_ms < p99_ms:
        raise InputError(
            f"the queue delay is {queue_delay_ms:g} ms; expected 0 or more, and less than the p99 of {p99_ms:g} ms."
        )


def replicas_here(threads: int | None, cores: int) -> int:
    """Return how many replicas of ``threads`` each have cores of their own here; None is one that takes them all."""
    return 1 if threads is None else cores // threads


def plan_replicas(
    measured: Mapping[int, Sequence[float]],
    rate_per_s: float,
    p99_ms: float,
    queue_delay_ms: float | None = None,
    progress: Progress = silent,
) -> Plan:
    """Return the fewest replicas that keep ``p99_ms`` at a rate, given service times in ms by batch size.

    For each measured size as the batch limit the alternatives are the fewest replicas that keep it, one less where
    that many can answer the rate at all, and one more. The answer is the ``best`` of those that keep it; a queue delay
    is in it where that saves a replica, unless ``queue_delay_ms`` sets one.
    Raises InputError where no number of replicas up to MOST_REPLICAS keeps it.
    """
    check_target(rate_per_s, p99_ms, queue_delay_ms)
    table = service_table(measured, max(measured))
    alone = float(np.percentile(measured[1], 99))
    if alone > p99_ms:
        raise InputError(
            f"a p99 of {p99_ms:g} ms cannot be kept: one row takes longer without any waiting, {alone:.3g} ms at p99 "
            f"of {len(measured[1])} calls and {np.median(measured[1]):.3g} ms at p50. Ask for a p99 above that, or "
            "make a row cheaper: fewer tokens, an INT8 bundle, more threads."
        )
    asked = queue_delay_ms or 0.0

    @cache
    def alternative(batching: Batching) -> Alternative:
        expected = simulate(rate_per_s, table, batching)
        return Alternative(expected, most_per_s(table, batching), expected.p99_ms <= p99_ms)

    found: list[Alternative] = []
    for done, limit in enumerate(limits := sorted(measured)):
        progress("simulating queues", done, len(limits))
        single = Batching(1, limit, asked if limit > 1 else 0.0)
        least = least_replicas(table, rate_per_s, single)

        def keeps(count: int, of: Batching = single) -> bool:
            return alternative(replace(of, replicas=count)).keeps

        fewest = fewest_replicas(least, keeps)
        if fewest is not None:
            counts = range(max(least, fewest - 1), fewest + 2)
            found += [alternative(replace(single, replicas=count)) for count in counts]
    progress("simulating queues", len(limits), len(limits))
    if not any(one.keeps for one in found):
        raise InputError(too_many(table, rate_per_s, p99_ms, limits))
    answer = best([one for one in found if one.keeps])
    if queue_delay_ms is None:
        delayed = [alternative(one) for one in with_delay(table, rate_per_s, p99_ms, limits, answer)]
        saved = [one for one in delayed if one.keeps]
        if saved:
            answer = best(saved)
            found.append(answer)
    return Plan(answer, tuple(sorted(found, key=order)))


def best(alternatives: Sequence[Alternative]) -> Alternative:
    """Return the alternative with the fewest replicas; of these, of the lowest p99 or ALIKE, one that can answer most.

    What is left over for bursts decides where limits that are hardly ever reached differ by chance.
    """
    least = min(one.expected.batching.replicas for one in alternatives)
    fewest = [one for one in alternatives if one.expected.batching.replicas == least]
    lowest_ms = min(one.expected.p99_ms for one in fewest)
    return max((one for one in fewest if one.expected.p99_ms <= ALIKE * lowest_ms), key=lambda one: one.most_per_s)


def order(alternative: Alternative) -> tuple[int, int, float]:
    batching = alternative.expected.batching
    return batching.limit, batching.replicas, batching.delay_ms


def least_replicas(table_ms: Times, rate_per_s: float, single: Batching) -> int:
    """Return the fewest replicas whose batches of at most ``single.limit`` can answer a rate at all."""
    return floor(rate_per_s / most_per_s(table_ms, single)) + 1


def fewest_replicas(least: int, keeps: Callable[[int], bool]) -> int | None:
    """Return the fewest replicas, ``least`` or more, that ``keeps`` says yes to; None beyond MOST_REPLICAS.

    More replicas are expected to keep what fewer do.
    """
    too_few, count, step = least - 1, least, 1
    while count <= MOST_REPLICAS and not keeps(count):
        too_few, count, step = count, count + step, 2 * step
    if count > MOST_REPLICAS:
        if too_few >= MOST_REPLICAS or least > MOST_REPLICAS or not keeps(MOST_REPLICAS):
            return None
        count = MOST_REPLICAS
    while count - too_few > 1:
        middle = (too_few + count) // 2
        too_few, count = (too_few, middle) if keeps(middle) else (middle, count)
    return count


def with_delay(
    table_ms: Times, rate_per_s: float, p99_ms: float, limits: Sequence[int], answer: Alternative
) -> Iterator[Batching]:
    """Yield batchings with one replica less than the answer, which wait for fuller batches."""
    count = answer.expected.batching.replicas - 1
    for limit in limits:
        room = p99_ms - float(table_ms[limit - 1].mean())
        if limit > 1 and room > 0 and count >= least_replicas(table_ms, rate_per_s, Batching(1, limit)):
            yield from (Batching(count, limit, round(part * room, 3)) for part in DELAYS)


def too_many(table_ms: Times, rate_per_s: float, p99_ms: float, limits: Sequence[int]) -> str:
    """Return why no number of replicas up to MOST_REPLICAS keeps a p99 at a rate, and what to do."""
    least = min(least_replicas(table_ms, rate_per_s, Batching(1, limit)) for limit in limits)
    if least > MOST_REPLICAS:
        parts = 10 ** ceil(log10(least / MOST_REPLICAS))
        return (
            f"{rate_per_s:g} requests a second need {least:,} replicas at least; this command simulates up to "
            f"{MOST_REPLICAS}. Ask for 1/{parts} of the rate, and take {parts} times the answer."
        )
    return (
        f"a p99 of {p99_ms:g} ms is kept by no number of replicas up to {MOST_REPLICAS}, at {rate_per_s:g} requests a "
        "second: it is too close to the service time of one row. Ask for a p99 some percent above it."
    )
