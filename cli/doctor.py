"""``transom doctor``: show what is installed, what the machine has, and which device ``--device auto`` chooses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from transom.cli.examine import FULL, RTX, capability_of, examine
from transom.cli.failures import FAILED
from transom.cli.options import Json
from transom.cli.output import print_fields, print_json


def doctor(
    bundle: Annotated[
        Path | None,
        typer.Argument(
            metavar="[BUNDLE]",
            help="Also load this bundle with --device auto.",
            show_default="auto is shown for a bundle without engines",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what is installed and which device auto chooses.

    Prints library versions, execution providers, the processor and its instructions, GPUs, the device that
    `--device auto` chooses and why, and why each faster device is not used. Which engine runs here depends on the
    bundle: give one to have it loaded. Exit status 1 when the runtime cannot work here; the line `problem` says what
    to do.
    """
    report = examine(bundle)
    if as_json:
        print_json(report)
    else:
        print_fields(report_fields(report))
    if report["problems"]:
        raise typer.Exit(FAILED)


def report_fields(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the name and the text of each field of the report."""
    yield "transom", report["transom"] or "not installed as a package"
    yield "python", f"{report['python']}, {report['system']}"
    for name, found in report["libraries"].items():
        yield name, found or "–"
    yield "export", "ready" if report["export"] else "not here; run `pip install 'transom[export]'`"
    cpu = report["cpu"]
    yield "cpu", f"{cpu['name']}, {cpu['architecture']}, {cpu['cores']} cores usable"
    yield "instructions", " ".join(cpu["instructions"]) or "none that speed up INT8 or half precision"
    int8 = cpu["int8"]
    sums = "sums were not tried" if int8["runs"] is None else f"sums in {int8['runs']} are {int8['means']}"
    yield "int8", f"{int8['instruction_set']}, {int8['meaning']}; {sums}"
    from transom.runtime.native.library import ABSENT

    yield "kernels", kernels_text(cpu["kernels"])
    for name, why in cpu["kernels"]["passed_over"].items():
        if why != ABSENT:
            yield f"not {name}", why
    for gpu in report["gpus"]:
        yield "gpu", gpu_text(gpu)
    libraries = report["engines"]["libraries"]
    for library in (libraries[RTX], libraries[FULL]):
        yield library["name"], library["version"] or library["problem"].removeprefix(f"{library['name']} is ")
    for what, found in (("build engines", report["engines"]["build"]), ("run engines", report["engines"]["run"])):
        yield what, f"{', '.join(found['targets']) or 'no'}: {found['reason']}"
    yield "providers", ", ".join(report["onnxruntime_providers"]) or "–"
    yield "auto", f"{report['auto']['device'] or '–'}: {report['auto']['reason']}"
    for device, why in report["auto"]["passed_over"].items():
        yield f"not {device}", why
    for problem in report["problems"]:
        yield "problem", problem


def kernels_text(kernels: Mapping[str, Any]) -> str:
    """Return ``native, for avx2, compiled by GCC 12.2.0``, or why ONNX Runtime's run alone."""
    if kernels["instruction_set"] is None:
        return f"ONNX Runtime's alone: {kernels['reason']}"
    return f"native, {kernels['reason'].removeprefix('kernels ')}; compiled by {kernels['compiler']}"


def gpu_text(gpu: Mapping[str, Any]) -> str:
    """Return ``NVIDIA L4, compute 8.9, 23034 MiB, 570.1, takes rtx-sm89``."""
    capability = capability_of(gpu)
    if capability is None:
        return ", ".join([gpu["name"], "compute capability unknown", gpu["memory"], gpu["driver"]])
    why = ": TensorRT-RTX has no target for SM{}{}".format(*capability) if gpu["target"] == "tensorrt" else ""
    compute = f"compute {gpu['compute_capability']}"
    return ", ".join([gpu["name"], compute, gpu["memory"], gpu["driver"], f"takes {gpu['target']}{why}"])
