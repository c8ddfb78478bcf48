"""``transom debug``: where a bundle's error comes from."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from transom.cli.extras import export_extra
from transom.cli.options import BundlePath, CalibratedOn, Json, Source, Threads
from transom.cli.output import print_json, print_table, printable
from transom.cli.progress import progress

if TYPE_CHECKING:
    from transom.export.debug import Findings


class Flavour(StrEnum):
    """What ``--flavour`` takes."""

    cpu = "cpu"
    default = "default"


def accuracy(
    bundle: BundlePath,
    source: Source = None,
    calibration_data: CalibratedOn = None,
    flavour: Annotated[
        Flavour, typer.Option(help="Which file of a quantised graph: default is the one for TensorRT.")
    ] = Flavour.cpu,
    target: Annotated[
        float | None,
        typer.Option(
            metavar="ERROR", min=0.0, help="The relative error to get down to.", show_default="a tenth of what it is"
        ),
    ] = None,
    most: Annotated[int, typer.Option(metavar="N", min=1, help="Layers to find at most.")] = 10,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Find the layers that break a quantised or half-precision bundle, worst first.

    In the files that ship, layers are put back into FP32 by halves until the one is found that lowers the output's
    error most, then the next. The error is relative to FP32, on inputs that calibration did not see; of your own model
    in fp16 or bf16, on those of parity. Needs torch and the checkpoint, as verify does.
    """
    with progress(quiet=as_json) as report, redirect_stdout(sys.stderr), export_extra():
        from transom.export.debug import debug_accuracy

        findings = debug_accuracy(
            bundle,
            source=source,
            calibration_data=calibration_data or (),
            variant=flavour.value,
            target=target,
            most=most,
            threads=threads,
            progress=report,
        )
    if as_json:
        print_json({"bundle": bundle, **findings.to_json()})
        return
    if findings.worst:
        rows = [
            [
                str(rank),
                layer.name,
                layer.graph,
                f"{layer.before:.2e} -> {layer.after:.2e}",
                share(layer.agreement),
            ]
            for rank, layer in enumerate(findings.worst, 1)
        ]
        print_table(("rank", "layer", "graph", "error", "same top-1"), rows, right=("rank", "same top-1"))
    for line in conclusion(findings):
        print(printable(line))


def share(agreement: float | None) -> str:
    return "-" if agreement is None else f"{agreement:.1%}"


def conclusion(findings: Findings) -> list[str]:
    """What was found, in sentences, and what to do about it."""
    precision, worst = findings.manifest.precision, len(findings.worst)
    same = "" if findings.agreement is None else f", same top-1 as FP32 on {findings.agreement:.1%}"
    lines = [f"{findings.output} of {findings.variant} on {findings.data}: relative error {findings.shipped:.2e}{same}"]
    if worst:
        lines.append(f"with {worst} of {findings.layers} layers in FP32: {findings.left:.2e}")
    if findings.everything > findings.target:
        lines.append(
            f"with all {findings.layers} layers in FP32 {findings.everything:.2e} is left, and at most "
            f"{findings.target:.2e} was to be: the rest comes from outside of them, such as an embedding, a "
            "LayerNormalization, or what --also quantised. Export again."
        )
    elif findings.shipped <= findings.target:
        lines.append(f"that is at most the target of {findings.target:.2e}; nothing was searched.")
    elif not worst:
        lines.append("no single layer lowers it: it is spread over all of them.")
    if worst:
        lines.append(advice(precision, findings.manifest.quantization))
    return lines


def advice(precision: str, quantization: object) -> str:
    if precision == "fp16":
        return "to keep them in higher precision export again with --precision bf16, of a wider range, or fp32."
    if precision == "bf16":
        return "to keep them in higher precision export again with --precision fp16, of more digits, or fp32."
    modes = quantization.get("activations", {}) if isinstance(quantization, dict) else {}
    method = quantization.get("method") if isinstance(quantization, dict) else None
    if set(modes.values()) == {"none"}:
        other = "--precision int8" if precision == "int4" else "a smaller --block-size"
    elif "static" in modes.values():
        other = f"another --method than {method}, or --activations dynamic"
    else:
        other = "another --calibration-data, or --activations none"
    return (
        "an export keeps such layers in higher precision by itself where its gate does not hold, and takes no names "
        f"of layers; export again with {other}."
    )
