"""``transom debug``: find the layers that a bundle's error comes from."""

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


class Variant(StrEnum):
    """Values of ``--variant``."""

    cpu = "cpu"
    default = "default"


def accuracy(
    bundle: BundlePath,
    source: Source = None,
    calibration_data: CalibratedOn = None,
    variant: Annotated[
        Variant, typer.Option(help="Which variant of a quantised graph: cpu, or default, that for TensorRT.")
    ] = Variant.cpu,
    flavour: Annotated[Variant | None, typer.Option("--flavour", hidden=True)] = None,  # its earlier name
    target: Annotated[
        float | None,
        typer.Option(
            metavar="ERROR", min=0.0, help="The relative error to reach.", show_default="a tenth of the bundle's"
        ),
    ] = None,
    most: Annotated[int, typer.Option(metavar="N", min=1, help="Most layers to find.")] = 10,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Find the layers that break a quantised or half-precision bundle, worst first.

    Restores layers of the shipped graphs to FP32, halving the set until the layer is found that lowers the output's
    error most, then the next. The error is relative to FP32, on inputs that calibration did not see; for your own model
    in fp16 or bf16, on the parity inputs. Needs torch and the checkpoint, as verify does.
    """
    with progress(quiet=as_json) as report, redirect_stdout(sys.stderr), export_extra():
        from transom.export.debug import debug_accuracy

        findings = debug_accuracy(
            bundle,
            source=source,
            calibration_data=calibration_data or (),
            variant=(flavour or variant).value,
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
    """Return an agreement in per cent; a dash for None."""
    return "-" if agreement is None else f"{agreement:.1%}"


def conclusion(findings: Findings) -> list[str]:
    """Return the findings in sentences, and what to do about them."""
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
    """Return how to export again with less error."""
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
