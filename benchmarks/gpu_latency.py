"""Measure latency on this machine's GPU: engines and ONNX Runtime CUDA beside PyTorch, eager and compiled.

    python benchmarks/gpu_latency.py --out docs/results

Models of published size with random weights, FP32, FP16 and INT8. Every side takes numpy arrays and gives numpy arrays;
what CUDA events saw of it on the GPU alone stands beside. PyTorch runs with its fused attention (sdpa), without (eager)
and compiled; in FP32 no side uses TF32. Sides take turns, round by round, so that whatever the GPU's clock
does falls on all of them. Without a GPU it says so and ends with status 0: there is nothing to measure.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from full_size_models import MODELS

from transom.export.engine.build import build
from transom.export.engine.targets import find_targets
from transom.export.pipeline import export
from transom.export.quantization.options import QuantizeOptions
from transom.runtime import load
from transom.runtime.backends.cuda import Event, find_gpu
from transom.runtime.backends.trt import CallContext
from transom.runtime.backends.trt_plans import target_for
from transom.runtime.bundle import Bundle
from transom.runtime.errors import TransomError

ROUNDS, WARMUP, TIMED = 10, 10, 40  # TIMED calls in a round at most
NEW_TOKENS = 64
PRECISIONS = ("fp32", "fp16", "int8")
SHAPES: dict[str, tuple[dict[str, int], ...]] = {  # those of the published tables
    "bert": ({"B": 1, "S": 128}, {"B": 8, "S": 128}, {"B": 32, "S": 128}),
    "vit": ({"B": 1}, {"B": 8}),
    "gpt": ({"B": 1, "S": 64}, {"B": 1, "S": 900}),
}


class TimedCall(CallContext):
    """A CallContext that times only its engine's work on the GPU."""

    last_ms = 0.0

    def _execute(self, *arguments: Any, **options: Any) -> None:
        start, end = Event(), Event()
        start.record(self._stream)
        super()._execute(*arguments, **options)
        end.record(self._stream)
        self._stream.wait()
        TimedCall.last_ms = start.elapsed_ms(end)


@dataclass
class Side:
    """A side: ``run`` from host arrays to host arrays; ``gpu_ms`` of its last run, where it is known."""

    name: str
    precision: str
    run: Callable[[], Any]
    gpu_ms: Callable[[], float | None]


def feeds_of(model: str, sizes: Mapping[str, int]) -> dict[str, Any]:
    arrays = MODELS[model][2]()
    B, S = sizes["B"], sizes.get("S")
    found = {}
    for name, array in arrays.items():
        rows = np.resize(array, (B, *array.shape[1:])) if S is None else np.resize(array, (B, S))
        found[name] = np.ones_like(rows) if name == "attention_mask" else np.ascontiguousarray(rows)
    return found


def bundle_sides(model: str, precision: str, bundle: Path, sizes: Mapping[str, int]) -> list[Side]:
    sides = []
    feeds = feeds_of(model, sizes)
    for device in ("tensorrt", "cuda"):
        try:
            loaded = load(bundle, device=device)
        except TransomError as error:
            print(f"  {model} {precision} on {device}: {error}", file=sys.stderr)
            continue
        if model == "gpt":
            prompts = feeds["input_ids"].tolist()

            def run(loaded: Any = loaded, prompts: Any = prompts) -> Any:
                return loaded.generate(prompts, max_new_tokens=NEW_TOKENS, do_sample=False)
        else:

            def run(loaded: Any = loaded, feeds: Any = feeds) -> Any:
                return loaded.run(feeds)

        known = device == "tensorrt" and model != "gpt"
        sides.append(Side(f"transom {device}", precision, run, lambda k=known: TimedCall.last_ms if k else None))
    return sides


def torch_sides(model: str, precision: str, sizes: Mapping[str, int], *, compiled: bool) -> list[Side]:
    """Return PyTorch's sides in a precision: eager and fused attention, and with ``compiled`` torch.compile."""
    import torch
    import transformers

    if precision == "int8":
        return []
    if not torch.cuda.is_available():
        print("  PyTorch here has no CUDA: its sides are left out", file=sys.stderr)
        return []
    dtype = {"fp32": torch.float32, "fp16": torch.float16}[precision]
    feeds = {name: torch.from_numpy(array) for name, array in feeds_of(model, sizes).items()}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    last = [0.0]

    def side(name: str, call: Callable[..., Any]) -> Side:
        @torch.inference_mode()
        def run() -> Any:
            given = {k: v.cuda().to(dtype) if v.is_floating_point() else v.cuda() for k, v in feeds.items()}
            start.record()
            found = call(given)
            end.record()
            host = found.float().cpu() if found.is_floating_point() else found.cpu()
            last[0] = start.elapsed_time(end)
            return host

        return Side(name, precision, run, lambda: last[0])

    def module(attention: str) -> Any:
        torch.manual_seed(0)
        loaded = MODELS[model][1](transformers).eval().to(dtype).cuda()
        loaded.set_attn_implementation(attention)
        return loaded

    sides = []
    asked = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    torch.backends.cudnn.allow_tf32 = False
    for attention in ("eager", "sdpa"):
        called = module(attention)
        if model == "gpt":
            sides.append(side(f"torch {attention}", lambda given, m=called: m.generate(**given, **asked)))
        else:
            sides.append(side(f"torch {attention}", lambda given, m=called: m(**given)[0]))
    if compiled and model != "gpt":
        fast = torch.compile(module("sdpa"), mode="reduce-overhead")
        sides.append(side("torch.compile", lambda given: fast(**given)[0]))
    return sides


