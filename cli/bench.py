"""``transom bench``: measure latency, throughput, memory and load time of a bundle on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from transom.cli.options import BundlePath, Device, Json, Kernels, Threads, sizes
from transom.cli.output import print_fields, print_json, print_table
from transom.cli.progress import progress
from transom.runtime.format import sizes_text

if TYPE_CHECKING:
    from transom.runtime.bench import BenchReport


def bench(
    bundle: BundlePath,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="B=1,S=128", help="Sizes of the axes; repeatable.", show_default="what the bundle is tuned for"
        ),
    ] = None,
    runs: Annotated[int, typer.Option(metavar="N", min=1, help="Timed calls per shape, at most.")] = 100,
    warmup: Annotated[int, typer.Option(metavar="N", min=0, help="Calls before the timed ones.")] = 10,
    seconds: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="Time per shape after which no further call is made.")
    ] = 10.0,
    new_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="New tokens of each row, where the bundle generates.",
            show_default="64, if they fit",
        ),
    ] = None,
    device: Device = "cpu",
    threads: Threads = None,
    kernels: Kernels = "auto",
    as_json: Json = False,
) -> None:
    """Measure latency, throughput and memory.

    Prints latency as p50, p95 and p99, throughput, load time, and peak memory. Inputs are generated from the
    tensors that the bundle declares, the same ones every time; checking and copying them is part of
    the time. A bundle that generates text is measured by whole generations: prefill reads B prompts
    of S tokens (of a translation: sources), decode makes one token for each of the B rows. Where it reads
    images, encoder has the time of B images apart; I of the S tokens of a prompt stand for one each.
    """
    shapes = [sizes(text, "--shape") for text in shape or ()]
    with progress(quiet=as_json) as report:
        from transom.runtime import bench as runtime

        measured = runtime.bench(
            bundle,
            shapes,
            runs=runs,
            warmup=warmup,
            seconds=seconds,
            device=device,
            threads=threads,
            progress=report,
            new_tokens=new_tokens,
            kernels=kernels,
        )
    if as_json:
        chosen = {name: vars(choice) for name, choice in measured.kernels.items()}
        timings = [vars(timing) for timing in measured.timings]
        print_json({"bundle": bundle, **vars(measured), "kernels": chosen, "timings": timings})
        return
    rates = {timing.items for timing in measured.timings}
    rows = [
        [
            timing.name,
            sizes_text(timing.sizes),
            str(timing.runs),
            *(f"{ms:.3f}" for ms in (timing.p50_ms, timing.p95_ms, timing.p99_ms)),
            f"{timing.items_per_s:.1f}" + (f" {timing.items}" if len(rates) > 1 else ""),
        ]
        for timing in measured.timings
    ]
    what = "graph" if rates == {"items"} else "step"
    rate = "per s" if len(rates) > 1 else f"{next(iter(rates))}/s"  # of captions, images and then tokens
    columns = (what, "shape", "runs", "p50 ms", "p95 ms", "p99 ms", rate)
    print_table(columns, rows, right=columns[2:])
    print()
    print_fields(circumstances(measured))


def circumstances(measured: BenchReport) -> Iterator[tuple[str, str]]:
    """Yield the conditions of the measurement: load time, memory, device, threads, processor, library."""
    threads = f"{measured.threads or 'one per core'}, {measured.cores} cores usable"
    yield "load", f"{measured.load_s:.3f} s"
    if measured.memory_peak_mib is not None and measured.memory_before_mib is not None:
        yield (
            "peak memory",
            f"{measured.memory_peak_mib:.0f} MiB, before loading {measured.memory_before_mib:.0f} MiB",
        )
    yield "device", measured.device
    yield "threads", threads
    yield "cpu", f"{measured.cpu}, {measured.instruction_set}"
    yield "onnxruntime", measured.onnxruntime
    if measured.device == "cpu":
        for name, choice in measured.kernels.items():
            yield f"kernels of {name}", f"{choice.kernels}: {choice.reason}"
