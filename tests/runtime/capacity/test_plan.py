"""Test how service times are measured, and how many replicas a plan asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from command_line import changed_bundle
from paths import KEPT
from transom.runtime import load
from transom.runtime.bench import Effort
from transom.runtime.capacity import plan as capacity_module
from transom.runtime.capacity import queueing
from transom.runtime.capacity.plan import MOST_REPLICAS, capacity, fewest_replicas, plan_replicas, replicas_here
from transom.runtime.capacity.queueing import Batching
from transom.runtime.capacity.service_times import batch_sizes, measure_service_times, service_time, work_of
from transom.runtime.errors import InputError, ShapeError

CONSTANT = {1: [10.0], 2: [12.0], 4: [16.0]}  # ms: 100, 167 and 250 requests a second of one replica
SHORT: dict[str, Any] = {"runs": 3, "seconds": 0.0}


@pytest.fixture(autouse=True)
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What plans are made of is enough of a simulation for these tests; test_queueing.py has whole ones."""
    monkeypatch.setattr(queueing, "REQUESTS", 4000)


@pytest.mark.parametrize(("most", "sizes"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (16, [1, 2, 4, 8, 16])])
def test_batch_sizes_double_up_to_the_limit(most: int, sizes: list[int]) -> None:
    assert batch_sizes(most) == sizes


def test_the_work_of_an_encoder_is_a_call_of_its_graph() -> None:
    with load(KEPT / "bert-fp32") as loaded:
        work = work_of(loaded, {"S": 5})
        assert (work.name, work.sizes, list(work.calls)) == ("graph model", {"S": 5}, [1, 2])
        for rows, call in work.calls.items():
            assert {len(output) for output in call().values()} == {rows}  # type: ignore[attr-defined]
        assert list(work_of(loaded, {}, max_batch=1).calls) == [1]


def test_one_of_several_graphs_is_chosen_by_name() -> None:
    with load(KEPT / "clip-fp32") as loaded:
        assert work_of(loaded, {}).name == "graph image"
        assert work_of(loaded, {"S": 4}, graph="text").sizes == {"S": 4}
        with pytest.raises(InputError, match="unknown graph 'sound'; this bundle has image, text"):
            work_of(loaded, {}, graph="sound")


@pytest.mark.parametrize(
    ("name", "shape"),
    [("gpt-fp32", {"S": 3}), ("transformer-fp32", {"S": 3}), ("seq2seq-fp32", {"S": 3}), ("show_attend_tell-fp32", {})],
)
def test_the_work_of_a_generator_is_whole_generations_of_equal_length(name: str, shape: dict[str, int]) -> None:
    with load(KEPT / name) as loaded:
        work = work_of(loaded, shape, new_tokens=4)
        assert work.name == "generation"
        assert work.sizes == {**shape, "new": 4}
        assert list(work.calls) == [1, 2]
        for rows, call in work.calls.items():
            assert [len(ids) for ids in call()] == [4] * rows  # type: ignore[attr-defined]


def test_images_among_the_tokens_are_read_in_every_generation() -> None:
    with load(KEPT / "flamingo-fp32") as loaded:
        work = work_of(loaded, {"S": 6, "I": 2}, new_tokens=3)
        assert work.sizes == {"S": 6, "I": 2, "new": 3}
        assert [len(ids) for ids in work.calls[2]()] == [3, 3]  # type: ignore[attr-defined]


def test_beams_take_rows_of_a_batch(tmp_path: Path) -> None:
    """Two beams of each prompt, at most two rows: one prompt."""
    bundle = changed_bundle(KEPT / "transformer-fp32", tmp_path, lambda words: words["generation"].update(num_beams=2))
    with load(bundle) as loaded:
        work = work_of(loaded, {"S": 3}, new_tokens=4)
        assert list(work.calls) == [1]
        assert [len(ids) for ids in work.calls[1]()] == [4]  # type: ignore[attr-defined]


def test_requests_that_sample_share_no_batch(tmp_path: Path) -> None:
    bundle = changed_bundle(KEPT / "gpt-fp32", tmp_path, lambda words: words["generation"].update(do_sample=True))
    with load(bundle) as loaded:
        work = work_of(loaded, {}, new_tokens=2)
        assert list(work.calls) == [1]
        assert "samples" in work.note


