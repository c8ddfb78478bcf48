"""Plan which registers share memory: those that no operator needs at the same time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transom.runtime.native.list_registers import Register
from transom.runtime.native.operators import ROWS, Attention, Embed, OperatorList, Patches, Unpack

SCALE = "\0scale"  # the end of the name of the scales of a register's rows: no register of a list has it
ROW = "\0row"  # the same of the rows of a result while they are finished, where none keeps them
FLOAT_BYTES = 4


@dataclass
class MemoryPlan:
    """Buffers by the kind of their rows and the bytes of one, and which of them each register lies in.

    A register whose rows have a scale each has a second one, its name and SCALE, of float32 (rows). What is collected
    of a row that is finished as a whole has one too, the name of the first result and ROW, of float32 (rows, columns).
    """

    rows: list[int] = field(default_factory=list)  # of each buffer, a place in ROWS
    row_bytes: list[int] = field(default_factory=list)
    buffer: dict[str, int] = field(default_factory=dict)


def reads_of(operator: Any) -> list[str]:
    """Return the registers that an operator reads."""
    if isinstance(operator, Attention):
        found = [operator.query, operator.key, operator.value]
    elif isinstance(operator, Embed | Patches):
        found = []
    else:
        found = [operator.source]
    if not isinstance(operator, Unpack):
        found.append(operator.then.residual)
    return [name for name in found if name is not None]


def writes_of(operator: Any) -> list[str]:
    """Return the registers that an operator writes."""
    if isinstance(operator, Unpack):
        return []
    then = operator.then
    found = (then.sum, then.out, then.quantized and then.quantized.to)
    return [name for name in found if name is not None]


def collected_in(operator: Any) -> str | None:
    """Return the register that an operator collects its rows in, where it is none of the list's; else None.

    A norm and the scale of a row need all of the row, and the library collects that in ``out``.
    """
    if isinstance(operator, Unpack) or operator.then.out is not None:
        return None
    then = operator.then
    whole = then.norm is not None or (then.quantized is not None and then.quantized.scale is None)
    return writes_of(operator)[0] + ROW if whole else None


def with_scales(names: Sequence[str], registers: Mapping[str, Register]) -> list[str]:
    """Return registers and the scales of their rows, where they have such."""
    return [*names, *(name + SCALE for name in names if has_scales(registers[name]))]


def has_scales(register: Register) -> bool:
    """Return whether each row of a register has a scale of its own."""
    return register.quantized is not None and register.quantized.scale is None


def plan_of(operators: OperatorList, registers: Mapping[str, Register]) -> MemoryPlan:
    """Give each register a buffer that is free from the operator that writes it to the last that reads it."""
    last: dict[str, int] = dict.fromkeys(operators.outputs, len(operators.operators))
    for index, operator in enumerate(operators.operators):
        for name in with_scales([*reads_of(operator), *writes_of(operator)], registers):
            last[name] = max(index, last.get(name, 0))
    plan = MemoryPlan()
    free: list[list[int]] = [[] for _ in ROWS]
    for index, operator in enumerate(operators.operators):
        here = with_scales(writes_of(operator), registers)
        collected = collected_in(operator)
        if collected is not None:
            here.append(collected)
            last[collected] = index
        for name in here:
            register = registers[name.removesuffix(SCALE).removesuffix(ROW)]
            kind = ROWS.index(register.rows)
            size = register.row_bytes
            if name.endswith((SCALE, ROW)):
                size = FLOAT_BYTES * (1 if name.endswith(SCALE) else register.columns)
            plan.buffer[name] = take(plan, free[kind], kind, size)
        done = {*here, *with_scales(reads_of(operator), registers)}
        for name in sorted(done, key=lambda name: plan.buffer[name]):
            if last[name] == index:
                free[plan.rows[plan.buffer[name]]].append(plan.buffer[name])
                last[name] = len(operators.operators) + 1  # given back once
    return plan


def take(plan: MemoryPlan, free: list[int], kind: int, size: int) -> int:
    """Take the free buffer that fits best, else make the largest one fit, else a new one."""
    if free:
        fitting = [buffer for buffer in free if plan.row_bytes[buffer] >= size]
        best = min(fitting, key=plan.row_bytes.__getitem__) if fitting else max(free, key=plan.row_bytes.__getitem__)
        free.remove(best)
        plan.row_bytes[best] = max(plan.row_bytes[best], size)
        return best
    plan.rows.append(kind)
    plan.row_bytes.append(size)
    return len(plan.rows) - 1
