"""From a compiled kernel's description to its launch: an emulated driver reads what is packed as the PTX declares it.

The one thing that is not executed here is the PTX: see emulated_driver. The packing goes through the real cuda-python
besides, to a libcuda of a few lines.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'transom[plugin]'")
pytest.importorskip("cuda.bindings.driver", reason="cuda-python is not installed")

import torch
from cuda.bindings import driver as real_driver
from cuda.bindings import runtime as real_runtime

from emulated_driver import TYPES, EmulatedDriver, Memories, compile_elsewhere
from test_plugin_kernel import exact, normal, require_close, visible
from transom.export.plugins import gpu as plugin_gpu
from transom.export.plugins.ahead import Compiled, compiled_from_json, json_from_compiled
from transom.export.plugins.gpu import Kernel
from transom.export.plugins.launch import Blocks, Variant
from transom.runtime.backends import cuda
from transom.runtime.backends.cuda import Memory, Stream
from transom.runtime.errors import BackendError, EngineError, InputError

STEP = {"dtype": "fp16", "size": 32, "heads": 4, "groups": 2, "lengths": True, "int8": True, "split": True}
CASES: dict[str, tuple[dict[str, Any], dict[str, str], Any]] = {  # variant, layout, blocks
    "causal": ({"dtype": "fp16", "size": 64, "heads": 2, "causal": True, "lengths": True}, {}, None),
    "masked": ({"dtype": "fp32", "size": 48, "heads": 2, "mask": 1}, {"order": "bhsd", "mask": "bm"}, None),
    "biased": (
        {"dtype": "fp32", "size": 32, "heads": 2, "mask": 2, "bias": True},
        {"order": "bshd", "mask": "h"},
        None,
    ),
    "grouped": ({"dtype": "bf16", "size": 40, "heads": 6, "groups": 3}, {"order": "bshd"}, None),
    "step": (STEP, {}, (16, 16, 4, 2)),
    "step, tokens first": (STEP, {"order": "bshd"}, (16, 16, 4, 2)),
    "large": ({"dtype": "fp16", "size": 128, "heads": 1}, {}, (128, 64, 8, 2)),
}
SIZES = (2, 5, 37)  # B, S, T: of 34 keys in blocks of 16 each of the three parts has some
PARTS = 3


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Compiled, ...]]:
    """For SM89, by the names of CASES: the kernel, and for a step the one that puts its parts together."""
    wanted, owners = [], []
    for name, (variant, layout, blocks) in CASES.items():
        for kind in ("attention", "whole") if variant.get("split") else ("attention",):
            wanted.append((kind, 89, variant, layout, blocks))
            owners.append(name)
    made = compile_elsewhere(wanted, tmp_path_factory.mktemp("triton"))
    return {name: tuple(m for m, owner in zip(made, owners, strict=True) if owner == name) for name in CASES}


@pytest.fixture
def driver(compiled: dict[str, tuple[Compiled, ...]], monkeypatch: pytest.MonkeyPatch) -> Iterator[EmulatedDriver]:
    """An SM89 that runs the compiled kernels."""
    emulated = EmulatedDriver(
        real_driver, Memories(real_runtime), [made for pair in compiled.values() for made in pair]
    )
    monkeypatch.setattr(cuda, "runtime", lambda: emulated.cuda)
    monkeypatch.setattr(cuda, "driver", lambda: emulated)
    yield emulated
    gc.collect()  # what holds memory or a module gives it back to this GPU


@dataclass
class OnGpu:
    """A tensor of the emulated GPU: what PyTorch's would tell of itself."""

    memory: Memory
    shape: tuple[int, ...]
    dtype: torch.dtype
    contiguous: bool = True

    def data_ptr(self) -> int:
        return self.memory.address

    def is_contiguous(self) -> bool:
        return self.contiguous

    def host(self) -> torch.Tensor:
        found = torch.empty(self.shape, dtype=self.dtype)
        ctypes.memmove(found.data_ptr(), self.memory.address, found.nbytes)
        return found


