"""Measure Transom's fused attention on this machine's GPU beside PyTorch's scaled_dot_product_attention, in one run.

    python benchmarks/gpu_attention.py --out docs/results

Timed are the PTX that was compiled ahead of time, launched by CUDA's driver, and each of PyTorch's backends by itself;
one that refuses is listed with its reason. Every side is compared with float64 before it is timed. Sides are
interleaved, round by round, each call timed by CUDA events after a write over the whole L2 cache. The GPU's peaks are
measured in the same run: a large product, a large copy. Tile sizes are tuned first, and better rows for the table in
``export/plugins/tile_sizes.py`` are printed. Without a GPU it says so and exits with status 0.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from attention_cases import AIMS, COLUMNS, Case, candidates, cases, key_of, splits_of, tuned_on
from attention_tables import Roofline, better_rows, markdown, number, ratio_of, row_of

from transom.export.plugins.aot import Compiled, attention_ptx, combine_ptx
from transom.export.plugins.cuda_launcher import Kernel
from transom.export.plugins.flash_attention import ADDITIVE
from transom.export.plugins.kernel_spec import TileSizes, Variant, padded_size
from transom.export.plugins.layout import Layout
from transom.export.plugins.tile_sizes import portable, tile_sizes_for
from transom.runtime.backends.cuda import Gpu, find_gpu
from transom.runtime.errors import TransomError, one_line

ROUNDS, TURN, WARMUP = 12, 8, 3
TIMED_MS = 400.0  # that a side of one case may take, unless one call a round takes more
TUNED_ROUNDS = 4
BACKENDS = {"flash": "FLASH_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "cudnn": "CUDNN_ATTENTION", "math": "MATH"}
# Largest error of a sampled slice, in units of roundoff of its largest value; sums are as long as T
TOLERANCE = {"fp16": (2**-11, 8), "bf16": (2**-8, 8), "fp32": (2**-24, 100), "tf32": (2**-10, 24)}
SAMPLED = 16  # queries of one head of the last row
FLUSHED = 512 << 20  # bytes at least: while they are written, over 0.1 ms, the launches behind them are queued
PRODUCT, COPIED = 8192, 1 << 30  # sizes of what measures the GPU


@dataclass
class Side:
    """An implementation of a case: ``run`` enqueues it on PyTorch's stream, ``output`` is its result, heads first."""

    name: str
    run: Callable[[], None]
    output: Callable[[], Any]
    about: str = ""
    times: list[float] = field(default_factory=list)  # ms


def reason_of(error: Exception, warned: Sequence[str]) -> str:
    """Return why a side refuses: PyTorch warns of its reasons, also those of backends that were not requested."""
    reasons = [one_line(RuntimeError(each), 160) for each in warned]
    reasons = [each for each in reasons if "not used because" not in each and "disabled" not in each]
    return "; ".join(dict.fromkeys(reasons))[:300] or one_line(error, 160)


# From here on a GPU is needed


@dataclass
class Tensors:
    """A case's tensors on the GPU; ``k`` and ``v`` are PyTorch's inputs, of the queries' dtype."""

    given: dict[str, Any]
    q: Any
    k: Any
    v: Any
    bias: Any
    mask: Any = None


