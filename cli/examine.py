"""Examine this machine: installed libraries, the processor, GPUs, and the device that ``auto`` chooses."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transom.cli.extras import EXPORT_EXTRA
from transom.runtime import probe
from transom.runtime.errors import BackendError

RUNTIME = ("numpy", "tokenizers", "pillow", "safetensors")  # onnxruntime has several distributions
ONNXRUNTIMES = ("onnxruntime", "onnxruntime-gpu")
OTHERS = ("transformers",)  # not needed; useful in a bug report
BUILD = ("onnx", "onnx-ir", "ml-dtypes", "polygraphy")  # needed to build an engine, beside TensorRT
RUN = "cuda-bindings"  # needed to run one
COMPILE = "triton"  # needed by the attention plugin in an engine of full TensorRT
RTX, FULL, CUDA = "tensorrt_rtx", "tensorrt", "cuda"  # modules, and their keys in the report
FLAGS = (  # of instructions that decide how fast INT8 and half precision are, x86 first
    *("avx2", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve"),
)
NVIDIA_SMI = "nvidia-smi"
NVIDIA_SMI_TIMEOUT_S = 60  # it takes up to ten where the driver is loaded for it
QUERIES = (  # the second for drivers that do not list the compute capability
    {"name": "name", "compute_capability": "compute_cap", "memory": "memory.total", "driver": "driver_version"},
    {"name": "name", "memory": "memory.total", "driver": "driver_version"},
)
PROBE_TIMEOUT_S = 120  # a library loads within some seconds; a busy machine must not look like a broken library
LOAD_TIMEOUT_S = 300  # of a bundle: TensorRT may read an engine of some gigabytes


def examine(bundle: Path | None = None) -> dict[str, Any]:
    """Return everything that doctor reports, as plain data. No library that may be broken is loaded in this process.

    Raises BundleError for a ``bundle`` that is damaged.
    """
    if bundle is not None:
        from transom.runtime.bundle import Bundle

        Bundle(bundle)
    versions = {name: version(name) for name in (*RUNTIME, *ONNXRUNTIMES, *EXPORT_EXTRA, *OTHERS, *BUILD, RUN, COMPILE)}
    providers, problems = examine_onnxruntime()
    problems += [f"{name} is not installed. Run `pip install {name}`." for name in RUNTIME if not versions[name]]
    found = probe_libraries()
    gpus = [{**gpu, "target": target_for(gpu)} for gpu in find_gpus() or [found[CUDA]["gpu"]] if gpu]
    auto = choose(bundle, providers, gpus)
    return {
        "transom": version("transom"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "libraries": versions,
        "onnxruntime_providers": providers,
        "export": all(versions[name] for name in EXPORT_EXTRA),
        "cpu": examine_cpu(),
        "gpus": gpus,
        "auto": auto,
        "engines": {
            "libraries": found,
            "build": can_build(found, versions),
            "run": can_run(found, gpus),
        },
        "problems": problems,
    }


def version(distribution: str) -> str | None:
    """Return the version of an installed distribution; None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def examine_onnxruntime() -> tuple[list[str], list[str]]:
    """Return the execution providers that ONNX Runtime offers, and the problems with it."""
    try:
        from transom.runtime.backends.ort_library import onnxruntime

        return list(onnxruntime().get_available_providers()), []
    except (BackendError, ImportError) as error:  # ImportError: numpy
        return [], [str(error)]


