"""Fuse steps into operators: what follows an operator on the same row goes into its epilogue.

An epilogue does one thing of each kind, in this order: bias, activation, residual, norm, quantising. A step that does
not fit there (a second norm of one value, say) becomes a Select of every row, which has an epilogue of its own. Linear
layers that read the same rows lie side by side in one operator where nothing but attention or a caller reads them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from transom.export.native.row_program import (
    ANCHORS,
    ActivationStep,
    AttentionStep,
    BiasStep,
    CannotLowerError,
    EmbedStep,
    LinearStep,
    NormStep,
    Output,
    PatchesStep,
    PoolStep,
    PrependStep,
    QuantiseStep,
    ResidualStep,
    RowProgram,
    SelectStep,
    Step,
    View,
    Weight,
)
from transom.runtime.native import operators as ops

MOST_SIDE_BY_SIDE = 32  # layers in one operator: a list's reader takes 64


@dataclass
class Fused:
    """Operators, the registers that become outputs, the tensors by name, and how many of each pattern there are."""

    operators: list[ops.Operator] = field(default_factory=list)
    outputs: dict[str, str] = field(default_factory=dict)
    weights: dict[str, Weight] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)


def fuse(program: RowProgram) -> Fused:
    """Return the operators of a program. Raises CannotLowerError for an output that no register can become."""
    return Fuser(program).fused()


class Fuser:
    """The readers of each live step, what was fused already, and where each float result lies."""

    def __init__(self, program: RowProgram) -> None:
        self.program = program
        self.made = Fused()
        self.steps = live(program)
        self.readers: dict[Step, list[Step]] = defaultdict(list)
        for step in self.steps:
            for source in step.sources:
                self.readers[source].append(step)
        self.returned: dict[Step, list[Output]] = defaultdict(list)
        for output in program.outputs:
            self.returned[output.view.step].append(output)
        self.place: dict[Step, tuple[str, int]] = {}  # register and first column of each result that lies somewhere
        self.absorbed: set[Step] = set()

    def fused(self) -> Fused:
        for step in self.steps:
            if step in self.absorbed:
                continue
            group = self.side_by_side(step) if isinstance(step, LinearStep) else []
            if len(group) > 1:
                self.emit_group(group)
            else:
                self.emit(step)
        for output in self.program.outputs:
            self.give_back(output)
        self.made.counts["dropped Q/DQ pairs"] = self.program.dropped
        self.made.counts = Counter({name: count for name, count in self.made.counts.items() if count})
        return self.made

    def emit(self, step: Step) -> None:
        """Make an operator of a step and of what fits into its epilogue."""
        then: dict[str, object] = {}
        last = step
        if not isinstance(step, ANCHORS):
            source = step.sources[0]  # of a Select of every row
            last = self.absorb(source, then, only=step)
        if isinstance(step, AttentionStep):
            self.finish(step, then)
        else:
            while (following := self.next_of(last, then)) is not None:
                last = self.absorb(last, then, only=following)
            self.finish(last, then)
        self.made.operators.append(self.operator(step, ops.Epilogue(**then)))  # type: ignore[arg-type]

    def next_of(self, step: Step, then: Mapping[str, object]) -> Step | None:
        """Return the step that goes into the epilogue after ``step``, which the epilogue has come to."""
        readers, norm = self.readers[step], None
        if "norm" in then:
            return None
        norm = next((reader for reader in readers if isinstance(reader, NormStep)), None)
        if norm is not None and norm not in self.absorbed:
            return norm
        if len(readers) != 1 or self.returned[step]:
            return None
        reader = readers[0]
        if isinstance(reader, BiasStep) and not then:
            return reader
        if isinstance(reader, ActivationStep) and not {"activation", "residual"} & {*then}:
            return reader
        if isinstance(reader, ResidualStep) and "residual" not in then:
            other = reader.other if reader.source is step else reader.source
            return reader if other in self.place else None
        return None

    def absorb(self, step: Step, then: dict[str, object], only: Step) -> Step:
        """Put the step ``only``, which reads ``step``, into the epilogue ``then``, and return it."""
        self.absorbed.add(only)
        if isinstance(only, BiasStep):
            then["bias"] = (self.tensor(only.bias),)
        elif isinstance(only, ActivationStep):
            then["activation"] = only.function
            self.made.counts["activation"] += 1
        elif isinstance(only, ResidualStep):
            then["residual"] = self.register(only.other if only.source is step else only.source)
            self.made.counts["residual"] += 1
        elif isinstance(only, NormStep):
            if (len(self.readers[step]) > 1 or self.returned[step]) and step not in self.place:
                then["sum"] = self.put(step)
            weight, bias = (None if each is None else self.tensor(each) for each in (only.weight, only.bias))
            then["norm"] = ops.Norm(only.kind, only.epsilon, weight, bias)
            self.made.counts[f"{only.kind} norm"] += 1
        elif isinstance(only, QuantiseStep):
            multiplier = None if only.multiplier is None else self.tensor(only.multiplier)
            then["quantized"] = ops.Quantized(self.put(only), only.scale, only.zero_point, multiplier)
            self.made.counts["quantised" if only.scale is not None else "quantised by row"] += 1
        return only

    def finish(self, last: Step, then: dict[str, object]) -> None:
        """Say where the row that an epilogue ends with goes: to integers, to floats, or both."""
        if isinstance(last, QuantiseStep):  # a Select that quantises what lies elsewhere
            return
        readers = self.readers[last]
        integers = next(
            (each for each in readers if isinstance(each, QuantiseStep) and each not in self.absorbed), None
        )
        if integers is not None:
            self.absorb(last, then, only=integers)
        if self.returned[last] or any(reader is not integers for reader in readers):
            then["out"] = self.put(last)

    def side_by_side(self, step: LinearStep) -> list[LinearStep]:
        """Return the linear layers that lie side by side in one operator, ``step`` the first; itself alone for none."""
        if not self.is_part(step):
            return [step]
        found = [
            other
            for other in self.readers[step.source]
            if isinstance(other, LinearStep)
            and other not in self.absorbed
            and other.rows == step.rows
            and other.transposed == step.transposed
            and other.weight.tensor.dtype == step.weight.tensor.dtype
            and (self.bias_of(other) is None) == (self.bias_of(step) is None)
            and self.is_part(other)
        ]
        return found[:MOST_SIDE_BY_SIDE]

    def is_part(self, step: LinearStep) -> bool:
        """Return whether nothing computes with a linear layer's columns but attention, or gives them back as tokens."""
        result = self.bias_of(step) or step
        if not self.readers[result] and not self.returned[result]:
            return False
        return step.rows == ops.TOKENS and all(isinstance(reader, AttentionStep) for reader in self.readers[result])

    def bias_of(self, step: LinearStep) -> BiasStep | None:
        readers = self.readers[step]
        if len(readers) == 1 and isinstance(readers[0], BiasStep) and not self.returned[step]:
            return readers[0]
        return None

    def emit_group(self, group: Sequence[LinearStep]) -> None:
        """Make one operator of linear layers side by side."""
        register, column = self.unused(group[0].name), 0
        biases = [self.bias_of(step) for step in group]
        for step, bias in zip(group, biases, strict=True):
            self.place[bias or step] = (register, column)
            self.absorbed |= {step} if bias is None else {step, bias}
            column += step.columns
        then = ops.Epilogue(bias=tuple(self.tensor(bias.bias) for bias in biases if bias is not None), out=register)
        self.made.operators.append(self.linear(group, then))
        self.made.counts["side by side"] += len(group)

    def linear(self, group: Sequence[LinearStep], then: ops.Epilogue) -> ops.Linear:
        first = group[0]
        self.made.counts["linear"] += 1
        return ops.Linear(
            self.register(first.source),
            first.rows,
            tuple(self.tensor(step.weight) for step in group),
            then,
            first.transposed,
            tuple(self.tensor(step.scale) for step in group if step.scale is not None),
        )

    def operator(self, step: Step, then: ops.Epilogue) -> ops.Operator:
        """Return the operator of a step, with its epilogue."""
        if isinstance(step, LinearStep):
            return self.linear([step], then)
        self.made.counts[type(step).__name__.removesuffix("Step").lower() if isinstance(step, ANCHORS) else "copy"] += 1
        if isinstance(step, EmbedStep):
            tables = (ops.Table(self.tensor(each.table), each.ids, each.scale) for each in step.lookups)
            return ops.Embed(tuple(tables), then)
        if isinstance(step, AttentionStep):
            return self.attention(step, then)
        if isinstance(step, PatchesStep):
            return ops.Patches(step.image, step.patch_height, step.patch_width, then)
        if isinstance(step, PrependStep):
            first, position = (None if each is None else self.tensor(each) for each in (step.first, step.position))
            return ops.Prepend(self.register(step.source), first, position, then)
        if isinstance(step, PoolStep):
            return ops.Pool(self.register(step.source), then)
        if isinstance(step, SelectStep):
            return ops.Select(self.register(step.source), step.rows, step.rule, then, step.input, step.value)
        return ops.Select(self.register(step.sources[0]), step.rows, ops.EVERY, then)

    def attention(self, step: AttentionStep, then: ops.Epilogue) -> ops.Attention:
        query, key, value = (self.columns(view) for view in (step.query, step.key, step.value))
        return ops.Attention(
            query=query[0] or "",
            then=then,
            heads=step.heads,
            key_heads=step.key_heads,
            head_dim=step.head_dim,
            scale=step.scale,
            key=key[0],
            value=value[0],
            query_column=query[1],
            key_column=key[1],
            value_column=value[1],
            causal=step.causal,
            key_cache=step.key_cache,
            value_cache=step.value_cache,
            cross_key=step.cross_key,
            cross_value=step.cross_value,
            cross_mask=step.cross_mask,
        )

    def columns(self, view: View | None) -> tuple[str | None, int]:
        """Return the register of a view, and its first column there."""
        if view is None:
            return None, 0
        register, column = self.place[view.step]
        return register, column + view.column

    def register(self, step: Step) -> str:
        """Return the register that a step's whole result is."""
        register, column = self.place[step]
        assert column == 0, f"{step.name} lies beside others"
        return register

    def put(self, step: Step) -> str:
        """Return the register of a result, its own from now on."""
        if step not in self.place:
            self.place[step] = (self.unused(step.name), 0)
        return self.place[step][0]

    def unused(self, name: str) -> str:
        taken = {register for register, _ in self.place.values()}
        return next(free for free in numbered(name) if free not in taken)

    def tensor(self, weight: Weight) -> str:
        """Return the name of a tensor of the list: its own, or with a number where another has that."""
        for name in numbered(weight.name):
            known = self.made.weights.setdefault(name, weight)
            if known is weight or (known.tensor is weight.tensor and known.shape == weight.shape):
                return name
        raise AssertionError("numbers end")

    def give_back(self, output: Output) -> None:
        """Make a graph output of a result."""
        step, view = output.view.step, output.view
        register, column = self.columns(view)
        assert register is not None
        if step.rows == ops.TOKENS:
            whole = view.whole and self.place[step] == (register, 0) and self.is_alone(register)
            self.made.operators.append(
                ops.Unpack(register, output.name, column, 0 if whole else view.columns, output.heads)
            )
            self.made.counts["unpack"] += 1
            return
        if step.rows not in (ops.SEQUENCES, ops.POSITIONS) or not view.whole:
            raise CannotLowerError(f"the output {output.name!r} is some columns of rows, or rows of patches")
        if register in self.made.outputs:
            copy = self.unused(f"{register}.{output.name}")
            self.made.operators.append(ops.Select(register, step.rows, ops.EVERY, ops.Epilogue(out=copy)))
            register = copy
        self.made.outputs[register] = output.name

    def is_alone(self, register: str) -> bool:
        """Return whether one result fills a register."""
        return sum(place == register for place, _ in self.place.values()) == 1


def live(program: RowProgram) -> list[Step]:
    """Return the steps that an output needs, in their order."""
    needed: set[Step] = set()
    waiting: list[Step] = [output.view.step for output in program.outputs]
    waiting += [step for step in program.steps if isinstance(step, AttentionStep) and step.key_cache is not None]
    while waiting:
        step = waiting.pop()
        if step not in needed:
            needed.add(step)
            waiting += step.sources
    return [step for step in program.steps if step in needed]


def numbered(name: str) -> Iterable[str]:
    """Yield ``name``, ``name.2``, ``name.3``, ..."""
    yield name
    number = 2
    while True:
        yield f"{name}.{number}"
        number += 1
