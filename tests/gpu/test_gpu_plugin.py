"""On a GPU: the PTX that was compiled ahead of time, loaded and launched, against PyTorch in float64.

Compiled in processes of their own, for this one is told to interpret kernels: see conftest.py.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'transom[plugin]'")

import torch

from attention_reference import exact, visible
from emulated_driver import TYPES, compile_elsewhere
from transom.export.plugins import tile_sizes as tables
from transom.export.plugins.compiled import Compiled
from transom.export.plugins.cuda_launcher import Kernel
from transom.export.plugins.kernel_spec import TileSizes, Variant, padded_size
from transom.export.plugins.tile_sizes import portable
from transom.export.plugins.trt_plugin import candidates
from transom.runtime.backends.cuda import Gpu

# Units of roundoff of max|exact|, as in test_flash_attention.py, with more for what a GPU does besides: ex2.approx is
# within 2 units of FP32, above and below the line of the fraction. TF32 cuts both operands of both products off at 10
# bits: up to 2 units of a score as large as 5, and of each weight and value.
ROUNDOFF = {"fp32": (2**-24, 24), "tf32": (2**-10, 14), "fp16": (2**-11, 4), "bf16": (2**-8, 4)}
SIZES = (64, 80, 128, 256)  # of heads
HEADS = 4
B = 3
# S and T; with causality some of the queries of the last two see no key
TOKENS = ((1, 1), (1, 67), (5, 5), (17, 131), (129, 257), (200, 70), (3, 0))
STEPS = ((1, 1), (1, 67), (3, 131), (1, 1030))
LONG = ((512, 512), (1024, 1024), (512, 1500))
SPLITS = (1, 4, 7)
EXACT_ON = "cuda" if torch.cuda.is_available() else "cpu"  # float64 everywhere, and faster there


@dataclass(frozen=True)
class Case:
    """What is compiled once, and how it is laid out."""

    options: tuple[tuple[str, Any], ...] = ()
    order: str = "bhsd"
    mask: str = "bhm"
    tiles: TileSizes | None = None

    @property
    def name(self) -> str:
        return ", ".join([f"{name}={value}" for name, value in self.options] + [self.order]) or "plain"


def case(order: str = "bhsd", mask: str = "bhm", **options: Any) -> Case:
    return Case(tuple(options.items()), order, mask)


UNSPLIT = (
    case(),
    case("bshd", causal=True, lengths=True),
    case(lengths=True, groups=2),
    case("bshd", mask="bm", mask_kind=1, causal=True, lengths=True),
    case(mask="m", mask_kind=1),
    case(mask="bh", mask_kind=2),
    case("bshd", mask="", mask_kind=2, bias=True, causal=True),
    case(bias=True),
    case("bshd", int8=True, lengths=True, causal=True, groups=2),
)
SPLIT_CASES = (
    case(split=True, lengths=True),
    case("bshd", split=True, lengths=True, causal=True, groups=4),
    case(split=True, int8=True, lengths=True, groups=2),
    case("bshd", mask="b", split=True, mask_kind=1, bias=True),
)
CAUSAL = (UNSPLIT[1], UNSPLIT[3], UNSPLIT[6])
WINDOWS = ((32, 49), (16, 64), (24, 16), (32, 144), (32, 256))  # sizes of heads, pixels of a window
FEW = (case(causal=True, lengths=True), case(mask="bm", mask_kind=2, bias=True))


@pytest.fixture(scope="module", params=list(ROUNDOFF))
def precision(request: pytest.FixtureRequest, gpu: Gpu) -> str:
    if not torch.cuda.is_available():
        pytest.skip("PyTorch here has no CUDA: install a torch that has, pip install torch")
    if gpu.capability == (7, 5) and request.param in ("bf16", "tf32"):
        pytest.skip(f"Turing does not multiply {request.param}")
    return str(request.param)


def compiled(
    cases: tuple[Case, ...], precision: str, size: int, gpu: Gpu, cache: Path
) -> dict[Case, tuple[Compiled, ...]]:
    """For this GPU: the kernel of each case, and the combine kernel."""
    sm = portable(10 * gpu.capability[0] + gpu.capability[1])
    wanted: list[Any] = []
    owners: list[Case] = []
    for each in cases:
        options = dict(each.options)
        options["mask"] = options.pop("mask_kind", 0)
        options |= {"dtype": "fp32", "precision": precision} if precision == "tf32" else {"dtype": precision}
        tiles = each.tiles and (each.tiles.m, each.tiles.n, each.tiles.warps, each.tiles.stages)
        for kind in ("attention", "combine") if options.get("split") else ("attention",):
            variant = {"size": size, "heads": HEADS, **options}
            wanted.append((kind, sm, variant, {"order": each.order, "mask": each.mask}, tiles))
            owners.append(each)
    ptx_kernel = compile_elsewhere(wanted, cache)
    return {each: tuple(m for m, owner in zip(ptx_kernel, owners, strict=True) if owner == each) for each in cases}


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(ptx_kernel: Compiled, S: int, T: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What the kernel reads, on the host, heads first; and what float64 makes of it. Behind lengths lies NaN."""
    variant = ptx_kernel.variant
    H, KV, D, dtype = variant.heads, variant.heads // variant.groups, variant.size, TYPES[variant.dtype]
    given = {"query": normal(B, H, S, D, seed=0, dtype=dtype)}
    given |= {name: normal(B, KV, T, D, seed=seed, dtype=dtype) for seed, name in ((1, "key"), (2, "value"))}
    if variant.int8:
        for seed, name in ((3, "key"), (4, "value")):
            given[name] = (20 * normal(B, KV, T, D, seed=seed)).round().clamp(-127, 127).to(torch.int8)
            given[f"{name}_scale"] = normal(B, KV, T, seed=seed + 2).abs() / 50 + 1e-3
    lengths = [T, (T + 1) // 2, 0] if variant.lengths else [T] * B
    for row, length in enumerate(lengths):
        for name in ("key_scale", "value_scale") if variant.int8 else ("key", "value"):
            given[name][row, :, length:] = torch.nan
    if variant.lengths:
        given["lengths"] = torch.tensor(lengths, dtype=torch.int32)
    seen, added = visible(lengths, S, T, causal=variant.causal), None
    if variant.mask:
        axes = zip("bhmn", (B, H, S, T), strict=True)
        mask = normal(*(size if axis in ptx_kernel.layout.mask + "n" else 1 for axis, size in axes), seed=7)
        given["mask"] = mask > -0.5 if variant.mask == 1 else mask.to(dtype)
        seen, added = (seen & given["mask"], None) if variant.mask == 1 else (seen, given["mask"])
    if variant.bias:
        given["bias"] = normal(H, S, T, seed=8, dtype=dtype)
        added = given["bias"].double() + (0 if added is None else added.double())
    k, v = (
        torch.nan_to_num(given[name].double() * (given[f"{name}_scale"][..., None].double() if variant.int8 else 1))
        for name in ("key", "value")
    )
    query, k, v, seen, added = (
        each if each is None else each.to(EXACT_ON) for each in (given["query"], k, v, seen, added)
    )
    return given, exact(query, k, v, D**-0.5, seen=seen, added=added).cpu()


def launched(
    kernels: tuple[Kernel, ...], given: dict[str, torch.Tensor], T: int, splits: int, device: str = "cuda"
) -> torch.Tensor:
    """What the kernels write, one or two, on PyTorch's stream; heads first, on the host."""
    ptx_kernel = kernels[0].compiled
    H, S, D = given["query"].shape[1:]
    tokens_first = ptx_kernel.layout.order == "bshd"
    tensors = {
        name: (tensor.transpose(1, 2) if tokens_first and tensor.ndim == 4 and name != "mask" else tensor)
        .contiguous()
        .to(device)
        for name, tensor in given.items()
    }
    shape = (B, S, H, D) if tokens_first else (B, H, S, D)
    output = torch.full(shape, torch.nan, dtype=given["query"].dtype, device=device)
    stream = torch.cuda.current_stream().cuda_stream if device == "cuda" else 0
    if ptx_kernel.variant.split:
        sums, partial = (torch.full((splits, *rest), torch.nan, device=device) for rest in ((2, B, H, S), (B, H, S, D)))
        kernels[0].launch({**tensors, "split_ml": sums, "split_acc": partial}, B, S, T, splits, stream)
        kernels[1].launch({"split_ml": sums, "split_acc": partial, "output": output}, B, S, T, splits, stream)
    else:
        kernels[0].launch({**tensors, "output": output}, B, S, T, stream=stream)
    found = output.cpu()
    return found.transpose(1, 2) if tokens_first else found


def units_of(found: torch.Tensor, expected: torch.Tensor, precision: str) -> float:
    """The worst error in units of roundoff of the largest value; infinite where something is NaN."""
    if found.isnan().any():
        return float("inf")
    error = (found.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    return float(error) / ROUNDOFF[precision][0]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("size", SIZES)
def test_parity(size: int, precision: str, gpu: Gpu, results: Any, tmp_path: Path) -> None:
    """Causality, lengths, masks, biases, grouped heads, an INT8 cache, split-KV; odd sizes, one query, no key."""
    worst, count, wrong = (0.0, "nothing"), 0, list[str]()
    for each, pair in compiled(UNSPLIT + SPLIT_CASES, precision, size, gpu, tmp_path).items():
        kernels = tuple(map(Kernel, pair))
        split = pair[0].variant.split
        most = ROUNDOFF[precision][1] + (2 if pair[0].variant.int8 else 0)  # values are rounded when they are scaled
        for (S, T), splits in product(STEPS if split else TOKENS, SPLITS if split else (1,)):
            given, expected = inputs(pair[0], S, T)
            found = launched(kernels, given, T, splits)
            units = units_of(found, expected, precision)
            what = f"{each.name}, S={S}, T={T}, {splits} splits: {units:.1f} units of roundoff, at most {most}"
            if units > most:
                wrong.append(what)
            if pair[0].variant.lengths and found[2].any():
                wrong.append(f"{what}; a row without keys is not zero")
            worst, count = max(worst, (units, what)), count + 1
    results.add(f"fused attention, head size {size}, {count} calls", "PTX", precision, f"worst: {worst[1]}")
    assert not wrong, f"{len(wrong)} of {count} calls: " + "; ".join(wrong)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("size", SIZES)
def test_long_prompts(size: int, precision: str, gpu: Gpu, results: Any, tmp_path: Path) -> None:
    """Causality over 512 tokens and more, where TensorRT 10 was wrong: alone, with a mask, with a mask and a bias."""
    worst, wrong = (0.0, "nothing"), list[str]()
    for each, pair in compiled(CAUSAL, precision, size, gpu, tmp_path).items():
        kernel = Kernel(pair[0])
        for S, T in LONG:
            given, expected = inputs(pair[0], S, T)
            units = units_of(launched((kernel,), given, T, 1), expected, precision)
            what = f"{each.name}, S={S}, T={T}: {units:.1f} units of roundoff, at most {ROUNDOFF[precision][1]}"
            if units > ROUNDOFF[precision][1]:
                wrong.append(what)
            worst = max(worst, (units, what))
    results.add(f"fused causal attention of long prompts, head size {size}", "PTX", precision, f"worst: {worst[1]}")
    assert not wrong, "; ".join(wrong)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("size", SIZES)
def test_blocks(size: int, precision: str, gpu: Gpu, results: Any, tmp_path: Path) -> None:
    """Every entry of the table that could serve this GPU, whatever it was meant for."""
    candidates = sorted(set(entries(precision, size)), key=str)
    cases = tuple(Case(each.options, each.order, each.mask, tiles) for tiles in candidates for each in FEW)
    worst, wrong = 0.0, list[str]()
    here = tables.GPUS[portable(10 * gpu.capability[0] + gpu.capability[1])]
    for each, pair in compiled(cases, precision, size, gpu, tmp_path).items():
        if pair[0].shared + here.reserved > here.shared:
            continue  # of another family, and for more shared memory than this GPU has
        kernels = tuple(map(Kernel, pair))
        for S, T in TOKENS:
            given, expected = inputs(pair[0], S, T)
            units = units_of(launched(kernels, given, T, 1), expected, precision)
            if units > ROUNDOFF[precision][1]:
                wrong.append(f"{each.name}, {each.tiles}, S={S}, T={T}: {units:.1f} units")
            worst = max(worst, units)
    found = f"worst: {worst:.1f} units of roundoff, at most {ROUNDOFF[precision][1]}"
    results.add(f"fused attention, head size {size}, {len(candidates)} blocks", "PTX", precision, found)
    assert not wrong, "; ".join(wrong)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("size", "pixels"), WINDOWS)
def test_windows(size: int, pixels: int, precision: str, gpu: Gpu, results: Any, tmp_path: Path) -> None:
    """A bias of each head, as an engine's plugin has it of Swin, in every tile that TensorRT chooses from."""
    dtype, product_of = ("fp32", "tf32") if precision == "tf32" else (precision, "ieee")
    offered = candidates(
        10 * gpu.capability[0] + gpu.capability[1],
        Variant(dtype, size, HEADS, mask=2, precision=product_of),
        pixels,
        pixels,
    )
    cases = tuple(Case((("mask_kind", 2),), mask="hm", tiles=tiles) for tiles in offered)
    for each, pair in compiled(cases, precision, size, gpu, tmp_path).items():
        given, expected = inputs(pair[0], pixels, pixels)
        units = units_of(launched((Kernel(pair[0]),), given, pixels, 1), expected, precision)
        found = f"{each.tiles}: {units:.1f} units of roundoff, at most {ROUNDOFF[precision][1]}"
        results.add(f"fused attention with a bias, windows of {pixels}, head size {size}", "PTX", precision, found)
        assert units <= ROUNDOFF[precision][1], found


def entries(precision: str, size: int) -> Iterator[TileSizes]:
    """Of all families: what one GPU prefers, another must compute rightly too, if it has the shared memory."""
    row = max(32, padded_size(size))
    if precision in ("fp32", "tf32"):
        yield from (tables.TF32 if precision == "tf32" else tables.FP32_UNITS)[row]
    else:
        for table in (*tables.HALVES.values(), tables.TURING):
            yield from table[row]


def test_a_graph_of_a_step_is_replayed(precision: str, gpu: Gpu, tmp_path: Path) -> None:
    """Both kernels of a step captured on PyTorch's stream: new contents of the same tensors, and a new result."""
    (pair,) = compiled((case(split=True, lengths=True),), precision, 64, gpu, tmp_path).values()
    given, _ = inputs(pair[0], 1, 67)
    tensors = {name: tensor.cuda() for name, tensor in given.items()}
    sums, partial = (torch.empty(4, *rest, device="cuda") for rest in ((2, B, HEADS, 1), (B, HEADS, 1, 64)))
    output = torch.full_like(tensors["query"], torch.nan)
    first = Kernel(pair[0]).bind({**tensors, "split_ml": sums, "split_acc": partial}, B, 1, 67, 4)
    second = Kernel(pair[1]).bind({"split_ml": sums, "split_acc": partial, "output": output}, B, 1, 67, 4)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for bound in (first, second):
            bound.launch(torch.cuda.current_stream().cuda_stream)
    for sign in (1, -1):
        tensors["query"].copy_(sign * given["query"])
        graph.replay()
        seen = visible(given["lengths"].tolist(), 1, 67, causal=False)
        k, v = (torch.nan_to_num(given[name]) for name in ("key", "value"))
        expected = exact(sign * given["query"], k, v, 64**-0.5, seen=seen)
        assert units_of(output.cpu(), expected, precision) <= ROUNDOFF[precision][1]


def test_a_thread_of_its_own_launches(precision: str, gpu: Gpu, tmp_path: Path) -> None:
    """The primary context is every thread's."""
    (pair,) = compiled((case(causal=True, lengths=True),), precision, 64, gpu, tmp_path).values()
    kernels = tuple(map(Kernel, pair))
    given, expected = inputs(pair[0], 17, 131)
    units: list[float] = []
    thread = threading.Thread(
        target=lambda: units.append(units_of(launched(kernels, given, 131, 1), expected, precision))
    )
    thread.start()
    thread.join()
    assert units
    assert units[0] <= ROUNDOFF[precision][1]