class Bench:
    """State of the whole run: the GPU, the flush buffer, compiled kernels."""

    def __init__(self, gpu: Gpu, device: str = "cuda") -> None:
        import torch

        self.torch, self.device = torch, device
        self.sm = portable(10 * gpu.capability[0] + gpu.capability[1])
        self.dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "tf32": torch.float32}
        l2 = int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0))
        self.flushed = torch.empty(max(FLUSHED, 2 * l2), dtype=torch.uint8, device=device)
        self.kernels: dict[tuple[Variant, TileSizes | None], Kernel] = {}
        self.best: dict[tuple[str, int, int], TileSizes] = {}

    def precise(self, precision: str) -> None:
        self.torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")

    def kernel(self, variant: Variant, tiles: TileSizes | None) -> Kernel:
        """Return the kernel with these tile sizes, or for None the combine kernel; compiled and loaded once."""
        if (variant, tiles) not in self.kernels:
            layout = Layout(mask="hm" if variant.mask == ADDITIVE else "b")
            made: Compiled = (
                combine_ptx(self.sm, variant, layout)
                if tiles is None
                else attention_ptx(self.sm, variant, layout, tiles)
            )
            self.kernels[variant, tiles] = Kernel(made)
        return self.kernels[variant, tiles]

    def tensors(self, case: Case) -> Tensors:
        torch = self.torch
        generator = torch.Generator(self.device).manual_seed(0)

        def normal(*shape: int) -> Any:
            return torch.randn(*shape, generator=generator, device=self.device, dtype=self.dtypes[case.precision])

        shared = case.heads // case.groups
        q = normal(case.B, case.heads, case.S, case.size)
        k, v = (normal(case.B, shared, case.T, case.size) for _ in range(2))
        given = {"query": q, "key": k, "value": v}
        if case.int8:
            for name in ("key", "value"):
                largest = given[name].abs().amax(-1).float()
                given[f"{name}_scale"] = largest / 127
                given[name] = (given[name] / given[f"{name}_scale"][..., None]).round().clamp(-127, 127).to(torch.int8)
            k, v = ((given[name] * given[f"{name}_scale"][..., None]).to(q.dtype) for name in ("key", "value"))
        bias = normal(case.heads, case.S, case.T) if case.kind in ("biased", "windows") else None
        mask = None
        if case.kind == "masked":  # padding: from row to row fewer keys, at least half of them
            lengths = torch.linspace(case.T, (case.T + 1) // 2, case.B, device=self.device).long()
            mask = (torch.arange(case.T, device=self.device) < lengths[:, None])[:, None, None, :].contiguous()
        added = {"mask": bias} if case.kind == "windows" else {"bias": bias, "mask": mask}
        given |= {name: tensor for name, tensor in added.items() if tensor is not None}
        return Tensors(given, q, k, v, bias, mask)

    def expected(self, case: Case, tensors: Tensors) -> Any:
        """Return float64's output for SAMPLED queries of the last row's last head, with the first and the last."""
        torch = self.torch
        rows = self.sampled(case)
        k, v = (each[-1, -1].double() for each in (tensors.k, tensors.v))
        scores = tensors.q[-1, -1, rows].double() @ k.T * case.size**-0.5
        if tensors.bias is not None:
            scores += tensors.bias[-1, rows].double()
        if tensors.mask is not None:
            scores = scores.masked_fill(~tensors.mask[-1, 0], -torch.inf)
        if case.causal:
            keys = torch.arange(case.T, device=self.device)
            scores = scores.masked_fill(keys > case.T - case.S + rows[:, None], -torch.inf)
        return torch.softmax(scores, -1) @ v

    def sampled(self, case: Case) -> Any:
        return self.torch.linspace(0, case.S - 1, min(SAMPLED, case.S), device=self.device).round().long()

    def wrong(self, case: Case, side: Side, expected: Any) -> str | None:
        """Run once and return the problem with the result compared with float64, or None."""
        side.run()
        found = side.output()[-1, -1, self.sampled(case)].double()
        unit, units = TOLERANCE[case.precision]
        error = float((found - expected).abs().max() / expected.abs().max()) / unit
        return None if error <= units else f"wrong: {error:.0f} units of roundoff, at most {units}"

    def ours(self, case: Case, tensors: Tensors, tiles: TileSizes, splits: int, name: str) -> Side:
        torch, variant = self.torch, case.variant
        output = torch.full_like(tensors.q, torch.nan)
        B, S, T, H, D = case.B, case.S, case.T, case.heads, case.size
        first = self.kernel(variant, tiles)
        if variant.split:
            split_ml = torch.empty(splits, 2, B, H, S, device=self.device)
            split_acc = torch.empty(splits, B, H, S, D, device=self.device)
            pair = {"split_ml": split_ml, "split_acc": split_acc}
            bound = [
                first.bind(tensors.given | pair, B, S, T, splits),
                self.kernel(variant, None).bind({**pair, "output": output}, B, S, T, splits),
            ]
        else:
            bound = [first.bind({**tensors.given, "output": output}, B, S, T)]
        stream = torch.cuda.current_stream().cuda_stream

        def run() -> None:
            for each in bound:
                each.launch(stream)

        about = f"{tiles.m}x{tiles.n}, {tiles.warps}, {tiles.stages}" + (f", {splits} splits" if variant.split else "")
        return Side(name, run, lambda: output, about)

    def theirs(self, case: Case, tensors: Tensors, backend: str) -> Side:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        torch, found = self.torch, []
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
                found[:] = [
                    torch.nn.functional.scaled_dot_product_attention(tensors.q, tensors.k, tensors.v, **options)
                ]

        return Side(f"torch {backend}", run, lambda: found[0])

    def eager(self, case: Case, tensors: Tensors) -> Side:
        """Return PyTorch's attention without fusion: two products and a softmax, each a kernel of its own."""
        torch, found = self.torch, []
        above = torch.ones(case.S, case.T, dtype=torch.bool, device=self.device).triu(case.T - case.S + 1)
        hidden = None if tensors.mask is None else ~tensors.mask

        def run() -> None:
            scores = tensors.q @ tensors.k.transpose(2, 3) * case.size**-0.5
            if tensors.bias is not None:
                scores = scores + tensors.bias
            if case.causal:
                scores = scores.masked_fill(above, -torch.inf)
            if hidden is not None:
                scores = scores.masked_fill(hidden, -torch.inf)
            found[:] = [torch.softmax(scores, -1) @ tensors.v]

        return Side("torch eager", run, lambda: found[0])

    def measure(self, sides: Sequence[Side], rounds: int, timed_ms: float) -> None:
        """Fill every side's ``times``, interleaved, each call after a write over the whole cache."""
        torch = self.torch
        for side in sides:
            for _ in range(WARMUP):
                side.run()
        turns = {id(side): TURN for side in sides}
        for number_of_round in range(rounds + 1):  # the first tells how long a call takes, and does not count
            for index in np.random.default_rng(number_of_round).permutation(len(sides)).tolist():
                side, marks = sides[index], []
                for _ in range(turns[id(side)] if number_of_round else 1):
                    marks.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
                    self.flushed.zero_()
                    marks[-1][0].record()
                    side.run()
                    marks[-1][1].record()
                torch.cuda.synchronize()
                took = [start.elapsed_time(end) for start, end in marks]
                if number_of_round:
                    side.times += took
                else:
                    turns[id(side)] = max(1, min(TURN, int(timed_ms / rounds / max(took[0], 1e-3))))

    def roofline(self) -> Roofline:
        """Measure PyTorch's peaks: the medians of a large product in every precision, and of a large copy."""
        torch, flops = self.torch, {}
        for precision, dtype in self.dtypes.items():
            if precision == "bf16" and not torch.cuda.is_bf16_supported():
                continue
            self.precise(precision)
            one, other = (torch.randn(PRODUCT, PRODUCT, device=self.device).to(dtype) for _ in range(2))
            result = torch.empty_like(one)
            side = Side(precision, lambda a=one, b=other, c=result: torch.matmul(a, b, out=c), lambda: None)
            self.measure([side], 4, TIMED_MS)
            flops[precision] = 2 * PRODUCT**3 / float(np.median(side.times)) * 1e3
        source = torch.zeros(COPIED, dtype=torch.uint8, device=self.device)
        to = torch.empty_like(source)
        side = Side("copy", lambda: to.copy_(source), lambda: None)
        self.measure([side], 4, TIMED_MS)
        return Roofline(flops, 2 * COPIED / float(np.median(side.times)) * 1e3)

    def tune(self, group: Sequence[Case], *, quick: bool) -> dict[str, Any]:
        """Return the best tile sizes of one precision, head size and column, by the geometric mean of times."""
        first = group[0]
        step, entry = first.kind == "step", tile_sizes_for(self.sm, first.variant)
        times: dict[TileSizes, list[float]] = {}
        for case in group:
            tensors, sides = self.tensors(case), {}
            expected = self.expected(case, tensors)
            for tiles in candidates(entry, step=step, quick=quick):
                try:
                    for splits in splits_of(case)[-3:] if step else (1,):
                        side = self.ours(case, tensors, tiles, splits, "ours")
                        if self.wrong(case, side, expected) is None:
                            sides[tiles, splits] = side
                except (TransomError, RuntimeError) as error:  # more shared memory than there is
                    print(f"    {tiles}: {one_line(error, 120)}", file=sys.stderr)
            self.measure(list(sides.values()), TUNED_ROUNDS, TIMED_MS / 8)
            for tiles in {tiles for tiles, _ in sides}:
                fastest = min(float(np.median(side.times)) for (each, _), side in sides.items() if each == tiles)
                times.setdefault(tiles, []).append(fastest)
        means = {b: math.exp(float(np.mean(np.log(each)))) for b, each in times.items() if len(each) == len(group)}
        best = min(means, key=lambda tiles: means[tiles], default=entry)
        self.best[key_of(first)] = best
        measured = [{"blocks": asdict(b), "ms": round(means[b], 5)} for b in sorted(means, key=lambda b: means[b])]
        return {
            "precision": first.precision,
            "width": padded_size(first.size),
            "column": COLUMNS[first.column],
            "cases": [case.name for case in group],
            "entry": asdict(entry),
            "entry_ms": means.get(entry),
            "best": asdict(best),
            "best_ms": means.get(best),
            "measured": measured,
        }

    def run(self, case: Case, roofline: Roofline) -> dict[str, Any]:
        """Return one case's rows for the sides that compute it, and the reasons of those that do not."""
        torch = self.torch
        self.precise(case.precision)
        torch.cuda.empty_cache()
        refused: dict[str, str] = {}
        sides: list[Side] = []
        tensors = self.tensors(case)
        expected = self.expected(case, tensors)
        for name, make in self.makers(case, tensors):
            if name == "torch math" and not case.model and any(each.name.startswith("torch") for each in sides):
                continue  # slow, and of interest only where no other backend runs
            try:
                with warnings.catch_warnings(record=True) as reasons:
                    warnings.simplefilter("always")
                    side = make()
                    wrong = self.wrong(case, side, expected)
                    torch.cuda.synchronize()
            except (TransomError, RuntimeError) as error:  # torch.OutOfMemoryError is one
                refused[name] = "; ".join(one_line(RuntimeError(each.message), 160) for each in reasons) or one_line(
                    error
                )
                continue
            if wrong is not None:
                refused[name] = wrong
            else:
                sides.append(side)
        self.measure(sides, ROUNDS, TIMED_MS)
        rows = [row_of(case, side.name, side.times, roofline, side.about) for side in sides]
        ratio, best = ratio_of(rows)
        about = {"name": case.name, "flops": case.flops, "bytes": case.bytes, "aim": case.aim}
        return {**asdict(case), **about, "ratio": ratio, "best_backend": best, "rows": rows, "refused": refused}

    def makers(self, case: Case, tensors: Tensors) -> Iterator[tuple[str, Callable[[], Side]]]:
        """Yield Transom's kernel by the table and as tuned, PyTorch's backends, and for models eager attention."""
        entry = case.tiles(tile_sizes_for(self.sm, case.variant))
        tried = {"ours": entry, "ours, tuned": case.tiles(self.best.get(key_of(case), entry))}
        for name, tiles in tried.items():
            if name == "ours" or tiles != entry:
                yield name, lambda name=name, tiles=tiles: self.in_best_splits(case, tensors, tiles, name)
        for backend in BACKENDS:
            yield f"torch {backend}", lambda backend=backend: self.theirs(case, tensors, backend)
        if case.model:
            yield "torch eager", lambda: self.eager(case, tensors)

    def in_best_splits(self, case: Case, tensors: Tensors, tiles: TileSizes, name: str) -> Side:
        if case.kind != "step":
            return self.ours(case, tensors, tiles, 1, name)
        tried = [self.ours(case, tensors, tiles, splits, name) for splits in splits_of(case)]
        self.measure(tried, TUNED_ROUNDS, TIMED_MS / 8)
        best = min(tried, key=lambda side: float(np.median(side.times)))
        return replace(best, times=[])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu-<name>-attention.json and .md")
    parser.add_argument("--quick", action="store_true", help="a few cases, in less than three minutes")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help='of a name, as "step" or "fp16 head 64"')
    parser.add_argument("--minutes", type=float, default=45.0, help="after which no further case is begun")
    parser.add_argument("--no-tuning", action="store_true", help="the blocks of the table alone")
    options = parser.parse_args()
    try:
        gpu = find_gpu()
    except TransomError as error:
        print(f"nothing was measured: {error}", file=sys.stderr)
        return 0
    import torch
    import triton

    if not torch.cuda.is_available():
        print(
            "nothing was measured: PyTorch here has no CUDA; install one that has: pip install torch", file=sys.stderr
        )
        return 0
    try:
        bench = Bench(gpu)
    except TransomError as error:  # a GPU that there is no kernel for
        print(f"nothing was measured: {error}", file=sys.stderr)
        return 0
    return measure_all(bench, gpu, options, {"torch": str(torch.__version__), "triton": str(triton.__version__)})