def measure(sides: list[Side], seconds: float) -> list[dict[str, Any]]:
    """Return the percentiles of every side over ROUNDS interleaved rounds, about ``seconds`` for each side in all."""
    host: dict[int, list[float]] = {index: [] for index in range(len(sides))}
    device: dict[int, list[float]] = {index: [] for index in range(len(sides))}
    turns: dict[int, int] = {}
    for index, side in enumerate(sides):
        side.run()  # compiles, allocates
        began = time.perf_counter()
        for _ in range(WARMUP):
            side.run()
            if time.perf_counter() - began > seconds / 2:
                break
        began = time.perf_counter()
        side.run()
        turns[index] = max(1, min(TIMED, int(seconds / ROUNDS / (time.perf_counter() - began))))
    for number in range(ROUNDS):
        for index in np.random.default_rng(number).permutation(len(sides)).tolist():
            for _ in range(turns[index]):
                began = time.perf_counter()
                sides[index].run()
                host[index].append((time.perf_counter() - began) * 1e3)
                on_gpu = sides[index].gpu_ms()
                if on_gpu is not None:
                    device[index].append(on_gpu)
    rows = []
    for index, side in enumerate(sides):
        p50, p95, p99 = np.percentile(host[index], (50, 95, 99)).round(4).tolist()
        gpu = round(statistics.median(device[index]), 4) if device[index] else None
        rows.append(
            {"side": side.name, "precision": side.precision, "p50": p50, "p95": p95, "p99": p99, "gpu_p50": gpu}
        )
    return rows


def made(model: str, precision: str, work: Path, target: str) -> Path:
    """Return a bundle with an engine, built once."""
    import torch
    import transformers

    folder = work / f"{model}-{precision}"
    if not (folder / "bundle").exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        MODELS[model][1](transformers).eval().save_pretrained(folder / "checkpoint")
        options = QuantizeOptions()
        if precision == "int8":
            np.savez(folder / "calibration.npz", **MODELS[model][2]())
            options = QuantizeOptions(calibration_data=(str(folder / "calibration.npz"),), gate=False)
        most = {"B": max(sizes["B"] for sizes in SHAPES[model])}
        if model == "bert":
            most["S"] = max(sizes["S"] for sizes in SHAPES[model])
        export(str(folder / "checkpoint"), folder / "bundle", precision=precision, max_sizes=most, quantize=options)
    try:
        build(Bundle(folder / "bundle"), find_targets([target]), allow_unfused=False, tell=lambda _: None)
    except TransomError as error:
        print(f"  {model} {precision} for {target}: {error}", file=sys.stderr)
    return folder / "bundle"


def versions() -> dict[str, str]:
    """Return the installed versions of the libraries that are compared."""
    names, found = ("onnxruntime", "onnxruntime-gpu", "torch", "transformers"), {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def markdown(report: Mapping[str, Any]) -> str:
    lines = [
        f"# Latency on {report['gpu']}",
        "",
        f"{report['date']}, driver for CUDA {report['driver'] / 1000:g}, "
        + ", ".join(f"{name} {version}" for name, version in report["versions"].items())
        + ".",
        "Milliseconds, host arrays to host arrays; *GPU* is the engine's or module's own work, by CUDA events.",
        f"GPT-2: a whole generation of {NEW_TOKENS} tokens after a prompt of S.",
        "",
    ]
    lines += ["| model | shape | side | precision | p50 | p95 | p99 | GPU p50 |", "| --- " * 8 + "|"]
    for row in report["rows"]:
        shape = " ".join(f"{axis}={size}" for axis, size in row["sizes"].items())
        gpu = "–" if row["gpu_p50"] is None else f"{row['gpu_p50']:.3f}"
        times = " | ".join(f"{row[key]:.3f}" for key in ("p50", "p95", "p99"))
        lines.append(f"| {MODELS[row['model']][0]} | {shape} | {row['side']} | {row['precision']} | {times} | {gpu} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu-<name>-latency.json and .md")
    parser.add_argument("--work", type=Path, default=Path("build/gpu"), help="where bundles are kept between runs")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--seconds", type=float, default=10.0, help="measuring time of each side of a shape")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which takes minutes")
    options = parser.parse_args()
    try:
        gpu = find_gpu()
    except TransomError as error:
        print(f"nothing was measured: {error}", file=sys.stderr)
        return
    import transom.runtime.backends.trt as trt

    trt.CallContext = TimedCall  # type: ignore[misc]
    rows: list[dict[str, Any]] = []
    report = {
        "gpu": str(gpu),
        "driver": gpu.driver,
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
        "rows": rows,
    }
    path = options.out / f"gpu-{'-'.join(gpu.name.lower().split())}-latency"
    options.out.mkdir(parents=True, exist_ok=True)
    for model in options.models:
        bundles = {p: made(model, p, options.work, target_for(gpu)) for p in options.precisions}
        for sizes in SHAPES[model]:
            sides = [side for p, bundle in bundles.items() for side in bundle_sides(model, p, bundle, sizes)]
            for precision in options.precisions:
                sides += torch_sides(model, precision, sizes, compiled=not options.no_compile)
            for row in measure(sides, options.seconds):
                rows.append({"model": model, "sizes": sizes, **row})
                about = f"{row['side']} {row['precision']}: p50 {row['p50']} ms, GPU {row['gpu_p50']}"
                print(f"{model} {sizes} {about}", flush=True)
            path.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
            path.with_suffix(".md").write_text(markdown(report))


if __name__ == "__main__":
    main()
