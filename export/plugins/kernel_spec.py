"""What a call of the kernel is: its constants, its arguments by name, its grid.

One description for everybody who launches it: Triton's interpreter in the tests, cuda-python, TensorRT's plugin.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from transom.export.plugins.flash_attention import ADDITIVE, BOOLEAN, LOG2_E, NO_MASK, attention, attention_whole
from transom.runtime.errors import InputError

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton decides, when it is imported
DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
PRECISIONS = ("ieee", "tf32")
MOST_SIZE = 256  # of a head
LEAST = 16  # rows and columns of the smallest product that tensor cores have
MOST_PROGRAMS, MOST_PARTS = 2**31 - 1, 65535  # the axes of a grid


@dataclass(frozen=True)
class Blocks:
    """Queries and keys of a program, its warps, and how many blocks of keys are on their way at once."""

    m: int
    n: int
    warps: int = 4
    stages: int = 2


WHOLE = Blocks(1, 1, 1, 1)  # of the kernel that puts parts together: a program has one query, and one warp


@dataclass(frozen=True)
class Variant:
    """What is constant in one compilation of the kernel.

    ``dtype`` is "fp32", "fp16" or "bf16"; ``size`` that of a head; ``groups`` heads of queries share one of keys;
    ``scale`` multiplies the scores, 1 / sqrt(size) for None. Raises InputError for what there is no kernel of.
    """

    dtype: str
    size: int
    heads: int = 1
    groups: int = 1
    scale: float | None = None
    causal: bool = False
    lengths: bool = False
    mask: int = NO_MASK
    bias: bool = False
    int8: bool = False
    split: bool = False
    precision: str = "ieee"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES.values():
            raise InputError(f"attention of dtype {self.dtype!r:.40}; expected one of {', '.join(DTYPES.values())}.")
        if not 1 <= self.size <= MOST_SIZE:
            raise InputError(f"attention was given heads of {self.size}; expected 1 to {MOST_SIZE}. Use smaller heads.")
        if self.groups < 1 or self.heads < 1 or self.heads % self.groups:
            raise InputError(
                f"attention was given {self.heads} heads in groups of {self.groups}; expected groups that divide them."
            )
        if self.precision not in PRECISIONS:
            raise InputError(f"precision is {self.precision!r:.40}; expected {' or '.join(PRECISIONS)}.")
        if self.scale is not None and not isfinite(self.scale):
            raise InputError(f"attention was given a scale of {self.scale}; expected a finite number.")

    @property
    def unit(self) -> float:
        """Scores count in 1 / unit: in base 2 by the scale, unless something natural is added to them."""
        return LOG2_E if self.bias or self.mask == ADDITIVE else 1.0

    def constants(self, blocks: Blocks) -> dict[str, Any]:
        """The kernel's constants by name."""
        scale = self.size**-0.5 if self.scale is None else self.scale
        return {
            "H": self.heads,
            "GROUP": self.groups,
            "D": self.size,
            "SCALE": scale * LOG2_E / self.unit,
            "UNIT": self.unit,
            "CAUSAL": self.causal,
            "MASK": self.mask,
            "INT8": self.int8,
            "PARTS": self.split,
            "BLOCK_M": blocks.m,
            "BLOCK_N": blocks.n,
            "BLOCK_D": width(self.size),
            "PRECISION": self.precision,
            "WIDEN": INTERPRETED and self.dtype == "bf16",
        }

    def constants_of_whole(self) -> dict[str, Any]:
        """The constants of the kernel that puts parts together."""
        return {"H": self.heads, "D": self.size, "UNIT": self.unit, "BLOCK_D": width(self.size)}

    def programs(self, blocks: Blocks, rows: Any, queries: Any) -> Any:
        """The first axis of the grid, of a batch of ``rows`` with ``queries`` each; the second is the number of parts.

        Whole numbers, or whatever else adds, multiplies and divides by //, as TensorRT's symbols do.
        """
        shared = self.groups if self.split else 1
        tiles = (queries * shared + (blocks.m - 1)) // blocks.m
        return tiles * rows * (self.heads // shared)


@dataclass(frozen=True)
class Launch:
    """One launch of ``kernel``: arguments and constants by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    blocks: Blocks

    def run(self) -> None:
        """By Triton itself: compiled on a GPU, interpreted elsewhere (TRITON_INTERPRET=1)."""
        options = {"num_warps": self.blocks.warps, "num_stages": self.blocks.stages}
        self.kernel[self.grid](**self.arguments, **self.constants, **options)


def launches(
    query: Any,
    key: Any,
    value: Any,
    output: Any,
    *,
    blocks: Blocks,
    scale: float | None = None,
    causal: bool = False,
    lengths: Any = None,
    mask: Any = None,
    bias: Any = None,
    scales: tuple[Any, Any] | None = None,
    parts: tuple[Any, Any] | None = None,
    precision: str = "ieee",
) -> list[Launch]:
    """The launches that compute one attention into ``output``.

    query, output  (B, H, S, D) in FP32, FP16 or BF16; their last axis contiguous, as those of keys and values
    key, value     (B, H / G, T, D), of the same dtype, or int8 with ``scales``
    scale          1 / sqrt(D) without
    scales         FP32 (B, H / G, T) of keys and of values, strided alike; one per head is a stride of 0
    lengths        int32 (B,): how many keys a row has; T without
    mask           bool, or added to the scores in any dtype, (B or 1, H or 1, S or 1, T or 1)
    bias           (H, S, T), added for every row of the batch, in any dtype
    parts          FP32 workspaces (n, 2, B, H, S) and (n, B, H, S, D), contiguous: the keys in n parts
    precision      "ieee", or "tf32" for FP32 on tensor cores

    Tensors are anything with data_ptr(), shape, stride(axis) and dtype. Raises InputError for what does not fit.
    """
    check(query, key, value, output, lengths, mask, bias, scales, parts)
    B, H, S, _ = query.shape
    shared, T = key.shape[1:3]
    variant = Variant(
        DTYPES[kind(query)],
        query.shape[3],
        H,
        H // shared,
        scale,
        causal,
        lengths is not None,
        NO_MASK if mask is None else BOOLEAN if kind(mask) == "bool" else ADDITIVE,
        bias is not None,
        scales is not None,
        parts is not None,
        precision,
    )
    tensors = {"query": query, "key": key, "value": value, "lengths": lengths, "mask": mask, "bias": bias}
    tensors |= dict(zip(("key_scale", "value_scale"), scales or (None, None), strict=True))
    strides = {
        **{f"q_{axis}": query.stride(place) for place, axis in enumerate("bhm")},
        **{f"k_{axis}": key.stride(place) for place, axis in enumerate("bhn")},
        **{f"v_{axis}": value.stride(place) for place, axis in enumerate("bhn")},
        **{f"s_{axis}": scales[0].stride(place) if scales else 0 for place, axis in enumerate("bhn")},
        **{f"m_{axis}": spread(mask, place) for place, axis in enumerate("bhmn")},
        **{f"b_{axis}": spread(bias, place) for place, axis in enumerate("hmn")},
    }
    sizes = {"S": S, "T": T, "ROWS": B * H * S}
    out = {f"o_{axis}": output.stride(place) for place, axis in enumerate("bhm")}
    constants = variant.constants(blocks)
    programs = variant.programs(blocks, B, S)
    if max(programs, B * H * S) > MOST_PROGRAMS:
        raise InputError(
            f"attention was given {B} rows of {H} heads; expected at most {MOST_PROGRAMS} programs. Split it."
        )
    if not programs:
        return []  # nothing to write
    if parts is None:
        arguments = {**tensors, **sizes, **strides, **out, "output": output, "sums": None, "parts": None}
        return [Launch(attention, (programs, 1), arguments, constants, blocks)]
    sums, partial = parts
    arguments = {**tensors, **sizes, **strides, **dict.fromkeys(out, 0), "output": None, "sums": sums, "parts": partial}
    count = sums.shape[0]
    whole = {"sums": sums, "parts": partial, "S": S, "ROWS": B * H * S, "COUNT": count, **out, "output": output}
    return [
        Launch(attention, (programs, count), arguments, constants, blocks),
        Launch(attention_whole, (B * H * S,), whole, variant.constants_of_whole(), WHOLE),
    ]


def check(
    query: Any, key: Any, value: Any, output: Any, lengths: Any, mask: Any, bias: Any, scales: Any, parts: Any
) -> None:
    """Raise InputError for what the kernel would read or write wrongly."""
    if any(len(each.shape) != 4 for each in (query, key, value, output)):
        ranks = [len(each.shape) for each in (query, key, value, output)]
        raise InputError(f"attention was given tensors of {ranks} axes; expected 4 each. Give (B, H, S, D).")
    B, H, S, D = query.shape
    rows, shared, T, size = key.shape
    wrong = None
    if kind(query) not in DTYPES:
        wrong = f"queries of {kind(query)}; expected {', '.join(DTYPES)}"
    elif any(kind(each) != ("int8" if scales else kind(query)) for each in (key, value)) or kind(output) != kind(query):
        wrong = f"keys of {kind(key)}, values of {kind(value)}, an output of {kind(output)} for {kind(query)} queries"
    elif (rows, size) != (B, D) or tuple(value.shape) != tuple(key.shape) or shared == 0 or H % shared:
        wrong = f"keys of {tuple(key.shape)} and values of {tuple(value.shape)} for queries of {tuple(query.shape)}"
    elif tuple(output.shape) != (B, H, S, D):
        wrong = f"an output of {tuple(output.shape)} for queries of {tuple(query.shape)}"
    elif lengths is not None and (tuple(lengths.shape) != (B,) or kind(lengths) != "int32" or lengths.stride(0) != 1):
        wrong = f"lengths of {tuple(lengths.shape)} in {kind(lengths)}; expected {(B,)} in int32"
    elif mask is not None and not spreads(mask, (B, H, S, T)):
        wrong = f"a mask of {tuple(mask.shape)}; expected one that spreads to {(B, H, S, T)}"
    elif bias is not None and tuple(bias.shape) != (H, S, T):
        wrong = f"a bias of {tuple(bias.shape)}; expected {(H, S, T)}"
    elif scales is not None and not all(
        tuple(each.shape) == (B, shared, T)
        and kind(each) == "float32"
        and all(each.stride(axis) == scales[0].stride(axis) for axis in range(3))
        for each in scales
    ):
        wrong = f"scales of {[tuple(each.shape) for each in scales]}; expected two of {(B, shared, T)}, float32, alike"
    elif parts is not None and not (
        tuple(parts[0].shape)[1:] == (2, B, H, S)
        and tuple(parts[1].shape) == (parts[0].shape[0], B, H, S, D)
        and all(kind(each) == "float32" and each.is_contiguous() for each in parts)
        and 1 <= parts[0].shape[0] <= MOST_PARTS
    ):
        given = [tuple(each.shape) for each in parts]
        wrong = f"workspaces of {given}; expected {('n', 2, B, H, S)} and {('n', B, H, S, D)}, float32, contiguous"
    elif any(each.stride(3) != 1 and D > 1 for each in (query, key, value, output)):
        wrong = "a last axis that is not contiguous"
    if wrong is not None:
        raise InputError(f"attention was given {wrong}. Give tensors that fit.")


def width(size: int) -> int:
    """The power of two that heads of ``size`` are padded to, in registers and shared memory."""
    return max(LEAST, 1 << (size - 1).bit_length())


def kind(tensor: Any) -> str:
    """Its dtype's name, as "float16"."""
    return str(tensor.dtype).rpartition(".")[2]


def spreads(tensor: Any, shape: tuple[int, ...]) -> bool:
    return len(tensor.shape) == len(shape) and all(
        size in (1, wanted) for size, wanted in zip(tensor.shape, shape, strict=True)
    )


def spread(tensor: Any, axis: int) -> int:
    """The stride of an axis; 0 where its one element is everybody's, and where there is no tensor."""
    return 0 if tensor is None or tensor.shape[axis] == 1 else int(tensor.stride(axis))
