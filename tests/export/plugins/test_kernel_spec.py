"""From a compiled kernel's description to its launch: an emulated driver reads what is packed as the PTX declares it.

The one thing that is not executed here is the PTX: see emulated_driver.
"""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'transom[plugin]'")
pytest.importorskip("cuda.bindings.driver", reason="cuda-python is not installed")

import torch
from cuda.bindings import driver as real_driver
from cuda.bindings import runtime as real_runtime

from attention_reference import exact, normal, require_close, visible
from emulated_driver import TYPES, EmulatedDriver, Memories, OnGpu, compile_elsewhere, empty, to_gpu
from transom.export.plugins import cuda_launcher as plugin_gpu
from transom.export.plugins.compiled import Compiled, compiled_from_json, json_from_compiled
from transom.export.plugins.cuda_launcher import Kernel
from transom.export.plugins.kernel_spec import Variant
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
SIZES = (2, 5, 37)  # B, S, T: of 34 keys in blocks of 16 each of the three splits has some
SPLITS = 3


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Compiled, ...]]:
    """For SM89, by the names of CASES: the kernel, and for a step its combine kernel."""
    wanted, owners = [], []
    for name, (variant, layout, tiles) in CASES.items():
        for kind in ("attention", "combine") if variant.get("split") else ("attention",):
            wanted.append((kind, 89, variant, layout, tiles))
            owners.append(name)
    ptx_kernel = compile_elsewhere(wanted, tmp_path_factory.mktemp("triton"))
    return {name: tuple(m for m, owner in zip(ptx_kernel, owners, strict=True) if owner == name) for name in CASES}


@pytest.fixture
def driver(compiled: dict[str, tuple[Compiled, ...]], monkeypatch: pytest.MonkeyPatch) -> Iterator[EmulatedDriver]:
    """An SM89 that runs the compiled kernels."""
    emulated = EmulatedDriver(
        real_driver, Memories(real_runtime), [ptx_kernel for pair in compiled.values() for ptx_kernel in pair]
    )
    monkeypatch.setattr(cuda, "runtime", lambda: emulated.cuda)
    monkeypatch.setattr(cuda, "driver", lambda: emulated)
    yield emulated
    gc.collect()  # what holds memory or a module gives it back to this GPU


def laid_out(tensor: torch.Tensor, order: str) -> torch.Tensor:
    """(B, H, S, D) as the layout has it, contiguous; and back."""
    return tensor.transpose(1, 2).contiguous() if order == "bshd" else tensor.contiguous()


