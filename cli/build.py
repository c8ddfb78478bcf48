"""``transom build``: build TensorRT engines of a bundle, for GPUs that need not be in this machine."""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from transom.cli.options import BundlePath, Json, Target, sizes
from transom.cli.output import print_json, print_table, printable
from transom.cli.progress import progress
from transom.runtime.format import bytes_text

if TYPE_CHECKING:
    from transom.export.engine.build import Engine


class Attention(StrEnum):
    MASK = "mask"
    LENGTHS = "lengths"


def build(
    bundle: BundlePath,
    target: Target,
    report: Annotated[bool, typer.Option("--report", help="Print which nodes ended in which kernels.")] = False,
    allow_unfused: Annotated[
        bool,
        typer.Option(
            "--allow-unfused",
            help="Accept an engine in which an attention is not one kernel, or the builder's log does not show it.",
        ),
    ] = False,
    attention: Annotated[
        Attention,
        typer.Option(
            help="What tells a decoder's attention how full its cache is: a mask, checked in ONNX Runtime; or lengths, "
            "for TensorRT-RTX's own operator in half precision, opt-in until a GPU has executed it."
        ),
    ] = Attention.MASK,
    plugin: Annotated[
        bool,
        typer.Option(
            help="For --target tensorrt: compute attention that TensorRT has no fused kernel for, such as FP32's, and "
            "attention with a bias per head, by Transom's plugin, which no GPU has executed yet; without it, by matrix "
            "products and a softmax, or by TensorRT's own kernel."
        ),
    ] = True,
    repository: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="For --target tensorrt: also put the plans into a model repository of Triton Inference Server.",
            file_okay=False,
        ),
    ] = None,
    least: Annotated[
        list[str] | None,
        typer.Option("--min", metavar="S=1", help="Least size of an axis; repeatable.", show_default="the bundle's"),
    ] = None,
    tuned: Annotated[
        list[str] | None,
        typer.Option("--opt", metavar="S=128", help="The size to tune for; repeatable.", show_default="the bundle's"),
    ] = None,
    most: Annotated[
        list[str] | None,
        typer.Option(
            "--max",
            metavar="S=512",
            help="Greatest size of an axis, within the bundle's; less takes less memory. Repeatable.",
            show_default="the bundle's",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Build TensorRT engines of a bundle and put them into it.

    TensorRT-RTX builds for GeForce and RTX GPUs on any x86-64 machine, without a GPU; full TensorRT builds for the
    GPU in this machine. The graphs are first compared with the bundle in ONNX Runtime. The builder's log shows
    what fused: an attention that did not become one kernel fails the build. Engines are kept in the user's cache.
    With --min, --opt and --max an engine takes narrower sizes than the bundle. `transom remove-engine` removes it.
    """
    bounds = {
        option: {name: size for text in given or () for name, size in sizes(text, f"--{option}").items()}
        for option, given in (("min", least), ("opt", tuned), ("max", most))
    }
    with progress(quiet=as_json) as report_progress, redirect_stdout(sys.stderr):
        from transom.export.engine.build import build as build_engines
        from transom.export.engine.shapes import Shapes
        from transom.export.engine.targets import find_targets
        from transom.runtime.bundle import Bundle
        from transom.runtime.progress import ProgressReporter

        targets = find_targets(target)
        engines = build_engines(
            Bundle(bundle),
            targets,
            allow_unfused=allow_unfused,
            tell=ProgressReporter(report_progress, 0).more,
            attention=attention.value,
            plugin=plugin,
            repository=repository,
            shapes=Shapes(**bounds),
        )
    if as_json:
        print_json({"bundle": bundle, "engines": [engine.to_json() for engine in engines]})
        return
    rows = [
        [
            engine.target,
            engine.graph,
            bytes_text(engine.size),
            f"{engine.seconds:.1f} s",
            bytes_text(engine.memory.get("activation", 0)),
            "; ".join(fusion.summary() for fusion in engine.fusions),
        ]
        for engine in engines
    ]
    print_table(("target", "graph", "plan", "time", "memory", "fused"), rows, right=("plan", "time", "memory"))
    if report:
        for engine in engines:
            print_kernels(engine)


def print_kernels(engine: Engine) -> None:
    """Print the kernels of one graph, how often each occurs, and what did not fuse."""
    for reasons, what in (
        (engine.decomposed, "are decomposed, TensorRT has no kernel"),
        (engine.plugins, "are our plugin:"),
        (engine.masked, "read a mask instead of lengths:"),
    ):
        for reason, count in Counter(reasons.values()).items():
            print(printable(f"\n{engine.target}, {engine.graph}: {count} attentions {what} {reason}"))
    print()
    for what, lines in (("executed", engine.evidence.executed), ("compiled only", engine.evidence.compiled)):
        for line in lines:
            print(printable(f"{engine.target}, {engine.graph}, {what}: {line}"))
    for fusion in engine.fusions:
        print(printable(f"\n{engine.target}, {engine.graph}, {fusion.summary()}"))
        for title, count in fusion.kernel_counts.items():
            print(printable(f"  {count:4d} x {title}"))
        for what, names in (
            ("attention that is not one kernel", fusion.unfused),
            ("integer products that are dequantised first", fusion.dequantized),
            ("nodes that are a kernel by themselves", fusion.unfused_nodes),
        ):
            if names:
                print(printable(f"  {what}: {', '.join(names)}"))
        for node, seen in fusion.unrecognized.items():
            print(printable(f"  not understood, which is neither fused nor not: of {node} {seen}"))