def to_gpu(tensor: torch.Tensor) -> OnGpu:
    tensor = tensor.contiguous()
    memory = Memory(tensor.nbytes)
    ctypes.memmove(memory.address, tensor.data_ptr(), tensor.nbytes)
    return OnGpu(memory, tuple(tensor.shape), tensor.dtype)


def empty(made: Compiled, name: str, *shape: int) -> OnGpu:
    """Garbage, which is NaN: an element that the kernel leaves out shows."""
    dtype = TYPES[made.types[name].removeprefix("*")]
    return OnGpu(Memory(torch.Size(shape).numel() * dtype.itemsize), shape, dtype)


def laid_out(tensor: torch.Tensor, order: str) -> torch.Tensor:
    """(B, H, S, D) as the layout has it, contiguous; and back."""
    return tensor.transpose(1, 2).contiguous() if order == "bshd" else tensor.contiguous()


def inputs(made: Compiled) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What the kernel reads, as (B, H, S, D), and what PyTorch in float64 makes of it. Behind lengths lies NaN."""
    variant, (B, S, T) = made.variant, SIZES
    H, KV, D, dtype = variant.heads, variant.heads // variant.groups, variant.size, TYPES[variant.dtype]
    given = {"query": normal(B, H, S, D, dtype=dtype)}
    given |= {name: normal(B, KV, T, D, seed=seed, dtype=dtype) for seed, name in ((1, "key"), (2, "value"))}
    k, v = given["key"], given["value"]
    if variant.int8:
        for seed, name in ((3, "key"), (4, "value")):
            given[name] = (20 * normal(B, KV, T, D, seed=seed)).round().clamp(-127, 127).to(torch.int8)
            given[f"{name}_scale"] = normal(B, KV, T, seed=seed + 2).abs() / 50 + 1e-3
        k, v = (given[name] * given[f"{name}_scale"][..., None] for name in ("key", "value"))
    seen, added = torch.ones(B, 1, S, T, dtype=torch.bool), None
    if variant.lengths:
        given["lengths"] = torch.tensor([T - 3, 3], dtype=torch.int32)
        seen = visible(given["lengths"], S, T, causal=variant.causal)
        for row, length in enumerate(given["lengths"].tolist()):
            for name in ("key_scale", "value_scale") if variant.int8 else ("key", "value"):
                given[name][row, :, length:] = torch.nan
    if variant.mask:
        axes = {"b": B, "h": H, "m": S, "n": T}
        shape = [size if axis in made.layout.mask + "n" else 1 for axis, size in axes.items()]
        given["mask"] = normal(*shape, seed=7) > -0.5 if variant.mask == 1 else normal(*shape, seed=7, dtype=dtype)
        seen, added = (seen & given["mask"], None) if variant.mask == 1 else (seen, given["mask"])
    if variant.bias:
        given["bias"] = normal(H, S, T, seed=8, dtype=dtype)
        added = given["bias"] + (0 if added is None else added)
    k, v = torch.nan_to_num(k), torch.nan_to_num(v)
    return given, exact(given["query"], k, v, D**-0.5, seen=seen, added=added)


def launched(pair: tuple[Compiled, ...], given: Mapping[str, torch.Tensor], stream: Stream) -> torch.Tensor:
    """What the kernels, one or two, write; (B, H, S, D)."""
    made, (B, S, _), order = pair[0], SIZES, pair[0].layout.order
    H, D = made.variant.heads, made.variant.size
    heads = ("query", "key", "value")
    tensors = {n: to_gpu(laid_out(t, order) if n in heads else t) for n, t in given.items()}
    output = empty(pair[-1], "output", *((B, S, H, D) if order == "bshd" else (B, H, S, D)))
    if made.variant.split:
        parts = {"sums": empty(made, "sums", PARTS, 2, B, H, S), "parts": empty(made, "parts", PARTS, B, H, S, D)}
        Kernel(made).launch(tensors | parts, *SIZES, PARTS, stream)
        Kernel(pair[1]).launch({**parts, "output": output}, *SIZES, PARTS, stream)
    else:
        Kernel(made).launch({**tensors, "output": output}, *SIZES, stream=stream)
    stream.wait()
    return laid_out(output.host(), order)


@pytest.mark.parametrize("name", [name for name in CASES if name != "large"])
def test_a_launch_computes_attention(name: str, compiled: Any, driver: EmulatedDriver) -> None:
    given, expected = inputs(compiled[name][0])
    found = launched(compiled[name], given, Stream())
    require_close(found, expected)


def test_the_parameters_that_the_driver_reads(compiled: Any, driver: EmulatedDriver) -> None:
    """B = 2, S = 5, T = 37 in three parts, four heads of 32, two of which share keys: by hand."""
    given, _ = inputs(compiled["step"][0])
    launched(compiled["step"], given, Stream())
    step, whole = driver.launched
    addresses = ["query", "key", "value", "key_scale", "value_scale", "lengths", "sums", "parts"]
    assert [name for name in step if name in addresses] == addresses
    assert {name: value for name, value in step.items() if name not in addresses} == {
        "S": 5, "T": 37, "ROWS": 2 * 4 * 5, "q_b": 4 * 5 * 32, "q_h": 5 * 32, "k_b": 2 * 37 * 32, "k_h": 37 * 32,
        "v_b": 2 * 37 * 32, "v_h": 37 * 32, "s_b": 2 * 37, "s_h": 37,
    }  # fmt: skip
    assert whole["COUNT"] == 3
    assert (whole["sums"], whole["parts"]) == (step["sums"], step["parts"])


def test_an_argument_left_out_or_swapped_shows(
    compiled: Any, driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The emulation is no yes-man: a launcher that packs wrongly gives wrong numbers, or an error as on a GPU."""
    given, expected = inputs(compiled["causal"][0])
    packed = plugin_gpu.Bound.__init__

    def wrongly(change: Any) -> None:
        def init(self: Any, kernel: Any, grid: Any, values: list[Any], tensors: Any) -> None:
            packed(self, kernel, grid, change(values), tensors)

        monkeypatch.setattr(plugin_gpu.Bound, "__init__", init)

    for left_out in (0, 3, 5, 13):
        wrongly(lambda values, at=left_out: values[:at] + values[at + 1 :])
        with pytest.raises(BackendError, match="cudaErrorIllegalAddress"):
            launched(compiled["causal"], given, Stream())
    for one, other in ((1, 2), (4, 5), (6, 8)):  # key and value, S and T, q_b and k_b

        def swap(values: list[Any], one: int = one, other: int = other) -> list[Any]:
            values[one], values[other] = values[other], values[one]
            return values

        wrongly(swap)
        with pytest.raises((AssertionError, BackendError)):  # numbers, or a place in memory
            require_close(launched(compiled["causal"], given, Stream()), expected)
    wrongly(lambda values: values)
    require_close(launched(compiled["causal"], given, Stream()), expected)


