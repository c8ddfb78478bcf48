"""Execute graphs with the native library: rows packed, memory reused, no work for padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.runtime.backends.base import Array, BoundRun, Read, ReadInPieces, RepeatedRun
from transom.runtime.errors import BundleError, ShapeError
from transom.runtime.host import usable_cores
from transom.runtime.json_reader import parse_json
from transom.runtime.manifest_graphs import GraphFile
from transom.runtime.native import records
from transom.runtime.native.library import NativeLibrary
from transom.runtime.native.memory import Memory, address_of, aligned
from transom.runtime.native.operator_list import list_from_json
from transom.runtime.native.operators import ROWS, Unpack
from transom.runtime.native.program import SCRATCH, Program, Slot, Variant, output_slot, register_slot
from transom.runtime.native.rows import Packer, Rows
from transom.runtime.process_bound import ProcessBound

NATIVE = "native"  # the file of a graph's list of operators, among its files
KEPT = 4  # workspaces that wait for the next run
KEY_STEP = 64  # working memory is asked for so many keys at a time


class NativeBackend(ProcessBound):
    """A graph as a list of fused operators; callable from many threads at once.

    Raises BundleError where the list or the weights are not usable, BackendError where there is no memory.
    """

    device = "cpu"

    def __init__(self, file: GraphFile, read: Read, threads: int | None, library: NativeLibrary) -> None:
        self.graph = file.graph.with_state_dtype("float32")
        self.library, self.threads = library, threads or usable_cores()
        name = file.files[NATIVE]
        weights = weights_size(file, read)
        operators = list_from_json(parse_json(read(name), name), self.graph, weights)
        if operators.weights != file.weights:
            raise BundleError(f"{name} reads {operators.weights[:60]!r}, bundle.json has {file.weights!r}; export it again.")
        self._program = Program(operators, self.graph, weights, library, read)
        self._packer = Packer(self._program, self.graph)
        self._scratch: dict[int, int] = {}
        self._free: list[Workspace] = []

    @property
    def packs_rows(self) -> bool:
        """Whether tokens whose mask is 0 cost nothing."""
        return self._program.operators.mask is not None

    def run(self, feeds: Mapping[str, Array], shapes: Mapping[str, Sequence[int]]) -> dict[str, Array]:
        wanted = frozenset(t.name for t in self.graph.outputs if t.name in shapes and t.aliases is None)
        variant = self._program.variant(wanted, padded=True)
        rows = self._packer.pack(feeds, variant)
        if not rows.padded:
            variant = self._program.variant(wanted, padded=False)
        workspace = self._free.pop() if self._free else Workspace(self._program)
        outputs = {name: np.empty(tuple(shapes[name]), np.float32) for name in wanted}
        workspace.place(rows, self.scratch(rows.longest), self.threads)
        workspace.bind(rows.slots)
        workspace.bind(output_slots(self._program, variant, rows, outputs))
        self.library.execute(variant.operators, workspace.run)
        if len(self._free) < KEPT:
            self._free.append(workspace)
        return outputs

    def bound_run(self, feeds: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> BoundRun:
        """Return a run over these inputs, which are read anew each time."""
        if self._packer.caches:
            from transom.runtime.native.bound_run import NativeBoundRun

            return NativeBoundRun(self, self._program, self._packer, feeds, shapes)
        return RepeatedRun(self, feeds, shapes)

    def give_back(self) -> None:
        """Free the memory of activations; the next run takes new memory."""
        self._free.clear()

    def scratch(self, keys: int) -> int:
        """Return the bytes of attention's working memory for one thread and up to so many keys."""
        keys = -(-keys // KEY_STEP) * KEY_STEP
        if keys not in self._scratch:
            found = (self.library.attention_scratch(record, keys) for record in self._program.attentions)
            self._scratch[keys] = max(found, default=0)
        return self._scratch[keys]


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


def weights_size(file: GraphFile, read: Read) -> int:
    """Return the bytes of a graph's weights. Raises BundleError where it has none beside it."""
    if file.weights is None:
        raise BundleError(f"the graph {file.graph.name!r} has a list of operators and no weights; export it again.")
    return read.size(file.weights) if isinstance(read, ReadInPieces) else len(read(file.weights))


