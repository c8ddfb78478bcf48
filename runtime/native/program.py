"""Make a list of operators ready to run: records of the native library, packed weights, and slots.

A slot is a place in the table of pointers that each run brings. Registers have one each, and the scales of their rows;
so have inputs, as the library takes them, chosen rows, and outputs that are given back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.runtime.backends.base import Read
from transom.runtime.graph_spec import Graph
from transom.runtime.native import records
from transom.runtime.native.library import NativeLibrary
from transom.runtime.native.list_registers import Register
from transom.runtime.native.memory import address_of, aligned_floats
from transom.runtime.native.memory_plan import SCALE, MemoryPlan, collected_in, has_scales, plan_of, reads_of, writes_of
from transom.runtime.native.operators import (
    ACTIVATIONS,
    EVERY,
    L2,
    LAYER,
    RMS,
    ROWS,
    Attention,
    Embed,
    Epilogue,
    Linear,
    OperatorList,
    Patches,
    Pool,
    Prepend,
    Select,
    Unpack,
)
from transom.runtime.native.weights import DTYPES, Weights
from transom.runtime.process_bound import ProcessBound

NORMS = {LAYER: records.LAYER_NORM, RMS: records.RMS_NORM, L2: records.L2_NORM}
SCRATCH = ("scratch", "")  # the slot of attention's working memory

Slot = tuple[Any, ...]


def register_slot(name: str) -> Slot:
    return ("register", name)


def input_slot(name: str) -> Slot:
    """Return the key of an input that the library reads as it is: images, caches, and an encoder's keys and values."""
    return ("input", name)


def ids_slot(name: str) -> Slot:
    """Return the key of an input with an integer for each token, int32 (tokens), or of COLUMN."""
    return ("ids", name)


def rows_slot(select: Select) -> Slot:
    """Return the key of the rows that a Select takes, int32."""
    return ("rows", select.rule, select.input, select.value)


def output_slot(unpack: Unpack) -> Slot:
    return ("output", unpack.output)


@dataclass(frozen=True)
class Variant:
    """The operators that some outputs need. ``direct`` are registers that are written as outputs, by their names."""

    operators: Any  # ctypes array of records.Operator
    parts: tuple[Any, ...]  # the operators as the list has them
    direct: Mapping[str, str]


