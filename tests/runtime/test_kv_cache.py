"""The KV cache's buffers, by pencil: grown in steps, rows reordered, forked and dropped without needless copies."""

from __future__ import annotations

import numpy as np
import pytest

from transom.runtime.graph_spec import Tensor
from transom.runtime.kv_cache import STEP, KVCache


def pencil_cache(rows: int = 2, limit: int = 300) -> KVCache:
    shape = ("B", 1, "C", 1)
    return KVCache([Tensor("k", "float32", shape, state=True), Tensor("v", "float16", shape, state=True)], rows, limit)


def write(cache: KVCache, first: int) -> None:
    """Column c of row r gets ``first`` + 1000 r + c in ``k``, the negative in ``v``; unused ones stay zeros."""
    for sign, name in ((1, "k"), (-1, "v")):
        for row in range(cache.rows):
            cache.buffers[name][row, 0, : cache.used, 0] = sign * (first + 1000 * row + np.arange(cache.used))


def firsts(cache: KVCache, column: int = 0) -> list[float]:
    return [float(value) for value in cache.buffers["k"][:, 0, column, 0]]


def test_reserve_grows_in_steps_and_keeps_what_is_there() -> None:
    cache = pencil_cache()
    assert (cache.capacity, cache.used) == (0, 0)
    cache.reserve(3)
    assert (cache.capacity, cache.used) == (STEP, 3)
    assert cache.buffers["k"].shape == (2, 1, STEP, 1)
    assert (cache.buffers["k"].dtype, cache.buffers["v"].dtype) == (np.float32, np.float16)
    write(cache, 5)
    same = cache.buffers["k"]
    cache.reserve(STEP)
    assert cache.buffers["k"] is same  # room enough: nothing moved
    cache.reserve(STEP + 1)
    assert (cache.capacity, cache.used) == (2 * STEP, STEP + 1)
    assert cache.buffers["k"][:, 0, :4, 0].tolist() == [[5, 6, 7, 0], [1005, 1006, 1007, 0]]
    assert cache.buffers["v"][:, 0, :4, 0].tolist() == [[-5, -6, -7, 0], [-1005, -1006, -1007, 0]]
    assert not cache.buffers["k"][:, :, 3:].any()
    cache.reserve(299)
    assert cache.capacity == 300  # the limit, not 3 * STEP
    cache.reserve(7)
    assert (cache.capacity, cache.used) == (300, 299)  # asking for less gives nothing back


def test_buffers_are_what_a_graph_may_write_into() -> None:
    cache = pencil_cache(rows=3)
    cache.reserve(9)
    cache.reorder(np.array([1, 2]))
    cache.reorder(np.array([1, 1, 0, 0]))
    for buffer in cache.buffers.values():
        assert buffer.flags.c_contiguous
        assert buffer.flags.writeable


def test_select_touches_changed_rows_up_to_what_is_used_alone() -> None:
    """Everything past ``used`` and every row that stays is poisoned with a value that a copy would carry along."""
    cache = pencil_cache(rows=4)
    cache.reserve(2)
    write(cache, 1)
    for buffer in cache.buffers.values():
        for row in range(4):
            buffer[row, :, 2:] = 7 * row  # a copy of whole rows would move these
    kept = cache.buffers["k"]
    cache.reorder(np.array([0, 2, 2, 1]))
    assert cache.buffers["k"].base is kept or cache.buffers["k"] is kept  # the same memory
    assert firsts(cache) == [1, 2001, 2001, 1001]
    assert firsts(cache, 1) == [2, 2002, 2002, 1002]
    assert firsts(cache, 2) == [0, 7, 14, 21]  # not copied
    cache = pencil_cache(rows=2)
    cache.reserve(2)
    write(cache, 1)
    cache.buffers["k"].flags.writeable = cache.buffers["v"].flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        cache.reorder(np.array([1, 0]))


def test_beams_that_cross_are_not_mixed_up() -> None:
    """Each row takes another's place: whoever copies one by one overwrites what is still needed."""
    cache = pencil_cache(rows=3)
    cache.reserve(1)
    write(cache, 0)
    cache.reorder(np.array([2, 0, 1]))
    assert firsts(cache) == [2000, 0, 1000]


def test_finished_rows_go_and_rows_are_forked() -> None:
    cache = pencil_cache(rows=3)
    cache.reserve(2)
    write(cache, 1)
    cache.reorder(np.array([0, 2]))
    assert (cache.rows, firsts(cache)) == (2, [1, 2001])
    cache.reserve(STEP + 5)
    assert (cache.rows, firsts(cache), firsts(cache, 2)) == (2, [1, 2001], [0, 0])
    cache.reorder(np.array([1, 1, 0, 0, 1]))
    assert (cache.rows, firsts(cache), cache.capacity) == (5, [2001, 2001, 1, 1, 2001], 2 * STEP)
    assert not cache.buffers["k"][:, :, 2:].any()
    cache.reorder(np.array([], dtype=np.intp))
    assert cache.rows == 0


def test_a_row_is_copied_from_where_it_differs() -> None:
    """Rows forked at position 3 differ from there on; one that takes another's place gets 3 and 4, whatever is before.

    A row of another prompt is copied whole, and a fork remembers where its own begins.
    """
    cache = pencil_cache(rows=2)
    cache.reserve(3)
    write(cache, 1)
    cache.reorder(np.array([0, 0, 1]), np.array([3, 3]))
    cache.reserve(5)
    for row in range(3):
        cache.buffers["k"][row, :, 3:5] = 10 * (row + 1)
    cache.buffers["k"][1, :, 0] = -1  # never so: it shows what is copied
    cache.reorder(np.array([0, 0, 2]), np.array([5, 5, 5]))
    assert cache.buffers["k"][1, 0, :5, 0].tolist() == [-1, *cache.buffers["k"][0, 0, 1:5, 0].tolist()]
    cache.reserve(6)
    cache.reorder(np.array([1, 1, 2]), np.array([6, 6, 6]))  # alike up to 5 now
    assert cache.buffers["k"][0, 0, 0, 0] != -1
    cache.reorder(np.array([2, 1, 2]), np.array([6, 6, 6]))
    np.testing.assert_array_equal(cache.buffers["k"][0], cache.buffers["k"][2])
    cache.reorder(np.array([1, 1, 2]))  # without the ends all is known from before: another prompt's
    np.testing.assert_array_equal(cache.buffers["k"][0], cache.buffers["k"][1])


def test_random_forks_are_what_whole_copies_give() -> None:
    """Three prompts of different lengths, padded; beams fork, change places and end, and each writes at its own end."""
    rng = np.random.default_rng(0)
    ends = np.array([2, 5, 3])
    ours, whole = pencil_cache(rows=3, limit=64), pencil_cache(rows=3, limit=64)
    for cache in (ours, whole):
        cache.reserve(5)
        write(cache, 1)
    for step in range(40):
        count = [6, 6, 6, 4, 7, 5][step % 6]
        rows = rng.integers(0, len(ends), count)
        rows = np.where(rng.random(count) < 0.6, np.minimum(np.arange(count), len(ends) - 1), rows)
        ours.reorder(rows, ends)
        whole.reorder(rows)
        whole._alike[...] = 0
        ends = ends[rows]
        for cache in (ours, whole):
            cache.reserve(int(ends.max()) + 1)
            for row, end in enumerate(ends.tolist()):
                cache.buffers["k"][row, :, end] = 1000 * step + row
        ends = ends + 1
        for row, end in enumerate(ends.tolist()):
            np.testing.assert_array_equal(ours.buffers["k"][row, :, :end], whole.buffers["k"][row, :, :end])