def inputs(ptx_kernel: Compiled) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What the kernel reads, as (B, H, S, D), and what PyTorch in float64 makes of it. Behind lengths lies NaN."""
    variant, (B, S, T) = ptx_kernel.variant, SIZES
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
        shape = [size if axis in ptx_kernel.layout.mask + "n" else 1 for axis, size in axes.items()]
        given["mask"] = normal(*shape, seed=7) > -0.5 if variant.mask == 1 else normal(*shape, seed=7, dtype=dtype)
        seen, added = (seen & given["mask"], None) if variant.mask == 1 else (seen, given["mask"])
    if variant.bias:
        given["bias"] = normal(H, S, T, seed=8, dtype=dtype)
        added = given["bias"] + (0 if added is None else added)
    k, v = torch.nan_to_num(k), torch.nan_to_num(v)
    return given, exact(given["query"], k, v, D**-0.5, seen=seen, added=added)


def launched(pair: tuple[Compiled, ...], given: Mapping[str, torch.Tensor], stream: Stream) -> torch.Tensor:
    """What the kernels, one or two, write; (B, H, S, D)."""
    ptx_kernel, (B, S, _), order = pair[0], SIZES, pair[0].layout.order
    H, D = ptx_kernel.variant.heads, ptx_kernel.variant.size
    heads = ("query", "key", "value")
    tensors = {n: to_gpu(laid_out(t, order) if n in heads else t) for n, t in given.items()}
    output = empty(pair[-1], "output", *((B, S, H, D) if order == "bshd" else (B, H, S, D)))
    if ptx_kernel.variant.split:
        splits = {
            "split_ml": empty(ptx_kernel, "split_ml", SPLITS, 2, B, H, S),
            "split_acc": empty(ptx_kernel, "split_acc", SPLITS, B, H, S, D),
        }
        Kernel(ptx_kernel).launch(tensors | splits, *SIZES, SPLITS, stream)
        Kernel(pair[1]).launch({**splits, "output": output}, *SIZES, SPLITS, stream)
    else:
        Kernel(ptx_kernel).launch({**tensors, "output": output}, *SIZES, stream=stream)
    stream.wait()
    return laid_out(output.host(), order)


@pytest.mark.parametrize("name", [name for name in CASES if name != "large"])
def test_a_launch_computes_attention(name: str, compiled: Any, driver: EmulatedDriver) -> None:
    given, expected = inputs(compiled[name][0])
    found = launched(compiled[name], given, Stream())
    require_close(found, expected)


def test_the_parameters_that_the_driver_reads(compiled: Any, driver: EmulatedDriver) -> None:
    """B = 2, S = 5, T = 37 in three splits, four heads of 32, two of which share keys: by hand."""
    given, _ = inputs(compiled["step"][0])
    launched(compiled["step"], given, Stream())
    step, combine = driver.launched
    addresses = ["query", "key", "value", "key_scale", "value_scale", "lengths", "split_ml", "split_acc"]
    assert [name for name in step if name in addresses] == addresses
    assert {name: value for name, value in step.items() if name not in addresses} == {
        "S": 5, "T": 37, "ROWS": 2 * 4 * 5, "q_b": 4 * 5 * 32, "q_h": 5 * 32, "k_b": 2 * 37 * 32, "k_h": 37 * 32,
        "v_b": 2 * 37 * 32, "v_h": 37 * 32, "s_b": 2 * 37, "s_h": 37,
    }  # fmt: skip
    assert combine["SPLITS"] == 3
    assert (combine["split_ml"], combine["split_acc"]) == (step["split_ml"], step["split_acc"])


def test_an_argument_left_out_or_swapped_shows(
    compiled: Any, driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The emulation is no yes-man: a launcher that packs wrongly gives wrong numbers, or an error as on a GPU."""
    given, expected = inputs(compiled["causal"][0])
    packed = plugin_gpu.BoundKernel.__init__

    def wrongly(change: Any) -> None:
        def init(self: Any, kernel: Any, grid: Any, values: list[Any], tensors: Any) -> None:
            packed(self, kernel, grid, change(values), tensors)

        monkeypatch.setattr(plugin_gpu.BoundKernel, "__init__", init)

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
    (ptx_kernel,) = compiled["large"]
    assert ptx_kernel.shared > 48 << 10
    addresses = dict.fromkeys((*ptx_kernel.tensors, *ptx_kernel.outputs), Memory(1 << 20).address)
    kernel = Kernel(ptx_kernel)
    assert [loaded.shared for loaded in driver.modules.values()] == [ptx_kernel.shared]
    kernel.bind(addresses, *SIZES).launch(Stream())
    with monkeypatch.context() as patch:
        patch.setattr(plugin_gpu, "SHARED", 1 << 20)
        kernel = Kernel(ptx_kernel)
    assert [loaded.shared for loaded in driver.modules.values()] == [48 << 10]  # the first is unloaded
    with pytest.raises(BackendError, match="cuLaunchKernel failed on the GPU: CUDA_ERROR_INVALID_VALUE"):
        kernel.bind(addresses, *SIZES).launch(Stream())
    more = compiled_from_json(json.dumps(json.loads(json_from_compiled(ptx_kernel)) | {"shared": 100 << 10}))
    with pytest.raises(BackendError, match=r"wants 102400 bytes of shared memory .* Emulated \(SM89\) refuses"):
        Kernel(more)
    driver.cuda.capability = (8, 6)
    with pytest.raises(BackendError, match=r"the kernel is for SM89 or later, and this is Emulated \(SM86\)"):
        Kernel(ptx_kernel)


def test_nothing_is_launched_for_nothing(compiled: Any, driver: EmulatedDriver) -> None:
    """No rows, or no queries: a grid of zero is an error to the driver, and there is nothing to write."""
    (ptx_kernel,) = compiled["grouped"]
    nothing = dict.fromkeys(("query", "key", "value", "output"), 0)
    for B, S in ((0, 5), (2, 0)):
        Kernel(ptx_kernel).launch({**nothing, **({"key": 4096, "value": 4096} if B else {})}, B, S, 37)
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
        for ptx_kernel in pair:
            assert compiled_from_json(json_from_compiled(ptx_kernel)) == ptx_kernel
            assert type(compiled_from_json(json_from_compiled(ptx_kernel))) is type(ptx_kernel)
    step, combine = compiled["step"]
    assert (step.name, combine.name, combine.threads, combine.shared) == ("attention", "attention_combine", 32, 0)
    assert (combine.tensors, combine.outputs) == (("split_ml", "split_acc"), ("output",))
    assert combine.integers == ("S", "ROWS", "SPLITS", "o_b", "o_h")
    assert combine.sizes(*SIZES, SPLITS) == (5, 2 * 4 * 5, 3, 4 * 5 * 32, 5 * 32)
    assert combine.grid(2, 5, SPLITS) == (2 * 5 * 4, 1, 1)
    assert combine.elements(*SIZES, SPLITS) == {"split_ml": 3 * 2 * 40, "split_acc": 3 * 40 * 32, "output": 40 * 32}
    assert compiled["biased"][0].elements(*SIZES)["mask"] == 2 * 37  # (1, H, 1, T)
    assert compiled["masked"][0].elements(*SIZES)["mask"] == 2 * 5 * 37  # (B, 1, S, T)