class Program(ProcessBound):
    """A list of operators for one instruction set. It may be shared by threads: no run changes it.

    Raises BundleError where the weights are not those of bundle.json, BackendError where there is no memory for them.
    """

    def __init__(
        self,
        operators: OperatorList,
        registers: Mapping[str, Register],
        graph: Graph,
        library: NativeLibrary,
        read: Read,
    ) -> None:
        self.operators, self.library = operators, library
        self.registers = registers
        self.plan: MemoryPlan = plan_of(operators, self.registers)
        self.weights = Weights(operators, self.registers, library, read)
        self.slots: dict[Slot, int] = {}
        for name in self.plan.buffer:
            self.slot(register_slot(name))
        self._graph = graph
        self._kept: list[NDArray[Any]] = []  # what records have the addresses of
        self._vectors: dict[tuple[Any, ...], NDArray[np.float32]] = {}
        bf16 = library.isa == records.AVX512_BF16 and any(
            panels.dtype == records.S8 for panels in self.weights.panels.values()
        )
        self._arithmetic = records.IN_BF16 if bf16 else records.IN_F32
        self.records = [self._record(index, operator) for index, operator in enumerate(operators.operators)]
        self.attentions = [record for record in self.records if isinstance(record, records.Attention)]
        self._variants: dict[tuple[frozenset[str], bool], Variant] = {}

    def slot(self, key: Slot | None) -> int:
        """Return the slot of a key, a new one for a new key."""
        return records.NONE if key is None else self.slots.setdefault(key, len(self.slots))

    def variant(self, outputs: frozenset[str], padded: bool) -> Variant:
        """Return the operators that ``outputs`` need; token outputs are not copied unless rows are ``padded``.

        Caches are written whatever is wanted.
        """
        key = (outputs, padded)
        found = self._variants.get(key)
        if found is None:
            found = self._variants[key] = self._make_variant(outputs, padded)
        return found

    def _make_variant(self, outputs: frozenset[str], padded: bool) -> Variant:
        direct = {register: output for register, output in self.operators.outputs.items() if output in outputs}
        needed, chosen = set(direct), []
        for index in range(len(self.records) - 1, -1, -1):
            operator = self.operators.operators[index]
            if isinstance(operator, Unpack):
                wanted = operator.output in outputs
                if wanted and not padded and self._is_whole(operator) and operator.source not in direct:
                    direct[operator.source] = operator.output
                    needed.add(operator.source)
                    continue
            else:
                writes_cache = isinstance(operator, Attention) and operator.key_cache is not None
                wanted = writes_cache or not needed.isdisjoint(writes_of(operator))
            if wanted:
                chosen.append(index)
                needed.update(reads_of(operator))
        chosen.reverse()
        made = records.operators_of([self.records[index] for index in chosen])
        return Variant(made, tuple(self.operators.operators[index] for index in chosen), direct)

    def _is_whole(self, unpack: Unpack) -> bool:
        """Return whether an output has a register's rows as they are."""
        columns = self.registers[unpack.source].columns
        return not unpack.heads and not unpack.column and unpack.columns in (0, columns)

    # Records

    def _record(self, index: int, operator: Any) -> Any:
        made = getattr(self, f"_{type(operator).__name__.lower()}")(index, operator)
        if not isinstance(operator, Unpack):
            made.then = self._epilogue(operator.then, self.registers[writes_of(operator)[0]].columns)
            if operator.then.out is None:
                made.then.out = self._register(collected_in(operator))
        return made

    def _register(self, name: str | None) -> int:
        return self.slot(None if name is None else register_slot(name))

    def _keep(self, array: NDArray[Any] | None) -> int | None:
        """Return the address of an array, which is kept as long as the program."""
        if array is not None:
            self._kept.append(array)
        return address_of(array)

    def _vector(self, *names: str) -> NDArray[np.float32]:
        """Return vectors that lie one after the other, float32."""
        if len(names) == 1:
            return self.weights.vectors[names[0]]
        if names not in self._vectors:
            self._vectors[names] = aligned_floats(np.concatenate([self.weights.vectors[name] for name in names]))
        return self._vectors[names]

    def _epilogue(self, then: Epilogue, columns: int) -> records.Epilogue:
        made = records.no_epilogue()
        if then.bias:
            made.bias = self._keep(self._vector(*then.bias))
        made.activation = ACTIVATIONS.index(then.activation)
        made.residual, made.sum, made.out = (self._register(name) for name in (then.residual, then.sum, then.out))
        if then.norm is not None:
            made.norm, made.epsilon = NORMS[then.norm.kind], then.norm.epsilon
            weight, bias = then.norm.weight, then.norm.bias
            if weight is not None:
                made.norm_weight = self._keep(self._vector(weight))
            elif then.norm.kind != L2:
                made.norm_weight = self._keep(aligned_floats(np.ones(columns, np.float32)))
            if bias is not None:
                made.norm_bias = self._keep(self._vector(bias))
            elif then.norm.kind == LAYER:
                made.norm_bias = self._keep(aligned_floats(np.zeros(columns, np.float32)))
        if then.quantized is not None:
            made.quantized = self._register(then.quantized.to)
            made.zero_point = then.quantized.zero_point
            multiplier = then.quantized.multiplier
            factors = None if multiplier is None else self._vector(multiplier)
            if then.quantized.scale is None:
                made.row_scale = self._register(then.quantized.to + SCALE)
                made.multiplier = self._keep(factors)
            else:
                inverse = np.full(columns, np.float32(1) / np.float32(then.quantized.scale), np.float32)
                made.inverse_scale = self._keep(aligned_floats(inverse if factors is None else inverse * factors))
        return made

    def _linear(self, index: int, linear: Linear) -> records.Linear:
        source, panels = self.registers[linear.source], self.weights.panels[index]
        made = records.Linear(rows=ROWS.index(linear.rows), input=self._register(linear.source), row_scale=records.NONE)
        made.matrix.k, made.matrix.n, made.matrix.dtype = panels.k, panels.n, panels.dtype
        made.matrix.panels = self.weights.address(panels)
        if source.quantized is not None:
            tensors = self.operators.tensors
            shapes = [tensors[name].shape for name in linear.weights]
            widths = [shape[0] if linear.transposed else shape[1] for shape in shapes]
            scales = np.concatenate(
                [np.broadcast_to(self._vector(name), width) for name, width in zip(linear.scales, widths, strict=True)]
            )
            scales = scales * np.float32(1.0 if source.quantized.scale is None else source.quantized.scale)
            made.matrix.scale = self._keep(aligned_floats(scales))
            made.matrix.column_sum = self._keep(panels.column_sum)
            made.zero_point = source.quantized.zero_point
            if has_scales(source):
                made.row_scale = self._register(linear.source + SCALE)
        return made

    def _attention(self, index: int, attention: Attention) -> records.Attention:
        names = {"query": attention.query, "key": attention.key, "value": attention.value}
        made = records.Attention(
            heads=attention.heads,
            key_heads=attention.key_heads,
            head_dim=attention.head_dim,
            scale=attention.scale,
            causal=int(attention.causal),
            arithmetic=self._arithmetic,
            scores=self.slot(SCRATCH),
        )
        for part, name in names.items():
            setattr(made, part, self._register(name))
            setattr(made, f"{part}_stride", 0 if name is None else self.registers[name].columns)
            setattr(made, f"{part}_column", 0 if name is None else getattr(attention, f"{part}_column"))
        for part in ("key_cache", "value_cache", "cross_key", "cross_value"):
            name = getattr(attention, part)
            setattr(made, part, self.slot(None if name is None else input_slot(name)))
        return made

    def _embed(self, index: int, embed: Embed) -> records.Embed:
        made = records.Embed(count=len(embed.tables), columns=self.operators.tensors[embed.tables[0].table].shape[1])
        for place in range(records.TABLES):
            made.ids[place] = records.NONE
        for place, table in enumerate(embed.tables):
            made.table[place] = self.weights.table(table.table)
            made.dtype[place] = DTYPES[self.operators.tensors[table.table].dtype]
            made.ids[place] = self.slot(ids_slot(table.ids))
            made.scale[place] = table.scale
        return made

    def _patches(self, index: int, patches: Patches) -> records.Patches:
        _, channels, height, width = self._graph.inputs_by_name[patches.image].shape
        return records.Patches(
            input=self.slot(input_slot(patches.image)),
            channels=channels,
            height=height,
            width=width,
            patch_height=patches.patch_height,
            patch_width=patches.patch_width,
        )

    def _prepend(self, index: int, prepend: Prepend) -> records.Prepend:
        names = (prepend.first, prepend.position)
        first, position = (None if name is None else self._keep(self._vector(name)) for name in names)
        return records.Prepend(
            input=self._register(prepend.source),
            columns=self.registers[prepend.source].columns,
            patches=self.patches,
            first=first,
            position=position,
        )

    def _select(self, index: int, select: Select) -> records.Select:
        return records.Select(
            rows=ROWS.index(select.rows),
            input=self._register(select.source),
            index=self.slot(None if select.rule == EVERY else rows_slot(select)),
            columns=self.registers[select.source].columns,
        )

    def _pool(self, index: int, pool: Pool) -> records.Pool:
        return records.Pool(input=self._register(pool.source), columns=self.registers[pool.source].columns)

    def _unpack(self, index: int, unpack: Unpack) -> records.Unpack:
        columns = self.registers[unpack.source].columns
        return records.Unpack(
            input=self._register(unpack.source),
            stride=columns,
            column=unpack.column,
            columns=unpack.columns or columns - unpack.column,
            heads=unpack.heads,
            out=self.slot(output_slot(unpack)),
        )

    @property
    def patches(self) -> int:
        """The patches of an image; 0 in a list for texts."""
        cut = next((each for each in self.operators.operators if isinstance(each, Patches)), None)
        if cut is None:
            return 0
        _, _, height, width = self._graph.inputs_by_name[cut.image].shape
        return (int(height) // cut.patch_height) * (int(width) // cut.patch_width)

    @property
    def image_tokens(self) -> int:
        """The tokens of an image; 0 in a list for texts."""
        put = next((each for each in self.operators.operators if isinstance(each, Prepend)), None)
        return 0 if put is None else self.patches + (put.first is not None)
