"""Hold the memory of one run of a program: registers, working memory, and the table of pointers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.runtime.backends.base import Array
from transom.runtime.errors import ShapeError
from transom.runtime.native import records
from transom.runtime.native.memory import Memory, address_of, aligned
from transom.runtime.native.operators import ROWS, Unpack
from transom.runtime.native.program import SCRATCH, Program, Slot, Variant, output_slot, register_slot
from transom.runtime.native.rows import Rows
from transom.runtime.process_bound import ProcessBound


class Workspace(ProcessBound):
    """The memory of one run at a time: registers, working memory, and the table of pointers."""

    def __init__(self, program: Program) -> None:
        self._program, plan = program, program.plan
        self.slots: NDArray[np.uintp] = np.zeros(len(program.slots), np.uintp)
        self.run = records.Run(slots=address_of(self.slots))
        self._memory = Memory(0)
        self._places = np.array([program.slots[register_slot(name)] for name in plan.buffer], np.intp)
        self._buffers = np.array(list(plan.buffer.values()), np.intp)
        self._placed: tuple[Any, ...] = ()
        self._addresses: NDArray[np.uintp] = np.zeros(0, np.uintp)

    @property
    def size(self) -> int:
        """The bytes of its registers and working memory."""
        return self._memory.size

    def place(self, rows: Rows, scratch: int, threads: int) -> None:
        """Give each register its memory, and the run what it says of ``rows``."""
        key = (rows.counts, scratch, threads)
        if key != self._placed:
            self._placed = ()
            plan = self._program.plan
            sizes = [aligned(rows.counts[kind] * size) for kind, size in zip(plan.rows, plan.row_bytes, strict=True)]
            total = sum(sizes) + aligned(scratch) * threads
            if total > self._memory.size:
                self._memory = Memory(0)  # before there is other memory, which then need not fit beside it
                self._memory = Memory(total)
            starts = np.cumsum([0, *sizes]).astype(np.uintp) + np.uintp(self._memory.address)
            self._addresses = starts[:-1][self._buffers]
            self._working = starts[-1]
            self._placed = key
        self.slots[self._places] = self._addresses
        if SCRATCH in self._program.slots:
            self.slots[self._program.slots[SCRATCH]] = self._working
        run = self.run
        for kind in range(len(ROWS)):
            run.rows[kind] = rows.counts[kind]
        for name in ("first_row", "column", "key_valid", "past", "cross_valid"):
            setattr(run, name, address_of(getattr(rows, name)))
        run.capacity, run.cross_length = rows.capacity, rows.cross_length
        run.padded_length, run.threads = rows.length, threads

    def bind(self, arrays: Mapping[Slot, Array]) -> None:
        """Let slots be arrays, which the caller keeps while it runs."""
        for slot, array in arrays.items():
            place = self._program.slots.get(slot)
            if place is not None:
                self.slots[place] = array.ctypes.data


def output_slots(program: Program, variant: Variant, rows: Rows, outputs: Mapping[str, Array]) -> dict[Slot, Array]:
    """Return which slots are outputs. Raises ShapeError for an array that has another number of elements."""
    found: dict[Slot, Array] = {}
    for register, name in variant.direct.items():
        known = program.registers[register]
        check_size(name, outputs[name], rows.counts[ROWS.index(known.rows)] * known.columns)
        found[register_slot(register)] = outputs[name]
    for part in variant.parts:
        if isinstance(part, Unpack):
            columns = part.columns or program.registers[part.source].columns - part.column
            check_size(part.output, outputs[part.output], rows.sequences * rows.length * columns)
            found[output_slot(part)] = outputs[part.output]
    return found


def check_size(name: str, array: Array, elements: int) -> None:
    if array.size != elements:
        raise ShapeError(f"output {name!r} is to have shape {array.shape}; the inputs give {elements} elements of it.")
