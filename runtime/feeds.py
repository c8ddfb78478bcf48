"""Check what a caller gives a graph against the declared tensors, before any library sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from transom.runtime.backends.base import Array
from transom.runtime.errors import InputError, ShapeError
from transom.runtime.graph_spec import (
    ARANGE,
    CACHE,
    IMAGES,
    Axis,
    EngineAxis,
    Graph,
    Tensor,
    cache_inputs,
    shape_of,
    token_input,
)

if TYPE_CHECKING:
    from transom.runtime.manifest_graphs import Plan

WRITE_INDICES = "write_indices"  # int64 (B,): where each row's new tokens go in its caches
LOGITS_POSITIONS = "logits_positions"  # int64 (B, P): which of the new tokens get logits
IMAGE_INDICES = "image_indices"  # int64 (B, S): which of the row's images a token sees, from 1; 0 is none


def checked_feeds(
    graph: Graph, axes: Mapping[str, Axis], inputs: Mapping[str, Any]
) -> tuple[dict[str, Array], dict[str, int]]:
    """Return every input of the graph as an array, defaults filled in, and the size of each named axis.

    Raises InputError for an unknown or missing name, a wrong type or dtype, an index out of its
    range, or a buffer that cannot be written in place; ShapeError for a wrong rank, a wrong fixed
    size, an axis out of bounds or that does not divide another one, two inputs that disagree about one, or a cache
    that is too short.
    """
    known = graph.inputs_by_name
    if not inputs.keys() <= known.keys():
        stranger = next(name for name in inputs if name not in known)
        raise InputError(f"unknown input {stranger!r}; this bundle takes {', '.join(known)}.")
    sizes: dict[str, int] = {}
    for name, value in inputs.items():
        check_type(known[name], value)
        check_shape(known[name], value, axes, sizes)
        check_range(known[name], value)
    if graph.written:
        check_buffers(graph.written, inputs)
    feeds = {name: np.asarray(value) for name, value in inputs.items()}
    if len(sizes) < len(graph.named_axes):
        complete_sizes(graph, axes, sizes)
    check_groups(axes, sizes)
    missing = [tensor for tensor in graph.inputs if tensor.name not in feeds] if len(feeds) < len(known) else []
    for tensor in sorted(missing, key=lambda tensor: tensor.default is not None):  # first those one must give
        feeds[tensor.name] = filled(tensor, sizes)
    if graph.written and cache_inputs(graph):
        check_positions(sizes[str(token_input(graph).shape[1])], sizes[CACHE], feeds)
    if IMAGE_INDICES in feeds:
        check_images(feeds[IMAGE_INDICES], sizes[IMAGES])
    return feeds, sizes


def complete_sizes(graph: Graph, axes: Mapping[str, Axis], sizes: dict[str, int]) -> None:
    """Add to ``sizes`` the axes that no given input has: each is as long as the one it is ``same_as``.

    One that is like no other is as short as it may be, where all inputs that have it may be left out.
    """
    required = {size for tensor in graph.inputs if tensor.default is None for size in tensor.shape}
    for name in graph.named_axes - sizes.keys():
        other = axes[name].same_as
        if other in sizes:
            sizes[name] = sizes[other]
        elif other is None and name not in required:
            sizes[name] = axes[name].min


def check_groups(axes: Mapping[str, Axis], sizes: Mapping[str, int]) -> None:
    """Raise ShapeError where an axis of groups does not divide the axis of what is grouped."""
    for name, size in sizes.items():
        whole = axes[name].divides
        if whole is not None and whole in sizes and sizes[whole] % size:
            raise ShapeError(
                f"axis {name} is {size} and axis {whole} is {sizes[whole]}, which is no multiple of it. Give each of "
                f"the {name} groups as many rows, or {name}={sizes[whole]}."
            )


def check_type(tensor: Tensor, value: Any) -> None:
    if not isinstance(value, np.ndarray):
        raise InputError(
            f"input {tensor.name!r} is a {type(value).__name__}; expected a numpy array of {tensor.dtype}. "
            f"Convert it with np.asarray(value, np.{tensor.dtype})."
        )
    if value.dtype is not storage(tensor) and value.dtype != storage(tensor):  # a byte-swapped dtype differs as well
        raise InputError(
            f"input {tensor.name!r} has dtype {value.dtype}; expected {storage(tensor)}. "
            f"Convert it with .astype(np.{storage(tensor)})."
        )


def storage(tensor: Tensor) -> np.dtype[Any]:
    """Return numpy's dtype of a tensor; for bfloat16, which numpy does not have, uint16 with the same bits."""
    return stored_as(tensor.dtype)