def test_every_parameter_is_declared(compiled: Any) -> None:
    """And no other: those of the second kernel too, without Triton's scratch memory."""
    for pair in compiled.values():
        for ptx_kernel in pair:
            (given,) = re.findall(rf"\.entry {ptx_kernel.name}\((.*?)\)", ptx_kernel.ptx.decode(), re.DOTALL)
            expected = (
                ["u64"] * len(ptx_kernel.tensors)
                + ["u32"] * len(ptx_kernel.integers)
                + ["u64"] * len(ptx_kernel.outputs)
            )
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
        ({"B": -1}, "given B=-1, S=5, T=37 and 1 splits; expected sizes from 0"),
        ({"splits": 2}, "given B=2, S=5, T=37 and 2 splits; expected sizes from 0, and 1 split"),
        ({"B": 2**31}, "given 2147483648 rows; expected at most 2147483647 programs"),
    ],
)
def test_what_does_not_fit_is_refused(change: Any, said: str, compiled: Any, driver: EmulatedDriver) -> None:
    (ptx_kernel,) = compiled["causal"]
    sizes = dict(zip("BST", SIZES, strict=True)) | {name: change[name] for name in change if name in ("B", "splits")}
    tensors: dict[str, Any] = dict.fromkeys(("query", "key", "value", "lengths", "output"), 4096)
    for name, value in change.items():
        if name not in sizes:
            tensors[name] = OnGpu(Memory(0), *value) if isinstance(value, tuple) else value
    tensors = {name: value for name, value in tensors.items() if value is not None}
    with pytest.raises(InputError, match=said):
        Kernel(ptx_kernel).bind(tensors, **sizes)
    assert driver.launched == []


def test_what_the_driver_says_of_ptx_that_it_does_not_take(compiled: Any, driver: EmulatedDriver) -> None:
    (ptx_kernel,) = compiled["causal"]
    broken = compiled_from_json(json.dumps(json.loads(json_from_compiled(ptx_kernel)) | {"ptx": "nothing"}))
    said = r"did not load attention for SM89: CUDA_ERROR_INVALID_PTX, and its compiler said: .*Missing \.version"
    with pytest.raises(BackendError, match=said):
        Kernel(broken)
    other = compiled_from_json(json.dumps(json.loads(json_from_compiled(ptx_kernel)) | {"name": "other"}))
    with pytest.raises(BackendError, match="cuModuleGetFunction failed on the GPU: CUDA_ERROR_NOT_FOUND"):
        Kernel(other)


def test_a_kernel_of_hopper_is_for_hopper_alone(compiled: Any, driver: EmulatedDriver) -> None:
    (ptx_kernel,) = compiled["causal"]
    hopper = compiled_from_json(json.dumps(json.loads(json_from_compiled(ptx_kernel)) | {"capability": 90}))
    driver.cuda.capability = (12, 0)
    with pytest.raises(BackendError, match=r"the kernel is for SM90, and this is Emulated \(SM120\)"):
        Kernel(hopper)
    driver.cuda.capability = (8, 9)
    Kernel(ptx_kernel)


def test_only_split_variants_have_a_combine_kernel() -> None:
    from transom.export.plugins.aot import combine_ptx

    with pytest.raises(EngineError, match="a variant without splits has no combine kernel; expected split=True"):
        combine_ptx(89, Variant("fp16", 64))
    with pytest.raises(EngineError, match="no kernel for compute capability 70"):
        combine_ptx(70, Variant("fp16", 64, split=True))
    with pytest.raises(BackendError, match="TRITON_INTERPRET=1 is set"):
        combine_ptx(89, Variant("fp16", 64, split=True))
