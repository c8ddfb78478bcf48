"""Compile the attention kernels ahead of time, without a GPU: PTX, launch parameters, the assembler's report."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

from transom.export.plugins.compiled import (
    ALIGNED,
    ATTENTION,
    COMBINE,
    POINTERS,
    Compiled,
    CompiledCombine,
    compiled_from_json,
    json_from_compiled,
    kernel_file,
)
from transom.export.plugins.kernel_spec import ADDITIVE, COMBINE_TILES, INTERPRETED, NO_MASK, TileSizes, Variant
from transom.export.plugins.layout import Formula, Layout
from transom.export.plugins.tile_sizes import tile_sizes_for
from transom.runtime.disk_cache import Cache, unwritable
from transom.runtime.errors import BackendError, EngineError, one_line

CACHE_KIND, CACHE_DIR = "triton", "TRITON_CACHE_DIR"  # of our cache; the variable that names Triton's own
WARP = 32  # threads
# The oldest version with the instructions: a driver reads the versions of its own CUDA. 8.0 is CUDA 12.0, 8.7 12.8.
PTX_VERSIONS = {75: 80, 80: 80, 86: 80, 87: 80, 89: 80, 90: 80, 100: 86, 120: 87}
OUTPUTS = {"query": ("output", "split_ml", "split_acc"), "split_ml": ("output",)}  # by a kernel's first argument
# Scratch memory that Triton appends to every kernel's parameters, and that only its own launcher fills in
SCRATCH = r",\s*\.param \.u64 \.ptr \.global \.align 1 {name}_param_{index}(?=[,\s])"


AnyCompiled = TypeVar("AnyCompiled", bound=Compiled)


def attention_ptx(
    capability: int, variant: Variant, layout: Layout | None = None, tiles: TileSizes | None = None
) -> Compiled:
    """Compile the attention kernel of ``variant`` for one compute capability, such as 89. No GPU is needed.

    Raises EngineError for a capability or a dtype without a kernel, BackendError without triton.
    """
    tiles = tiles or tile_sizes_for(capability, variant)
    if capability == 75 and (variant.dtype == "bf16" or variant.precision == "tf32"):
        raise EngineError(
            f"SM75 has matrix products of neither BF16 nor TF32, and {variant.dtype} in {variant.precision} was "
            "requested; use fp16, or fp32 with ieee."
        )
    layout, constants = layout or Layout(), variant.constants(tiles)
    formulas, types = layout.strides(variant), pointer_types(variant)
    return compile_kernel(Compiled, ATTENTION, capability, variant, layout, tiles, formulas, types, constants)


def combine_ptx(capability: int, variant: Variant, layout: Layout | None = None) -> CompiledCombine:
    """Compile the combine kernel of a ``split`` variant, the second kernel of split-KV.

    Raises EngineError for a capability or a variant without one, BackendError without triton.
    """
    tile_sizes_for(capability, variant)
    if not variant.split:
        raise EngineError(
            "a variant without splits has no combine kernel; expected split=True. Use attention_ptx alone."
        )
    layout, constants = layout or Layout(), variant.combine_constants()
    formulas = layout.strides(variant, combine=True)
    types = {"split_ml": "*fp32", "split_acc": "*fp32", "output": f"*{variant.dtype}"}
    tiles = COMBINE_TILES
    return compile_kernel(CompiledCombine, COMBINE, capability, variant, layout, tiles, formulas, types, constants)


@contextmanager
def bounded_triton_cache() -> Iterator[None]:
    """Point Triton's cache at our bounded cache, unless TRITON_CACHE_DIR names another folder.

    Triton's default is in the home folder, or without one below the working folder; where it cannot be written nothing
    is compiled.
    """
    from triton import knobs

    users = os.environ.get(CACHE_DIR)
    if users and unwritable(Path(users)) is None:
        yield
        return
    cache = Cache(CACHE_KIND, "Every build compiles our attention again, which takes seconds.")
    with ExitStack() as stack:
        stack.enter_context(knobs.cache.scope())
        if cache.keeps:
            knobs.cache.dir = str(cache.folder)
        else:
            cache.warn()
            knobs.cache.dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="transom-triton-"))
        yield
        cache.trim()


def compile_kernel(
    kind: type[AnyCompiled],
    name: str,
    capability: int,
    variant: Variant,
    layout: Layout,
    tiles: TileSizes,
    formulas: Mapping[str, Formula],
    types: Mapping[str, str],
    constants: Mapping[str, Any],
) -> AnyCompiled:
    """Compile a kernel by Triton: each argument is a pointer with a type, an integer with a formula, or a constant.

    One that ``$TRANSOM_KERNELS`` has is read from there, without Triton.
    """
    kept = kernel_file(name, capability, variant, layout, tiles)
    if kept is not None and kept.exists():
        return cast(AnyCompiled, compiled_from_json(kept.read_text(encoding="utf-8")))
    if INTERPRETED:
        raise BackendError("TRITON_INTERPRET=1 is set, so nothing is compiled; unset it and start again.")
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError as error:
        raise BackendError(
            f"triton cannot be imported ({one_line(error, 100)}), and $TRANSOM_KERNELS has no kernel "
            f"for SM{capability} of {variant}; expected either. Run `pip install 'transom[plugin]'`."
        ) from None
    from transom.export.plugins import flash_attention

    kernel = getattr(flash_attention, name)
    fixed: dict[str, Any] = {name: None for name in POINTERS if name not in types}
    fixed |= {name: factor for name, (factor, sizes) in formulas.items() if not sizes}
    fixed = {name: value for name, value in {**fixed, **constants}.items() if name in kernel.arg_names}
    fixed |= {name: 0 for name in kernel.arg_names if name not in {**types, **fixed, **formulas}}
    signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in kernel.arg_names}
    given = [name for name in kernel.arg_names if name not in fixed]
    aligned = {  # known divisors of pointers, and of integers with an even factor
        (place,): [["tt.divisibility", ALIGNED if name in types else power_of_two(formulas[name][0])]]
        for place, name in enumerate(kernel.arg_names)
        if name in given
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=aligned)
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages, "ptx_version": PTX_VERSIONS[capability]}
    options["enable_fp_fusion"] = True
    with bounded_triton_cache():
        binary = triton.compile(source, target=GPUTarget("cuda", capability, WARP), options=options)
    outputs = tuple(name for name in given if name in OUTPUTS[kernel.arg_names[0]])
    compiled = kind(
        capability,
        variant,
        tiles,
        binary.metadata.name,
        without_scratch(binary.asm["ptx"], binary.metadata, len(given)).encode(),
        int(binary.metadata.shared),
        int(binary.metadata.num_warps) * WARP,
        tuple(name for name in given if name in types and name not in outputs),
        tuple(name for name in given if name not in types),
        outputs,
        formulas,
        {name: types[name] for name in given if name in types},
        layout,
    )
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_name(f".{kept.name}.{os.getpid()}")  # processes beside this one may read or write it too
        partial.write_text(json_from_compiled(compiled), encoding="utf-8")
        partial.replace(kept)
    return compiled


def pointer_types(variant: Variant) -> dict[str, str]:
    """Return Triton's types of a variant's tensors. Additive masks and biases have the queries' dtype."""
    stored = "i8" if variant.int8 else variant.dtype
    types = {"query": variant.dtype, "key": stored, "value": stored}
    if variant.int8:
        types |= {"key_scale": "fp32", "value_scale": "fp32"}
    if variant.lengths:
        types["lengths"] = "i32"
    if variant.mask != NO_MASK:
        types["mask"] = variant.dtype if variant.mask == ADDITIVE else "i1"
    if variant.bias:
        types["bias"] = variant.dtype
    types |= {"split_ml": "fp32", "split_acc": "fp32"} if variant.split else {"output": variant.dtype}
    return {name: f"*{kind}" for name, kind in types.items()}


def power_of_two(factor: int) -> int:
    """Return the greatest power of two, up to 16, that divides every multiple of ``factor``."""
    return min(factor & -factor, ALIGNED)


def without_scratch(ptx: str, metadata: Any, given: int) -> str:
    """Remove the two scratch parameters that Triton appends to the PTX: TensorRT would leave them undefined.

    Raises EngineError where the kernel uses them: it would need memory that no launcher provides.
    """
    name = metadata.name
    for index in (given + 1, given):
        ptx, dropped = re.subn(SCRATCH.format(name=name, index=index), "", ptx)
        if (
            dropped != 1
            or f"{name}_param_{index}" in ptx
            or metadata.global_scratch_size
            or metadata.profile_scratch_size
        ):
            raise EngineError(
                f"the compiled {name} has no unused parameter {index} for Triton's scratch memory; "
                "expected PTX of Triton 3.7 or 3.9. Install triton 3.7 or 3.9."
            )
    return ptx
