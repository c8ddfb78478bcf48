"""The kernel compiled for a GPU that is not here: PTX, what a launch of it takes, and what the assembler says of it."""

from __future__ import annotations

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
from typing import Any, TypeVar

from transom.export.plugins.flash_attention import ADDITIVE, NO_MASK, attention, attention_whole
from transom.export.plugins.kernel_spec import INTERPRETED, WHOLE, Blocks, Variant
from transom.export.plugins.tile_sizes import blocks_for
from transom.runtime.disk_cache import Cache, unwritable
from transom.runtime.errors import BackendError, EngineError, one_line

KIND, CACHE_DIR = "triton", "TRITON_CACHE_DIR"  # of cache; what says that Triton's is elsewhere
WARP = 32  # threads
ALIGNED = 16  # bytes, elements: what Triton makes of it are loads of 16 bytes
# The oldest that has the instructions: a driver takes what its own CUDA knows. 8.0 is CUDA 12.0, 8.7 is CUDA 12.8.
PTX_VERSIONS = {75: 80, 80: 80, 86: 80, 87: 80, 89: 80, 90: 80, 100: 86, 120: 87}
POINTERS = ("query", "key", "value", "key_scale", "value_scale", "lengths", "mask", "bias", "output", "sums", "parts")
OUTPUTS = {"query": ("output", "sums", "parts"), "sums": ("output",)}  # of either kernel, by its first argument
RESOURCES = re.compile(r"Used (\d+) registers")
SPILLS = re.compile(r"(\d+) bytes spill stores")
# What Triton appends to every kernel's parameters: scratch memory that only its own launcher knows of
SCRATCH = r",\s*\.param \.u64 \.ptr \.global \.align 1 {name}_param_{index}(?=[,\s])"
LAYOUTS = ("bhsd", "bshd")
MASK_AXES = ("", "b", "h", "m", "bh", "bm", "hm", "bhm")


@dataclass(frozen=True)
class Layout:
    """Contiguous tensors, as an engine has them.

    ``order`` is "bhsd" or "bshd", of queries, keys, values and output; ``mask`` names the axes that a mask has besides
    T, of b, h and m: "" is (1, 1, 1, T), "bm" is (B, 1, S, T). Scales are (B, H / G, T).
    """

    order: str = "bhsd"
    mask: str = "bhm"

    def __post_init__(self) -> None:
        if self.order not in LAYOUTS or self.mask not in MASK_AXES:
            raise EngineError(
                f"a layout of {self.order!r:.20} with a mask of {self.mask!r:.20}; "
                f"expected {' or '.join(LAYOUTS)}, and of b, h and m those that the mask has, in this order."
            )

    def elements(self, variant: Variant) -> dict[str, tuple[int, str]]:
        """How many elements every tensor has, as (factor, sizes it is multiplied with), P being the number of parts."""
        H, KV, D = variant.heads, variant.heads // variant.groups, variant.size
        shared = dict.fromkeys(("key", "value"), (KV * D, "BT"))
        shared |= dict.fromkeys(("key_scale", "value_scale"), (KV, "BT"))
        axes = "".join({"b": "B", "m": "S"}.get(axis, "") for axis in self.mask)
        return {
            **shared,
            "query": (H * D, "BS"),
            "lengths": (1, "B"),
            "mask": (H if "h" in self.mask else 1, axes + "T"),
            "bias": (H, "ST"),
            "output": (H * D, "BS"),
            "sums": (2 * H, "PBS"),
            "parts": (H * D, "PBS"),
        }

    def strides(self, variant: Variant, *, whole: bool = False) -> dict[str, tuple[int, str]]:
        """Every integer argument as (factor, sizes it is multiplied with), of B, S and T: (64, "S") is 64 S.

        Of keys in parts the kernel writes no output; what puts the ``whole`` together does, and is told of P parts.
        """
        H, KV, D = variant.heads, variant.heads // variant.groups, variant.size
        heads_first = self.order == "bhsd"

        def tensor(name: str, heads: int, axis: str) -> dict[str, tuple[int, str]]:
            rows = "m" if axis == "S" else "n"
            within = (D, axis) if heads_first else (D, "")
            return {
                f"{name}_b": (heads * D, axis),
                f"{name}_h": within,
                f"{name}_{rows}": (D, "") if heads_first else (heads * D, ""),
            }

        queries, heads = ("S" if "m" in self.mask else ""), (H if "h" in self.mask else 1)
        none = (0, "")
        found = {"S": (1, "S"), "T": (1, "T"), "ROWS": (H, "BS")} | ({"COUNT": (1, "P")} if whole else {})
        found |= {**tensor("q", H, "S"), **tensor("k", KV, "T"), **tensor("v", KV, "T"), **tensor("o", H, "S")}
        found |= {"s_b": (KV, "T"), "s_h": (1, "T"), "s_n": (1, "")}
        found |= {"m_b": (heads, queries + "T") if "b" in self.mask else none}
        found |= {"m_h": (1, queries + "T") if "h" in self.mask else none}
        found |= {"m_m": (1, "T") if "m" in self.mask else none, "m_n": (1, "")}
        found |= {"b_h": (1, "ST"), "b_m": (1, "T"), "b_n": (1, "")}
        absent = {"s": not variant.int8, "m": variant.mask == NO_MASK, "b": not variant.bias}
        absent["o"] = variant.split and not whole
        return {
            name: none if "_" in name and absent.get(name[0]) else found[name]
            for name in found
            if variant.split or name != "ROWS"
        }


