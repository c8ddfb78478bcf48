"""Call every kernel of an instruction set once, on tiny data, and compare with the plain kernels.

``trust.py`` runs it in a process of its own, without the package and its libraries (``python -I -S``), since a
processor that does not execute what it claims ends it. Exit status 0 where all values are those of the plain kernels,
WRONG where one is not.
"""

from __future__ import annotations

import ctypes
import sys
from importlib import import_module
from typing import Any

WRONG = 3
TOLERANCE = 0.02  # of float32 outputs, of which one is computed in BF16; of uint8 outputs one step
TOKENS, SEQUENCES, COLUMNS, HEADS = 5, 2, 72, 2
CAPACITY, CROSS = 7, 3
PERIOD = 509  # prime, so that rows differ
IMAGE, PATCH, CHANNELS = 6, 3, 2  # pixels of a side, of a patch's side


# In the child process this file and records.py are modules of their own, found by the folder that they are in.
R: Any = import_module("transom.runtime.native.records" if __package__ else "records")


class Memory:
    """The slots of one run, and weights packed for one instruction set; everything is kept as long as this is."""

    def __init__(self, library: Any, isa: int) -> None:
        self.library, self.isa = library, isa
        self.slots: list[Any] = []
        self.kept: list[Any] = []
        self._seed = 0

    def floats(self, count: int, kind: Any = ctypes.c_float, factor: float = 1.0) -> Any:
        """Return an array of fixed numbers in [-factor, factor), others with each call, that repeat after PERIOD."""
        self._seed += 7919
        numbers = [factor * ((index * (index * 31 + self._seed) % PERIOD) / PERIOD * 2 - 1) for index in range(PERIOD)]
        period = (kind * PERIOD)(*(map(int, numbers) if kind is ctypes.c_int8 else numbers))
        return self.keep((kind * count).from_buffer_copy(bytes(period) * (count // PERIOD + 1)))

    def keep(self, array: Any) -> Any:
        self.kept.append(array)
        return array

    def address(self, array: Any) -> int:
        return ctypes.addressof(array)

    def weight(self, count: int) -> int:
        return self.address(self.floats(count))

    def slot(self, array: Any) -> int:
        self.slots.append(array)
        return len(self.slots) - 1

    def out(self, rows: int, columns: int = COLUMNS) -> int:
        return self.slot((ctypes.c_float * (rows * columns))())

    def out_u8(self, rows: int, columns: int = COLUMNS) -> int:
        return self.slot((ctypes.c_uint8 * (rows * columns))())

    def integers(self, values: Any) -> Any:
        values = list(values)
        return self.keep((ctypes.c_int32 * len(values))(*values))

    def matrix(self, k: int, n: int, dtype: int) -> Any:
        """Return a packed random weight (k, n)."""
        size = self.library.transom_packed_bytes(self.isa, dtype, k, n)
        room = self.keep(ctypes.create_string_buffer(size + 64))
        panels = -(-self.address(room) // 64) * 64
        source = self.floats(k * n, ctypes.c_int8, 127.0) if dtype == R.S8 else self.floats(k * n, factor=0.125)
        sums = self.integers([0] * n)
        self.library.transom_pack(
            self.isa, dtype, k, n, 0, n, self.address(source), dtype, n, 0, panels, self.address(sums)
        )
        scale = self.keep((ctypes.c_float * n)(*[2e-5] * n))
        return R.Matrix(
            k=k, n=n, dtype=dtype, panels=panels, scale=self.address(scale), column_sum=self.address(sums)
        )  # fmt: skip


def epilogue(**fields: Any) -> Any:
    done = R.no_epilogue()
    for name, value in fields.items():
        setattr(done, name, value)
    return done


def linears(memory: Memory) -> list[Any]:
    """Make an embedding, products of each dtype with different epilogues, and what moves rows."""
    n = COLUMNS
    hidden, quantized, packed = memory.out(TOKENS), memory.out_u8(TOKENS), memory.out(TOKENS, 3 * n)
    wide, wide_quantized, scale = memory.out(TOKENS), memory.out_u8(TOKENS), memory.out(TOKENS, 1)
    finished, summed, last = memory.out(TOKENS), memory.out(TOKENS), memory.out(SEQUENCES)
    half = memory.keep((ctypes.c_uint16 * (4 * n))(*[0x3C00 + 8 * index for index in range(4 * n)]))  # 1.0 to 2.1
    steps = memory.keep((ctypes.c_float * n)(*[40.0] * n))
    embed = R.Embed(count=2, columns=n)
    embed.table[0], embed.table[1] = memory.weight(4 * n), memory.address(half)
    embed.dtype[0], embed.dtype[1] = R.F32, R.F16
    embed.scale[0], embed.scale[1] = 1.0, 0.5
    for table in range(2):
        embed.ids[table] = memory.slot(memory.integers((index + table) % 4 for index in range(TOKENS)))
    embed.then = epilogue(
        norm=R.LAYER_NORM, epsilon=1e-5, norm_weight=memory.weight(n), norm_bias=memory.weight(n), out=hidden,
        quantized=quantized, inverse_scale=memory.address(steps), zero_point=100,
    )  # fmt: skip
    return [
        embed,
        R.Linear(
            rows=R.TOKENS, input=hidden, row_scale=R.NONE, matrix=memory.matrix(n, 3 * n, R.F32),
            then=epilogue(bias=memory.weight(3 * n), out=packed),
        ),
        R.Linear(
            rows=R.TOKENS, input=quantized, row_scale=R.NONE, zero_point=100, matrix=memory.matrix(n, n, R.S8),
            then=epilogue(
                bias=memory.weight(n), activation=R.GELU, out=wide, quantized=wide_quantized, row_scale=scale,
                zero_point=128,
            ),
        ),
        R.Linear(
            rows=R.TOKENS, input=wide_quantized, row_scale=scale, zero_point=128, matrix=memory.matrix(n, n, R.S8),
            then=epilogue(
                activation=R.SILU, residual=hidden, sum=summed, norm=R.RMS_NORM, epsilon=1e-5,
                norm_weight=memory.weight(n), out=finished,
            ),
        ),
        R.Select(
            rows=R.SEQUENCES, input=finished, index=memory.slot(memory.integers((4, 1))), columns=n,
            then=epilogue(out=last, norm=R.L2_NORM, epsilon=1e-12),
        ),
        R.Linear(  # one row or few: another kernel than many
            rows=R.SEQUENCES, input=last, row_scale=R.NONE, matrix=memory.matrix(n, n, R.F32),
            then=epilogue(activation=R.TANH, out=memory.out(SEQUENCES)),
        ),
        R.Pool(input=finished, columns=n, then=epilogue(out=memory.out(SEQUENCES))),
        R.Unpack(input=packed, stride=3 * n, column=n, columns=n, heads=HEADS, out=memory.out(SEQUENCES * 4)),
    ]  # fmt: skip


def attentions(memory: Memory, packed: int) -> list[Any]:
    """Make each kind of attention over the packed projection."""
    n, size = COLUMNS, COLUMNS // HEADS
    caches = [memory.slot(memory.floats(SEQUENCES * CAPACITY * n)) for _ in range(2)]
    cross = [memory.slot(memory.floats(SEQUENCES * CROSS * n)) for _ in range(2)]
    made = []
    for arithmetic, causal, cached, crossed in (
        (R.IN_F32, 0, 0, 0), (R.IN_BF16, 1, 0, 0), (R.IN_F32, 1, 1, 0), (R.IN_F32, 0, 0, 1),
    ):  # fmt: skip
        attention = R.Attention(
            query=packed, key=packed, value=packed, query_stride=3 * n, key_stride=3 * n, value_stride=3 * n,
            key_column=n, value_column=2 * n, heads=HEADS, key_heads=HEADS, head_dim=size, scale=size**-0.5,
            causal=causal, key_cache=R.NONE, value_cache=R.NONE, cross_key=R.NONE, cross_value=R.NONE,
            arithmetic=arithmetic, then=epilogue(out=memory.out(TOKENS)),
        )  # fmt: skip
        if cached:
            attention.key_cache, attention.value_cache = caches
        if crossed:
            attention.key = attention.value = R.NONE
            attention.cross_key, attention.cross_value = cross
        keys = max(TOKENS, CAPACITY, CROSS)
        scratch = memory.library.transom_attention_scratch(memory.isa, ctypes.addressof(attention), keys)
        room = memory.keep(ctypes.create_string_buffer(scratch + 64))
        attention.scores = memory.slot((ctypes.c_byte * scratch).from_buffer(room, -memory.address(room) % 64))
        made.append(attention)
    return made


def images(memory: Memory) -> list[Any]:
    """Make what cuts images into patches, and puts a row before those of each."""
    count, n = (IMAGE // PATCH) ** 2, CHANNELS * PATCH * PATCH
    image, rows = memory.slot(memory.floats(SEQUENCES * CHANNELS * IMAGE * IMAGE)), memory.out(SEQUENCES * count, n)
    return [
        R.Patches(
            input=image, channels=CHANNELS, height=IMAGE, width=IMAGE, patch_height=PATCH, patch_width=PATCH,
            then=epilogue(out=rows),
        ),
        R.Prepend(
            input=rows, columns=n, patches=count, first=memory.weight(n), position=memory.weight((count + 1) * n),
            then=epilogue(out=memory.out(SEQUENCES * (count + 1), n)),
        ),
    ]  # fmt: skip


def values_of(library: Any, isa: int) -> list[Any]:
    """Return every slot after two runs: texts, then images."""
    memory = Memory(library, isa)
    texts = linears(memory)
    texts += attentions(memory, texts[1].then.out)
    pictures = images(memory)
    tokens = (IMAGE // PATCH) ** 2 + 1
    for records, rows, starts in (
        (texts, (TOKENS, SEQUENCES, SEQUENCES, 0), (0, 2, TOKENS)),
        (pictures, (SEQUENCES * tokens, SEQUENCES, 0, SEQUENCES * (tokens - 1)), (0, tokens, 2 * tokens)),
    ):
        table = (ctypes.c_void_p * len(memory.slots))(*map(ctypes.addressof, memory.slots))
        run = R.Run(
            slots=ctypes.addressof(table), first_row=memory.address(memory.integers(starts)),
            past=memory.address(memory.integers((1, 3))), capacity=CAPACITY, cross_length=CROSS, padded_length=4,
            threads=1,
        )  # fmt: skip
        for kind, count in enumerate(rows):
            run.rows[kind] = count
        operators = R.operators_of(records)
        stopped = library.transom_execute(isa, ctypes.addressof(operators), len(operators), ctypes.addressof(run))
        if stopped:
            sys.exit(f"operator {stopped - 1} was not executed")
    working = {each.scores for each in texts if isinstance(each, R.Attention)}
    return [list(slot) for index, slot in enumerate(memory.slots) if index not in working]


def main() -> None:
    """Compare an instruction set with the plain kernels."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # what is expected to crash leaves nothing behind
    except (ImportError, OSError, ValueError):
        pass
    path, isa = sys.argv[1], int(sys.argv[2])
    library = ctypes.CDLL(path)
    R.declare(library)
    wanted = values_of(library, R.PLAIN)
    for slot, (ours, theirs) in enumerate(zip(values_of(library, isa), wanted, strict=True)):
        for index, (value, plain) in enumerate(zip(ours, theirs, strict=True)):
            step = 1 if isinstance(plain, int) else TOLERANCE * max(1.0, abs(plain))
            if not abs(value - plain) <= step:
                print(f"slot {slot} has {value} at {index}, the plain kernels {plain}", file=sys.stderr)
                sys.exit(WRONG)
