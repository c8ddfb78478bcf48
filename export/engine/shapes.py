"""Narrow the bundle's axes to the bounds that an engine is built for.

As trtexec's ``--minShapes``, ``--optShapes`` and ``--maxShapes``, but by axis: an axis has one size in all inputs.
Sizes that an engine does not have to accept cost it neither memory nor a worse choice of kernels.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from transom.export.engine.profiles import cache_sizes, step_axes
from transom.runtime.errors import ExportError
from transom.runtime.graph_spec import Axis, Graph, cache_inputs, is_decoder, token_input


@dataclass(frozen=True)
class Shapes:
    """Requested sizes by axis, in elements; an axis that is not named keeps the bundle's."""

    min: Mapping[str, int] = field(default_factory=dict)
    opt: Mapping[str, int] = field(default_factory=dict)
    max: Mapping[str, int] = field(default_factory=dict)


def narrowed(axes: Mapping[str, Axis], graphs: Sequence[Graph], shapes: Shapes) -> dict[str, Axis]:
    """Return the bounds of an engine for the bundle's ``axes``.

    1. A named axis has the requested sizes; an opt that is not requested moves to the nearest bound.
    2. A decoder's cache has one length in an engine, its max.
    3. A prompt is no longer than the cache that it is written to, and logits are computed at no more positions than it
       has: these axes follow where they are not named themselves.
    4. An axis that divides another has its max at most: no more groups of rows than rows.

    Raises ExportError, for all problems at once, for an axis that the bundle does not have, sizes out of its bounds or
    out of order, and bounds of a decoder that its steps do not have.
    """
    decoders = [graph for graph in graphs if is_decoder(graph)]
    fixed = {name for graph in decoders if not cache_inputs(graph) for name in step_axes(graph)}
    caches = {name for graph in decoders for name in cache_sizes(graph, axes)}
    steps = {name for graph in decoders for name in step_axes(graph)}
    problems = [problem for each in vars(shapes) for problem in out_of_range(each, getattr(shapes, each), axes, fixed)]
    problems += [
        f"--{each} {name}={getattr(shapes, each)[name]}: a cache has one length in an engine; give --max {name}"
        for each in ("min", "opt")
        for name in sorted(caches & getattr(shapes, each).keys())
    ]
    problems += [
        f"--min {name}={shapes.min[name]}: a step has one new token in each row, so it has to be 1"
        for name in sorted((steps - fixed) & shapes.min.keys())
        if shapes.min[name] > 1
    ]
    problems += [
        f"--{each} {name}={getattr(shapes, each)[name]}: an engine has one for each row; give --{each} {axis.divides}"
        for each in vars(shapes)
        for name, axis in axes.items()
        if axis.divides is not None and name in getattr(shapes, each)
    ]
    require_none(problems)
    bounds = {name: bounded(name, axis, shapes, problems) for name, axis in axes.items()}
    for name, axis in axes.items():
        if axis.divides is not None:
            most = min(axis.max, bounds[axis.divides].max)
            bounds[name] = replace(axis, opt=min(axis.opt, most), max=most)
    for graph in decoders:
        for cache in cache_sizes(graph, axes):
            bounds[cache] = replace(bounds[cache], opt=bounds[cache].max)
            follow(bounds, axes, str(token_input(graph).shape[1]), cache, shapes, problems)
        for name in step_axes(graph):
            follow(bounds, axes, name, str(token_input(graph).shape[1]), shapes, problems)
    require_none(problems)
    return bounds


def out_of_range(
    option: str, requested: Mapping[str, int], axes: Mapping[str, Axis], fixed: Collection[str]
) -> list[str]:
    """Return the problems of one option's sizes with the bundle's axes; no export widens the ``fixed`` ones."""
    problems = []
    for name, size in requested.items():
        axis = axes.get(name)
        if axis is None:
            problems.append(f"--{option} names the axis {name!r:.40}; this bundle has {', '.join(axes)}")
        elif not axis.min <= size <= axis.max:
            again = f"; export again with --max {name}={size}" if size > axis.max else ""
            if name in fixed:
                again = "; a recurrent state is moved by one token at a time"
            problems.append(
                f"--{option} {name}={size} is out of range; this bundle allows {axis.min}..{axis.max}{again}"
            )
    return problems


def bounded(name: str, axis: Axis, shapes: Shapes, problems: list[str]) -> Axis:
    low, high = shapes.min.get(name, axis.min), shapes.max.get(name, axis.max)
    opt = shapes.opt.get(name, max(low, min(axis.opt, high)))
    if not low <= opt <= high:
        problems.append(f"axis {name} would have min {low}, opt {opt}, max {high}; expected them in this order")
    return replace(axis, min=low, opt=opt, max=high)


def follow(
    bounds: dict[str, Axis], axes: Mapping[str, Axis], name: str, other: str, shapes: Shapes, problems: list[str]
) -> None:
    """Bound the axis ``name`` by the max of the ``other``, which it cannot exceed, where that was narrowed.

    ``require_cache_for_prompt`` refuses bounds of the bundle that contradict each other.
    """
    most = bounds[other].max
    if name not in bounds or bounds[name].max <= most or most == axes[other].max:
        return
    if name in shapes.max or (name in shapes.opt and shapes.opt[name] > most):
        problems.append(f"axis {name} would reach {bounds[name].max}, and {other} {most}, which bounds it")
    bounds[name] = replace(bounds[name], opt=min(bounds[name].opt, most), max=most)


def require_none(problems: Sequence[str]) -> None:
    if problems:
        raise ExportError(f"{'; '.join(problems)}. Nothing was built.")


def bounds_to_json(axes: Mapping[str, Axis], graphs: Sequence[Graph]) -> dict[str, dict[str, int]]:
    """Return an engine's bounds for bundle.json: those of each axis of the graphs' inputs."""
    named = {size for graph in graphs for tensor in graph.inputs for size in tensor.shape if isinstance(size, str)}
    return {name: {"min": axis.min, "opt": axis.opt, "max": axis.max} for name, axis in axes.items() if name in named}