def measure_all(bench: Bench, gpu: Gpu, options: argparse.Namespace, libraries: Mapping[str, str]) -> int:
    began, limit_s = time.monotonic(), 60 * min(options.minutes, 2.5 if options.quick else options.minutes)
    measured = cases(quick=options.quick, only=options.only)
    if gpu.capability == (7, 5):
        measured = [case for case in measured if case.precision not in ("bf16", "tf32")]
    roofline = bench.roofline()
    report: dict[str, Any] = {"gpu": str(gpu), "driver": gpu.driver, "date": time.strftime("%Y-%m-%d")}
    report |= {"versions": dict(libraries), "aims": AIMS, "roofline": asdict(roofline)}
    report |= {"cases": [], "tuned": [], "better_rows": [], "left": []}
    path = options.out / f"gpu-{'-'.join(gpu.name.lower().split())}-attention"
    options.out.mkdir(parents=True, exist_ok=True)
    for group in [] if options.no_tuning else tuned_on(measured, quick=options.quick):
        if time.monotonic() - began > limit_s / 2:
            print("  half of the time is up: no further blocks are tuned", file=sys.stderr)
            break
        bench.precise(group[0].precision)
        try:
            tuned = bench.tune(group, quick=options.quick)
        except (TransomError, RuntimeError) as error:
            print(f"  {group[0].name} cannot be tuned: {one_line(error)}", file=sys.stderr)
            continue
        report["tuned"].append(tuned)
        print(f"tuned {group[0].name}: {tuned['best']}, {number(tuned['best_ms'], 4)} ms", flush=True)
    report["better_rows"] = better_rows(report["tuned"], bench.sm)
    for index, case in enumerate(measured):
        if time.monotonic() - began > limit_s:
            report["left"] = [left.name for left in measured[index:]]
            break
        try:
            found = bench.run(case, roofline)
        except (TransomError, RuntimeError) as error:  # not even its tensors have room
            found = {**asdict(case), "name": case.name, "aim": case.aim, "ratio": None, "best_backend": "none"}
            found |= {"rows": [], "refused": {"ours": one_line(error)}}
        report["cases"].append(found)
        best = min((row["p50_ms"] for row in found["rows"] if row["side"].startswith("ours")), default=None)
        about = f"ours {number(best, 4)} ms, {number(found['ratio'])} times {found['best_backend']}"
        print(f"[{index + 1}/{len(measured)}, {time.monotonic() - began:.0f} s] {case.name}: {about}", flush=True)
        path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
        path.with_suffix(".md").write_text(markdown(report))
    failed = [each["name"] for each in report["cases"] if str(each["refused"].get("ours", "")).startswith("wrong")]
    if failed:
        print(f"ours is wrong in {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