def choose(bundle: Path | None, providers: Sequence[str], gpus: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the "device" that ``auto`` chooses here, the "reason", and in "passed_over" why faster ones are not.

    ``load`` makes the same choice by the same function. A bundle is loaded in a process of its own, which a broken
    library may end. The device is None where none can be used.
    """
    if not providers:
        return {"device": None, "reason": "onnxruntime cannot be used", "passed_over": {}}
    from transom.runtime.loading import choice_for

    try:
        choice = (
            choice_for(None).to_json() if bundle is None else run_probe("auto", ("device", str(bundle)), LOAD_TIMEOUT_S)
        )
    except BackendError as error:
        choice = {"problem": str(error)}
    if "problem" in choice:
        return {"device": None, "reason": choice["problem"], "passed_over": {}}
    if choice["device"] == "cpu":
        choice["reason"] += f": {cpu_reason(providers, gpus)}"
    return choice


def cpu_reason(providers: Sequence[str], gpus: Sequence[Mapping[str, Any]]) -> str:
    """Return why no GPU is used on this machine, and what to do about it."""
    if not gpus:
        return "no NVIDIA GPU was found"
    if "CUDAExecutionProvider" in providers:
        return f"there is one ({gpus[0]['name']}), and neither an engine nor CUDA can be used on it, as below"
    return (
        f"there is a GPU ({gpus[0]['name']}), but this onnxruntime has no CUDA provider; "
        "run `pip uninstall -y onnxruntime` and `pip install onnxruntime-gpu` to use it"
    )


def examine_cpu() -> dict[str, Any]:
    """Return the processor's name, architecture, usable cores, instructions, how it multiplies INT8, and kernels."""
    from transom.runtime.host import cpu_flags, cpu_name, usable_cores

    return {
        "name": cpu_name(),
        "architecture": platform.machine(),
        "cores": usable_cores(),
        "instructions": [flag for flag in FLAGS if flag in cpu_flags()],
        "int8": examine_int8(),
        "kernels": examine_kernels(),
    }


def examine_int8() -> dict[str, Any]:
    """Return what multiplies 8-bit integers here, and whether their sums are exact, by a product with known sums.

    ``exact``, ``means`` and ``runs`` are None where onnxruntime cannot be used.
    """
    from transom.runtime.host import ADDS_IN_32_BITS, this_cpu

    here = this_cpu()
    int8: dict[str, Any] = {"instruction_set": here.name, "meaning": here.meaning}
    try:
        from transom.runtime.backends.integer_sums import integer_sums
        from transom.runtime.backends.ort_library import onnxruntime

        sums = integer_sums()
        if sums.saturates_alone and here.name in ADDS_IN_32_BITS:
            int8["meaning"] = "reported by the system, but this process does not have it, as under emulation"
        runs = f"onnxruntime {onnxruntime().__version__}"
    except (BackendError, ImportError):
        return {**int8, "exact": None, "saturates": None, "means": None, "runs": None}
    return {**int8, "exact": sums.exact, "saturates": not sums.exact, "means": sums.means, "runs": runs}


def examine_kernels() -> dict[str, Any]:
    """Return the ``instruction_set`` of the native kernels that run here, None where none do, and the ``reason``."""
    answer = run_probe("the native library", ("kernels",))
    if "problem" in answer:
        return {"instruction_set": None, "compiler": None, "reason": answer["problem"], "passed_over": {}}
    return answer


def find_gpus() -> list[dict[str, str | None]]:
    """Return the NVIDIA GPUs that the driver's own tool lists; none where there is no tool or it fails."""
    tool = shutil.which(NVIDIA_SMI)
    for query in QUERIES if tool is not None else ():
        command = [str(tool), f"--query-gpu={','.join(query.values())}", "--format=csv,noheader"]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=NVIDIA_SMI_TIMEOUT_S, check=True
            )
        except subprocess.CalledProcessError:
            continue
        except (OSError, subprocess.SubprocessError):
            return []
        rows = (line.rsplit(", ", len(query) - 1) for line in done.stdout.splitlines())
        return [
            {"compute_capability": None, **dict(zip(query, row, strict=True))} for row in rows if len(row) == len(query)
        ]
    return []


