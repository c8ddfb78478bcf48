"""Specification of the attention kernels: constants, arguments by name, grid.

Shared by all launchers: Triton's interpreter in the tests, cuda-python, TensorRT's plugin. Only ``launches`` needs
Triton.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from transom.runtime.errors import InputError

NO_MASK, BOOLEAN, ADDITIVE = 0, 1, 2  # MASK of the kernel
LOG2_E = 1.4426950408889634
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton decides, when it is imported
DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
PRECISIONS = ("ieee", "tf32")
MOST_SIZE = 256  # of a head
LEAST = 16  # rows and columns of the smallest matrix product of tensor cores
MOST_PROGRAMS, MOST_SPLITS = 2**31 - 1, 65535  # the axes of a grid


@dataclass(frozen=True)
class TileSizes:
    """Queries ``m`` and keys ``n`` of a program, its warps, and the stages of its software pipeline."""

    m: int
    n: int
    warps: int = 4
    stages: int = 2


COMBINE_TILES = TileSizes(1, 1, 1, 1)  # of attention_combine: a program has one query, and one warp


@dataclass(frozen=True)
class Variant:
    """Compile-time constants of the kernel.

    ``dtype`` is "fp32", "fp16" or "bf16"; ``size`` the head size; ``groups`` query heads share one head of keys;
    ``scale`` multiplies the scores, 1 / sqrt(size) for None; ``split`` is split-KV. Raises InputError for a variant
    that has no kernel.
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
        """Return UNIT: 1 for scores in base 2, LOG2_E where a bias or an additive mask, in base e, is added to them."""
        return LOG2_E if self.bias or self.mask == ADDITIVE else 1.0

    def constants(self, tiles: TileSizes) -> dict[str, Any]:
        """Return the kernel's constants by name."""
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
            "SPLIT_KV": self.split,
            "BLOCK_M": tiles.m,
            "BLOCK_N": tiles.n,
            "BLOCK_D": padded_size(self.size),
            "PRECISION": self.precision,
            "WIDEN": INTERPRETED and self.dtype == "bf16",
        }

    def combine_constants(self) -> dict[str, Any]:
        """Return the constants of attention_combine."""
        return {"H": self.heads, "D": self.size, "UNIT": self.unit, "BLOCK_D": padded_size(self.size)}

    def programs(self, tiles: TileSizes, rows: Any, queries: Any) -> Any:
        """Return the first axis of the grid for a batch of ``rows`` with ``queries`` each; the second is the splits.

        Sizes are integers, or anything else with +, * and //, such as TensorRT's symbols.
        """
        shared = self.groups if self.split else 1
        query_tiles = (queries * shared + (tiles.m - 1)) // tiles.m
        return query_tiles * rows * (self.heads // shared)


@dataclass(frozen=True)
class Launch:
    """One launch of ``kernel``: arguments and constants by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    constants: Mapping[str, Any]
    tiles: TileSizes

    def run(self) -> None:
        """Launch by Triton itself: compiled on a GPU, interpreted elsewhere (TRITON_INTERPRET=1)."""
        options = {"num_warps": self.tiles.warps, "num_stages": self.tiles.stages}
        self.kernel[self.grid](**self.arguments, **self.constants, **options)


def launches(
    query: Any,
    key: Any,
    value: Any,
    output: Any,
    *,
    tiles: TileSizes,
    scale: float | None = None,
    causal: bool = False,
    lengths: Any = None,
    mask: Any = None,
    bias: Any = None,
    scales: tuple[Any, Any] | None = None,
    workspaces: tuple[Any, Any] | None = None,
    precision: str = "ieee",
) -> list[Launch]:
    """Return the launches that compute one attention into ``output``.

    query, output  (B, H, S, D) in FP32, FP16 or BF16; their last axis contiguous, as those of keys and values
    key, value     (B, H / G, T, D), of the same dtype, or int8 with ``scales``
    scale          1 / sqrt(D) for None
    scales         FP32 (B, H / G, T) of keys and of values, with equal strides; one per head is a stride of 0
    lengths        int32 (B,): keys of each row; T for None
    mask           bool, or added to the scores in any dtype, (B or 1, H or 1, S or 1, T or 1)
    bias           (H, S, T), added for every row of the batch, in any dtype
    workspaces     FP32 (n, 2, B, H, S) and (n, B, H, S, D), contiguous: split-KV with n splits
    precision      "ieee", or "tf32" for FP32 on tensor cores

    Tensors are anything with data_ptr(), shape, stride(axis) and dtype. Raises InputError for tensors
    that do not fit.
    """
    from transom.export.plugins.flash_attention import attention, attention_combine

    check(query, key, value, output, lengths, mask, bias, scales, workspaces)
    B, H, S, _ = query.shape
    shared, T = key.shape[1:3]
    variant = Variant(
        DTYPES[dtype_name(query)],
        query.shape[3],
        H,
        H // shared,
        scale,
        causal,
        lengths is not None,
        NO_MASK if mask is None else BOOLEAN if dtype_name(mask) == "bool" else ADDITIVE,
        bias is not None,
        scales is not None,
        workspaces is not None,
        precision,
    )
    tensors = {"query": query, "key": key, "value": value, "lengths": lengths, "mask": mask, "bias": bias}
    tensors |= dict(zip(("key_scale", "value_scale"), scales or (None, None), strict=True))
    strides = {
        **{f"q_{axis}": query.stride(place) for place, axis in enumerate("bhm")},
        **{f"k_{axis}": key.stride(place) for place, axis in enumerate("bhn")},
        **{f"v_{axis}": value.stride(place) for place, axis in enumerate("bhn")},
        **{f"s_{axis}": scales[0].stride(place) if scales else 0 for place, axis in enumerate("bhn")},
        **{f"m_{axis}": broadcast_stride(mask, place) for place, axis in enumerate("bhmn")},
        **{f"b_{axis}": broadcast_stride(bias, place) for place, axis in enumerate("hmn")},
    }
    sizes = {"S": S, "T": T, "ROWS": B * H * S}
    out = {f"o_{axis}": output.stride(place) for place, axis in enumerate("bhm")}
    constants = variant.constants(tiles)
    programs = variant.programs(tiles, B, S)
    if max(programs, B * H * S) > MOST_PROGRAMS:
        raise InputError(
            f"attention was given {B} rows of {H} heads; expected at most {MOST_PROGRAMS} programs. Split it."
        )
    if not programs:
        return []  # nothing to write
    if workspaces is None:
        arguments = {**tensors, **sizes, **strides, **out, "output": output, "split_ml": None, "split_acc": None}
        return [Launch(attention, (programs, 1), arguments, constants, tiles)]
    partial = dict(zip(("split_ml", "split_acc"), workspaces, strict=True))
    arguments = {**tensors, **sizes, **strides, **dict.fromkeys(out, 0), "output": None, **partial}
    splits = workspaces[0].shape[0]
    combined = {**partial, "S": S, "ROWS": B * H * S, "SPLITS": splits, **out, "output": output}
    return [
        Launch(attention, (programs, splits), arguments, constants, tiles),
        Launch(attention_combine, (B * H * S,), combined, variant.combine_constants(), COMBINE_TILES),
    ]


def check(
    query: Any, key: Any, value: Any, output: Any, lengths: Any, mask: Any, bias: Any, scales: Any, workspaces: Any
) -> None:
    """Raise InputError for tensors that the kernel would read or write out of bounds, or in a wrong dtype."""
    if any(len(each.shape) != 4 for each in (query, key, value, output)):
        ranks = [len(each.shape) for each in (query, key, value, output)]
        raise InputError(f"attention was given tensors of {ranks} axes; expected 4 each. Give (B, H, S, D).")
    B, H, S, D = query.shape
    rows, shared, T, size = key.shape
    stored, wrong = "int8" if scales else dtype_name(query), None
    if dtype_name(query) not in DTYPES:
        wrong = f"queries of {dtype_name(query)}; expected {', '.join(DTYPES)}"
    elif {dtype_name(key), dtype_name(value)} != {stored} or dtype_name(output) != dtype_name(query):
        keys_values = f"keys of {dtype_name(key)}, values of {dtype_name(value)}"
        wrong = f"{keys_values}, an output of {dtype_name(output)} for {dtype_name(query)} queries"
    elif (rows, size) != (B, D) or tuple(value.shape) != tuple(key.shape) or shared == 0 or H % shared:
        wrong = f"keys of {tuple(key.shape)} and values of {tuple(value.shape)} for queries of {tuple(query.shape)}"
    elif tuple(output.shape) != (B, H, S, D):
        wrong = f"an output of {tuple(output.shape)} for queries of {tuple(query.shape)}"
    elif lengths is not None and (
        tuple(lengths.shape) != (B,) or dtype_name(lengths) != "int32" or lengths.stride(0) != 1
    ):
        wrong = f"lengths of {tuple(lengths.shape)} in {dtype_name(lengths)}; expected {(B,)} in int32"
    elif mask is not None and not is_broadcastable(mask, (B, H, S, T)):
        wrong = f"a mask of {tuple(mask.shape)}; expected one that broadcasts to {(B, H, S, T)}"
    elif bias is not None and tuple(bias.shape) != (H, S, T):
        wrong = f"a bias of {tuple(bias.shape)}; expected {(H, S, T)}"
    elif scales is not None and not all(
        tuple(each.shape) == (B, shared, T)
        and dtype_name(each) == "float32"
        and all(each.stride(axis) == scales[0].stride(axis) for axis in range(3))
        for each in scales
    ):
        given = [tuple(each.shape) for each in scales]
        wrong = f"scales of {given}; expected two of {(B, shared, T)}, float32, of equal strides"
    elif workspaces is not None and not (
        tuple(workspaces[0].shape)[1:] == (2, B, H, S)
        and tuple(workspaces[1].shape) == (workspaces[0].shape[0], B, H, S, D)
        and all(dtype_name(each) == "float32" and each.is_contiguous() for each in workspaces)
        and 1 <= workspaces[0].shape[0] <= MOST_SPLITS
    ):
        given = [tuple(each.shape) for each in workspaces]
        wrong = f"workspaces of {given}; expected {('n', 2, B, H, S)} and {('n', B, H, S, D)}, float32, contiguous"
    elif any(each.stride(3) != 1 and D > 1 for each in (query, key, value, output)):
        wrong = "a last axis that is not contiguous"
    if wrong is not None:
        raise InputError(f"attention was given {wrong}. Give tensors that fit.")


def padded_size(size: int) -> int:
    """Return the power of two that heads of ``size`` are padded to, in registers and shared memory."""
    return max(LEAST, 1 << (size - 1).bit_length())


def dtype_name(tensor: Any) -> str:
    """Return the name of a tensor's dtype, such as "float16"."""
    return str(tensor.dtype).rpartition(".")[2]


def is_broadcastable(tensor: Any, shape: tuple[int, ...]) -> bool:
    return len(tensor.shape) == len(shape) and all(
        size in (1, wanted) for size, wanted in zip(tensor.shape, shape, strict=True)
    )


def broadcast_stride(tensor: Any, axis: int) -> int:
    """Return the stride of an axis; 0 where its one element is broadcast, and for no tensor."""
    return 0 if tensor is None or tensor.shape[axis] == 1 else int(tensor.stride(axis))
