"""Run a decoder's list of operators again and again over the same arrays, with little Python between two steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from transom.runtime.backends.base import Array
from transom.runtime.feeds import WRITE_INDICES
from transom.runtime.graph_spec import Graph
from transom.runtime.native.library import NativeLibrary
from transom.runtime.native.operators import COLUMN, EVERY, INDICES, Embed, Select
from transom.runtime.native.program import Program, ids_slot, input_slot
from transom.runtime.native.rows import Packer, Rows
from transom.runtime.native.workspace import Workspace, output_slots
from transom.runtime.process_bound import ProcessBound

FEW = 16  # rows up to which plain ints are faster than numpy, whose code a step has pushed out of the caches


class OpenedList(Protocol):
    """The parts of a backend that a run needs; ``scratch`` returns the working memory for so many keys, bytes."""

    graph: Graph
    library: NativeLibrary
    threads: int
    program: Program
    packer: Packer

    def scratch(self, keys: int) -> int: ...


class NativeBoundRun(ProcessBound):
    """A run of a decoder over fixed arrays; their values may change between runs. Not to be shared by threads.

    Raises what ``Packer.pack`` raises, at every run too.
    """

    def __init__(self, backend: OpenedList, feeds: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> None:
        self._backend, self._feeds = backend, dict(feeds)
        self._shapes = {
            tensor.name: tuple(shapes[tensor.name])
            for tensor in backend.graph.outputs
            if tensor.name in shapes and tensor.aliases is None
        }
        self._variant = backend.program.variant(frozenset(self._shapes), padded=False)
        self._workspace = Workspace(backend.program)
        self._outputs: dict[str, Array] = {}
        self._pack()

    def _pack(self) -> None:
        backend = self._backend
        self._rows = rows = backend.packer.pack(self._feeds, self._variant)
        self._workspace.place(rows, backend.scratch(rows.longest), backend.threads)
        self._workspace.bind(rows.slots)
        self._step = OneToken.of(backend, self._feeds, rows, self._variant.parts)

    def run(self, *, reused: bool = False) -> dict[str, Array]:
        """Execute on what the inputs hold now; if ``reused``, into the arrays of the last such run."""
        stays = self._step is not None and self._step.refresh()
        if not stays:
            self._pack()
        outputs = self._outputs if reused else {}
        if not outputs:
            stays = False
            outputs = {name: np.empty(shape, np.float32) for name, shape in self._shapes.items()}
            self._outputs = outputs if reused else {}
        if not stays:
            self._workspace.bind(output_slots(self._backend.program, self._variant, self._rows, outputs))
        self._backend.library.execute(self._variant.operators, self._workspace.run)
        return outputs


class OneToken:
    """The inputs of a step of one token for each of a few rows, written into the arrays that are bound."""

    def __init__(self, backend: OpenedList, feeds: Mapping[str, Any], rows: Rows, names: Sequence[str]) -> None:
        """Take the inputs ``names`` as ids."""
        bounds = backend.packer.bounds
        self._ids = [
            (feeds[name].reshape(-1), bounds[name], rows.slots[ids_slot(name)].data) for name in names if name != COLUMN
        ]
        self._write_indices = feeds[WRITE_INDICES]
        assert rows.past is not None
        self._past = rows.past.data
        self._columns = rows.slots[ids_slot(COLUMN)].data if COLUMN in names else None
        self._room = min(rows.capacity, bounds[COLUMN]) if COLUMN in names else rows.capacity
        chosen = backend.packer.indices
        self._chosen = None if chosen is None else feeds[chosen].reshape(-1)
        mask = backend.packer.cross_mask
        self._cross_mask: Array = np.empty(0) if mask is None else feeds[mask]
        self._cross_valid: NDArray[np.bool_] | None = None
        if rows.cross_valid is not None:
            self._cross_valid = rows.cross_valid.view(np.bool_)

    @classmethod
    def of(cls, backend: OpenedList, feeds: Mapping[str, Any], rows: Rows, parts: Sequence[Any]) -> OneToken | None:
        """Return the inputs of such a step; None where a run is another one, or its arrays are no blocks of memory."""
        packer = backend.packer
        names = list(dict.fromkeys(table.ids for each in parts if isinstance(each, Embed) for table in each.tables))
        rules = {each.rule for each in parts if isinstance(each, Select)}
        copied = any(rows.slots[input_slot(name)] is not feeds[name] for name in packer.crossed)
        read = [feeds[name] for name in (*names, str(packer.indices), WRITE_INDICES) if name in feeds]
        if (
            rows.length != 1
            or rows.sequences > FEW
            or rows.positions not in (0, rows.sequences)
            or not rules <= {EVERY, INDICES}
            or copied
            or not all(array.flags.c_contiguous for array in read)
        ):
            return None
        return cls(backend, feeds, rows, names)

    def refresh(self) -> bool:
        """Take the values that the inputs hold now; False where some are out of their range."""
        for values, bound, target in self._ids:
            for place, value in enumerate(values.tolist()):
                if not 0 <= value < bound:
                    return False
                target[place] = value
        for place, value in enumerate(self._write_indices.tolist()):
            if not 0 <= value < self._room:
                return False
            self._past[place] = value
            if self._columns is not None:
                self._columns[place] = value
        if self._chosen is not None and any(self._chosen.tolist()):
            return False
        if self._cross_valid is not None:
            np.not_equal(self._cross_mask, 0, out=self._cross_valid)
        return True
