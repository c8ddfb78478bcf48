"""Time kernels of the native library: `python benchmarks/native_kernels.py [NAME ...]`.

Each row is a list of operators of one published size, with as many layers as the model has, so that weights change as
they do in a model and come from memory where the model's do. Random weights; the median of interleaved runs. Operations
are two for each product of a weight and a row; bytes are those of the packed weights, once.

    int8 encoder S128 b1    BERT-base's linears, 12 layers, fused: bias; bias, residual and LayerNorm, quantised; bias,
                            GELU, quantised
    int8 step               GPT-2's linears for one token, 12 layers, rows quantised by their own largest value
    int8 vocabulary         its last one, 768 to 50257
    float32 encoder, step   the same in float32, unquantised
    attention S128 b1       BERT-base's attention of 12 layers, in float32; bf16: the products in BF16
    attention step 1024     GPT-2's for one token after 1023, from caches of 12 layers
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable

import numpy as np

from transom.runtime.native import records as r
from transom.runtime.native.library import NativeLibrary, library_path, open_library
from transom.runtime.native.memory import Memory, aligned

HIDDEN, INNER, LAYERS, HEADS, VOCABULARY = 768, 3072, 12, 12, 50257
ARENA_BYTES = 1 << 30  # more than any row needs; what is not written takes no memory


class Workload:
    """Records over slots of random contents, and what they cost."""

    def __init__(self, kernels: NativeLibrary, rows: int, threads: int) -> None:
        self.kernels, self.rows, self.threads = kernels, rows, threads
        self.random = np.random.default_rng(7)
        self.slots: list[np.ndarray] = []
        self.kept: list[np.ndarray] = []  # sums of columns
        self.records: list[ctypes.Structure] = []
        self.operations = self.bytes = self.used = 0
        self.sequences, self.past, self.capacity = 1, 0, 0
        self.arena = Memory(ARENA_BYTES)

    def slot(self, columns: int, dtype: type = np.float32) -> int:
        shape = (self.rows, columns) if columns else (self.rows,)
        values = self.random.standard_normal(shape) if dtype is np.float32 else self.random.integers(0, 256, shape)
        room = self.room(values.size * np.dtype(dtype).itemsize).view(dtype).reshape(shape)
        room[...] = values
        self.slots.append(room)
        return len(self.slots) - 1

    def cache(self, floats: int) -> int:
        room = self.room(4 * floats).view(np.float32)
        room[...] = 0.5
        self.slots.append(room)
        return len(self.slots) - 1

    def constant(self, *shape: int, value: float | None = None) -> int:
        room = self.room(4 * int(np.prod(shape))).view(np.float32).reshape(shape)
        room[...] = self.random.standard_normal(shape) if value is None else value
        return room.ctypes.data

    def room(self, size: int) -> np.ndarray:
        """Return bytes of one arena in large pages, each at a line of the caches, as those of a bundle's run lie."""
        start, self.used = self.used, self.used + aligned(size)
        return self.arena.view(start, size)

    def int8(self, k: int, n: int) -> r.Matrix:
        weight = self.random.integers(-128, 128, (k, n), dtype=np.int8)
        panels = self.room(self.kernels.packed_bytes(r.S8, k, n))
        sums = np.zeros(n, np.int32)
        self.kernels.pack(
            r.S8, k, n, source=weight.ctypes.data, source_dtype=r.S8, stride=n, transposed=False,
            panels=panels.ctypes.data, column_sum=sums.ctypes.data,
        )  # fmt: skip
        self.kept.append(sums)
        self.operations += 2 * k * n * self.rows
        self.bytes += panels.nbytes
        scale = self.constant(n, value=1 / 74 / 74 / np.sqrt(k))
        return r.Matrix(k=k, n=n, dtype=r.S8, panels=panels.ctypes.data, scale=scale, column_sum=sums.ctypes.data)

    def float32(self, k: int, n: int) -> r.Matrix:
        weight = self.random.standard_normal((k, n)).astype(np.float32) / np.float32(np.sqrt(k))
        panels = self.room(self.kernels.packed_bytes(r.F32, k, n))
        self.kernels.pack(
            r.F32, k, n, source=weight.ctypes.data, source_dtype=r.F32, stride=n, transposed=False,
            panels=panels.ctypes.data,
        )  # fmt: skip
        self.operations += 2 * k * n * self.rows
        self.bytes += panels.nbytes
        return r.Matrix(k=k, n=n, dtype=r.F32, panels=panels.ctypes.data)

    def linear(self, source: int, k: int, n: int, **then: float) -> None:
        epilogue = r.no_epilogue()
        for name, value in then.items():
            setattr(epilogue, name, value)
        dynamic = then.get("row_scale", r.NONE)
        matrix = self.int8(k, n) if self.slots[source].dtype == np.uint8 else self.float32(k, n)
        self.records.append(
            r.Linear(rows=r.TOKENS, input=source, row_scale=dynamic, zero_point=128, matrix=matrix, then=epilogue)
        )

    def runner(self) -> Callable[[], None]:
        operators = r.operators_of(self.records)
        table = (ctypes.c_void_p * len(self.slots))(*(slot.ctypes.data for slot in self.slots))
        run = r.Run(slots=ctypes.addressof(table), threads=self.threads)
        run.rows[:] = (self.rows, self.sequences, 1, 1)
        first_row = np.arange(self.sequences + 1, dtype=np.int32) * (self.rows // self.sequences)
        past = np.full(self.sequences, self.past, np.int32)
        run.first_row, run.past, run.capacity = first_row.ctypes.data, past.ctypes.data, self.capacity
        kept = (table, self, first_row, past)  # as long as the function is
        return lambda: kept[1].kernels.execute(operators, run)


def int8_encoder(kernels: NativeLibrary, rows: int, threads: int) -> Workload:
    load = Workload(kernels, rows, threads)
    hidden, other, packed = load.slot(HIDDEN), load.slot(HIDDEN), load.slot(3 * HIDDEN)
    x, inner = load.slot(HIDDEN, np.uint8), load.slot(INNER, np.uint8)
    for _ in range(LAYERS):
        quantize = {"inverse_scale": load.constant(HIDDEN, value=30), "zero_point": 128}
        norm = {"norm": r.LAYER_NORM, "epsilon": 1e-12, "norm_weight": load.constant(HIDDEN)}
        norm["norm_bias"] = load.constant(HIDDEN)
        load.linear(x, HIDDEN, 3 * HIDDEN, bias=load.constant(3 * HIDDEN), out=packed)
        load.linear(x, HIDDEN, HIDDEN, bias=load.constant(HIDDEN), residual=hidden, out=other, quantized=x,
                    **norm, **quantize)  # fmt: skip
        load.linear(x, HIDDEN, INNER, bias=load.constant(INNER), activation=r.GELU, quantized=inner,
                    inverse_scale=load.constant(INNER, value=30), zero_point=128)  # fmt: skip
        load.linear(inner, INNER, HIDDEN, bias=load.constant(HIDDEN), residual=other, out=hidden, quantized=x,
                    **norm, **quantize)  # fmt: skip
    return load


def int8_step(kernels: NativeLibrary, rows: int, threads: int) -> Workload:
    load = Workload(kernels, rows, threads)
    hidden, packed, wide = load.slot(HIDDEN), load.slot(3 * HIDDEN), load.slot(INNER)
    x, inner, scale, wide_scale = load.slot(HIDDEN, np.uint8), load.slot(INNER, np.uint8), load.slot(0), load.slot(0)
    for _ in range(LAYERS):
        load.linear(x, HIDDEN, 3 * HIDDEN, bias=load.constant(3 * HIDDEN), out=packed)
        load.linear(x, HIDDEN, HIDDEN, bias=load.constant(HIDDEN), out=hidden, quantized=x, row_scale=scale,
                    norm=r.LAYER_NORM, norm_weight=load.constant(HIDDEN), zero_point=128)  # fmt: skip
        load.linear(x, HIDDEN, INNER, bias=load.constant(INNER), activation=r.GELU_TANH, out=wide, quantized=inner,
                    row_scale=wide_scale, zero_point=128)  # fmt: skip
        load.linear(inner, INNER, HIDDEN, bias=load.constant(HIDDEN), out=hidden, quantized=x, row_scale=scale,
                    norm=r.LAYER_NORM, norm_weight=load.constant(HIDDEN), zero_point=128)  # fmt: skip
    return load


def int8_vocabulary(kernels: NativeLibrary, rows: int, threads: int) -> Workload:
    load = Workload(kernels, rows, threads)
    x, logits = load.slot(HIDDEN, np.uint8), load.slot(VOCABULARY)
    load.linear(x, HIDDEN, VOCABULARY, out=logits)
    return load


def float32_encoder(kernels: NativeLibrary, rows: int, threads: int) -> Workload:
    load = Workload(kernels, rows, threads)
    x, other, inner, packed = load.slot(HIDDEN), load.slot(HIDDEN), load.slot(INNER), load.slot(3 * HIDDEN)
    for _ in range(LAYERS):
        norm = {"norm": r.LAYER_NORM, "epsilon": 1e-12, "norm_weight": load.constant(HIDDEN)}
        norm["norm_bias"] = load.constant(HIDDEN)
        load.linear(x, HIDDEN, 3 * HIDDEN, bias=load.constant(3 * HIDDEN), out=packed)
        load.linear(x, HIDDEN, HIDDEN, bias=load.constant(HIDDEN), residual=x, out=other, **norm)
        load.linear(other, HIDDEN, INNER, bias=load.constant(INNER), activation=r.GELU, out=inner)
        load.linear(inner, INNER, HIDDEN, bias=load.constant(HIDDEN), residual=other, out=x, **norm)
    return load


def attention(arithmetic: int, sequences: int, past: int = 0) -> Callable[[NativeLibrary, int, int], Workload]:
    """Return what makes BERT-base's attention, or with ``past`` GPT-2's over caches that hold so many positions."""

    def make(kernels: NativeLibrary, rows: int, threads: int) -> Workload:
        load = Workload(kernels, rows, threads)
        load.sequences, load.past, load.capacity = sequences, past, past + rows // sequences
        packed, out = load.slot(3 * HIDDEN), load.slot(HIDDEN)
        keys = load.capacity
        for _ in range(LAYERS):
            then = r.no_epilogue()
            then.out = out
            caches = [load.cache(sequences * keys * HIDDEN) if past else r.NONE for _ in range(2)]
            record = r.Attention(
                query=packed, key=packed, value=packed, query_stride=3 * HIDDEN, key_stride=3 * HIDDEN,
                value_stride=3 * HIDDEN, key_column=HIDDEN, value_column=2 * HIDDEN, heads=HEADS, key_heads=HEADS,
                head_dim=HIDDEN // HEADS, scale=0.125, key_cache=caches[0], value_cache=caches[1], cross_key=r.NONE,
                cross_value=r.NONE, arithmetic=arithmetic, then=then,
            )  # fmt: skip
            if not load.records:
                scratch = load.cache(kernels.attention_scratch(record, keys) // 4 * threads)
            record.scores = scratch
            load.records.append(record)
            load.operations += 4 * rows * keys * HIDDEN
            load.bytes += 2 * 4 * sequences * keys * HIDDEN
        return load

    return make


WORKLOADS: dict[str, tuple[Callable[[NativeLibrary, int, int], Workload], int]] = {
    **{f"int8 encoder S{s} b1": (int8_encoder, s) for s in (16, 32, 64, 128, 256, 512)},
    "int8 encoder S128 b8": (int8_encoder, 1024),
    "int8 step": (int8_step, 1),
    "int8 step b4": (int8_step, 4),
    "int8 vocabulary": (int8_vocabulary, 1),
    **{f"float32 encoder S{s} b1": (float32_encoder, s) for s in (16, 64, 128, 512)},
    "float32 encoder S128 b8": (float32_encoder, 1024),
    "float32 step": (float32_encoder, 1),
    "float32 step b8": (float32_encoder, 8),
    **{f"attention S{s} b1": (attention(r.IN_F32, 1), s) for s in (128, 512)},
    "attention S128 b8": (attention(r.IN_F32, 8), 1024),
    **{f"bf16 attention S{s} b1": (attention(r.IN_BF16, 1), s) for s in (128, 512)},
    "bf16 attention S128 b8": (attention(r.IN_BF16, 8), 1024),
    "attention step 1024": (attention(r.IN_F32, 1, 1023), 1),
    "attention step 1024 b4": (attention(r.IN_F32, 4, 1023), 4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(WORKLOADS)}; all by default, or what begins so")
    parser.add_argument("--isa", default=None, help="the best that the processor has by default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.5, help="for each row")
    options = parser.parse_args()
    library = open_library(library_path())
    best = max(isa for isa in range(len(r.ISA_NAMES)) if library.supports(isa))
    kernels = library.with_isa(r.ISA_NAMES.index(options.isa) if options.isa else best)
    print(f"{kernels.name}, {options.threads} threads, {kernels.compiler}")
    for name, (make, rows) in WORKLOADS.items():
        if options.names and not any(name.startswith(each) for each in options.names):
            continue
        load = make(kernels, rows, options.threads)
        call = load.runner()
        call()
        times = []
        end = time.perf_counter() + options.seconds
        while time.perf_counter() < end or len(times) < 3:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        seconds = statistics.median(times)
        print(
            f"{name:24} {seconds * 1e3:8.2f} ms (least {min(times) * 1e3:.2f})  "
            f"{load.operations / seconds / 1e9:7.0f} GOP/s  {load.bytes / seconds / 1e9:6.1f} GB/s"
        )


if __name__ == "__main__":
    main()