@dataclass(frozen=True)
class Compiled:
    """A kernel's PTX and how to launch it.

    ``tensors``, ``integers``, ``outputs`` are the kernel's parameters in this order, and it has no others: pointers,
    32-bit integers, pointers. ``shared`` is in bytes, and dynamic: beyond 48 KiB a launcher must ask for it
    (cuFuncSetAttribute, MAX_DYNAMIC_SHARED_SIZE_BYTES). ``types`` are Triton's, as "*fp16". Pointers are multiples of
    ALIGNED bytes.
    """

    capability: int
    variant: Variant
    blocks: Blocks
    name: str
    ptx: bytes
    shared: int
    threads: int
    tensors: tuple[str, ...]
    integers: tuple[str, ...]
    outputs: tuple[str, ...]
    formulas: Mapping[str, tuple[int, str]] = field(repr=False)
    types: Mapping[str, str] = field(default_factory=dict, repr=False)
    layout: Layout = field(default_factory=Layout)

    def grid(self, B: Any, S: Any, parts: Any = 1) -> tuple[Any, Any, int]:
        """Programs of a batch of B rows of S queries; whole numbers or an engine builder's symbols."""
        return self.variant.programs(self.blocks, B, S), parts, 1

    def sizes(self, B: Any, S: Any, T: Any, parts: Any = 1) -> tuple[Any, ...]:
        """The values of ``integers``; numbers or an engine builder's symbols.

        Raises EngineError for numbers that 32 bits do not hold.
        """
        sizes = {"B": B, "S": S, "T": T, "P": parts}
        found = []
        for name in self.integers:
            value: Any = product(self.formulas[name], sizes)
            if isinstance(value, int) and not -(2**31) <= value < 2**31:
                raise EngineError(
                    f"{name} is {value} for B={B}, S={S}, T={T}; expected 32 bits. Use fewer rows at once."
                )
            found.append(value)
        return tuple(found)

    def elements(self, B: int, S: int, T: int, parts: int = 1) -> dict[str, int]:
        """How many elements every tensor and output has."""
        sizes, counts = {"B": B, "S": S, "T": T, "P": parts}, self.layout.elements(self.variant)
        return {name: product(counts[name], sizes) for name in (*self.tensors, *self.outputs)}

    @cached_property
    def assembled(self) -> tuple[int, int]:
        """(registers of a thread, bytes a thread spills) by the assembler that Triton brings."""
        from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

        with tempfile.TemporaryDirectory() as made:
            path = Path(made) / "kernel.ptx"
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


class CompiledWhole(Compiled):
    """The kernel that puts parts together: a program for every query of every head."""

    def grid(self, B: Any, S: Any, parts: Any = 1) -> tuple[Any, Any, int]:
        return B * S * self.variant.heads, 1, 1


Made = TypeVar("Made", bound=Compiled)


def attention_ptx(
    capability: int, variant: Variant, layout: Layout | None = None, blocks: Blocks | None = None
) -> Compiled:
    """PTX of one variant for one compute capability, as 89. No GPU is needed.

    Raises EngineError for a capability or a dtype that there is no kernel for, BackendError without triton.
    """
    blocks = blocks or blocks_for(capability, variant)
    if capability == 75 and (variant.dtype == "bf16" or variant.precision == "tf32"):
        raise EngineError(
            f"SM75 multiplies neither BF16 nor TF32, and {variant.dtype} in {variant.precision} was asked for; "
            "use fp16, or fp32 with ieee."
        )
    layout, constants = layout or Layout(), variant.constants(blocks)
    formulas, types = layout.strides(variant), pointer_types(variant)
    return compiled(Compiled, attention, capability, variant, layout, blocks, formulas, types, constants)


def whole_ptx(capability: int, variant: Variant, layout: Layout | None = None) -> CompiledWhole:
    """PTX of what puts the parts of a ``split`` variant together: the second kernel of such a step.

    Raises EngineError for a capability or a variant that has none, BackendError without triton.
    """
    blocks_for(capability, variant)
    if not variant.split:
        raise EngineError("a variant without parts was to be put together; expected split=True. attention_ptx is all.")
    layout, constants = layout or Layout(), variant.constants_of_whole()
    formulas = layout.strides(variant, whole=True)
    types = {"sums": "*fp32", "parts": "*fp32", "output": f"*{variant.dtype}"}
    return compiled(CompiledWhole, attention_whole, capability, variant, layout, WHOLE, formulas, types, constants)


