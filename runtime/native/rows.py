"""Pack what a caller feeds into the rows that the native library computes, and check what it relies on.

Tokens whose mask is 0 have no row, unless one of them is chosen as a result: then all have one, and nothing attends to
those. The library takes int32 where graphs take int64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.runtime.backends.base import Array
from transom.runtime.errors import InputError, ShapeError
from transom.runtime.feeds import WRITE_INDICES, check_buffer
from transom.runtime.graph_spec import CACHE, Graph, Tensor
from transom.runtime.native.operators import COLUMN, EVERY, FIRST, FIRST_EQUAL, INDICES, Attention, Embed, Select
from transom.runtime.native.program import Program, Slot, Variant, ids_slot, input_slot, rows_slot

MOST_ROWS = 2**31 - 1

Integers = NDArray[np.int32]


@dataclass
class Rows:
    """The rows of one run: how many of each kind, where each sequence begins, and the arrays of its slots.

    ``column``, ``key_valid``, ``past`` and ``cross_valid`` are those of transom_run. ``padded`` says that some tokens
    have no row.
    """

    sequences: int
    length: int  # of a padded sequence, tokens
    tokens: int
    positions: int
    patches: int
    longest: int  # keys that a row may attend to
    first_row: Integers
    column: Integers | None = None
    key_valid: NDArray[np.uint8] | None = None
    past: Integers | None = None
    cross_valid: NDArray[np.uint8] | None = None
    capacity: int = 0
    cross_length: int = 0
    padded: bool = False
    slots: dict[Slot, Array] = field(default_factory=dict)

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """Rows of tokens, sequences, positions and patches, in the order of transom.h."""
        return (self.tokens, self.sequences, self.positions, self.patches)


class Packer:
    """Packs the inputs of one program; not changed by any run."""

    def __init__(self, program: Program, graph: Graph) -> None:
        operators = program.operators
        self._program, self._graph, self._list = program, graph, operators
        self.bounds: dict[str, int] = {}  # rows of the smallest table that an input, or COLUMN, has ids of
        for operator in operators.operators:
            if isinstance(operator, Embed):
                for table in operator.tables:
                    rows = operators.tensors[table.table].shape[0]
                    self.bounds[table.ids] = min(rows, self.bounds.get(table.ids, rows))
        attentions = [each for each in operators.operators if isinstance(each, Attention)]
        self.caches = [name for each in attentions for name in (each.key_cache, each.value_cache) if name is not None]
        self.crossed = [name for each in attentions for name in (each.cross_key, each.cross_value) if name is not None]
        self.cross_mask = next((each.cross_mask for each in attentions if each.cross_mask is not None), None)
        selects = [each for each in operators.operators if isinstance(each, Select) and each.rule == INDICES]
        self.indices = next((each.input for each in selects), None)

    def pack(self, feeds: Mapping[str, Any], variant: Variant) -> Rows:
        """Return the rows of a run on ``feeds``, which are of the graph's dtypes.

        Raises InputError for ids or positions out of their range and for caches that cannot be written, ShapeError
        for shapes that do not fit each other.
        """
        sizes: dict[str, int] = {}
        for tensor in self._graph.inputs:
            self._check_shape(tensor, feeds[tensor.name], sizes)
        ids = np.asarray(feeds[self._list.ids])
        sequences = len(ids)
        length = ids.shape[1] if ids.ndim == 2 else self._program.image_tokens
        patches = 0 if ids.ndim == 2 else sequences * self._program.patches
        if max(sequences * length, patches) > MOST_ROWS:
            raise ShapeError(f"{sequences} rows of {length} tokens are more than {MOST_ROWS}. Give fewer at a time.")
        selects = [each for each in variant.parts if isinstance(each, Select) and each.rule != EVERY]
        chosen = {rows_slot(select): self._columns(select, feeds, sequences, length) for select in selects}
        rows = self._rows(feeds, sequences, length, chosen)
        rows.patches = patches
        rows.positions = next((columns.size for slot, columns in chosen.items() if slot[1] == INDICES), 0)
        self._add_caches(rows, feeds)
        self._add_tokens(rows, feeds, variant)
        if self.crossed:
            self._add_crossed(rows, feeds)
        if ids.ndim != 2:
            rows.slots[input_slot(self._list.ids)] = np.ascontiguousarray(ids, np.float32)
        return rows

    def _check_shape(self, tensor: Tensor, value: Any, sizes: dict[str, int]) -> None:
        dtype = np.dtype(tensor.dtype)
        if not isinstance(value, np.ndarray) or value.dtype != dtype or value.ndim != len(tensor.shape):
            raise InputError(
                f"input {tensor.name!r} is {getattr(value, 'dtype', type(value).__name__)} "
                f"{getattr(value, 'shape', '')}; expected {dtype} {tensor.shape}."
            )
        for name, size in zip(tensor.shape, value.shape, strict=True):
            expected = name if isinstance(name, int) else sizes.setdefault(name, size)
            if size != expected:
                raise ShapeError(
                    f"input {tensor.name!r} has shape {value.shape}; expected {expected} where it has {size} (axis "
                    f"{name}). Give all inputs the same sizes."
                )

    def _columns(self, select: Select, feeds: Mapping[str, Any], sequences: int, length: int) -> NDArray[np.int64]:
        """Return which tokens of each sequence a rule chooses, int64 (sequences, ...)."""
        if length < 1:
            raise ShapeError("sequences have no tokens to choose from; give at least one each.")
        if select.rule == FIRST:
            return np.zeros((sequences, 1), np.int64)
        values = feeds[str(select.input)]
        if select.rule == INDICES:
            check_below(values, length, str(select.input))
            return np.asarray(values, np.int64)
        found = values == select.value if select.rule == FIRST_EQUAL else values
        return np.asarray(found.argmax(1), np.int64)[:, None]

    def _rows(
        self, feeds: Mapping[str, Any], sequences: int, length: int, chosen: Mapping[Slot, NDArray[np.int64]]
    ) -> Rows:
        """Return the rows of tokens, and which of them are chosen."""
        starts = np.arange(0, (sequences + 1) * length, max(length, 1), dtype=np.int32)[: sequences + 1]
        rows = Rows(sequences, length, sequences * length, 0, 0, length, starts)
        flat = {slot: columns + np.arange(sequences)[:, None] * length for slot, columns in chosen.items()}
        if self._list.mask is not None:
            mask = (feeds[self._list.mask] != 0).reshape(-1)
            if not mask.all():
                if all(mask[places].all() for places in flat.values()):
                    flat = self._pack_masked(rows, mask, flat)
                else:
                    rows.key_valid = mask.view(np.uint8)
        for slot, places in flat.items():
            rows.slots[slot] = places.astype(np.int32)
        return rows

    def _pack_masked(
        self, rows: Rows, mask: NDArray[np.bool_], flat: Mapping[Slot, NDArray[np.int64]]
    ) -> dict[Slot, NDArray[np.int64]]:
        """Leave out the rows of tokens whose mask is 0; return the places of the chosen ones among the rest."""
        behind = np.cumsum(mask)  # of each token, how many rows there are up to it
        counts = mask.reshape(rows.sequences, rows.length).sum(1)
        rows.first_row = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        rows.tokens, rows.longest, rows.padded = int(behind[-1]), int(counts.max()), True
        rows.column = (np.flatnonzero(mask) % rows.length).astype(np.int32)
        return {slot: behind[places] - 1 for slot, places in flat.items()}

    def _add_tokens(self, rows: Rows, feeds: Mapping[str, Any], variant: Variant) -> None:
        """Add the ids of tables, int32 (tokens)."""
        names = dict.fromkeys(table.ids for each in variant.parts if isinstance(each, Embed) for table in each.tables)
        places = None
        if rows.padded and rows.column is not None:
            lengths = np.diff(rows.first_row)
            places = rows.column + np.repeat(np.arange(rows.sequences) * rows.length, lengths)
        for name in names:
            if name == COLUMN:
                ids = np.tile(np.arange(rows.length, dtype=np.int32), rows.sequences)
                if rows.column is not None:
                    ids = rows.column
                if rows.past is not None:
                    ids = ids + np.repeat(rows.past, rows.length)
                if len(ids) and int(ids.max()) >= self.bounds[name]:
                    raise ShapeError(
                        f"a token stands at {int(ids.max())}; the model has {self.bounds[name]} positions. Give "
                        "shorter rows."
                    )
            else:
                check_below(feeds[name], self.bounds[name], name)
                ids = feeds[name].reshape(-1)
                ids = (ids if places is None else ids[places]).astype(np.int32)
            rows.slots[ids_slot(name)] = np.ascontiguousarray(ids, np.int32)

    def _add_caches(self, rows: Rows, feeds: Mapping[str, Any]) -> None:
        """Add the caches, which are written in place."""
        if not self.caches:
            return
        places = next(tensor.shape.index(CACHE) for tensor in self._graph.inputs if tensor.name == self.caches[0])
        rows.capacity = feeds[self.caches[0]].shape[places]
        past = feeds[WRITE_INDICES]
        low, high = int(past.min(initial=0)), int(past.max(initial=0))
        if low < 0 or high + rows.length > rows.capacity:
            raise ShapeError(
                f"{rows.length} tokens at {WRITE_INDICES} {low}..{high}; the caches hold C={rows.capacity}. Give "
                "larger ones, and no place below 0."
            )
        rows.past, rows.longest = past.astype(np.int32), max(rows.longest, rows.capacity)
        for name in self.caches:
            check_buffer(name, feeds[name])
            rows.slots[input_slot(name)] = feeds[name]

    def _add_crossed(self, rows: Rows, feeds: Mapping[str, Any]) -> None:
        """Add the keys and values of an encoder, and which of its tokens count."""
        for name in self.crossed:
            rows.slots[input_slot(name)] = np.ascontiguousarray(feeds[name])
        rows.cross_length = feeds[self.crossed[0]].shape[2]
        rows.longest = max(rows.longest, rows.cross_length)
        if self.cross_mask is not None:
            rows.cross_valid = np.ascontiguousarray(feeds[self.cross_mask] != 0).view(np.uint8)


def check_below(values: Array, bound: int, name: str) -> None:
    """Raise InputError unless all values are in 0..bound - 1."""
    if not values.size:
        return
    unsigned = values.view(np.uint64) if values.flags.c_contiguous else np.ascontiguousarray(values).view(np.uint64)
    if int(unsigned.max()) >= bound:
        low, high = int(values.min()), int(values.max())
        raise InputError(
            f"input {name!r} holds {low if low < 0 else high}; expected values in 0..{bound - 1}. Is this the "
            "tokenizer of this model?"
        )