@cache
def stored_as(dtype: str) -> np.dtype[Any]:
    return np.dtype("uint16" if dtype == "bfloat16" else dtype)


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
    """Return the bounds, and how to get a ``size`` beyond them, if at all: ``1..67. Export again with --max S=68.``"""
    where = f" in the engine for {axis.target}" if isinstance(axis, EngineAxis) else ""
    beyond = size > axis.max or (isinstance(axis, EngineAxis) and size >= exported(axis).min)
    hint = f" {wider({name: axis}, {name: size})}." if beyond else ""
    ceiling = exported(axis).ceiling
    if ceiling is not None and size > ceiling:
        hint = f" The model has {ceiling} positions; give no more." if ceiling > 1 else " Give one at a time."
    return f"{axis.min}..{axis.max}{where}.{hint}"


def wider(axes: Mapping[str, Axis], sizes: Mapping[str, int]) -> str:
    """Return the command that lets axes have ``sizes`` out of their bounds: ``Export again with --max S=68``.

    An engine within the bundle's bounds is built again; beyond them both commands are named.
    """
    new = " ".join(f"--max {name}={size}" for name, size in sizes.items() if size > exported(axes[name]).max)
    built = " ".join(
        f"--{'max' if size > axes[name].max else 'min'} {name}={size}"
        for name, size in sizes.items()
        if not axes[name].min <= size <= axes[name].max
    )
    targets = [axis.target for axis in axes.values() if isinstance(axis, EngineAxis)]
    if not targets:
        return f"Export again with {new}"
    command = f"`transom build BUNDLE --target {targets[0]} {built}`"
    return f"Export again with {new}, then run {command}" if new else f"Run {command}"


def exported(axis: Axis) -> Axis:
    """Return the bundle's bounds of an axis."""
    return axis.exported if isinstance(axis, EngineAxis) and axis.exported is not None else axis


def engine_axes(axes: Mapping[str, Axis], plan: Plan) -> dict[str, Axis]:
    """Return the bundle's ``axes`` within the bounds of an engine; those that it does not narrow are unchanged."""
    narrowed = {
        name: EngineAxis(
            axis.min,
            axis.opt,
            axis.max,
            same_as=axes[name].same_as,
            divides=axes[name].divides,
            target=plan.target,
            exported=axes[name],
        )
        for name, axis in plan.axes.items()
        if (axis.min, axis.max) != (axes[name].min, axes[name].max)
    }
    return {**axes, **narrowed}


def check_range(tensor: Tensor, value: Array) -> None:
    if tensor.exclusive_max is None or value.size == 0:
        return
    if value.dtype == np.int64:  # as unsigned, what is negative is above all bounds; argmax is numpy's quickest look
        unsigned = value.view(np.uint64)
        if unsigned.item(unsigned.argmax()) < tensor.exclusive_max:
            return
    low, high = int(value.min()), int(value.max())
    if low < 0 or high >= tensor.exclusive_max:
        wrong = low if low < 0 else high
        raise InputError(
            f"input {tensor.name!r} holds {wrong}; expected values in 0..{tensor.exclusive_max - 1}. "
            "Is this the tokenizer of this model?"
        )


def check_buffer(name: str, value: Array) -> None:
    """Raise InputError for a state that cannot be written in place.

    A copy that made it contiguous would get the new values instead.
    """
    if not (value.flags.c_contiguous and value.flags.writeable and value.flags.aligned):
        raise InputError(
            f"input {name!r} is read-only or no contiguous block of memory; it is written in place. "
            "Make one with np.zeros(shape, dtype) and keep it between calls."
        )