def capability_of(gpu: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the compute capability, (8, 9); None where the driver does not list it."""
    found = re.fullmatch(r"(\d{1,3})\.(\d{1,2})", gpu["compute_capability"] or "")
    return (int(found[1]), int(found[2])) if found else None


def target_for(gpu: Mapping[str, Any]) -> str | None:
    """Return the ``transom build --target`` of a GPU; None where its compute capability is not known."""
    from transom.runtime.backends.trt_library import RTX_CAPABILITIES

    capability = capability_of(gpu)
    if capability is None:
        return None
    return "rtx-sm{}{}".format(*capability) if capability in RTX_CAPABILITIES else "tensorrt"


def probe_libraries() -> dict[str, dict[str, Any]]:
    """Return of RTX, FULL and CUDA the ``name``, ``version`` or ``gpu``, and ``problem``, None where there is none.

    Each that is installed is probed in a process of its own: a broken one may end its process, or hang.
    """
    from transom.runtime.backends.trt_library import BINDINGS, INSTALL, LIBRARIES, NAMES

    names = {**NAMES, CUDA: RUN}
    installed = {name: is_installed(name) for name in names}
    installed[RTX] |= is_installed(BINDINGS) and is_installed(LIBRARIES)
    questions = {name: ("gpu",) if name == CUDA else ("library", name) for name in names if installed[name]}
    with ThreadPoolExecutor(len(names)) as pool:
        answers = {name: pool.submit(run_probe, names[name], question) for name, question in questions.items()}
    found: dict[str, dict[str, Any]] = {}
    for name, called in names.items():
        absent = {"problem": f"{called} is not installed: {INSTALL.get(name, INSTALL[RTX])}"}
        answer = answers[name].result() if name in answers else absent
        found[name] = {"name": called, "gpu" if name == CUDA else "version": None, "problem": None} | answer
    return found


def is_installed(module: str) -> bool:
    """Return whether a top-level module is installed, without importing it."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def run_probe(name: str, question: Sequence[str], timeout_s: float | None = None) -> dict[str, Any]:
    """Return what ``runtime.probe`` answers in a process of its own, or its ``problem`` with ``name``."""
    timeout_s = timeout_s or PROBE_TIMEOUT_S
    command = [sys.executable or "python3", "-P", "-m", probe.__name__, *question]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return {"problem": f"{name} is broken: it did not load within {timeout_s} s. Install it again."}
    except OSError as error:
        return {"problem": f"{name} could not be tried: {error.strerror}"}
    answer = probe.result_of(done.stdout)
    if done.returncode == 0 and answer is not None:
        return answer
    last = (done.stderr.splitlines() or ["it printed nothing"])[-1]
    return {"problem": f"{name} is broken: loading it ended with status {done.returncode}, {last:.200}"}


def can_build(found: Mapping[str, Mapping[str, Any]], versions: Mapping[str, str | None]) -> dict[str, Any]:
    """Return the targets that ``transom build`` can build here, and why there are not more."""
    from transom.runtime.backends.trt_library import INSTALL, RTX_CAPABILITIES

    missing = [name for name in BUILD if not versions[name]]
    if missing:
        return {"targets": [], "reason": f"{', '.join(missing)} not installed: {INSTALL[RTX]}"}
    no_rtx = found[RTX]["problem"]
    targets = [] if no_rtx else ["rtx-sm{}{}".format(*capability) for capability in RTX_CAPABILITIES]
    targets += [] if found[FULL]["problem"] or found[CUDA]["problem"] else ["tensorrt"]
    return {"targets": targets, "reason": no_rtx or "TensorRT-RTX builds without a GPU"}


def can_run(found: Mapping[str, Mapping[str, Any]], gpus: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the targets whose engines run here, and why there are not more."""
    if not gpus:
        return {"targets": [], "reason": "no NVIDIA GPU was found"}
    gpu = found[CUDA]["gpu"]
    if gpu is None:
        return {"targets": [], "reason": found[CUDA]["problem"]}
    target, no_full = target_for(gpu), found[FULL]["problem"]
    if target == "tensorrt":
        return {"targets": [] if no_full else [target], "reason": no_full or f"{gpu['name']} can be used"}
    no_rtx = found[RTX]["problem"]
    targets = [name for name, problem in ((target, no_rtx), ("tensorrt", no_full)) if not problem]
    return {"targets": targets, "reason": no_rtx or f"{gpu['name']} can be used"}