@pytest.mark.parametrize(
    ("name", "shape", "options", "error", "said"),
    [
        ("bert-fp32", {"B": 2}, {}, InputError, "B is 2; batches of 1, 2, 4, ... rows are measured"),
        ("bert-fp32", {"Q": 2}, {}, InputError, "unknown axis 'Q'; this bundle has B, S"),
        ("bert-fp32", {"S": 8}, {}, ShapeError, "axis S is 8; this bundle allows 1..7"),
        ("bert-fp32", {}, {"max_batch": 3}, ShapeError, "axis B is 3; this bundle allows 1..2"),
        ("bert-fp32", {}, {"new_tokens": 3}, InputError, "a bundle for text-classification generates nothing"),
        ("gpt-fp32", {}, {"graph": "decoder"}, InputError, "its whole generations are measured"),
        ("gpt-fp32", {"S": 7}, {"new_tokens": 10}, InputError, "7 tokens and 10 new ones make 17; the context holds 7"),
    ],
)
def test_work_that_a_bundle_cannot_do(
    name: str, shape: dict[str, int], options: dict[str, Any], error: type[Exception], said: str
) -> None:
    with load(KEPT / name) as loaded, pytest.raises(error, match=said):
        work_of(loaded, shape, **options)


def test_batch_sizes_take_turns_until_each_has_its_calls() -> None:
    called: list[int] = []
    calls = {rows: lambda rows=rows: called.append(rows) for rows in (1, 2)}  # type: ignore[misc]
    times = measure_service_times(calls, Effort(3, 1, 10.0))
    assert called == [1, 2, 1, 2, 1, 2, 1, 2]
    assert {rows: len(found) for rows, found in times.items()} == {1: 3, 2: 3}


def test_a_size_whose_time_is_over_is_called_no_more_and_others_are() -> None:
    calls = {1: lambda: None, 2: lambda: sum(range(300_000))}  # some milliseconds
    times = measure_service_times(calls, Effort(40, 1, 0.002))
    assert len(times[2]) < 40
    assert len(times[1]) > len(times[2])
    once = measure_service_times(calls, Effort(40, 1, 0.0))
    assert {rows: len(found) for rows, found in once.items()} == {1: 1, 2: 1}


def test_a_service_time_has_its_spread() -> None:
    found = service_time(4, [5.0, 1.0, 4.0, 2.0, 3.0])
    assert (found.batch, found.runs, found.mean_ms, found.p50_ms, found.most_ms) == (4, 5, 3.0, 3.0, 5.0)
    assert (found.p95_ms, found.p99_ms) == pytest.approx((4.8, 4.96))
    assert found.rows_per_s == pytest.approx(4 / 0.003)


@pytest.mark.parametrize(("rate", "least"), [(50, 1), (240, 1), (260, 2), (900, 4)])
def test_a_plan_has_the_fewest_replicas_that_keep_the_p99(rate: float, least: int) -> None:
    """No fewer than rate / 250, what full batches of four allow."""
    plan = plan_replicas(CONSTANT, rate, 60.0)
    answer = plan.answer.expected
    assert answer.batching.replicas >= least
    assert answer.p99_ms <= 60
    for one in plan.alternatives:
        expected = one.expected
        assert one.keeps == (expected.p99_ms <= 60)
        assert one.most_per_s == pytest.approx(
            expected.batching.replicas * expected.batching.limit * 1e3 / CONSTANT[expected.batching.limit][0]
        )
        assert rate < one.most_per_s
        assert expected.p50_ms <= expected.p95_ms <= expected.p99_ms
        if one.keeps:
            assert expected.batching.replicas >= answer.batching.replicas
    assert plan.answer in plan.alternatives
    assert plan == plan_replicas(CONSTANT, rate, 60.0)


def test_each_batch_limit_has_one_replica_less_and_one_more() -> None:
    plan = plan_replicas(CONSTANT, 150, 25.0)
    for limit in CONSTANT:
        counts = [
            (one.expected.batching.replicas, one.keeps)
            for one in plan.alternatives
            if one.expected.batching.limit == limit and one.expected.batching.delay_ms == 0
        ]
        kept = [count for count, keeps in counts if keeps]
        assert kept == [min(kept), min(kept) + 1]
        assert [count for count, keeps in counts if not keeps] in ([], [min(kept) - 1])


def test_requests_that_never_wait_need_one_replica_and_take_the_service_time() -> None:
    plan = plan_replicas(CONSTANT, 0.01, 10.5)
    answer = plan.answer.expected
    assert (answer.batching.replicas, answer.batching.limit, answer.batching.delay_ms) == (1, 4, 0)
    assert answer.p99_ms == pytest.approx(10)


def test_of_equal_replicas_and_about_equal_p99_the_answer_can_answer_most() -> None:
    plan = plan_replicas({1: [10.0], 2: [10.0], 4: [10.0]}, 5, 60.0)
    assert plan.answer.expected.batching == Batching(1, 4)
    slow = plan_replicas({1: [10.0], 2: [60.0], 4: [200.0]}, 20, 60.0)  # where a batch is no gain
    assert slow.answer.expected.batching == Batching(1, 1)