def check_buffers(names: Sequence[str], inputs: Mapping[str, Array]) -> None:
    """Raise InputError unless the given states are all there, once tokens lie in them, each in memory of its own."""
    given = [name for name in names if name in inputs]
    for name in given:
        check_buffer(name, inputs[name])
    if given and len(given) < len(names) and np.any(inputs.get(WRITE_INDICES, 0)):
        missing = next(name for name in names if name not in inputs)
        raise InputError(
            f"input {missing!r} is missing, but {WRITE_INDICES} continues after tokens that it should hold. Give "
            "all of the caches that the call before wrote."
        )
    placed = sorted((inputs[name].ctypes.data, name) for name in given)
    for (start, name), (following, other) in pairwise(placed):
        if start + inputs[name].nbytes > following:
            raise InputError(
                f"inputs {name!r} and {other!r} share memory, and both are written. Give each its own: np.zeros."
            )


def check_positions(new: int, capacity: int, feeds: Mapping[str, Array]) -> None:
    """Raise ShapeError where ``new`` tokens a row do not fit into caches of ``capacity`` behind those written before.

    Raises InputError where a wanted position is not among the new ones. Graphs check neither: TensorRT drops what is
    written past the end without an error.
    """
    end = int(np.max(feeds[WRITE_INDICES], initial=0)) + new
    if end > capacity:
        raise ShapeError(
            f"{new} tokens at {WRITE_INDICES} up to {end - new} end at {end}; the caches hold C={capacity}. "
            "Give larger ones."
        )
    wanted = feeds[LOGITS_POSITIONS]
    if wanted.size and not 0 <= int(wanted.min()) <= int(wanted.max()) < new:
        raise InputError(
            f"input {LOGITS_POSITIONS!r} holds {int(wanted.min())}..{int(wanted.max())}; expected positions among the "
            f"{new} tokens of this call, 0..{new - 1}."
        )


def check_images(indices: Array, images: int) -> None:
    """Raise InputError where a token is to see an image that the call does not have: the graph does not check it."""
    low, high = int(indices.min(initial=0)), int(indices.max(initial=0))
    if low < 0 or high > images:
        raise InputError(
            f"input {IMAGE_INDICES!r} holds {low if low < 0 else high}; expected 0 for no image, or 1..{images}, the "
            f"images of this call (axis {IMAGES}). Give the keys and values of as many images."
        )


def filled(tensor: Tensor, sizes: Mapping[str, int]) -> Array:
    """Make the default of an input that was left out; InputError where it has none."""
    if tensor.default is None or any(isinstance(name, str) and name not in sizes for name in tensor.shape):
        raise InputError(f"input {tensor.name!r} is missing; expected {tensor.dtype} {expected_shape(tensor)}.")
    shape = shape_of(tensor, sizes)
    if tensor.default == ARANGE:
        return np.broadcast_to(np.arange(shape[-1], dtype=tensor.dtype), shape).copy()
    try:
        return np.full(shape, tensor.default, storage(tensor))
    except (MemoryError, ValueError):
        raise InputError(f"there is no memory for the input {tensor.name!r} of {shape}. Give smaller ones.") from None


def expected_shape(tensor: Tensor) -> str:
    return f"({', '.join(map(str, tensor.shape))})"


def wanted_outputs(graph: Graph, names: Sequence[str] | None, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the outputs asked for (all of them for None); InputError for an unknown one.

    A buffer that is written in place goes by the name of its input.
    """
    known = graph.outputs_by_name
    wanted = list(known) if names is None else list(names)
    if not wanted and not graph.written:  # a decoder may just write its caches
        raise InputError("outputs is empty; name at least one, or leave it out for all.")
    strangers = [name for name in wanted if name not in known]
    if strangers:
        raise InputError(f"unknown output {strangers[0]!r}; this bundle has {', '.join(known)}.")
    return {name: shape_of(known[name], sizes) for name in wanted}