def test_shared_memory_beyond_48_kib_is_asked_for(
    compiled: Any, driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    (made,) = compiled["large"]
    assert made.shared > 48 << 10
    addresses = dict.fromkeys((*made.tensors, *made.outputs), Memory(1 << 20).address)
    kernel = Kernel(made)
    assert [loaded.shared for loaded in driver.modules.values()] == [made.shared]
    kernel.bind(addresses, *SIZES).launch(Stream())
    with monkeypatch.context() as patch:
        patch.setattr(plugin_gpu, "SHARED", 1 << 20)
        kernel = Kernel(made)
    assert [loaded.shared for loaded in driver.modules.values()] == [48 << 10]  # the first is unloaded
    with pytest.raises(BackendError, match="cuLaunchKernel failed on the GPU: CUDA_ERROR_INVALID_VALUE"):
        kernel.bind(addresses, *SIZES).launch(Stream())
    more = compiled_from_json(json.dumps(json.loads(json_from_compiled(made)) | {"shared": 100 << 10}))
    with pytest.raises(BackendError, match=r"wants 102400 bytes of shared memory .* Emulated \(SM89\) refused"):
        Kernel(more)
    driver.cuda.capability = (8, 6)
    with pytest.raises(BackendError, match=r"the kernel is for SM89 or later, and this is Emulated \(SM86\)"):
        Kernel(made)


def test_nothing_is_launched_for_nothing(compiled: Any, driver: EmulatedDriver) -> None:
    """No rows, or no queries: a grid of zero is an error to the driver, and there is nothing to write."""
    (made,) = compiled["grouped"]
    nothing = dict.fromkeys(("query", "key", "value", "output"), 0)
    for B, S in ((0, 5), (2, 0)):
        Kernel(made).launch({**nothing, **({"key": 4096, "value": 4096} if B else {})}, B, S, 37)
    assert driver.launched == []


def test_a_stream_of_others_and_plain_addresses(compiled: Any, driver: EmulatedDriver) -> None:
    """As a stream's handle, as PyTorch gives it; without one the work is on CUDA's own."""
    given, expected = inputs(compiled["causal"][0])
    tensors = {name: to_gpu(tensor) for name, tensor in given.items()}
    output = empty(compiled["causal"][0], "output", *given["query"].shape)
    bound = Kernel(compiled["causal"][0]).bind(
        {n: t.data_ptr() for n, t in (tensors | {"output": output}).items()}, *SIZES
    )
    stream = Stream()
    bound.launch(stream.handle)
    assert output.host().isnan().all()  # not yet
    stream.wait()
    require_close(output.host(), expected)
    bound.launch()
    assert len(driver.launched) == 2


def test_a_description_goes_through_json(compiled: Any) -> None:
    for pair in compiled.values():
        for made in pair:
            assert compiled_from_json(json_from_compiled(made)) == made
            assert type(compiled_from_json(json_from_compiled(made))) is type(made)
    step, whole = compiled["step"]
    assert (step.name, whole.name, whole.threads, whole.shared) == ("attention", "attention_whole", 32, 0)
    assert (whole.tensors, whole.outputs) == (("sums", "parts"), ("output",))
    assert whole.integers == ("S", "ROWS", "COUNT", "o_b", "o_h")
    assert whole.sizes(*SIZES, PARTS) == (5, 2 * 4 * 5, 3, 4 * 5 * 32, 5 * 32)
    assert whole.grid(2, 5, PARTS) == (2 * 5 * 4, 1, 1)
    assert whole.elements(*SIZES, PARTS) == {"sums": 3 * 2 * 40, "parts": 3 * 40 * 32, "output": 40 * 32}
    assert compiled["biased"][0].elements(*SIZES)["mask"] == 2 * 37  # (1, H, 1, T)
    assert compiled["masked"][0].elements(*SIZES)["mask"] == 2 * 5 * 37  # (B, 1, S, T)


def test_every_parameter_is_declared(compiled: Any) -> None:
    """And no other: those of the second kernel too, without Triton's scratch memory."""
    for pair in compiled.values():
        for made in pair:
            (given,) = re.findall(rf"\.entry {made.name}\((.*?)\)", made.ptx.decode(), re.DOTALL)
            expected = ["u64"] * len(made.tensors) + ["u32"] * len(made.integers) + ["u64"] * len(made.outputs)
            assert re.findall(r"\.param \.(\w+)", given) == expected


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"mask": 4096},
            "attention was given query, key, value, lengths, output, mask; expected query, key, value, leng",
        ),
        (
            {"key": None},
            "attention was given query, value, lengths, output; expected query, key, value, lengths, output",
        ),
        ({"key": 4098}, "given key at address 0x1002; expected a multiple of 16 bytes"),
        ({"key": 0}, "given key at address 0x0; expected a multiple of 16 bytes"),
        ({"key": ((2, 2, 37, 64), torch.float32)}, "given key in float32; expected float16"),
        ({"key": ((2, 2, 36, 64), torch.float16)}, r"given key of \(2, 2, 36, 64\), 9216 elements; expected 9472"),
        ({"key": ((2, 2, 37, 64), torch.float16, False)}, r"given key of \(2, 2, 37, 64\) that is not contiguous"),
        ({"key": torch.zeros(2, 2, 37, 64).half()}, "given key that lies in the host's memory; expected the GPU's"),
        ({"B": -1}, "given B=-1, S=5, T=37 and 1 parts; expected sizes from 0"),
        ({"parts": 2}, "given B=2, S=5, T=37 and 2 parts; expected sizes from 0, and 1 part"),
        ({"B": 2**31}, "given 2147483648 rows; expected at most 2147483647 programs"),
    ],
)
def test_what_does_not_fit_is_refused(change: Any, said: str, compiled: Any, driver: EmulatedDriver) -> None:
    (made,) = compiled["causal"]
    sizes = dict(zip("BST", SIZES, strict=True)) | {name: change[name] for name in change if name in ("B", "parts")}
    tensors: dict[str, Any] = dict.fromkeys(("query", "key", "value", "lengths", "output"), 4096)
    for name, value in change.items():
        if name not in sizes:
            tensors[name] = OnGpu(Memory(0), *value) if isinstance(value, tuple) else value
    tensors = {name: value for name, value in tensors.items() if value is not None}
    with pytest.raises(InputError, match=said):
        Kernel(made).bind(tensors, **sizes)
    assert driver.launched == []


