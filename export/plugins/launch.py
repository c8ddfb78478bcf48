"""What a call of the kernel is: which kernel, its arguments in order, its constants, its grid.

One description for everybody who launches it: Triton's interpreter in the tests, cuda-python, TensorRT's plugin.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from transom.export.plugins.attention import (
    ADDITIVE,
    BOOLEAN,
    MOST_SIZE,
    NO_MASK,
    attention,
    attention_part,
    attention_whole,
)
from transom.runtime.errors import InputError

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton decides, when it is imported
LEAST = 16  # rows and columns of the smallest product that tensor cores have


@dataclass(frozen=True)
class Blocks:
    """Queries and keys of a program, its warps, and how many blocks of keys are on their way at once."""

    m: int
    n: int
    warps: int = 4
    stages: int = 2


@dataclass(frozen=True)
class Launch:
    """One launch of ``kernel``: arguments in order, constants by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Sequence[Any]
    constants: Mapping[str, Any]
    blocks: Blocks

    def run(self) -> None:
        """By Triton itself: compiled on a GPU, interpreted elsewhere (TRITON_INTERPRET=1)."""
        options = {"num_warps": self.blocks.warps, "num_stages": self.blocks.stages}
        self.kernel[self.grid](*self.arguments, **self.constants, **options)


def launches(
    query: Any,
    key: Any,
    value: Any,
    output: Any,
    *,
    scale: float,
    blocks: Blocks,
    causal: bool = False,
    lengths: Any = None,
    mask: Any = None,
    bias: Any = None,
    scales: tuple[Any, Any] | None = None,
    parts: tuple[int, Any, Any] | None = None,
    precision: str = "ieee",
) -> list[Launch]:
    """The launches that compute one attention into ``output``.

    query, output  (B, H, S, D) in FP32, FP16 or BF16; their last axis contiguous, as that of all others
    key, value     (B, H / G, T, D), of the same dtype, or int8 with ``scales``
    scales         FP32 (B, H / G, T) of keys and of values
    lengths        int32 (B,): how many keys a row has; T without
    mask           bool, or additive in any dtype, (B or 1, H or 1, S, T)
    bias           (H, S, T), added for every row of the batch
    parts          (n, sums, parts): the keys in n parts, for S of at most a block; FP32 workspaces
                   (B, H, n, 2, blocks.m) and (B, H, n, blocks.m, width(D))
    precision      "ieee", or "tf32" for FP32 on tensor cores

    Tensors are anything with shape, stride(axis), dtype. Raises InputError for shapes that do not fit.
    """
    B, H, S, D = query.shape
    _, shared, T, _ = key.shape
    check(query, key, value, output, mask, bias, scales, parts, blocks)
    nothing = query  # of what a call does not have no byte is read
    strides = [query.stride(0), query.stride(1), query.stride(2)]
    for tensor in (key, value):
        strides += [tensor.stride(0), tensor.stride(1), tensor.stride(2)]
    strides += [0, 0, 0, 0] if mask is None else [spread(mask, axis) for axis in range(4)]
    strides += [0, 0, 0] if bias is None else [bias.stride(axis) for axis in range(3)]
    strides += [0, 0] if scales is None else [scales[0].stride(0), scales[0].stride(1)]
    tensors = [query, key, value, *(nothing if each is None else each for each in (mask, bias, lengths))]
    tensors += [nothing, nothing] if scales is None else list(scales)
    constants = {
        "CAUSAL": causal,
        "LENGTHS": lengths is not None,
        "MASK": NO_MASK if mask is None else BOOLEAN if is_boolean(mask) else ADDITIVE,
        "BIAS": bias is not None,
        "INT8": scales is not None,
        "BLOCK_M": blocks.m,
        "BLOCK_N": blocks.n,
        "BLOCK_D": width(D),
        "PRECISION": precision,
        "WIDEN": INTERPRETED and str(query.dtype).endswith("bfloat16"),
    }
    sizes = [H, H // shared, S, T, D, scale]
    out = [output.stride(0), output.stride(1), output.stride(2)]
    if parts is None:
        grid = (ceil(S / blocks.m), B * H)
        return [Launch(attention, grid, [*tensors, output, *strides, *out, *sizes], constants, blocks)]
    count, sums, partial = parts
    each = ceil(T / count / blocks.n) * blocks.n
    first = Launch(
        attention_part, (count, B * H), [*tensors, sums, partial, *strides, *sizes, max(each, 1)], constants, blocks
    )
    whole = {name: constants[name] for name in ("BLOCK_M", "BLOCK_D")}
    return [first, Launch(attention_whole, (B * H,), [sums, partial, output, *out, H, S, D, count], whole, blocks)]


def check(
    query: Any, key: Any, value: Any, output: Any, mask: Any, bias: Any, scales: Any, parts: Any, blocks: Blocks
) -> None:
    """Raise InputError for what the kernel would read or write wrongly."""
    B, H, S, D = query.shape
    rows, shared, T, size = key.shape
    wrong = None
    if not 1 <= D <= MOST_SIZE:
        wrong = f"heads of {D}; expected 1 to {MOST_SIZE}"
    elif (rows, size) != (B, D) or tuple(value.shape) != tuple(key.shape) or shared == 0 or H % shared:
        wrong = f"keys of {tuple(key.shape)} and values of {tuple(value.shape)} for queries of {tuple(query.shape)}"
    elif tuple(output.shape) != (B, H, S, D):
        wrong = f"an output of {tuple(output.shape)} for queries of {tuple(query.shape)}"
    elif mask is not None and any(a not in (1, b) for a, b in zip(mask.shape, (B, H, S, T), strict=True)):
        wrong = f"a mask of {tuple(mask.shape)}; expected one that spreads to {(B, H, S, T)}"
    elif bias is not None and tuple(bias.shape) != (H, S, T):
        wrong = f"a bias of {tuple(bias.shape)}; expected {(H, S, T)}"
    elif scales is not None and any(tuple(each.shape) != (B, shared, T) for each in scales):
        wrong = f"scales of {tuple(scales[0].shape)}; expected {(B, shared, T)}"
    elif parts is not None and blocks.m < S:
        wrong = f"{S} queries in one block of {blocks.m}; keys in parts are for steps of decoding"
    elif any(each.stride(3) != 1 for each in (query, key, value, output)):
        wrong = "a last axis that is not contiguous"
    if wrong is not None:
        raise InputError(f"attention was given {wrong}. Give tensors that fit.")


def width(size: int) -> int:
    """The power of two that heads of ``size`` are padded to, in registers alone."""
    return max(LEAST, 1 << (size - 1).bit_length())


def spread(tensor: Any, axis: int) -> int:
    """The stride of an axis; 0 where its one element is everybody's."""
    return 0 if tensor.shape[axis] == 1 else int(tensor.stride(axis))


def is_boolean(tensor: Any) -> bool:
    return str(tensor.dtype).rpartition(".")[2] == "bool"
