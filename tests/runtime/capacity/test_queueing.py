"""Test the simulated queue: small ones by hand, long ones by the formulas of the textbooks."""

from __future__ import annotations

import math

import numpy as np
import pytest

from transom.runtime.capacity.queueing import (
    RUNS,
    Batching,
    Served,
    Times,
    most_per_s,
    poisson_arrivals,
    runs_of,
    serve,
    service_table,
    simulate,
)

MS_PER_S = 1e3
FIVE_OR_SIX = np.array([[5.0], [6.0]])  # ms for a batch of one, of two


def served(arrivals: list[float], table: Times, batching: Batching) -> Served:
    return serve(np.array(arrivals), table, np.zeros(len(arrivals), np.int64), batching)


def test_a_replica_takes_what_waits_when_it_is_free() -> None:
    """One at 0 alone until 5, two until 11, the last one until 16."""
    found = served([0, 1, 2, 10], FIVE_OR_SIX, Batching(1, 2))
    assert found.batch_sizes.tolist() == [1, 2, 1]
    assert found.waiting_ms.tolist() == [0, 4, 3, 1]
    assert found.latency_ms.tolist() == [5, 10, 9, 6]
    assert found.service_ms.tolist() == [5, 6, 5]


def test_two_replicas_answer_two_requests_at_once() -> None:
    """The third waits for the first replica, free at 5; the fourth finds one that is free since 6."""
    found = served([0, 1, 2, 10], FIVE_OR_SIX, Batching(2, 1))
    assert found.latency_ms.tolist() == [5, 5, 8, 5]


def test_no_batch_is_larger_than_the_limit() -> None:
    assert served([0] * 5, np.full((3, 1), 2.0), Batching(1, 3)).batch_sizes.tolist() == [3, 2]
    assert served([0] * 5, np.full((3, 1), 2.0), Batching(1, 3)).latency_ms.tolist() == [2, 2, 2, 4, 4]


def test_a_batch_waits_for_its_queue_delay_or_until_it_is_full() -> None:
    """Full at 1, so it begins then; the last request waits 3 ms in vain."""
    found = served([0, 1, 10], FIVE_OR_SIX, Batching(1, 2, delay_ms=3))
    assert found.latency_ms.tolist() == [7, 6, 8]
    assert found.waiting_ms.tolist() == [1, 0, 3]


def test_the_queue_delay_is_no_pause_after_a_busy_replica() -> None:
    """The second waits from 1 to 8 for the replica, longer than 3 ms: it is not delayed again."""
    found = served([0, 1], np.array([[5.0]]), Batching(1, 1, delay_ms=3))
    assert found.waiting_ms.tolist() == [0, 4]  # a batch of one is full at once
    found = served([0, 1, 2.5], np.array([[5.0], [6.0], [7.0]]), Batching(1, 3, delay_ms=0.5))
    assert found.waiting_ms.tolist() == [0.5, 4.5, 3]  # 0.5 to 5.5 alone, then two


def test_service_times_between_measured_sizes_are_interpolated_by_quantile() -> None:
    table = service_table({1: [1.0, 3.0], 2: [2.0, 4.0], 4: [10.0, 4.0]}, 4)
    assert table.tolist() == [[1, 3], [2, 4], [3, 7], [4, 10]]


def test_fewer_calls_of_a_size_are_repeated_evenly() -> None:
    table = service_table({1: [1.0, 2.0, 3.0, 4.0], 2: [7.0, 5.0], 8: [9.0]}, 2)
    assert table.tolist() == [[1, 2, 3, 4], [5, 5, 7, 7]]


@pytest.mark.parametrize("measured", [{}, {2: [1.0]}, {1: [1.0], 8: [2.0]}])
def test_a_table_needs_the_times_of_one_row_and_of_the_limit(measured: dict[int, list[float]]) -> None:
    with pytest.raises(ValueError, match="expected 1 and 4 among them"):
        service_table(measured, 4)


def test_arrivals_have_the_rate_and_the_spread_of_a_poisson_process() -> None:
    gaps = np.diff(poisson_arrivals(np.random.default_rng(0), 200, 100_000))
    assert gaps.mean() == pytest.approx(5, rel=0.02)
    assert gaps.std() == pytest.approx(5, rel=0.02)


def exponential(mean_ms: float, count: int = 20_000) -> Times:
    """Service times whose quantiles are those of an exponential distribution, (count,)."""
    return -mean_ms * np.log1p(-(np.arange(count) + 0.5) / count)


