"""Read a list of operators and check everything that the native library relies on.

The library checks nothing: it reads and writes where records say. What passes here reads no register before it is
written or with other columns, no tensor beyond the weights, and no input of another shape than its operator takes; what
differs from run to run (ids, positions, lengths) the backend checks at each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import prod
from typing import Any

from transom.runtime.errors import BundleError
from transom.runtime.graph_spec import CACHE, Graph, cache_inputs, state_inputs
from transom.runtime.json_reader import shortened
from transom.runtime.native.list_registers import FLOATS, ListState, Register, shape_of
from transom.runtime.native.operator_json import MAX_INTEGER, NAME_OF, operators_from_json, operators_to_json
from transom.runtime.native.operators import (
    COLUMN,
    EVERY,
    FIRST_EQUAL,
    INDICES,
    LARGEST,
    PATCHES,
    POSITIONS,
    ROWS,
    RULES,
    SEQUENCES,
    TOKENS,
    Attention,
    Embed,
    Linear,
    OperatorList,
    Patches,
    Pool,
    Prepend,
    Select,
    Unpack,
)

MAX_TABLES = 4  # TRANSOM_TABLES
MAX_USES = 4  # products that a weight may be packed for: each is a copy of it
MAX_INT8_DEPTH = 1 << 16  # rows of an int8 weight: so many products of 255 x 128 fit in 32 bits
SHOWN = 8  # problems of a message


def list_from_json(value: Any, graph: Graph, weights_bytes: int) -> OperatorList:
    """Return the list of operators for ``graph``, whose tensors lie in a file of ``weights_bytes``.

    Raises BundleError with everything that is wrong.
    """
    return checked_list(value, graph, weights_bytes)[0]


def checked_list(value: Any, graph: Graph, weights_bytes: int) -> tuple[OperatorList, Mapping[str, Register]]:
    """Return what ``list_from_json`` does, and the registers of the list, which the check finds."""
    problems: list[str] = []
    registers: Mapping[str, Register] = {}
    found = operators_from_json(value, problems)
    if found is not None:
        checker = Checker(found, graph, weights_bytes)
        problems += checker.problems
        registers = checker.registers
    if found is None or problems:
        shown = "; ".join(map(shortened, problems[:SHOWN]))
        more = f" (and {len(problems) - SHOWN} more)" if len(problems) > SHOWN else ""
        raise BundleError(
            f"the operators of the graph {graph.name!r}: {shown}{more}. The bundle is damaged or not one of Transom: "
            "export it again, or load it with kernels='onnxruntime'."
        )
    return found, registers


def list_to_json(operators: OperatorList) -> dict[str, Any]:
    """Return a list as plain data, which ``list_from_json`` reads."""
    return operators_to_json(operators)


def list_problems(operators: OperatorList, graph: Graph, weights_bytes: int) -> list[str]:
    """Return everything that is wrong with a list for ``graph``."""
    return Checker(operators, graph, weights_bytes).problems


def registers_of(operators: OperatorList, graph: Graph, weights_bytes: int) -> Mapping[str, Register]:
    """Return the registers of a list that ``list_from_json`` accepted."""
    return Checker(operators, graph, weights_bytes).registers


class Checker(ListState):
    """Goes through a list once, operator by operator."""

    def __post_init__(self) -> None:
        self.given: Counter[str] = Counter()  # outputs, by who gives them
        self.caches: Counter[str] = Counter()
        self.indices: set[str] = set()  # inputs of positions
        self.image_tokens: set[int] = set()
        self.patches: set[int] = set()  # of an image
        self.crossed: set[tuple[Any, str | None]] = set()  # axis of the keys' positions, and their mask
        super().__post_init__()
        for place, operator in enumerate(self.operators.operators):
            self.where = f"operators[{place}] ({NAME_OF[type(operator)]})"
            getattr(self, f"check_{NAME_OF[type(operator)]}")(operator)
        self.where = "the list"
        self.check_outputs()

    def check_linear(self, linear: Linear) -> None:
        self.expect(linear.rows in ROWS, f"has rows of {linear.rows[:60]!r}, expected one of {', '.join(ROWS)}")
        self.expect(bool(linear.weights), "has no weights")
        source = self.read(linear.source, linear.rows, None)
        if source is None:
            return
        whole = source.dtype == "uint8"
        dtypes = ("int8",) if whole else FLOATS
        self.expect(
            len(linear.scales) == (len(linear.weights) if whole else 0),
            f"has {len(linear.scales)} scales of {len(linear.weights)} weights, expected one each of int8, else none",
        )
        self.expect(not whole or source.columns <= MAX_INT8_DEPTH, f"adds {source.columns} products of 8 bits")
        columns = 0
        for place, name in enumerate(linear.weights):
            weight = self.tensor(name, dtypes, None, 2)
            self.uses[name] += 1
            few = self.expect(self.uses[name] <= MAX_USES, f"packs {name[:60]!r} a {self.uses[name]}th time")
            if weight is None or not few:
                return
            depth, size = weight.shape[::-1] if linear.transposed else weight.shape
            self.expect(depth == source.columns, f"multiplies {source.columns} columns by {name[:60]!r} {weight.shape}")
            if place < len(linear.scales):
                scales = self.operators.tensors.get(linear.scales[place])
                self.tensor(linear.scales[place], ("float32",), () if scales and not scales.shape else (size,))
            columns += size
        self.epilogue(linear.then, linear.rows, columns)

    def check_attention(self, attention: Attention) -> None:
        heads, key_heads, size = attention.heads, attention.key_heads, attention.head_dim
        if not self.expect(
            min(heads, key_heads, size) > 0 and heads * size <= MAX_INTEGER and heads % max(key_heads, 1) == 0,
            f"has {heads} heads of {size} and {key_heads} key heads, expected positive ones that divide",
        ):
            return
        self.columns(attention.query, attention.query_column, heads * size, "query")
        crossed = (attention.cross_key, attention.cross_value)
        cached = (attention.key_cache, attention.value_cache)
        own = (attention.key, attention.value)
        for pair in (crossed, cached, own):
            self.expect((pair[0] is None) == (pair[1] is None), "has one of key and value alone, expected both or none")
        if attention.cross_key is not None or attention.cross_value is not None:
            self.expect(own == cached == (None, None), "has keys of its own beside cross_key, expected one of them")
            self.expect(not attention.causal, "is causal over cross_key, expected none")
            for name in crossed:
                self.cross_input(str(name), key_heads, size)
            if attention.cross_mask is not None:
                self.cross_mask(attention.cross_mask, str(attention.cross_key))
            for name in crossed:
                keys = self.graph.inputs_by_name.get(str(name))
                self.crossed.add((keys and keys.shape[2:3], attention.cross_mask))
            self.expect(len(self.crossed) == 1, "reads keys of another axis or mask than another operator")
        else:
            self.expect(attention.cross_mask is None, "has cross_mask without cross_key")
            self.columns(attention.key, attention.key_column, key_heads * size, "key")
            self.columns(attention.value, attention.value_column, key_heads * size, "value")
            for name in cached:
                if name is not None:
                    self.cache(name, key_heads, size)
        self.epilogue(attention.then, TOKENS, heads * size, plain=True)

    def columns(self, name: str | None, first: int, count: int, what: str) -> None:
        """Check that a register of token rows has ``count`` columns from ``first`` on."""
        if not self.expect(name is not None, f"has no {what}"):
            return
        found = self.read(str(name), TOKENS)
        if found is not None:
            self.expect(
                0 <= first <= found.columns - count,
                f"reads {count} columns from {first} on as its {what}, {str(name)[:60]!r} has {found.columns}",
            )

    def cache(self, name: str, heads: int, size: int) -> None:
        known = {tensor.name: tensor for tensor in cache_inputs(self.graph)}
        found = known.get(name)
        good = found is not None and found.shape == ("B", heads, CACHE, size)
        self.expect(good, f"writes the cache {name[:60]!r}, which is no cache (B, {heads}, C, {size}) of the graph")
        self.caches[name] += 1
        self.expect(self.caches[name] == 1, f"writes the cache {name[:60]!r} once more, expected one of its own")

    def cross_input(self, name: str, heads: int, size: int) -> None:
        found = self.graph.inputs_by_name.get(name)
        good = found is not None and len(found.shape) == 4 and isinstance(found.shape[2], str)
        good = good and found is not None and found.shape[::3] == ("B", size) and found.shape[1] == heads
        good = good and found is not None and found.state and found.name not in self.graph.written
        self.expect(good, f"reads {name[:60]!r}, which is no input (B, {heads}, S, {size}) that is only read")

    def cross_mask(self, name: str, key: str) -> None:
        found, keys = self.graph.inputs_by_name.get(name), self.graph.inputs_by_name.get(key)
        good = found is not None and keys is not None and len(keys.shape) == 4 and found.dtype == "int64"
        good = good and found is not None and keys is not None and found.shape == (keys.shape[0], keys.shape[2])
        self.expect(good, f"has the cross_mask {name[:60]!r}, which is no input int64 (B, S) of the keys' S")

    def check_embed(self, embed: Embed) -> None:
        tables = embed.tables
        if not self.expect(0 < len(tables) <= MAX_TABLES, f"has {len(tables)} tables, expected 1..{MAX_TABLES}"):
            return
        found = [self.tensor(table.table, FLOATS, None, 2) for table in tables]
        if not all(found):
            return
        widths = {tensor.shape[1] for tensor in found}
        self.expect(len(widths) == 1, f"adds rows of {sorted(widths)} columns, expected equal ones")
        for table, tensor in zip(tables, found, strict=True):
            if table.ids == COLUMN:
                continue
            ids = self.token_input(table.ids, "ids")
            bound = None if ids is None else ids.exclusive_max
            self.expect(
                ids is None or (bound is not None and bound <= tensor.shape[0]),
                f"reads {table.table[:60]!r} {tensor.shape} by {table.ids[:60]!r}, whose values are below {bound}",
            )
        self.epilogue(embed.then, TOKENS, found[0].shape[1])

    def check_patches(self, patches: Patches) -> None:
        image = self.graph.inputs_by_name.get(patches.image)
        if not self.expect(
            image is not None and patches.image == self.operators.ids and not self.by_token,
            f"cuts {patches.image[:60]!r}, expected the ids of the list, images (B, channels, height, width)",
        ):
            return
        assert image is not None
        if len(image.shape) != 4 or not all(isinstance(size, int) for size in image.shape[1:]):
            return  # noted with the inputs
        channels, height, width = (int(size) for size in image.shape[1:])
        tall, wide = patches.patch_height, patches.patch_width
        if self.expect(
            0 < tall <= height and 0 < wide <= width and height % tall == 0 and width % wide == 0,
            f"cuts {height} x {width} pixels into patches of {tall} x {wide}, expected ones that divide them",
        ):
            self.patches.add((height // tall) * (width // wide))
            self.expect(len(self.patches) == 1, f"makes other numbers of patches than another: {sorted(self.patches)}")
            self.epilogue(patches.then, PATCHES, channels * tall * wide)

    def check_prepend(self, prepend: Prepend) -> None:
        source = self.read(prepend.source, PATCHES)
        if source is None or not self.patches:
            return
        tokens = min(self.patches) + (prepend.first is not None)
        self.image_tokens.add(tokens)
        self.expect(len(self.image_tokens) == 1, f"makes other numbers of tokens: {sorted(self.image_tokens)}")
        if prepend.first is not None:
            self.tensor(prepend.first, FLOATS, (source.columns,))
        if prepend.position is not None:
            self.tensor(prepend.position, FLOATS, (tokens, source.columns))
        self.epilogue(prepend.then, TOKENS, source.columns)

    def check_select(self, select: Select) -> None:
        if not self.expect(select.rule in RULES, f"has the rule {select.rule[:60]!r}, expected {', '.join(RULES)}"):
            return
        source = self.read(select.source, None if select.rule == EVERY else TOKENS)
        expected = {EVERY: source.rows if source else select.rows, INDICES: POSITIONS}.get(select.rule, SEQUENCES)
        self.expect(select.rows == expected, f"makes rows of {select.rows[:60]!r}, expected {expected}")
        takes_input = select.rule in (FIRST_EQUAL, LARGEST, INDICES)
        self.expect(
            (select.input is not None) == takes_input, f"has the input {select.input!r} by the rule {select.rule}"
        )
        self.expect((select.value is not None) == (select.rule == FIRST_EQUAL), f"has the value {select.value!r}")
        if select.input is not None and select.rule == INDICES:
            found = self.graph.inputs_by_name.get(select.input)
            good = found is not None and found.dtype == "int64" and found.shape == ("B", "P")
            self.indices.add(select.input)
            self.expect(
                good and len(self.indices) == 1,
                f"reads positions {select.input[:60]!r}, expected one input int64 (B, P)",
            )
        elif select.input is not None:
            self.token_input(select.input, "values")
        if source is not None:
            self.epilogue(select.then, expected, source.columns)

    def check_pool(self, pool: Pool) -> None:
        source = self.read(pool.source, TOKENS)
        if source is not None:
            self.epilogue(pool.then, SEQUENCES, source.columns)

    def check_unpack(self, unpack: Unpack) -> None:
        self.given[unpack.output] += 1
        source = self.read(unpack.source, TOKENS)
        output = self.graph.outputs_by_name.get(unpack.output)
        if source is None or not self.expect(
            output is not None, f"gives {unpack.output[:60]!r}, no output of the graph"
        ):
            return
        assert output is not None
        columns = unpack.columns or source.columns - unpack.column
        if not self.expect(
            columns > 0 and unpack.heads >= 0 and 0 <= unpack.column <= source.columns - columns,
            f"gives {columns} columns from {unpack.column} on, {unpack.source[:60]!r} has {source.columns}",
        ):
            return
        tokens: Any = self.by_token[1] if self.by_token else min(self.image_tokens, default=None)
        shape: tuple[Any, ...] = ("B", tokens, columns)
        if unpack.heads:
            whole = columns % unpack.heads == 0
            self.expect(whole, f"gives {columns} columns of {unpack.heads} heads, expected a multiple")
            shape = ("B", unpack.heads, tokens, columns // unpack.heads)
        flat = columns == 1 and not unpack.heads and output.shape == shape[:2]
        self.expect(
            (output.shape == shape or flat) and output.aliases is None,
            f"gives {unpack.output[:60]!r} {shape}, the graph has {shape_of(output)}",
        )

    def check_outputs(self) -> None:
        """Check that the list gives all outputs of the graph, each once, in its shape."""
        for register, name in self.operators.outputs.items():
            self.given[name] += 1
            found, output = self.read(register, None), self.graph.outputs_by_name.get(name)
            if not self.expect(output is not None, f"gives {name[:60]!r}, no output of the graph") or found is None:
                continue
            assert output is not None
            lead: tuple[str, ...] = ("B", "P") if found.rows == POSITIONS else ("B",)
            rest = output.shape[len(lead) :]
            good = output.shape[: len(lead)] == lead and all(isinstance(size, int) for size in rest)
            good = good and prod(int(size) for size in rest) == found.columns and output.aliases is None
            self.expect(
                found.rows in (SEQUENCES, POSITIONS) and good,
                f"gives {name[:60]!r} from {found.columns} columns of {found.rows}, the graph has {shape_of(output)}",
            )
        wanted = {tensor.name for tensor in self.graph.outputs if tensor.aliases is None}
        for name in sorted(wanted | self.given.keys()):
            times = self.given[name]
            self.expect(times == 1, f"gives the output {name[:60]!r} {times} times, expected once")
        written = {tensor.name for tensor in state_inputs(self.graph)}
        left = sorted(written - self.caches.keys())
        self.expect(not left, f"does not write {', '.join(left[:4])}, which the graph writes")
