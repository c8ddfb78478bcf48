"""Compile the attention kernels ahead of time, without a GPU: PTX, launch parameters, the assembler's report."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

from transom.export.plugins.flash_attention import ADDITIVE, NO_MASK, attention, attention_combine
from transom.export.plugins.kernel_spec import COMBINE_TILES, INTERPRETED, TileSizes, Variant
from transom.export.plugins.layout import Formula, Layout, product
from transom.export.plugins.tile_sizes import tile_sizes_for
from transom.runtime.disk_cache import Cache, unwritable
from transom.runtime.errors import BackendError, EngineError, one_line

CACHE_KIND, CACHE_DIR = "triton", "TRITON_CACHE_DIR"  # of our cache; the variable that names Triton's own
KERNELS_DIR = "TRANSOM_KERNELS"  # names a folder: a kernel that it has is not compiled again, any other is added
SOURCES = ("flash_attention.py", "kernel_spec.py", "layout.py", "aot.py")  # that decide what a kernel is
WARP = 32  # threads
ALIGNED = 16  # bytes of a pointer, elements of a stride: Triton then loads 16 bytes at once
# The oldest version with the instructions: a driver reads the versions of its own CUDA. 8.0 is CUDA 12.0, 8.7 12.8.
PTX_VERSIONS = {75: 80, 80: 80, 86: 80, 87: 80, 89: 80, 90: 80, 100: 86, 120: 87}
INPUTS = ("query", "key", "value", "key_scale", "value_scale", "lengths", "mask", "bias")
POINTERS = (*INPUTS, "output", "split_ml", "split_acc")
OUTPUTS = {"query": ("output", "split_ml", "split_acc"), "split_ml": ("output",)}  # by a kernel's first argument
RESOURCES = re.compile(r"Used (\d+) registers")
SPILLS = re.compile(r"(\d+) bytes spill stores")
# Scratch memory that Triton appends to every kernel's parameters, and that only its own launcher fills in
SCRATCH = r",\s*\.param \.u64 \.ptr \.global \.align 1 {name}_param_{index}(?=[,\s])"


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel: its PTX and its launch parameters.

    ``tensors``, ``integers``, ``outputs`` are the kernel's parameters in this order, and it has no others: pointers,
    32-bit integers, pointers. ``shared`` is dynamic shared memory in bytes: beyond 48 KiB a launcher must request it
    (cuFuncSetAttribute, MAX_DYNAMIC_SHARED_SIZE_BYTES). ``types`` are Triton's, such as "*fp16". Pointers are multiples
    of ALIGNED bytes.
    """

    capability: int
    variant: Variant
    tiles: TileSizes
    name: str
    ptx: bytes
    shared: int
    threads: int
    tensors: tuple[str, ...]
    integers: tuple[str, ...]
    outputs: tuple[str, ...]
    formulas: Mapping[str, Formula] = field(repr=False)
    types: Mapping[str, str] = field(default_factory=dict, repr=False)
    layout: Layout = field(default_factory=Layout)

    def grid(self, B: Any, S: Any, splits: Any = 1) -> tuple[Any, Any, int]:
        """Return the grid for a batch of B rows of S queries; integers or an engine builder's symbols."""
        return self.variant.programs(self.tiles, B, S), splits, 1

    def sizes(self, B: Any, S: Any, T: Any, splits: Any = 1) -> tuple[Any, ...]:
        """Return the values of ``integers``; numbers or an engine builder's symbols.

        Raises EngineError for numbers that do not fit in 32 bits.
        """
        sizes = {"B": B, "S": S, "T": T, "P": splits}
        values = []
        for name in self.integers:
            value: Any = product(self.formulas[name], sizes)
            if isinstance(value, int) and not -(2**31) <= value < 2**31:
                raise EngineError(
                    f"{name} is {value} for B={B}, S={S}, T={T}; expected 32 bits. Use fewer rows at once."
                )
            values.append(value)
        return tuple(values)

    def elements(self, B: int, S: int, T: int, splits: int = 1) -> dict[str, int]:
        """Return the number of elements of every tensor and output."""
        sizes, counts = {"B": B, "S": S, "T": T, "P": splits}, self.layout.elements(self.variant)
        return {name: product(counts[name], sizes) for name in (*self.tensors, *self.outputs)}

    @cached_property
    def assembled(self) -> tuple[int, int]:
        """Registers per thread and bytes spilled per thread, as reported by the assembler that Triton ships."""
        from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.ptx"
            path.write_bytes(self.ptx)
            target = f"--gpu-name={sm_arch_from_capability(self.capability)}"
            command = [get_ptxas(self.capability).path, "-v", target, str(path), "-o", f"{path}.cubin"]
            done = subprocess.run(command, capture_output=True, text=True)
        registers, spills = RESOURCES.search(done.stderr), SPILLS.search(done.stderr)
        if done.returncode or registers is None or spills is None:
            said = one_line(RuntimeError(done.stderr))
            raise EngineError(
                f"ptxas did not take the kernel for SM{self.capability}: {said}. Install triton 3.7 or 3.9."
            )
        return int(registers[1]), int(spills[1])


class CompiledCombine(Compiled):
    """The compiled combine kernel of split-KV: a program for every query of every head."""

    def grid(self, B: Any, S: Any, splits: Any = 1) -> tuple[Any, Any, int]:
        return B * S * self.variant.heads, 1, 1


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
    return compile_kernel(Compiled, attention, capability, variant, layout, tiles, formulas, types, constants)


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
    kernel, tiles = attention_combine, COMBINE_TILES
    return compile_kernel(CompiledCombine, kernel, capability, variant, layout, tiles, formulas, types, constants)


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
    kernel: Any,
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
    kept = kernel_file(kernel, capability, variant, layout, tiles)
    if kept is not None and kept.exists():
        return cast(AnyCompiled, compiled_from_json(kept.read_text(encoding="utf-8")))
    if INTERPRETED:
        raise BackendError("TRITON_INTERPRET=1 is set, so nothing is compiled; unset it and start again.")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

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


def kernel_file(kernel: Any, capability: int, variant: Variant, layout: Layout, tiles: TileSizes) -> Path | None:
    """Return the file of a kernel in ``$TRANSOM_KERNELS``, by a hash of its source and options; None without one."""
    folder = os.environ.get(KERNELS_DIR)
    if not folder:
        return None
    sources = [Path(__file__).with_name(name).read_text(encoding="utf-8") for name in SOURCES]
    key = [kernel.__name__, capability, asdict(variant), asdict(layout), asdict(tiles), sources]
    return Path(folder) / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.json"


def json_from_compiled(compiled: Compiled) -> str:
    """Serialise a kernel for a launcher that compiles nothing; ``compiled_from_json`` reads it."""
    return json.dumps({**asdict(compiled), "ptx": compiled.ptx.decode()})


def compiled_from_json(text: str) -> Compiled:
    """Read back a kernel that ``json_from_compiled`` wrote."""
    fields = json.loads(text)
    kind = Compiled if fields["name"] == attention.__name__ else CompiledCombine
    fields |= {name: tuple(fields[name]) for name in ("tensors", "integers", "outputs")}
    fields |= {"variant": Variant(**fields["variant"]), "tiles": TileSizes(**fields["tiles"])}
    fields |= {"layout": Layout(**fields["layout"]), "ptx": fields["ptx"].encode()}
    fields["formulas"] = {name: (factor, sizes) for name, (factor, sizes) in fields["formulas"].items()}
    return kind(**fields)


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