@contextmanager
def kept_kernels() -> Iterator[None]:
    """Have Triton keep what it compiles in our cache, which has a bound, unless TRITON_CACHE_DIR names another.

    Triton's own is in the home folder, or without one below the folder that this runs in; where it cannot be written
    nothing is compiled.
    """
    from triton import knobs

    theirs = os.environ.get(CACHE_DIR)
    if theirs and unwritable(Path(theirs)) is None:
        yield
        return
    kept = Cache(KIND, "Every build compiles our attention again, which takes seconds.")
    with ExitStack() as stack:
        stack.enter_context(knobs.cache.scope())
        if kept.keeps:
            knobs.cache.dir = str(kept.folder)
        else:
            kept.warn()
            knobs.cache.dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="transom-triton-"))
        yield
        kept.trim()


def compiled(
    kind: type[Made],
    kernel: Any,
    capability: int,
    variant: Variant,
    layout: Layout,
    blocks: Blocks,
    formulas: Mapping[str, tuple[int, str]],
    types: Mapping[str, str],
    constants: Mapping[str, Any],
) -> Made:
    """What Triton makes of a kernel: an argument is a pointer with a type, an integer with sizes, or a constant."""
    if INTERPRETED:
        raise BackendError("TRITON_INTERPRET=1 is set, and nothing is compiled; unset it and start again.")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    fixed: dict[str, Any] = {name: None for name in POINTERS if name not in types}
    fixed |= {name: factor for name, (factor, sizes) in formulas.items() if not sizes}
    fixed = {name: value for name, value in {**fixed, **constants}.items() if name in kernel.arg_names}
    fixed |= {name: 0 for name in kernel.arg_names if name not in {**types, **fixed, **formulas}}
    signature = {name: "constexpr" if name in fixed else types.get(name, "i32") for name in kernel.arg_names}
    given = [name for name in kernel.arg_names if name not in fixed]
    aligned = {  # what a pointer, or an integer of an even factor, is a multiple of
        (place,): [["tt.divisibility", ALIGNED if name in types else power_of_two(formulas[name][0])]]
        for place, name in enumerate(kernel.arg_names)
        if name in given
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=aligned)
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages, "ptx_version": PTX_VERSIONS[capability]}
    options["enable_fp_fusion"] = True
    with kept_kernels():
        made = triton.compile(source, target=GPUTarget("cuda", capability, WARP), options=options)
    outputs = tuple(name for name in given if name in OUTPUTS[kernel.arg_names[0]])
    return kind(
        capability,
        variant,
        blocks,
        made.metadata.name,
        without_scratch(made.asm["ptx"], made.metadata, len(given)).encode(),
        int(made.metadata.shared),
        int(made.metadata.num_warps) * WARP,
        tuple(name for name in given if name in types and name not in outputs),
        tuple(name for name in given if name not in types),
        outputs,
        formulas,
        {name: types[name] for name in given if name in types},
        layout,
    )


def json_from_compiled(made: Compiled) -> str:
    """All of it, for a launcher that compiles nothing: ``compiled_from_json`` reads it."""
    return json.dumps({**asdict(made), "ptx": made.ptx.decode()})


def compiled_from_json(text: str) -> Compiled:
    told = json.loads(text)
    kind = Compiled if told["name"] == attention.__name__ else CompiledWhole
    lists = {name: tuple(told[name]) for name in ("tensors", "integers", "outputs")}
    told |= {"variant": Variant(**told["variant"]), "blocks": Blocks(**told["blocks"]), **lists}
    told |= {"layout": Layout(**told["layout"]), "ptx": told["ptx"].encode()}
    told["formulas"] = {name: (factor, sizes) for name, (factor, sizes) in told["formulas"].items()}
    return kind(**told)


def product(formula: tuple[int, str], sizes: Mapping[str, Any]) -> Any:
    """(64, "S") is 64 S. A symbol stands in front: it multiplies, a number does not multiply it."""
    factor, letters = formula
    value = sizes[letters[0]] * factor
    for letter in letters[1:]:
        value = value * sizes[letter]
    return value


def pointer_types(variant: Variant) -> dict[str, str]:
    """Triton's types of the tensors that a variant has. Additive masks and biases are of the queries' dtype."""
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
    types |= {"sums": "fp32", "parts": "fp32"} if variant.split else {"output": variant.dtype}
    return {name: f"*{kind}" for name, kind in types.items()}


def power_of_two(factor: int) -> int:
    """The greatest power of two, up to 16, that divides every multiple of ``factor``."""
    return min(factor & -factor, ALIGNED)


def without_scratch(ptx: str, metadata: Any, given: int) -> str:
    """The PTX without the two parameters that Triton appends: TensorRT would leave them to chance.

    Raises EngineError where the kernel uses them: it would need memory that nobody gives it.
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
                "expected what Triton 3.7 and 3.9 make. Install triton 3.7 or 3.9."
            )
    return ptx
