"""Sides of a case: our kernel and PyTorch's backends on the same tensors, each compared with float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpu_check.cases import Case
from gpu_check.machines import Kernel, Machine
from transom.export.plugins.aot import attention_ptx, combine_ptx
from transom.export.plugins.kernel_spec import TileSizes, Variant
from transom.export.plugins.layout import Layout
from transom.runtime.errors import one_line

BACKENDS = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "math": "MATH"}
# One unit of roundoff, and how many an element may be off, of its query's largest value. Halves and TF32 round the
# operands of two products, which random inputs show as 1.3 and 3.1 units at most; FP32 adds up T terms.
TOLERANCE = {"fp16": (2**-11, 6), "bf16": (2**-8, 6), "fp32": (2**-24, 64), "tf32": (2**-10, 8)}
QUERIES = 64  # of every head and row that are compared, the first and the last among them
SCORES = 1 << 27  # of float64, or elements of the keys, that are held at once: 1 GiB


@dataclass
class Side:
    """An implementation of a case: ``run`` enqueues it on PyTorch's stream, ``output`` is its result, heads first."""

    name: str
    run: Callable[[], None]
    output: Callable[[], Any]
    about: str = ""
    error: Error | None = None
    times: list[float] = field(default_factory=list)  # ms


@dataclass(frozen=True)
class Error:
    """The largest difference from float64, in units of roundoff of its query's largest value, and its place."""

    units: float
    most: float
    place: tuple[int, ...]  # row, head, query, element

    @property
    def wrong(self) -> str | None:
        if self.units <= self.most:
            return None
        place = f"(row, head, query, element) = {self.place}"
        return f"wrong: {self.units:.3g} units of roundoff, at most {self.most:g}, at {place}"


@dataclass
class Tensors:
    """A case's tensors; ``k`` and ``v`` are PyTorch's inputs, of the queries' dtype."""

    given: dict[str, Any]
    q: Any
    k: Any
    v: Any
    bias: Any = None
    mask: Any = None