def test_what_the_driver_says_of_ptx_that_it_does_not_take(compiled: Any, driver: EmulatedDriver) -> None:
    (made,) = compiled["causal"]
    broken = compiled_from_json(json.dumps(json.loads(json_from_compiled(made)) | {"ptx": "nothing"}))
    said = r"did not load attention for SM89: CUDA_ERROR_INVALID_PTX, and its compiler said: .*Missing \.version"
    with pytest.raises(BackendError, match=said):
        Kernel(broken)
    other = compiled_from_json(json.dumps(json.loads(json_from_compiled(made)) | {"name": "other"}))
    with pytest.raises(BackendError, match="cuModuleGetFunction failed on the GPU: CUDA_ERROR_NOT_FOUND"):
        Kernel(other)


def test_a_kernel_of_hopper_is_for_hopper_alone(compiled: Any, driver: EmulatedDriver) -> None:
    (made,) = compiled["causal"]
    hopper = compiled_from_json(json.dumps(json.loads(json_from_compiled(made)) | {"capability": 90}))
    driver.cuda.capability = (12, 0)
    with pytest.raises(BackendError, match=r"the kernel is for SM90, and this is Emulated \(SM120\)"):
        Kernel(hopper)
    driver.cuda.capability = (8, 9)
    Kernel(made)


