"""Execute a list of fused operators in numpy, without regard to speed: what kernels and lowering are compared with.

Rows are packed as the runtime packs them: those tokens of each sequence whose mask is not 0, one sequence after the
other. Integer sums are exact; everything else is computed in ``dtype``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import erf, sqrt
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from transom.runtime.native.operators import (
    COLUMN,
    DYNAMIC_ZERO_POINT,
    EVERY,
    FIRST,
    FIRST_EQUAL,
    INDICES,
    LARGEST,
    LAYER,
    POSITIONS,
    RMS,
    SEQUENCES,
    TOKENS,
    Attention,
    Embed,
    Epilogue,
    Linear,
    Norm,
    OperatorList,
    Patches,
    Pool,
    Prepend,
    Quantized,
    Select,
    StoredTensor,
    Unpack,
)

Array = NDArray[Any]
Floats = NDArray[np.floating[Any]]
QUICK_GELU = 1.702  # Hendrycks & Gimpel (2016, arXiv:1606.08415), section 2: gelu(x) ~ x * sigmoid(1.702 x)


@dataclass(frozen=True)
class Rows:
    """A quantised register: uint8 (rows, n), and the scale of its steps, a number or (rows, 1)."""

    values: NDArray[np.uint8]
    scale: float | Floats
    zero_point: int


def run_operators(
    operators: OperatorList,
    weights: bytes,
    feeds: Mapping[str, Array],
    *,
    dtype: DTypeLike = np.float64,
    compute_masked: bool = False,
    registers: dict[str, Any] | None = None,
) -> dict[str, Array]:
    """Return the outputs of a list by name, float32, and its caches as they are afterwards, by the inputs' names.

    ``weights`` are the bytes of the list's file. ``feeds`` are the graph's inputs, all of them, and are not changed.
    Token outputs are zero where the mask is 0; with ``compute_masked`` these tokens are computed, too, and nothing
    attends to them. ``registers`` gets all of them by name.
    """
    run = Run(operators, weights, feeds, np.dtype(dtype), compute_masked, {} if registers is None else registers)
    return run.outputs()


def activate(name: str, x: Floats) -> Floats:
    """Apply one of the activation functions, as transom.h defines them."""
    if name == "relu":
        return np.maximum(x, 0)
    if name == "gelu":
        return x * (1 + np.vectorize(erf, otypes=[x.dtype])(x / sqrt(2))) / 2
    if name == "gelu_tanh":
        return x * (1 + np.tanh(sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2
    if name in ("quick_gelu", "silu"):
        return x * (1 + np.tanh((QUICK_GELU if name == "quick_gelu" else 1.0) * x / 2)) / 2  # a sigmoid by its tanh
    if name == "tanh":
        return np.tanh(x)
    assert name == "identity", name
    return x


def normalise(norm: Norm, x: Floats, weight: Floats | None, bias: Floats | None) -> Floats:
    """Apply a norm to each row of x (rows, n)."""
    if norm.kind == LAYER:
        centred = x - x.mean(-1, keepdims=True)
        x = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + norm.epsilon)
    elif norm.kind == RMS:
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + norm.epsilon)
    else:
        x = x / np.maximum(np.sqrt((x**2).sum(-1, keepdims=True)), norm.epsilon)
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def quantise(then: Quantized, y: Floats, multiplier: Floats | None) -> Rows:
    """Quantise each row of y (rows, n): by the scale of ``then``, or by its own largest magnitude over 127."""
    y = y if multiplier is None else y * multiplier
    zero_point = then.zero_point if then.scale is not None else DYNAMIC_ZERO_POINT
    scale: Any = then.scale if then.scale is not None else np.abs(y).max(-1, keepdims=True) / 127
    steps = np.divide(y, scale, out=np.zeros_like(y), where=np.asarray(scale) != 0)
    return Rows(np.clip(np.rint(steps) + zero_point, 0, 255).astype(np.uint8), scale, zero_point)


def softmax(scores: Floats, seen: NDArray[np.bool_]) -> Floats:
    """Return softmax over the last axis of what is ``seen``; zeros where nothing is."""
    scores = np.where(seen, scores, -np.inf)
    top = scores.max(-1, keepdims=True, initial=-np.inf)
    weights = np.where(seen, np.exp(scores - np.where(np.isfinite(top), top, 0)), 0)
    return weights / np.maximum(weights.sum(-1, keepdims=True), np.finfo(scores.dtype).tiny)


class Run:
    """One execution of a list: its registers by name, its caches, and the rows of each sequence."""

    def __init__(
        self,
        operators: OperatorList,
        weights: bytes,
        feeds: Mapping[str, Array],
        dtype: np.dtype[Any],
        compute_masked: bool,
        registers: dict[str, Any],
    ) -> None:
        self.list, self.feeds, self.dtype, self.registers = operators, feeds, dtype, registers
        self._weights = weights
        self.caches = {
            name: feeds[name].astype(np.float32)
            for operator in operators.operators
            if isinstance(operator, Attention)
            for name in (operator.key_cache, operator.value_cache)
            if name is not None
        }
        self.sequences = len(feeds[operators.ids])
        self.padded = self._padded_length()
        valid = np.ones((self.sequences, self.padded), np.bool_)
        if operators.mask is not None:
            valid = np.asarray(feeds[operators.mask]) != 0
        computed = np.ones_like(valid) if compute_masked else valid
        self.sequence_of_row, self.column = np.nonzero(computed)
        self.key_valid = valid[computed]
        self.past = np.zeros(self.sequences, np.int64)
        if self.caches:
            self.past = np.asarray(feeds["write_indices"])

    def _padded_length(self) -> int:
        shape = self.feeds[self.list.ids].shape
        if len(shape) == 2:
            return int(shape[1])
        patches = next(op for op in self.list.operators if isinstance(op, Patches))
        prepend = next(op for op in self.list.operators if isinstance(op, Prepend))
        return (shape[2] // patches.patch_height) * (shape[3] // patches.patch_width) + (prepend.first is not None)

    def outputs(self) -> dict[str, Array]:
        """Execute all operators and return what they give back."""
        given: dict[str, Array] = {}
        for operator in self.list.operators:
            if isinstance(operator, Unpack):
                given[operator.output] = self._unpack(operator)
            else:
                y, then = getattr(self, f"_{type(operator).__name__.lower()}")(operator)
                self._finish(y, then)
        for register, output in self.list.outputs.items():
            value = self.registers[register]
            if self._rows_of(register) == POSITIONS:
                value = value.reshape(self.sequences, -1, value.shape[-1])
            given[output] = value
        return {name: value.astype(np.float32) for name, value in {**given, **self.caches}.items()}

    def _rows_of(self, register: str) -> str:
        for operator in self.list.operators:
            if isinstance(operator, (Linear, Select)) and register in (operator.then.out, operator.then.sum):
                return operator.rows
        return TOKENS

    def tensor(self, name: str) -> Array:
        """Return a stored tensor as it lies in the file."""
        stored: StoredTensor = self.list.tensors[name]
        count = int(np.prod(stored.shape))
        return np.frombuffer(self._weights, stored.dtype, count, stored.offset).reshape(stored.shape)

    def floats(self, name: str | None) -> Floats | None:
        """Return a stored tensor in the arithmetic's dtype."""
        return None if name is None else self.tensor(name).astype(self.dtype)

    def _finish(self, y: Floats, then: Epilogue) -> None:
        if then.bias:
            y = y + np.concatenate([self.tensor(name).reshape(-1) for name in then.bias]).astype(self.dtype)
        y = activate(then.activation, y)
        if then.residual is not None:
            y = y + self.registers[then.residual]
        if then.sum is not None:
            self.registers[then.sum] = y
        if then.norm is not None:
            y = normalise(then.norm, y, self.floats(then.norm.weight), self.floats(then.norm.bias))
        if then.out is not None:
            self.registers[then.out] = y
        if then.quantized is not None:
            self.registers[then.quantized.to] = quantise(then.quantized, y, self.floats(then.quantized.multiplier))

    def _linear(self, operator: Linear) -> tuple[Floats, Epilogue]:
        weights = [self.tensor(name) for name in operator.weights]
        weight = np.concatenate([w.T if operator.transposed else w for w in weights], axis=1)
        x = self.registers[operator.source]
        if not isinstance(x, Rows):
            return x @ weight.astype(self.dtype), operator.then
        sums = (x.values.astype(np.int64) - x.zero_point) @ weight.astype(np.int64)
        widths = [w.shape[0] if operator.transposed else w.shape[1] for w in weights]
        scales = [np.broadcast_to(self.tensor(s).reshape(-1), n) for s, n in zip(operator.scales, widths, strict=True)]
        return sums.astype(self.dtype) * x.scale * np.concatenate(scales).astype(self.dtype), operator.then

    def _attention(self, operator: Attention) -> tuple[Floats, Epilogue]:
        groups = operator.heads // operator.key_heads
        query = self._heads(operator.query, operator.query_column, operator.heads, operator.head_dim)
        y = np.zeros((len(query), operator.heads, operator.head_dim), self.dtype)
        if operator.cross_key is None:
            key, value = (
                self._heads(register, column, operator.key_heads, operator.head_dim)
                for register, column in ((operator.key, operator.key_column), (operator.value, operator.value_column))
            )
        for sequence in range(self.sequences):
            rows = np.flatnonzero(self.sequence_of_row == sequence)
            keys: Array
            values: Array
            if operator.cross_key is not None and operator.cross_value is not None:
                keys, values = (self.feeds[name][sequence] for name in (operator.cross_key, operator.cross_value))
                seen = np.ones((len(rows), keys.shape[1]), np.bool_)
                if operator.cross_mask is not None:
                    seen &= np.asarray(self.feeds[operator.cross_mask][sequence]) != 0
            elif operator.key_cache is not None and operator.value_cache is not None:
                places = self.past[sequence] + self.column[rows]
                for cache, new in ((operator.key_cache, key), (operator.value_cache, value)):
                    self.caches[cache][sequence][:, places] = new[rows].transpose(1, 0, 2)
                keys, values = (self.caches[name][sequence] for name in (operator.key_cache, operator.value_cache))
                seen = np.arange(keys.shape[1]) <= places[:, None]
            else:
                keys, values = key[rows].transpose(1, 0, 2), value[rows].transpose(1, 0, 2)
                seen = np.broadcast_to(self.key_valid[rows], (len(rows), len(rows)))
                if operator.causal:
                    seen = seen & np.tri(len(rows), dtype=np.bool_)
            for head in range(operator.heads):
                k, v = (side[head // groups].astype(self.dtype) for side in (keys, values))
                scores = operator.scale * (query[rows, head] @ k.T)
                # what no row sees may be anything, NaN too, as the rest of a cache may
                y[rows, head] = softmax(scores, seen) @ np.where(seen.any(0)[:, None], v, 0)
        return y.reshape(len(query), -1), operator.then

    def _heads(self, register: str | None, column: int, heads: int, head_dim: int) -> Floats:
        assert register is not None
        rows: Floats = self.registers[register]
        return rows[:, column : column + heads * head_dim].reshape(-1, heads, head_dim)

    def _embed(self, operator: Embed) -> tuple[Floats, Epilogue]:
        y: Any = 0
        for table in operator.tables:
            if table.ids == COLUMN:
                ids = self.column + self.past[self.sequence_of_row]
            else:
                ids = np.asarray(self.feeds[table.ids])[self.sequence_of_row, self.column]
            y = y + self.tensor(table.table)[ids].astype(self.dtype) * np.asarray(table.scale, self.dtype)
        return y, operator.then

    def _patches(self, operator: Patches) -> tuple[Floats, Epilogue]:
        image = np.asarray(self.feeds[operator.image], self.dtype)
        batch, channels, height, width = image.shape
        high, wide = operator.patch_height, operator.patch_width
        cut = image.reshape(batch, channels, height // high, high, width // wide, wide).transpose(0, 2, 4, 1, 3, 5)
        return cut.reshape(-1, channels * high * wide), operator.then

    def _prepend(self, operator: Prepend) -> tuple[Floats, Epilogue]:
        rows = self.registers[operator.source]
        y = rows.reshape(self.sequences, -1, rows.shape[-1])
        if operator.first is not None:
            first = np.broadcast_to(self.tensor(operator.first).reshape(-1), (self.sequences, 1, y.shape[-1]))
            y = np.concatenate([first.astype(self.dtype), y], axis=1)
        if operator.position is not None:
            y = y + self.tensor(operator.position).reshape(y.shape[1:]).astype(self.dtype)
        return y.reshape(-1, y.shape[-1]), operator.then

    def _select(self, operator: Select) -> tuple[Floats, Epilogue]:
        rows: Floats = self.registers[operator.source]
        if operator.rule == EVERY:
            return rows, operator.then
        if operator.rule == INDICES:
            assert operator.input is not None
            columns = np.asarray(self.feeds[operator.input])
        elif operator.rule == FIRST:
            columns = np.zeros((self.sequences, 1), np.int64)
        else:
            assert operator.input is not None
            assert operator.rule in (FIRST_EQUAL, LARGEST), operator.rule
            values = np.asarray(self.feeds[operator.input])
            values = values == operator.value if operator.rule == FIRST_EQUAL else values
            columns = values.argmax(1)[:, None]
        if operator.rows == SEQUENCES and len(rows) == self.sequences:
            return rows, operator.then  # one row of each already
        found = np.full((self.sequences, self.padded), -1)
        found[self.sequence_of_row, self.column] = np.arange(len(self.column))
        chosen = np.take_along_axis(found, columns, 1).reshape(-1)
        assert (chosen >= 0).all(), "a row that is masked out was chosen: compute_masked=True"
        return rows[chosen], operator.then

    def _pool(self, operator: Pool) -> tuple[Floats, Epilogue]:
        rows: Floats = self.registers[operator.source]
        y = np.zeros((self.sequences, rows.shape[1]), self.dtype)
        for sequence in range(self.sequences):
            counted = rows[(self.sequence_of_row == sequence) & self.key_valid]
            if len(counted):
                y[sequence] = counted.mean(0)
        return y, operator.then

    def _unpack(self, operator: Unpack) -> Array:
        rows: Floats = self.registers[operator.source]
        columns = operator.columns or rows.shape[1] - operator.column
        out = np.zeros((self.sequences, self.padded, columns), self.dtype)
        out[self.sequence_of_row, self.column] = rows[:, operator.column : operator.column + columns]
        if operator.heads:
            return out.reshape(self.sequences, self.padded, operator.heads, -1).transpose(0, 2, 1, 3)
        return out


def tensors_of(arrays: Mapping[str, Array]) -> tuple[dict[str, StoredTensor], bytes]:
    """Lay arrays out as a file of weights: their places by name, and its bytes, each at a multiple of 64."""
    places, data = {}, bytearray()
    for name, array in arrays.items():
        data += bytes(-len(data) % 64)
        places[name] = StoredTensor(str(array.dtype), array.shape, len(data))
        data += np.ascontiguousarray(array).tobytes()
    return places, bytes(data)


def list_of(arrays: Mapping[str, Array], *operators: Any, **fields: Any) -> tuple[OperatorList, bytes]:
    """Return a list of ``operators`` over token ids "input_ids", and the bytes of its weights."""
    tensors, data = tensors_of(arrays)
    made = OperatorList("model", "model.weights", "input_ids", None, operators, tensors)
    return replace(made, **fields), data