class Sides:
    """Makes the sides of cases on one machine; kernels are loaded once."""

    def __init__(self, machine: Machine, sm: int) -> None:
        import torch

        self.torch, self.machine, self.sm, self.device = torch, machine, sm, machine.device
        self.dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "tf32": torch.float32}
        self.kernels: dict[tuple[Variant, Layout, TileSizes | None], Kernel] = {}

    def kernel(self, case: Case, tiles: TileSizes | None) -> Kernel:
        """Return the kernel with these tile sizes, or for None the combine kernel, from ``$TRANSOM_KERNELS``."""
        key = (case.variant, case.layout, tiles)
        if key not in self.kernels:
            about = (self.sm, case.variant, case.layout)
            self.kernels[key] = self.machine.kernel(
                combine_ptx(*about) if tiles is None else attention_ptx(*about, tiles)
            )
        return self.kernels[key]

    def precise(self, precision: str) -> None:
        """Let PyTorch multiply FP32 on tensor cores for "tf32", and exactly for all else."""
        self.torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")

    def tensors(self, case: Case) -> Tensors:
        torch = self.torch
        generator = torch.Generator(self.device).manual_seed(0)

        def normal(*shape: int) -> Any:
            return torch.randn(*shape, generator=generator, device=self.device).to(self.dtypes[case.precision])

        shared = case.heads // case.groups
        q = normal(case.B, case.heads, case.S, case.size)
        k, v = (normal(case.B, shared, case.T, case.size) for _ in range(2))
        found = Tensors({"query": q, "key": k, "value": v}, q, k, v)
        if case.int8:
            for name in ("key", "value"):
                scale = found.given[name].abs().amax(-1).float() / 127
                found.given[f"{name}_scale"] = scale
                integers = (found.given[name] / scale[..., None]).round().clamp(-127, 127)
                found.given[name] = integers.to(torch.int8)
            found.k, found.v = (
                (found.given[name] * found.given[f"{name}_scale"][..., None]).to(q.dtype) for name in ("key", "value")
            )
        if case.kind in ("biased", "windows"):
            found.bias = normal(case.heads, case.S, case.T)
            found.given["mask" if case.kind == "windows" else "bias"] = found.bias
        if case.kind == "masked":  # padding: from row to row fewer keys, at least half of them
            lengths = torch.linspace(case.T, (case.T + 1) // 2, case.B, device=self.device).long()
            keys = torch.arange(case.T, device=self.device)
            found.mask = (keys < lengths[:, None])[:, None, None, :].contiguous()
            found.given["mask"] = found.mask
        return found

    def sampled(self, case: Case) -> Any:
        return self.torch.linspace(0, case.S - 1, min(QUERIES, case.S), device=self.device).round().long().unique()

    def expected(self, case: Case, tensors: Tensors) -> Any:
        """Return float64's output for the sampled queries of every head and row: (B, H, queries, D)."""
        torch, queries = self.torch, self.sampled(case)
        rows = max(1, SCORES // (case.heads * case.T * max(len(queries), case.size)))
        keys = torch.arange(case.T, device=self.device)
        found = []
        for start in range(0, case.B, rows):
            part = slice(start, start + rows)
            q = tensors.q[part][:, :, queries].double()
            k, v = (each[part].double().repeat_interleave(case.groups, 1) for each in (tensors.k, tensors.v))
            scores = q @ k.transpose(2, 3) * case.size**-0.5
            if tensors.bias is not None:
                scores += tensors.bias[:, queries].double()
            if tensors.mask is not None:
                scores = scores.masked_fill(~tensors.mask[part], -torch.inf)
            if case.causal:
                scores = scores.masked_fill(keys > case.T - case.S + queries[:, None], -torch.inf)
            found.append(torch.softmax(scores, -1) @ v)
        return torch.cat(found)

    def compare(self, case: Case, output: Any, expected: Any) -> Error:
        """Return the worst element of the sampled queries; one that is not finite is infinitely wrong."""
        found = output[:, :, self.sampled(case)].double()
        largest = expected.abs().amax(-1, keepdim=True)
        unit, most = TOLERANCE[case.precision]
        off = ((found - expected).abs() / largest / unit).nan_to_num(nan=float("inf"))
        place, sizes = [], [*off.shape]
        flat = int(off.argmax())
        for size in reversed(sizes):
            flat, at = divmod(flat, size)
            place.insert(0, at)
        units = float(off[tuple(place)])
        place[2] = int(self.sampled(case)[place[2]])
        if not bool(output.isfinite().all()):
            units = float("inf")  # also outside of what is compared: outputs are NaN before
        return Error(units, most, tuple(place))

    def ours(self, case: Case, tensors: Tensors, tiles: TileSizes, splits: int, name: str = "ours") -> Side:
        torch = self.torch
        output = torch.full_like(tensors.q, torch.nan)
        B, S, T, H, D = case.B, case.S, case.T, case.heads, case.size
        first = self.kernel(case, tiles)
        if case.variant.split:
            options = {"fill_value": torch.nan, "device": self.device, "dtype": torch.float32}
            pair = {"split_ml": torch.full((splits, 2, B, H, S), **options)}
            pair["split_acc"] = torch.full((splits, B, H, S, D), **options)
            bound = [first.bind(tensors.given | pair, B, S, T, splits)]
            bound += [self.kernel(case, None).bind({**pair, "output": output}, B, S, T, splits)]
        else:
            bound = [first.bind({**tensors.given, "output": output}, B, S, T)]

        def run() -> None:
            stream = self.machine.stream()
            for each in bound:
                each.launch(stream)

        about = f"{tiles.m}x{tiles.n}, {tiles.warps}, {tiles.stages}" + (
            f", {splits} splits" if case.variant.split else ""
        )
        return Side(name, run, lambda: output, about)

    def theirs(self, case: Case, tensors: Tensors, backend: str) -> Side:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        attend, found = self.torch.nn.functional.scaled_dot_product_attention, []
        options: dict[str, Any] = {"is_causal": case.causal}
        if case.groups > 1:
            options["enable_gqa"] = True
        if tensors.bias is not None:
            options["attn_mask"] = tensors.bias[None].expand(case.B, -1, -1, -1)
        if tensors.mask is not None:
            options["attn_mask"] = tensors.mask.expand(-1, -1, case.S, -1)
        wanted = getattr(SDPBackend, BACKENDS[backend])

        def run() -> None:
            with sdpa_kernel(wanted):
                found[:] = [attend(tensors.q, tensors.k, tensors.v, **options)]

        return Side(f"torch {backend}", run, lambda: found[0])

    def makers(self, case: Case, tensors: Tensors) -> Iterator[tuple[str, Callable[[], list[Side]]]]:
        """Yield our kernel with the table's tile sizes, in every number of splits, and PyTorch's backends."""
        tiles = case.tiles(self.sm)
        yield "ours", lambda: [self.ours(case, tensors, tiles, splits) for splits in case.splits]
        for backend in BACKENDS:
            yield f"torch {backend}", lambda backend=backend: [self.theirs(case, tensors, backend)]  # type: ignore[misc]


def reason_of(error: Exception, warned: Sequence[str]) -> str:
    """Return why a side refuses: PyTorch warns of its reasons, also those of backends that were not requested."""
    reasons = [one_line(RuntimeError(each), 160) for each in warned]
    reasons = [each for each in reasons if "not used because" not in each and "disabled" not in each]
    return "; ".join(dict.fromkeys(reasons))[:300] or one_line(error, 160)
