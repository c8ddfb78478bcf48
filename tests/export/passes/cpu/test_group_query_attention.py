"""Attention over a cache as one operator beside the graph that it replaces: prompts, chunks, uneven rows, steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray

from cached_graphs import CAPACITY, GRAPH, HEADS, SIZE, E, attention
from tiny_graphs import normal, operators
from transom.export.bundle_graphs import operator_counts
from transom.export.passes.cpu import optimize_for_cpu
from transom.export.passes.cpu.group_query_attention import group_query_attention

RUNS = {  # rows, new tokens, where each row begins
    "a prompt": (1, 5, [0]),
    "prompts": (3, 5, [0, 0, 0]),
    "prompts that fill the buffer": (2, CAPACITY, [0, 0]),
    "the first token": (2, 1, [0, 0]),
    "a step": (1, 1, [7]),
    "a step into the last place": (1, 1, [CAPACITY - 1]),
    "a step of rows at places of their own": (3, 1, [4, 0, 9]),
    "a chunk": (1, 4, [6]),
    "chunks of rows that begin together": (2, 4, [6, 6]),
    "chunks of rows at places of their own": (3, 4, [2, 8, 0]),
}


def rewritten(packed: bool = True) -> ir.Model:
    model = attention(packed)
    assert optimize_for_cpu(model)["group_query_attention"] == 1
    return model


def session_of(model: ir.Model) -> onnxruntime.InferenceSession:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def feeds_of(rows: int, new: int, starts: list[int], *, packed: bool, behind: float = 100) -> dict[str, Any]:
    """Tokens and caches; what lies behind a row's tokens is ``behind``, which one wrong key would show."""
    qkv = normal(rows, new, 3 * E)
    caches = {
        f"{name}_cache": normal(rows, HEADS, CAPACITY, SIZE, seed=s) for s, name in enumerate(("key", "value"), 1)
    }
    for cache in caches.values():
        for row, start in enumerate(starts):
            cache[row, :, start + new :] = behind
    tokens = {"qkv": qkv} if packed else dict(zip("qkv", np.split(qkv, 3, axis=2), strict=True))
    return {**tokens, **caches, "write_indices": np.array(starts)}


def run(session: onnxruntime.InferenceSession, feeds: dict[str, Any]) -> list[NDArray[np.float32]]:
    return list(session.run(["y", "keys", "values"], feeds))


@pytest.mark.parametrize("packed", [True, False])
def test_one_operator_stands_for_the_heads_the_cache_and_the_attention(packed: bool) -> None:
    counts = operator_counts(rewritten(packed))
    assert counts["com.microsoft::GroupQueryAttention"] == 2, "together, and row by row"
    assert counts["If"] == counts["Scan"] == 1
    assert not counts.keys() & {"Attention", "TensorScatter", "Split", "Reshape", "Transpose", "Range", "LessOrEqual"}


@pytest.mark.parametrize("packed", [True, False])
def test_the_operator_computes_what_the_graph_did(packed: bool) -> None:
    theirs, ours = session_of(attention(packed)), session_of(rewritten(packed))
    for what, case in RUNS.items():
        feeds = feeds_of(*case, packed=packed)
        expected, found = run(theirs, feeds), run(ours, feeds)
        np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=2e-6, err_msg=what)
        for cache, exact in zip(found[1:], expected[1:], strict=True):
            for row, start in enumerate(case[2]):  # behind a row's end the operator leaves what it likes
                filled = np.s_[row, :, : start + case[1]]
                np.testing.assert_array_equal(cache[filled], exact[filled], err_msg=what)


def test_what_lies_behind_a_row_is_not_read() -> None:
    session = session_of(rewritten())
    for what, case in RUNS.items():
        expected, found = (run(session, feeds_of(*case, packed=True, behind=behind))[0] for behind in (0, np.nan))
        np.testing.assert_array_equal(found, expected, err_msg=what)


def test_a_row_computes_bit_for_bit_what_it_computes_alone() -> None:
    session = session_of(rewritten())
    for what, (rows, new, starts) in RUNS.items():
        feeds = feeds_of(rows, new, starts, packed=True)
        together = run(session, feeds)
        for row in range(rows):
            alone = run(session, {name: array[row : row + 1] for name, array in feeds.items()})
            np.testing.assert_array_equal(together[0][row], alone[0][0], err_msg=what)


