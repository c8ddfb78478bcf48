"""``transom doctor``: what is installed here, what the machine has, and what ``--device auto`` would choose."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import typer

from transom.cli.extras import EXPORT_EXTRA
from transom.cli.failures import FAILED
from transom.cli.options import Json
from transom.cli.show import print_fields, print_json
from transom.runtime.errors import BackendError

RUNTIME = ("numpy", "tokenizers", "pillow", "safetensors")  # onnxruntime has several distributions
ONNXRUNTIMES = ("onnxruntime", "onnxruntime-gpu")
OTHERS = ("transformers",)  # needed by nothing, useful in a report
FLAGS = (  # of instructions that decide how fast INT8 and half precision are, x86 first
    *("avx2", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve"),
)
NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,compute_cap,memory.total,driver_version", "--format=csv,noheader")
NVIDIA_SMI_TIMEOUT_S = 10


def doctor(as_json: Json = False) -> None:
    """Show what is installed and what auto would choose.

    Versions, execution providers, the processor and its instructions, GPUs, and why `--device auto`
    would choose what it would. Exit status 1 when the runtime cannot work here; the line `problem` says what to do.
    """
    report = examine()
    if as_json:
        print_json(report)
    else:
        print_fields(lines(report))
    if report["problems"]:
        raise typer.Exit(FAILED)


def examine() -> dict[str, Any]:
    """Everything doctor knows, as plain data. Libraries are asked for their version, not imported."""
    versions = {name: version(name) for name in (*RUNTIME, *ONNXRUNTIMES, *EXPORT_EXTRA, *OTHERS)}
    providers, problems = examine_onnxruntime()
    problems += [f"{name} is not installed. Run `pip install {name}`." for name in RUNTIME if not versions[name]]
    gpus = find_gpus()
    device, reason = choose(providers, gpus)
    return {
        "transom": version("transom"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "libraries": versions,
        "onnxruntime_providers": providers,
        "export": all(versions[name] for name in EXPORT_EXTRA),
        "cpu": examine_cpu(),
        "gpus": gpus,
        "auto": {"device": device, "reason": reason},
        "problems": problems,
    }


def version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def examine_onnxruntime() -> tuple[list[str], list[str]]:
    """The execution providers that the library offers, and what is wrong with it."""
    try:
        from transom.runtime.ort import onnxruntime

        return list(onnxruntime().get_available_providers()), []
    except (BackendError, ImportError) as error:  # ImportError: numpy
        return [], [str(error)]


def choose(providers: Sequence[str], gpus: Sequence[Mapping[str, str]]) -> tuple[str | None, str]:
    """What ``auto`` means here, and why."""
    if not providers:
        return None, "onnxruntime cannot be used"
    from transom.runtime.ort import best_device

    device = best_device()
    if device != "cpu":
        return device, f"onnxruntime offers {providers[0]}"
    if not gpus:
        return device, "no NVIDIA GPU was found"
    return device, (
        f"there is a GPU ({gpus[0]['name']}), but this onnxruntime has no CUDA provider; "
        "run `pip uninstall -y onnxruntime` and `pip install onnxruntime-gpu` to use it"
    )


def examine_cpu() -> dict[str, Any]:
    from transom.runtime.cpu import cpu_flags, this_cpu
    from transom.runtime.machine import cpu_name, usable_cores

    int8 = this_cpu()
    return {
        "name": cpu_name(),
        "architecture": platform.machine(),
        "cores": usable_cores(),
        "instructions": [flag for flag in FLAGS if flag in cpu_flags()],
        "int8": {"instruction_set": int8.name, "meaning": int8.meaning, "saturates": int8.saturates},
    }


def find_gpus() -> list[dict[str, str]]:
    """NVIDIA GPUs as the driver's own tool lists them; none where there is no tool or it fails."""
    tool = shutil.which(NVIDIA_SMI[0])
    if tool is None:
        return []
    try:
        done = subprocess.run(
            [tool, *NVIDIA_SMI[1:]], capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    names = ("name", "compute_capability", "memory", "driver")
    rows = (line.split(", ") for line in done.stdout.splitlines())
    return [dict(zip(names, row, strict=True)) for row in rows if len(row) == len(names)]


def lines(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "transom", report["transom"] or "not installed as a package"
    yield "python", f"{report['python']}, {report['system']}"
    for name, found in report["libraries"].items():
        yield name, found or "–"
    yield "export", "ready" if report["export"] else "not here; run `pip install 'transom[export]'`"
    cpu = report["cpu"]
    yield "cpu", f"{cpu['name']}, {cpu['architecture']}, {cpu['cores']} cores usable"
    yield "instructions", " ".join(cpu["instructions"]) or "none of those that matter here"
    yield "int8", f"{cpu['int8']['instruction_set']}: {cpu['int8']['meaning']}"
    for gpu in report["gpus"]:
        yield "gpu", ", ".join([gpu["name"], f"compute {gpu['compute_capability']}", gpu["memory"], gpu["driver"]])
    yield "providers", ", ".join(report["onnxruntime_providers"]) or "–"
    yield "auto", f"{report['auto']['device'] or '–'}: {report['auto']['reason']}"
    for problem in report["problems"]:
        yield "problem", problem
