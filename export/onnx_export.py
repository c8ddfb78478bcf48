"""Trace a PyTorch module to the canonical ONNX graph: FP32, standard operators, named axes."""

from __future__ import annotations

import ast
import contextlib
import inspect
import itertools
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from transom.calib.graph_hash import MODULE
from transom.export.passes.share_initializers import share_initializers
from transom.runtime.errors import ExportError, one_line
from transom.runtime.graph_spec import Axis, Graph, cache_inputs, shape_of

OPSET = 23  # the first with Attention
CACHE_OPSET = 24  # the first with TensorScatter, which writes the KV cache
NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"  # what torch.export 2.13 records for a node that no module made


def onnx_from_module(module: nn.Module, graph: Graph, axes: Mapping[str, Axis]) -> ir.Model:
    """Trace ``module`` once and return its graph with the names, dtypes and axes of ``graph``.

    Every node carries the path of its module as metadata; the exporter's other metadata (stack traces
    with the paths of this machine) is dropped. Raises ExportError when the exporter fails or returns
    other axes than those of ``graph``.
    """
    sizes = example_sizes(graph, axes)
    examples = tuple(
        torch.zeros(shape_of(tensor, sizes), dtype=getattr(torch, tensor.dtype)) for tensor in graph.inputs
    )
    dims = {  # an example may lie beyond its axis: see example_sizes
        name: torch.export.Dim(name, min=axis.min, max=max(axis.max, sizes.get(name, 0)))
        for name, axis in axes.items()
        if axis.max > 1
    }
    dynamic = [{i: dims[size] for i, size in enumerate(tensor.shape) if size in dims} for tensor in graph.inputs]
    cached = bool(cache_inputs(graph))
    try:
        with quiet_exporter():
            program = torch.onnx.export(
                module,
                examples,
                dynamo=True,
                opset_version=CACHE_OPSET if cached else OPSET,
                dynamic_shapes=grouped(module, dynamic),
                input_names=[tensor.name for tensor in graph.inputs],
                output_names=[tensor.name for tensor in graph.outputs],
                verbose=False,
            )
    except Exception as error:  # the exporter wraps failures in many types
        raise ExportError(
            f"torch.onnx.export failed: {one_line(error)}. Run again with --debug for the traceback."
        ) from error
    assert program is not None
    model = program.model
    share_initializers(model)
    model.producer_name, model.producer_version, model.doc_string = "transom", None, None
    model.graph.name, model.graph.doc_string = graph.name, None
    keep_module_paths(model)
    check_axes(model, graph, axes)
    return model


def grouped(module: nn.Module, shapes: list[dict[int, Any]]) -> tuple[Any, ...]:
    """Group the shapes as torch.export expects them: those of ``*state`` in a tuple of their own."""
    parameters = inspect.signature(module.forward).parameters.values()
    named = sum(parameter.kind is not parameter.VAR_POSITIONAL for parameter in parameters)
    rest = tuple(shapes[named:])
    return (*shapes[:named], rest) if rest else tuple(shapes)


def example_sizes(graph: Graph, axes: Mapping[str, Axis]) -> dict[str, int]:
    """Choose distinct sizes of at least 2, so that the tracer can neither specialise an axis nor equate two.

    Axes of one are constants and stay 1; one that ``divides`` another does. Where bounds leave fewer sizes than there
    are axes, one is traced beyond its bound, which is not part of the graph; the batch first, for positions are looked
    up in tables that may end there. Returns a size for each axis of the graph's inputs.
    """
    named = [size for tensor in graph.inputs for size in tensor.shape if isinstance(size, str)]
    batches = {tensor.shape[0] for tensor in graph.inputs if tensor.shape}
    sizes: dict[str, int] = {}

    def place(name: str) -> tuple[int, bool, bool]:
        """Return what sorts the axes: one that divides another comes in front of it."""
        whole = axes[name].divides
        return axes[whole or name].max, name in batches, whole is None

    for name in sorted(dict.fromkeys(named), key=place):
        step = math.prod(sizes[other] for other in sizes if axes[other].divides == name)
        free = (n for n in itertools.count(max(2, axes[name].min)) if n not in sizes.values() and n % step == 0)
        sizes[name] = 1 if axes[name].max == 1 else next(free)
    return sizes


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Hide the exporter's messages to its own developers: deprecations inside torch, missing torchvision."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def keep_module_paths(model: ir.Model) -> None:
    """Replace the exporter's metadata by the dotted path of the module each node comes from."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph:
        path = module_path(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        node.metadata_props.clear()
        node.doc_string = None
        if path:
            node.metadata_props[MODULE] = path
    for value in values(model):
        value.metadata_props.clear()
        value.doc_string = None


def module_path(scopes: str) -> str:
    """Return the path of the innermost module of ``scopes``, the exporter's repr of a list; empty for none.

    The list has every module around the node from the outside in, "" for the outermost, then the operation. Raises
    ExportError for anything else: which nodes stay in FP32 is decided by their paths.
    """
    try:
        found = ast.literal_eval(scopes)
    except (ValueError, SyntaxError):
        found = None
    if not isinstance(found, list) or not all(isinstance(scope, str) for scope in found):
        raise ExportError(
            f"the exporter notes {scopes!r:.200} as the modules around a node; expected a list of strings. Install the "
            "version of torch that pyproject.toml names."
        )
    path = found[-2] if len(found) > 1 else ""
    return "" if path == NO_MODULE else path


def values(model: ir.Model) -> Iterator[ir.Value]:
    """Yield every value of the main graph: inputs, initializers and the nodes' outputs."""
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in model.graph:
        yield from node.outputs


def check_axes(model: ir.Model, graph: Graph, axes: Mapping[str, Axis]) -> None:
    """Raise ExportError where the exporter renamed or specialised an axis, which it does silently."""
    for tensor, value in zip((*graph.inputs, *graph.outputs), (*model.graph.inputs, *model.graph.outputs), strict=True):
        expected = tuple(
            1 if isinstance(size, str) and axes[size].max == 1 else size for size in tensor.shape
        )  # an axis of one is traced as a constant
        found = tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape or ())
        if value.name != tensor.name or found != expected:
            advice = "the definition specialises an axis. Look for Python branches on a size in its forward."
            if len(found) != len(expected):
                advice = (
                    "these are two different tensors. Does forward return them in the order in which graphs has them?"
                )
            raise ExportError(f"the exporter made {value.name} {found} of {tensor.name} {expected}; {advice}")
