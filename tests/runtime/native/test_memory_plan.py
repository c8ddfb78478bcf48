"""Which registers share memory: never two that are needed at the same time, and few buffers for many layers."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest

from operator_lists import DECODER, ENCODER, HIDDEN, NORM, VISION, decoder_list, encoder_list, list_with, vision_list
from transom.runtime.graph_spec import Graph, Tensor
from transom.runtime.native.memory_plan import ROW, SCALE, MemoryPlan, collected_in, plan_of, reads_of, writes_of
from transom.runtime.native.operator_list import registers_of
from transom.runtime.native.operators import (
    TOKENS,
    Embed,
    Epilogue,
    Linear,
    OperatorList,
    Quantized,
    Table,
    Unpack,
)

LISTS = [(encoder_list, ENCODER), (decoder_list, DECODER), (vision_list, VISION)]
DEEP = Graph(
    "model",
    (Tensor("input_ids", "int64", ("B", "S"), exclusive_max=32),),
    (Tensor("last_hidden_state", "float32", ("B", "S", HIDDEN)),),
)


def planned(operators: OperatorList, graph: Graph) -> MemoryPlan:
    return plan_of(operators, registers_of(operators, graph, 1 << 20))


def lifetimes(operators: OperatorList) -> dict[str, tuple[int, int]]:
    """The operator that writes each register and the last that reads it."""
    found: dict[str, tuple[int, int]] = {}
    for index, operator in enumerate(operators.operators):
        own = collected_in(operator)
        for name in [*writes_of(operator), *([] if own is None else [own])]:
            found[name] = (index, index)
        for name in reads_of(operator):
            found[name] = (found[name][0], index)
    for name in operators.outputs:
        found[name] = (found[name][0], len(operators.operators))
    return found


@pytest.mark.parametrize(("made", "graph"), LISTS)
def test_registers_that_are_needed_at_once_lie_apart(made: Any, graph: Graph) -> None:
    operators, _ = made()
    plan, lives = planned(operators, graph), lifetimes(operators)
    for one, other in combinations(lives, 2):
        (first, last), (start, end) = lives[one], lives[other]
        if first <= end and start <= last:
            assert plan.buffer[one] != plan.buffer[other], (one, other)
    for name, register in registers_of(operators, graph, 1 << 20).items():
        buffer = plan.buffer[name]
        assert plan.row_bytes[buffer] >= register.row_bytes


def test_layers_use_the_memory_of_the_ones_before() -> None:
    """Four linears, each with a residual: two buffers of 32 bytes a row, whatever the depth."""
    layers = [
        Linear(f"x{n}", TOKENS, ("square",), Epilogue(residual=f"x{n}", norm=NORM, out=f"x{n + 1}")) for n in range(4)
    ]
    embed = Embed((Table("words", "input_ids"),), Epilogue(out="x0"))
    operators, _ = list_with("model", "input_ids", embed, *layers, Unpack("x4", "last_hidden_state"))
    plan = planned(operators, DEEP)
    assert plan.row_bytes == [4 * HIDDEN, 4 * HIDDEN]
    assert plan.buffer["x4"] == plan.buffer["x0"]


def test_rows_that_nobody_keeps_are_collected_in_memory_of_their_own() -> None:
    """A norm needs the whole row; where only its 8-bit form is a register, rows of float32 lie beside that."""
    then = Epilogue(norm=NORM, quantized=Quantized("y", None, 128))
    operators, _ = list_with(
        "model",
        "input_ids",
        Embed((Table("words", "input_ids"),), then),
        Linear("y", TOKENS, ("wq",), Epilogue(out="z"), False, ("sq",)),
        Unpack("z", "last_hidden_state"),
    )
    plan = planned(operators, DEEP)
    assert {*plan.buffer} == {"y", "y" + SCALE, "y" + ROW, "z"}
    sizes = {name: plan.row_bytes[buffer] for name, buffer in plan.buffer.items()}
    assert (sizes["y"], sizes["y" + SCALE], sizes["y" + ROW]) == (HIDDEN, 4, 4 * HIDDEN)
    assert len({plan.buffer[name] for name in ("y", "y" + SCALE, "y" + ROW)}) == 3