def test_parts_are_put_together_of_parts_alone() -> None:
    from transom.export.plugins.ahead import whole_ptx

    with pytest.raises(EngineError, match="a variant without parts was to be put together; expected split=True"):
        whole_ptx(89, Variant("fp16", 64))
    with pytest.raises(EngineError, match="no kernel for compute capability 70"):
        whole_ptx(70, Variant("fp16", 64, split=True))
    with pytest.raises(BackendError, match="TRITON_INTERPRET=1 is set"):
        whole_ptx(89, Variant("fp16", 64, split=True))


@pytest.fixture
def benchmark() -> Any:
    script = Path(os.environ.get("TRANSOM_REPO") or Path(__file__).resolve().parents[1]) / "benchmarks/gpu_attention.py"
    spec = importlib.util.spec_from_file_location("gpu_attention", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_attention"] = module  # its dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_the_benchmark_s_arithmetic_by_hand(benchmark: Any) -> None:
    """FLOP and bytes of small cases, the roofline, what is tried; and no case twice."""
    Case = benchmark.Case
    whole = Case("prompt", "fp16", 2, 4, 4, 3, 64)
    assert whole.flops == 4 * 2 * 3 * 64 * 16  # two products of 16 pairs, a multiplication and an addition each
    assert replace(whole, causal=True).flops == 4 * 2 * 3 * 64 * 10  # 1 + 2 + 3 + 4 pairs
    assert replace(whole, causal=True, S=1).flops == replace(whole, S=1).flops  # a step sees every key
    assert whole.bytes == 2 * (2 * 3 * 4 * 64) * 4  # Q, K, V, O
    assert replace(whole, kind="biased").bytes == whole.bytes + 2 * 3 * 16
    step = Case("step", "fp16", 1, 1, 100, 4, 64, groups=2)
    assert step.bytes == 2 * 2 * 4 * 64 + 2 * 2 * 2 * 100 * 64
    assert replace(step, int8=True).bytes == 2 * 2 * 4 * 64 + 2 * 2 * 100 * (64 + 4)
    roofline = benchmark.Roofline({"fp16": 1e12}, 1e9)
    assert roofline.least_ms(replace(step, B=10)) == pytest.approx(1e3 * 10 * step.bytes / 1e9)
    row = benchmark.told_of(whole, "ours", [1.0, 2.0, 3.0], roofline)
    assert (row["p50_ms"], row["p10_ms"], row["p90_ms"]) == (2.0, 1.2, 2.8)
    sides = [
        {"side": "ours", "p50_ms": 2.0},
        {"side": "torch flash", "p50_ms": 3.0},
        {"side": "torch math", "p50_ms": 9},
    ]
    assert benchmark.ratio_of(sides) == (1.5, "torch flash")
    assert benchmark.ratio_of(sides[:1]) == (None, "none")
    assert benchmark.parts_of(replace(step, T=1100)) == [1, 2, 4, 8]
    names = [case.name for case in benchmark.cases(quick=False)]
    assert len(names) == len({*names}) == 4 * 2 * (2 * 7 + 3) + 2 * 2 * 4 * 3
    assert [case.name for case in benchmark.cases(quick=True, only=["biased"])] == [
        "biased fp16 head 64 B=16 S=1024 T=1024"
    ]
    tried = benchmark.candidates(Blocks(128, 64, 8, 2), step=False, quick=False)
    assert tried[0] == Blocks(128, 64, 8, 2)
    assert {Blocks(128, 32, 8, 2), Blocks(128, 64, 4, 2), Blocks(64, 64, 8, 2), Blocks(128, 64, 8, 3)} <= {*tried}
    assert all(each.m == 16 for each in benchmark.candidates(Blocks(16, 64, 4, 3), step=True, quick=False))


def test_rows_of_the_table_that_would_be_better(benchmark: Any) -> None:
    """A column that was tuned, beside what stands there; none for what is 1% faster."""
    found = {"precision": "fp16", "width": 64, "column": "prompt", "best": asdict(Blocks(128, 128, 8, 3))}
    assert benchmark.better_rows([found | {"entry_ms": 1.0, "best_ms": 0.8}], 90) == [
        "HALVES['wgmma'], from fp16: 64: (Blocks(128, 128, 8, 3), Blocks(64, 64, 4, 2), Blocks(16, 64, 4, 3)),"
    ]
    assert benchmark.better_rows([found | {"entry_ms": 1.0, "best_ms": 0.99}], 90) == []


# What cuda-python looks for in libcuda.so.1, and a launch that prints what it was given
LIBCUDA = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
int cuGetProcAddress_v2(const char *name, void **found, int version, unsigned long flags, int *status) {
    void *here = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    *found = here ? dlsym(here, name) : 0;
    if (status) *status = *found ? 0 : 1;
    return 0;
}
int cuGetProcAddress(const char *name, void **found, int version, unsigned long flags) {
    return cuGetProcAddress_v2(name, found, version, flags, 0);
}
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuModuleLoadDataEx(void **module, const char *image, unsigned n, const int *options, void **values) {
    printf("%zu %u %d %d %zu\\n", strlen(image), n, options[0], options[1], (size_t)values[1]);
    if (!strstr(image, ".entry")) { strcpy(values[0], "line 1; no entry"); return 218; }
    *module = (void *)7;
    return 0;
}
int cuModuleGetFunction(void **function, void *module, const char *name) {
    printf("%zu %s\\n", (size_t)module, name);
    *function = (void *)9;
    return 0;
}
int cuModuleUnload(void *module) { return 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) {
    printf("%zu %d %d\\n", (size_t)function, attribute, value);
    return 0;
}
int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned more, unsigned most,
                   unsigned shared, void *stream, void **parameters, void **extra) {
    printf("%zu %u %u %u %u %u %u %u %zu %d\\n", (size_t)function, x, y, z, threads, more, most, shared, (size_t)stream,
           extra == 0);
    for (const char *kind = getenv("PARAMETERS"); *kind; kind++, parameters++)
        if (*kind == 'p') printf("%ld ", *(long *)*parameters); else printf("%d ", *(int *)*parameters);
    printf("\\n");
    fflush(stdout);
    return 0;
}
"""
THROUGH_CUDA_PYTHON = """
import sys
from transom.export.plugins import gpu
from transom.export.plugins.ahead import compiled_from_json
gpu.find_gpu, gpu.use_primary_context = lambda: gpu.Gpu("none", (8, 9), 0, 13000), lambda: None
for line in sys.stdin:
    made = compiled_from_json(line)
    try:
        kernel = gpu.Kernel(made)
        addresses = {name: 2**40 + 4096 * n for n, name in enumerate((*made.tensors, *made.outputs))}
        kernel.launch(addresses, 2, 5, 37, stream=77)
    except gpu.BackendError as error:
        sys.stdout.flush()
        print(error, flush=True)
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_the_packing_through_cuda_python(compiled: Any, tmp_path: Path) -> None:
    """The real library hands on what we pack: JIT's log, the attribute, the launch, and each parameter in its width."""
    (made,) = compiled["large"]
    (tmp_path / "libcuda.c").write_text(LIBCUDA)
    library = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", tmp_path / "libcuda.so.1", tmp_path / "libcuda.c"]
    subprocess.run(["cc", *library, "-ldl"], check=True)
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path), "PARAMETERS": "ppp" + "i" * len(made.integers) + "p"}
    broken = json.dumps(json.loads(json_from_compiled(made)) | {"ptx": "nothing"})
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", THROUGH_CUDA_PYTHON],
        input=f"{json_from_compiled(made)}\n{broken}\n",
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    log, room = (
        int(getattr(real_driver.CUjit_option, f"CU_JIT_ERROR_LOG_BUFFER{more}")) for more in ("", "_SIZE_BYTES")
    )
    most = int(real_driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)
    addresses = [2**40 + 4096 * n for n in range(4)]
    assert (
        done.stdout.splitlines()[:6]
        == [
            f"{len(made.ptx)} 2 {log} {room} 8192",
            "7 attention",
            f"9 {most} {made.shared}",
            f"9 2 1 1 {made.threads} 1 1 {made.shared} 77 1",  # one tile of 5 queries for each of two rows
            " ".join(map(str, [*addresses[:3], *made.sizes(2, 5, 37), addresses[3]])) + " ",
            f"7 2 {log} {room} 8192",
        ]
    )
    assert "CUDA_ERROR_INVALID_PTX, and its compiler said: line 1; no entry; expected" in done.stdout