def waiting(rate_per_s: float, table: Times, batching: Batching, requests: int = 100_000) -> Times:
    """Waiting times of all runs, without the first tenth of each."""
    runs = runs_of(rate_per_s, table, batching, requests)
    return np.concatenate([run.waiting_ms[requests // 10 :] for run in runs])


@pytest.mark.parametrize(("load", "mean_ms"), [(0.3, 2.142857), (0.5, 5.0), (0.8, 20.0)])
def test_constant_service_times_wait_as_m_d_1(load: float, mean_ms: float) -> None:
    """Pollaczek-Khinchine: the mean wait is load * s / (2 (1 - load)), here of s = 10 ms."""
    found = waiting(load * MS_PER_S / 10, np.array([[10.0]]), Batching(1, 1))
    assert mean_ms == pytest.approx(load * 10 / (2 * (1 - load)), rel=1e-6)
    assert found.mean() == pytest.approx(mean_ms, rel=0.04)
    assert (found == 0).mean() == pytest.approx(1 - load, abs=0.01)  # who arrives sees the average


def erlang_c(replicas: int, offered: float) -> float:
    """Return the probability that a request waits, for ``offered`` = rate times service time."""
    last = offered**replicas / math.factorial(replicas) * replicas / (replicas - offered)
    return last / (sum(offered**k / math.factorial(k) for k in range(replicas)) + last)


def test_erlang_c_is_known() -> None:
    assert erlang_c(1, 0.7) == pytest.approx(0.7)
    assert erlang_c(2, 1.0) == pytest.approx(1 / 3)
    assert erlang_c(10, 8.0) == pytest.approx(0.4092, abs=5e-5)


@pytest.mark.parametrize(("replicas", "load"), [(1, 0.5), (2, 0.7), (5, 0.8)])
def test_exponential_service_times_wait_as_m_m_c(replicas: int, load: float) -> None:
    """Erlang C: the part that waits, the mean wait C s / (c - offered), and the tail of the waits."""
    mean_ms = 10.0
    offered = replicas * load
    found = waiting(offered / mean_ms * MS_PER_S, exponential(mean_ms)[None], Batching(replicas, 1))
    probability = erlang_c(replicas, offered)
    assert (found > 0).mean() == pytest.approx(probability, rel=0.03)
    assert found.mean() == pytest.approx(probability * mean_ms / (replicas - offered), rel=0.05)
    late_ms = mean_ms / (replicas - offered)
    assert (found > late_ms).mean() == pytest.approx(probability / math.e, rel=0.05)


def test_batches_of_exponential_service_times_wait_by_their_closed_form() -> None:
    """Bulk service: with n requests waiting p(n) = p(0) r^n, where r < 1 solves m (r + ... + r^b) = l.

    Here b = 2, and a batch of one takes as long as one of two: l = 120, m = 100 per second.
    """
    arrive, serve_rate = 120.0, 100.0
    r = (-1 + math.sqrt(1 + 4 * arrive / serve_rate)) / 2  # r + r^2 = l / m
    full = 1 / (1 / (1 - r) + serve_rate / arrive)  # p(0) while busy
    mean_ms = full * r / (1 - r) ** 2 / arrive * MS_PER_S  # Little: those that wait, by the rate
    table = np.stack([exponential(10.0)] * 2)
    found = waiting(arrive, table, Batching(1, 2))
    assert found.mean() == pytest.approx(mean_ms, rel=0.04)
    assert (found == 0).mean() == pytest.approx(full * serve_rate / arrive, abs=0.01)  # the replica idles


def test_at_light_load_a_request_takes_its_service_time() -> None:
    expected = simulate(0.01, np.array([[10.0], [15.0]]), Batching(1, 2))
    assert (expected.p50_ms, expected.p95_ms, expected.p99_ms) == pytest.approx((10, 10, 10))
    assert expected.mean_batch == 1
    assert expected.busy == pytest.approx(0.0001, rel=0.05)


def test_percentiles_are_those_of_the_service_times_where_nothing_waits() -> None:
    times = np.arange(1.0, 101)
    expected = simulate(0.001, times[None], Batching(1, 1))
    assert expected.p50_ms == pytest.approx(50, abs=1.5)
    assert expected.p99_ms == pytest.approx(99, abs=0.5)
    assert expected.p99_lowest_ms <= expected.p99_ms <= expected.p99_highest_ms


def test_a_queue_delay_is_in_the_latency() -> None:
    expected = simulate(0.01, np.array([[10.0], [15.0]]), Batching(1, 2, delay_ms=4))
    assert expected.p50_ms == pytest.approx(14)


def test_utilisation_is_rate_times_service_time() -> None:
    assert simulate(150, np.array([[10.0]]), Batching(2, 1)).busy == pytest.approx(0.75, rel=0.01)


def test_the_most_requests_are_those_of_full_batches() -> None:
    table = np.array([[10.0], [12.0], [14.0], [16.0]])
    assert most_per_s(table, Batching(1, 1)) == 100
    assert most_per_s(table, Batching(3, 4)) == 750
    crowded = simulate(2000, table, Batching(3, 4))
    assert crowded.mean_batch == pytest.approx(4, rel=0.01)
    assert crowded.busy == 1


def test_a_queue_settles_before_it_is_counted() -> None:
    """Five per cent too many for one replica: who comes later waits longer, and the first tenth is the best of it."""
    table = np.array([[10.0]])
    first = [run.latency_ms[: len(run.latency_ms) // 10] for run in runs_of(105, table, Batching(1, 1))]
    assert simulate(105, table, Batching(1, 1)).p50_ms > 2 * np.median(first)


def test_one_simulation_gives_one_answer() -> None:
    table, batching = exponential(10.0, 100)[None], Batching(2, 1)
    assert simulate(100, table, batching) == simulate(100, table, batching)
    runs = runs_of(100, table, batching, 50)
    assert len(runs) == RUNS
    assert len({run.latency_ms.tobytes() for run in runs}) == RUNS
