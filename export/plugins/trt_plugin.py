"""Plugins of full TensorRT for the attention kernel, compiled when an engine is built: the engine needs no Python.

TensorRT asks a plugin of ``tensorrt.plugin`` for a kernel's name, its PTX, its launch parameters and its integers, all
as functions of the shapes, and stores them in the engine (documentation of ``tensorrt.plugin.aot_impl``). It launches
the kernel with the inputs, the integers and the outputs in this order, which is the kernel's.

**Not yet executed on a GPU**: TensorRT builds only where one is. The tests run NVIDIA's own Python package
(``tensorrt_bindings.plugin`` 11.4) on an emulation of the classes below it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from transom.export.passes.plugin_attention import ATTRIBUTES, AXES, CAUSAL, DOMAIN, INPUTS, MASKED
from transom.export.plugins.aot import attention_ptx
from transom.export.plugins.compiled import Compiled
from transom.export.plugins.kernel_spec import ADDITIVE, BOOLEAN, NO_MASK, TileSizes, Variant
from transom.export.plugins.layout import Layout
from transom.export.plugins.tile_sizes import SHARED, fitted, portable, tile_sizes_for
from transom.runtime.errors import EngineError

DTYPES = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16"}  # of trt.DataType, by the names of its members
TYPES = {
    "FLOAT": "FP32",
    "HALF": "FP16",
    "BF16": "BF16",
    "BOOL": "BOOL",
    "INT32": "INT32",
}  # names in autotune's formats
ADVICE = "Build with --no-plugin."

Sizes = Sequence[int | None]  # of a tensor; None for a size that is known only at run time


def variant_of(operator: str, dtypes: Sequence[str], shapes: Sequence[Sizes], scale: float) -> Variant:
    """Return the kernel variant of a node of ``operator``, by the dtypes (of trt.DataType) and shapes of its inputs.

    Raises EngineError for inputs that do not fit together: a kernel would read out of bounds.
    """
    query, key, value, *more = shapes
    wrong = None
    if dtypes[0] not in DTYPES or len(set(dtypes[:3])) > 1:
        wrong = f"queries, keys and values of {', '.join(dtypes[:3])}; expected one of {', '.join(DTYPES)}"
    elif [len(shape) for shape in shapes[:3]] != [4, 4, 4] or None in (query[1], key[1], query[3]):
        wrong = "queries and keys whose heads have no fixed number and size; expected (B, H, S, D)"
    elif query[1] % key[1] or value[1] != key[1] or {key[3], value[3]} != {query[3]}:  # type: ignore[operator]
        wrong = f"queries of {tuple(query)}, keys of {tuple(key)} and values of {tuple(value)}; expected some that fit"
    elif operator == MASKED and (dtypes[3] not in ("BOOL", dtypes[0]) or len(more[0]) != len(AXES)):
        wrong = f"a mask of {dtypes[3]} {tuple(more[0])}; expected four axes, in BOOL or {dtypes[0]}"
    elif operator == CAUSAL and (dtypes[3] != "INT32" or len(more[0]) != 1):
        wrong = f"lengths of {dtypes[3]} {tuple(more[0])}; expected (B,) in INT32"
    if wrong is not None:
        raise EngineError(f"the plugin {operator} was given {wrong}. {ADVICE}")
    heads, shared, size = query[1] or 1, key[1] or 1, query[3] or 0
    mask = NO_MASK if operator != MASKED else BOOLEAN if dtypes[3] == "BOOL" else ADDITIVE
    causal = operator == CAUSAL
    return Variant(DTYPES[dtypes[0]], size, heads, heads // shared, scale, causal=causal, lengths=causal, mask=mask)


def layout_of(operator: str, shapes: Sequence[Sizes], mask_axes: str = AXES) -> Layout:
    """Return the layout for a node's ``mask_axes``. Raises EngineError where the mask's sizes contradict them."""
    if operator != MASKED:
        return Layout()
    query, key, _, mask = shapes
    scores = (query[0], query[1], query[2], key[2])
    for axis, size, wanted in zip(AXES, mask, scores, strict=True):
        expected = wanted if axis in mask_axes else 1
        if size is not None and expected is not None and size != expected:
            raise EngineError(
                f"the plugin {operator} was given a mask of {tuple(mask)} with the axes {mask_axes!r:.20} for scores "
                f"of {scores}; expected sizes that are equal, and 1 along the other axes. {ADVICE}"
            )
    return Layout(mask=mask_axes.removesuffix(AXES[-1]))


def candidates(sm: int, variant: Variant, queries: int | None = None, keys: int | None = None) -> tuple[TileSizes, ...]:
    """Return the tile sizes that TensorRT times on the GPU: those for many queries, and those for a decoding step.

    Both are fitted to the numbers of ``queries`` and ``keys`` where the graph fixes them.
    """
    sm = portable(sm)
    both = tile_sizes_for(sm, variant), tile_sizes_for(sm, replace(variant, split=True))
    return tuple(dict.fromkeys(fitted(tiles, queries, keys) for tiles in both))


def kernel_of(variant: Variant, layout: Layout, sm: int, tiles: TileSizes) -> Compiled:
    """Compile the kernel with one of ``candidates``.

    Raises EngineError for one that needs more shared memory than a launch gets without opting in.
    """
    compiled = attention_ptx(portable(sm), variant, layout, tiles)
    if compiled.shared > SHARED:
        raise EngineError(
            f"the attention kernel of {variant} needs {compiled.shared} bytes of shared memory for SM{sm}; expected at "
            f"most {SHARED}. {ADVICE}"
        )
    return compiled


def register_plugins(trtp: Any, sm: int, failed: Callable[[Exception], None]) -> None:
    """Register the operators with TensorRT, once per process: ``trtp`` is ``tensorrt.plugin``, ``sm`` such as 89.

    ``failed`` is called with each exception inside a plugin, for TensorRT itself reports only that one occurred.
    """
    for operator in INPUTS:
        register_plugin(trtp, operator, sm, failed)


def register_plugin(trtp: Any, operator: str, sm: int, failed: Callable[[Exception], None]) -> None:
    """Register one operator: its output's description, its formats and tactics, its kernel."""
    tensors, attributes, name = INPUTS[operator], ATTRIBUTES[operator], f"{DOMAIN}::{operator}"
    count = len(tensors)

    def describe(*given: Any, **_: Any) -> Any:
        return given[0].like()

    def combinations(*given: Any) -> list[Any]:
        dtypes, shapes = dtypes_and_shapes(given[:count])
        variant = variant_of(operator, dtypes, shapes, 1.0)
        tactics = list(range(1, len(candidates(sm, variant, shapes[0][2], shapes[1][2])) + 1))
        types = [TYPES[dtype] for dtype in (*dtypes, dtypes[0])]
        return [trtp.AutoTuneCombination(", ".join(types), "LINEAR", tactics)]

    def launch_of(*given: Any) -> Any:
        scale, *axes, _, tactic = given[count:]
        dtypes, shapes = dtypes_and_shapes(given[:count])
        layout = layout_of(operator, shapes, *axes)
        variant = variant_of(operator, dtypes, shapes, scale)
        tiles = candidates(sm, variant, shapes[0][2], shapes[1][2])[max(tactic, 1) - 1]
        compiled = kernel_of(variant, layout, sm, tiles)
        query, key = (tensor.shape_expr for tensor in given[:2])
        B, S, T = query[0], query[2], key[2]
        launch = trtp.KernelLaunchParams()
        launch.grid_x, launch.grid_y, launch.grid_z = compiled.grid(B, S)
        launch.block_x, launch.shared_mem = compiled.threads, compiled.shared
        integers = trtp.SymIntExprs.from_tuple([trtp.SymInt32(value) for value in compiled.sizes(B, S, T)])
        return compiled.name, compiled.ptx, launch, integers

    def reporting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            try:
                return function(*given)
            except Exception as error:
                failed(error)
                raise

        return call

    # TensorRT reads the signatures, whose annotations have to be classes
    described = [(tensor, trtp.TensorDesc) for tensor in tensors]
    outputs, tactic = ("outputs", tuple[trtp.TensorDesc]), ("tactic", int)
    result = tuple[str, bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]
    trtp.register(name)(signed(describe, [*described, *attributes.items()], trtp.TensorDesc))
    trtp.autotune(name)(signed(reporting(combinations), [*described, outputs], list[trtp.AutoTuneCombination]))
    trtp.aot_impl(name)(signed(reporting(launch_of), [*described, *attributes.items(), outputs, tactic], result))


def signed(function: Callable[..., Any], parameters: Sequence[tuple[str, Any]], result: Any) -> Callable[..., Any]:
    """Set the signature of ``function`` and return it."""
    given = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=a) for name, a in parameters]
    function.__signature__ = inspect.Signature(given, return_annotation=result)  # type: ignore[attr-defined]
    return function


def dtypes_and_shapes(tensors: Sequence[Any]) -> tuple[list[str], list[Sizes]]:
    """Return the names of the dtypes, such as "HALF", and the shapes."""
    shapes: list[Sizes] = [
        [n.constant_value() if n.is_constant else None for n in tensor.shape_expr] for tensor in tensors
    ]
    return [str(tensor.dtype).rpartition(".")[2] for tensor in tensors], shapes
