"""The vocabulary of a list of fused operators: what export writes and the native library executes.

A list is data: registers that operators read and write, tensors of the bundle's weights by name, and numbers. Rows of
registers are packed: the rows of all sequences lie one after the other, none of them padding. docs/bundle_format.md has
the JSON form; ``transom.runtime.native.operator_list`` reads it and checks everything that is said here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

TOKENS, SEQUENCES, POSITIONS, PATCHES = "tokens", "sequences", "positions", "patches"
ROWS = (TOKENS, SEQUENCES, POSITIONS, PATCHES)  # in the order of transom.h
ACTIVATIONS = ("identity", "relu", "gelu", "gelu_tanh", "quick_gelu", "silu", "tanh")  # in the order of transom.h
LAYER, RMS, L2 = "layer", "rms", "l2"
NORMS = (LAYER, RMS, L2)
COLUMN = "column"  # in place of an input's name: where a row stands in its sequence, cached positions counted
DYNAMIC_ZERO_POINT = 128  # rows that are quantised by their own largest value


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in the bundle's file of weights: dtype float32, float16 or int8, row-major, at ``offset`` bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Norm:
    """LayerNorm, RMSNorm, or division by the L2 norm (which has no weight); ``epsilon`` is its smallest for L2."""

    kind: str
    epsilon: float
    weight: str | None = None
    bias: str | None = None


@dataclass(frozen=True)
class Quantized:
    """The uint8 form of a row: ``clamp(round(y * multiplier / scale) + zero_point)``.

    Without ``scale`` each row has its own, max|y * multiplier| / 127, and the zero point is 128.
    """

    to: str  # register
    scale: float | None
    zero_point: int
    multiplier: str | None = None  # tensor (n)


@dataclass(frozen=True)
class Epilogue:
    """Steps that finish a row, in this order; each may be absent.

    ``y += bias; y = activation(y); y += residual; sum = y; y = norm(y); out = y; quantized = ...``
    """

    bias: tuple[str, ...] = ()  # tensors, one after the other
    activation: str = "identity"
    residual: str | None = None  # register
    sum: str | None = None  # register
    norm: Norm | None = None
    out: str | None = None  # register
    quantized: Quantized | None = None


@dataclass(frozen=True)
class Linear:
    """``x W``: of uint8 registers with int8 weights, of float32 ones with float32 or float16 weights.

    ``weights`` (k, n_i), or (n_i, k) where ``transposed``, lie side by side: the result has the sum of the n_i columns.
    ``scales`` has the scale of each column of int8 weights, a tensor (n_i) or () for each weight.
    """

    source: str
    rows: str
    weights: tuple[str, ...]
    then: Epilogue
    transposed: bool = False
    scales: tuple[str, ...] = ()


@dataclass(frozen=True)
class Attention:
    """Softmax attention over registers (tokens, ...): each of query, key and value from its column on.

    ``key_cache`` and ``value_cache`` name graph inputs (B, H, C, D) that are written in place and attended to;
    ``cross_key`` and ``cross_value`` name inputs (B, H, S, D) that take the place of key and value, ``cross_mask`` the
    input (B, S) that says which of them count.
    """

    query: str
    then: Epilogue  # quantized or out alone
    heads: int
    key_heads: int
    head_dim: int
    scale: float
    key: str | None = None
    value: str | None = None
    query_column: int = 0
    key_column: int = 0
    value_column: int = 0
    causal: bool = False
    key_cache: str | None = None
    value_cache: str | None = None
    cross_key: str | None = None
    cross_value: str | None = None
    cross_mask: str | None = None


@dataclass(frozen=True)
class Table:
    """A table (ids, n) of an embedding, the input that has its ids, or COLUMN, and a factor."""

    table: str
    ids: str
    scale: float = 1.0


@dataclass(frozen=True)
class Embed:
    """The sum of rows of tables, in their order."""

    tables: tuple[Table, ...]
    then: Epilogue


@dataclass(frozen=True)
class Patches:
    """Images (B, channels, height, width) cut into patches that do not overlap: rows in a convolution's order."""

    image: str  # graph input
    patch_height: int
    patch_width: int
    then: Epilogue


@dataclass(frozen=True)
class Prepend:
    """Rows of patches become rows of tokens: ``first`` (n) before an image's own, ``position`` (tokens, n) added."""

    source: str
    first: str | None
    position: str | None
    then: Epilogue


# Rules of Select. The first three choose one row of each sequence, INDICES rows by a graph input (B, P) of positions.
FIRST, FIRST_EQUAL, LARGEST, INDICES, EVERY = "first", "first_equal", "largest", "indices", "every"
RULES = (FIRST, FIRST_EQUAL, LARGEST, INDICES, EVERY)


@dataclass(frozen=True)
class Select:
    """Rows of a register, chosen by a rule: each sequence's first, its first where ``input`` equals ``value`` (else its
    first), that of the largest value of ``input``, those at positions ``input``, or every one."""

    source: str
    rows: str  # what the result's rows are
    rule: str
    then: Epilogue
    input: str | None = None
    value: int | None = None


@dataclass(frozen=True)
class Pool:
    """The mean of each sequence's rows."""

    source: str
    then: Epilogue


@dataclass(frozen=True)
class Unpack:
    """Columns of a register, given back as a graph output: (B, S, n), (B, S) of one, or (B, heads, S, n / heads)."""

    source: str
    output: str
    column: int = 0
    columns: int = 0  # 0: all from ``column`` on
    heads: int = 0


Operator = Linear | Attention | Embed | Patches | Prepend | Select | Pool | Unpack


@dataclass(frozen=True)
class OperatorList:
    """The operators of one graph in order, and the tensors that they read.

    graph     the graph of the bundle whose inputs and outputs it has
    ids       the input that has a row for each token: token ids (B, S), or images (B, ...) of a fixed number of tokens
    mask      the input (B, S) that says which tokens count, None where all do
    outputs   {register: graph output}: what rows of sequences or positions become. Token rows are given back by Unpack
    counts    how many of each pattern were fused
    """

    graph: str
    weights: str  # file
    ids: str
    mask: str | None
    operators: tuple[Operator, ...]
    tensors: Mapping[str, StoredTensor]
    outputs: Mapping[str, str] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
