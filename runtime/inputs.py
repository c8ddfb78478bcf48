"""What a caller hands in, held against what the graph declares, before any library sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from transom.runtime.backend import Array
from transom.runtime.errors import InputError, ShapeError
from transom.runtime.spec import Axis, Graph, Tensor


def checked_feeds(
    graph: Graph, axes: Mapping[str, Axis], inputs: Mapping[str, Any]
) -> tuple[dict[str, Array], dict[str, int]]:
    """Every input of the graph as an array, defaults filled in, and the size of each named axis.

    Raises InputError for an unknown or missing name, a wrong type or dtype, or an index out of its
    range; ShapeError for a wrong rank, a wrong fixed size, an axis out of bounds, or two inputs that
    disagree about one.
    """
    known = {tensor.name: tensor for tensor in graph.inputs}
    strangers = [name for name in inputs if name not in known]
    if strangers:
        raise InputError(f"unknown input {strangers[0]!r}; this bundle takes {', '.join(known)}.")
    sizes: dict[str, int] = {}
    for name, value in inputs.items():
        check_type(known[name], value)
        check_shape(known[name], value, axes, sizes)
        check_range(known[name], value)
    feeds = {name: np.asarray(value) for name, value in inputs.items()}
    for tensor in graph.inputs:
        if tensor.name not in feeds:
            feeds[tensor.name] = filled(tensor, sizes)
    return feeds, sizes


def check_type(tensor: Tensor, value: Any) -> None:
    if not isinstance(value, np.ndarray):
        raise InputError(
            f"input {tensor.name!r} is a {type(value).__name__}; expected a numpy array of {tensor.dtype}. "
            f"Convert it with np.asarray(value, np.{tensor.dtype})."
        )
    if value.dtype != np.dtype(tensor.dtype):  # a byte-swapped dtype differs as well
        raise InputError(
            f"input {tensor.name!r} has dtype {value.dtype}; expected {tensor.dtype}. "
            f"Convert it with .astype(np.{tensor.dtype})."
        )


def check_shape(tensor: Tensor, value: Array, axes: Mapping[str, Axis], sizes: dict[str, int]) -> None:
    """Check the rank and each size; named sizes are noted in ``sizes``."""
    if value.ndim != len(tensor.shape):
        raise ShapeError(
            f"input {tensor.name!r} has shape {value.shape}; expected {len(tensor.shape)} axes "
            f"{expected_shape(tensor)}. Add or drop an axis."
        )
    for name, size in zip(tensor.shape, value.shape, strict=True):
        if isinstance(name, int):
            if size != name:
                raise ShapeError(
                    f"input {tensor.name!r} has shape {value.shape}; expected {expected_shape(tensor)}: "
                    f"this axis is fixed at {name}."
                )
            continue
        if not axes[name].min <= size <= axes[name].max:
            allowed = allowed_sizes(name, axes[name], size)
            raise ShapeError(f"input {tensor.name!r} has shape {value.shape}; axis {name} allows {allowed}")
        if sizes.setdefault(name, size) != size:
            raise ShapeError(
                f"input {tensor.name!r} has shape {value.shape}; another input has {name}={sizes[name]}. "
                f"Give all inputs the same {name}."
            )


def allowed_sizes(name: str, axis: Axis, size: int) -> str:
    """``1..67. Export again with --max S=68.``: the bounds, and how to have a ``size`` beyond them."""
    hint = f" Export again with --max {name}={size}." if size > axis.max else ""
    return f"{axis.min}..{axis.max}.{hint}"


def check_range(tensor: Tensor, value: Array) -> None:
    if tensor.below is None or value.size == 0:
        return
    low, high = int(value.min()), int(value.max())
    if low < 0 or high >= tensor.below:
        wrong = low if low < 0 else high
        raise InputError(
            f"input {tensor.name!r} holds {wrong}; expected values in 0..{tensor.below - 1}. "
            "Is this the tokenizer of this model?"
        )


def filled(tensor: Tensor, sizes: Mapping[str, int]) -> Array:
    """The default of an input that was left out."""
    if tensor.default is None or any(isinstance(name, str) and name not in sizes for name in tensor.shape):
        raise InputError(f"input {tensor.name!r} is missing; expected {tensor.dtype} {expected_shape(tensor)}.")
    return np.full(shape_of(tensor, sizes), tensor.default, np.dtype(tensor.dtype))


def shape_of(tensor: Tensor, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The tensor's shape with every axis name replaced by its size."""
    return tuple(sizes[size] if isinstance(size, str) else size for size in tensor.shape)


def expected_shape(tensor: Tensor) -> str:
    return f"({', '.join(map(str, tensor.shape))})"


def wanted_outputs(graph: Graph, names: Sequence[str] | None, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the outputs asked for (all of them for None); InputError for an unknown one."""
    known = {tensor.name: tensor for tensor in graph.outputs}
    wanted = list(known) if names is None else list(names)
    strangers = [name for name in wanted if name not in known]
    if strangers:
        raise InputError(f"unknown output {strangers[0]!r}; this bundle has {', '.join(known)}.")
    return {name: shape_of(known[name], sizes) for name in wanted}