@pytest.mark.parametrize("what", RUNS)
def test_caches_are_written_in_place(what: str) -> None:
    """One buffer, bound as input and output: new tokens go to their places, and nothing else changes."""
    rows, new, starts = RUNS[what]
    session = session_of(rewritten())
    feeds = feeds_of(rows, new, starts, packed=True)
    expected = run(session_of(attention()), feeds)
    binding, y = session.io_binding(), np.full((rows, new, E), np.nan, np.float32)
    for name, array in feeds.items():
        binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    for name, array in {"y": y, "keys": feeds["key_cache"], "values": feeds["value_cache"]}.items():
        binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    session.run_with_iobinding(binding)
    np.testing.assert_allclose(y, expected[0], rtol=0, atol=2e-6)
    behind = {row: start + new for row, start in enumerate(starts)}
    for cache, exact in zip((feeds["key_cache"], feeds["value_cache"]), expected[1:], strict=True):
        for row, end in behind.items():
            np.testing.assert_array_equal(cache[row, :, :end], exact[row, :, :end])


@pytest.mark.parametrize(
    ("rows", "new", "starts"),
    [
        (1, 1, [CAPACITY]),
        (2, 1, [3, CAPACITY]),
        (2, 4, [2, 9]),
        (1, 13, [0]),
        (1, 1, [-1]),
        (2, 1, [-1, 5]),
        (2, 3, [-2, 0]),
    ],
)
def test_tokens_outside_of_the_buffers_are_refused(rows: int, new: int, starts: list[int]) -> None:
    """As ``TensorScatter`` refuses them; bound buffers have no room to grow."""
    session = session_of(rewritten())
    feeds = feeds_of(rows, new, [0] * rows, packed=True)
    binding, y = session.io_binding(), np.zeros((rows, new, E), np.float32)
    for name, array in {**feeds, "write_indices": np.array(starts)}.items():
        binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    for name, array in {"y": y, "keys": feeds["key_cache"], "values": feeds["value_cache"]}.items():
        binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    with pytest.raises(Exception, match=r"sequence_length|seqlens_k|pre-allocated"):
        session.run_with_iobinding(binding)


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("LessOrEqual (columns, most)", "Less (columns, most)"),
        ("Attention <scale = 0.3>", "Attention <scale = 0.3, softcap = 2.0>"),
        ("Attention <scale = 0.3> (queries, keys, values, mask)", "Attention <scale = 0.3> (queries, keys, values)"),
        ("Attention <scale = 0.3> (queries, keys,", "Attention <scale = 0.3> (queries, new_keys,"),
        ("new_keys = Transpose <perm = [0, 2, 1, 3]>", "new_keys = Transpose <perm = [0, 2, 3, 1]>"),
        ("TensorScatter <axis = -2> (key_cache", 'TensorScatter <axis = -2, mode = "circular"> (key_cache'),
        ("y = Reshape (turned, whole)", "z = Reshape (turned, whole) y = Add (z, z)  w = Neg (turned)"),
    ],
)
def test_another_graph_stays(part: str, other: str) -> None:
    assert part in GRAPH
    model = attention(graph=GRAPH.replace(part, other))
    before = operators(model)
    assert group_query_attention(model) == 0
    assert operators(model) == before


def test_a_head_size_that_the_operator_refuses_stays() -> None:
    """12 is no multiple of 8."""
    graph = GRAPH.replace(f"{HEADS}, C, {SIZE}", "2, C, 12").replace(f"{HEADS}, {SIZE}", "2, 12")
    assert group_query_attention(attention(graph=graph)) == 0
    accepted = graph.replace("2, C, 12", "3, C, 8").replace("2, 12", "3, 8")
    assert group_query_attention(attention(graph=accepted)) == 1


def test_parts_in_another_order_are_no_packed_value() -> None:
    """The keys are the first part: read as three values, not as query, key and value in one."""
    graph = GRAPH.replace("SPLIT", "k, q, v = Split <axis = 2, num_outputs = 3> (qkv)")
    theirs, model = session_of(attention(graph=graph)), attention(graph=graph)
    assert optimize_for_cpu(model)["group_query_attention"] == 1
    assert operators(model)["Split"] == 1
    feeds = feeds_of(2, 3, [4, 4], packed=True)
    np.testing.assert_allclose(run(session_of(model), feeds)[0], run(theirs, feeds)[0], rtol=0, atol=2e-6)
