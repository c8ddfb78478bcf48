"""Our attention as plugins of full TensorRT, compiled when an engine is built: the engine then needs no Python.

TensorRT asks a plugin of ``tensorrt.plugin`` for a kernel's name, its PTX, how it is launched and its integers, all as
functions of the shapes, and keeps them in the engine (documentation of ``tensorrt.plugin.aot_impl``). It launches the
kernel with the inputs, the integers and the outputs in this order, which is the kernel's.

**No machine has executed this for us**: TensorRT builds where a GPU is. What is tested is what NVIDIA's own Python
package (``tensorrt_bindings.plugin`` 11.4) makes of it, on an emulation of the classes below that package.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from transom.export.passes.plugin_attention import CAUSAL, DOMAIN, INPUTS, MASKED
from transom.export.plugins.ahead import Compiled, Layout, attention_ptx
from transom.export.plugins.attention import ADDITIVE, BOOLEAN, NO_MASK
from transom.export.plugins.blocks import SHARED, blocks_for, portable
from transom.export.plugins.launch import Blocks, Variant
from transom.runtime.errors import EngineError

DTYPES = {"FLOAT": "fp32", "HALF": "fp16", "BF16": "bf16"}  # of trt.DataType, by the names of its members
TYPES = {"FLOAT": "FP32", "HALF": "FP16", "BF16": "BF16", "BOOL": "BOOL", "INT32": "INT32"}  # as autotune writes them
MASK_AXES = "bhm"  # and the keys
SCALE = "scale"

Sizes = Sequence[int | None]  # of a tensor; None for one that is known when the engine runs


def variant_of(operator: str, dtypes: Sequence[str], shapes: Sequence[Sizes], scale: float) -> tuple[Variant, Layout]:
    """The kernel that a node of ``operator`` is, by the dtypes (of trt.DataType) and the shapes of its inputs."""
    (_, heads, _, size), (_, shared, _, _) = shapes[:2]
    if dtypes[0] not in DTYPES or not heads or not shared or size is None:
        raise EngineError(
            f"the plugin {operator} was given queries of {dtypes[0]} {tuple(shapes[0])} and keys of "
            f"{tuple(shapes[1])}; expected {', '.join(DTYPES)}, and heads whose number and size are fixed. "
            "Build with --no-plugin."
        )
    mask, axes = NO_MASK, ""
    if operator == MASKED:
        mask = BOOLEAN if dtypes[3] == "BOOL" else ADDITIVE
        axes = "".join(axis for axis, length in zip(MASK_AXES, shapes[3], strict=False) if length != 1)
    causal = operator == CAUSAL
    variant = Variant(DTYPES[dtypes[0]], size, heads, heads // shared, scale, causal=causal, lengths=causal, mask=mask)
    return variant, Layout(mask=axes)


def candidates(sm: int, variant: Variant) -> tuple[Blocks, ...]:
    """Blocks that TensorRT times one against the other on the GPU: for many queries, and for a step's few."""
    sm = portable(sm)
    return tuple(dict.fromkeys((blocks_for(sm, variant), blocks_for(sm, replace(variant, split=True)))))


def kernel_of(variant: Variant, layout: Layout, sm: int, tactic: int) -> Compiled:
    """The kernel of a ``tactic``, which counts ``candidates`` from 1.

    Raises EngineError for one that wants more shared memory than a launch has without asking for it.
    """
    blocks = candidates(sm, variant)[max(tactic, 1) - 1]
    made = attention_ptx(portable(sm), variant, layout, blocks)
    if made.shared > SHARED:
        raise EngineError(
            f"the attention kernel of {variant} wants {made.shared} bytes of shared memory for SM{sm}; expected at "
            f"most {SHARED}. Build with --no-plugin, and report this."
        )
    return made


def register_plugins(trtp: Any, sm: int, failed: Callable[[Exception], None]) -> None:
    """Make the operators known to TensorRT, once in a process: ``trtp`` is ``tensorrt.plugin``, ``sm`` as 89.

    ``failed`` is told what goes wrong inside, for TensorRT itself tells only that something did.
    """
    for operator in INPUTS:
        register_plugin(trtp, operator, sm, failed)


def register_plugin(trtp: Any, operator: str, sm: int, failed: Callable[[Exception], None]) -> None:
    tensors, name = INPUTS[operator], f"{DOMAIN}::{operator}"
    count = len(tensors)

    def describe(*given: Any, **attributes: Any) -> Any:
        return given[0].like()

    def combinations(*given: Any) -> list[Any]:
        query, *others = given[:count]
        types = [type_of(query), *(type_of(other) for other in others), type_of(query)]
        variant, _ = understood(given[:count], scale=1.0)
        tactics = list(range(1, len(candidates(sm, variant)) + 1))
        return [trtp.AutoTuneCombination(", ".join(TYPES[each] for each in types), "LINEAR", tactics)]

    def compiled(*given: Any) -> Any:
        scale, _, tactic = given[count:]
        inputs = given[:count]
        variant, layout = understood(inputs, scale)
        made = kernel_of(variant, layout, sm, tactic)
        query, key = (tensor.shape_expr for tensor in inputs[:2])
        B, S, T = query[0], query[2], key[2]
        launch = trtp.KernelLaunchParams()
        launch.grid_x, launch.grid_y, launch.grid_z = made.grid(B, S)
        launch.block_x, launch.shared_mem = made.threads, made.shared
        integers = trtp.SymIntExprs.from_tuple([trtp.SymInt32(value) for value in made.sizes(B, S, T)])
        return made.name, made.ptx, launch, integers

    def understood(inputs: Sequence[Any], scale: float) -> tuple[Variant, Layout]:
        dtypes = [type_of(tensor) for tensor in inputs]
        return variant_of(operator, dtypes, [sizes_of(tensor) for tensor in inputs], scale)

    def telling(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            try:
                return function(*given)
            except Exception as error:
                failed(error)
                raise

        return call

    # TensorRT reads the signatures, in which annotations are classes
    described = [(tensor, trtp.TensorDesc) for tensor in tensors]
    outputs, tactic = ("outputs", tuple[trtp.TensorDesc]), ("tactic", int)
    result = tuple[str, bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]
    trtp.register(name)(signed(describe, [*described, (SCALE, float)], trtp.TensorDesc))
    trtp.autotune(name)(signed(telling(combinations), [*described, outputs], list[trtp.AutoTuneCombination]))
    trtp.aot_impl(name)(signed(telling(compiled), [*described, (SCALE, float), outputs, tactic], result))


def signed(function: Callable[..., Any], parameters: Sequence[tuple[str, Any]], result: Any) -> Callable[..., Any]:
    """``function`` with this signature."""
    made = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=a) for name, a in parameters]
    function.__signature__ = inspect.Signature(made, return_annotation=result)  # type: ignore[attr-defined]
    return function


def type_of(tensor: Any) -> str:
    """The name of a trt.DataType: "HALF"."""
    return str(tensor.dtype).rpartition(".")[2]


def sizes_of(tensor: Any) -> Sizes:
    return [size.constant_value() if size.is_constant else None for size in tensor.shape_expr]