def test_a_queue_delay_that_is_asked_for_is_in_every_batch_of_several() -> None:
    plan = plan_replicas(CONSTANT, 20, 60.0, 3.0)
    delays = {one.expected.batching.limit: one.expected.batching.delay_ms for one in plan.alternatives}
    assert delays == {1: 0.0, 2: 3.0, 4: 3.0}
    assert {one.expected.batching.delay_ms for one in plan_replicas(CONSTANT, 20, 60.0, 0.0).alternatives} == {0.0}


def test_a_p99_below_the_service_time_of_one_row_is_refused_with_what_is_possible() -> None:
    with pytest.raises(InputError, match=r"9 ms cannot be kept: one row takes longer .* 10 ms at p99 of 1 calls"):
        plan_replicas(CONSTANT, 5, 9.0)


def test_a_rate_beyond_the_simulation_is_refused_with_a_way_out() -> None:
    with pytest.raises(InputError, match=r"need 4,001 replicas at least; .* Ask for 1/10 of the rate, and take 10 t"):
        plan_replicas({1: [1.0]}, 4e6, 50.0)
    with pytest.raises(InputError, match=r"need 40,001 replicas at least; .* Ask for 1/100 of the rate, and take 100"):
        plan_replicas({1: [1.0]}, 4e7, 50.0)
    assert plan_replicas({1: [1.0]}, 4e5, 50.0).answer.keeps


def test_a_p99_too_close_to_the_service_time_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four replicas that work 97 % of the time leave some waiting, of more than a ten-thousandth of a millisecond."""
    monkeypatch.setattr(capacity_module, "MOST_REPLICAS", 4)
    with pytest.raises(InputError, match=r"kept by no number of replicas up to 4, at 3900 requests a second"):
        plan_replicas({1: [1.0]}, 3900, 1.0001)


@pytest.mark.parametrize(
    ("rate", "p99", "delay", "said"),
    [
        (0, 50, None, "the rate is 0; expected requests per second, above 0"),
        (-1, 50, None, "the rate is -1"),
        (float("nan"), 50, None, "the rate is nan"),
        (1e-306, 50, None, "the rate is 1e-306 requests per second; expected 1e-06 to 1e.09"),
        (1e308, 50, None, "the rate is 1e.308 requests per second; expected 1e-06 to 1e.09"),
        (float("inf"), 50, None, "the rate is inf"),
        (5, 0, None, "p99 is 0 ms; expected a time above 0"),
        (5, float("nan"), None, "p99 is nan ms"),
        (5, 50, -1, "the queue delay is -1 ms"),
        (5, 50, 50, "less than the p99 of 50 ms"),
    ],
)
def test_targets_that_are_none(rate: float, p99: float, delay: float | None, said: str) -> None:
    with pytest.raises(InputError, match=said):
        plan_replicas(CONSTANT, rate, p99, delay)
    with pytest.raises(InputError, match=said):  # before the bundle is opened
        capacity("no bundle", rate, p99, queue_delay_ms=delay)


@pytest.mark.parametrize("least", [1, 3, 17, MOST_REPLICAS])
@pytest.mark.parametrize("more", [0, 1, 2, 5, 100])
def test_the_search_finds_the_first_number_that_does(least: int, more: int) -> None:
    wanted = least + more
    asked: list[int] = []

    def keeps(count: int) -> bool:
        asked.append(count)
        return count >= wanted

    assert fewest_replicas(least, keeps) == (wanted if wanted <= MOST_REPLICAS else None)
    assert all(least <= count <= MOST_REPLICAS for count in asked)


def test_the_search_ends_where_nothing_does() -> None:
    assert fewest_replicas(1, lambda count: False) is None
    assert fewest_replicas(MOST_REPLICAS + 1, lambda count: True) is None


@pytest.mark.parametrize(("threads", "cores", "here"), [(None, 8, 1), (1, 8, 8), (3, 8, 2), (16, 8, 0)])
def test_replicas_have_cores_of_their_own(threads: int | None, cores: int, here: int) -> None:
    assert replicas_here(threads, cores) == here


@pytest.mark.parametrize(("name", "work"), [("bert-fp32", "graph model"), ("gpt-int8", "generation")])
def test_capacity_measures_and_answers(name: str, work: str) -> None:
    said: list[tuple[str, int, int]] = []
    found = capacity(
        KEPT / name,
        0.01,
        60_000.0,
        threads=1,
        progress=lambda what, done, total: said.append((what, done, total)),
        **SHORT,
    )
    assert found.work == work
    assert [one.batch for one in found.service] == [1, 2]
    assert all(one.runs == 1 and one.mean_ms > 0 for one in found.service)
    assert found.plan.answer.expected.batching.replicas == 1
    assert found.replicas_here == found.cores
    assert np.isfinite([one.expected.p99_ms for one in found.plan.alternatives]).all()
    assert ("service times of batches of 1, 2", 0, 3) in said
    assert said[-1] == ("simulating queues", 2, 2)
