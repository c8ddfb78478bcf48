"""``transom doctor``: what is installed here, what the machine has, and what ``--device auto`` chooses."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from transom.cli.extras import EXPORT_EXTRA
from transom.cli.failures import FAILED
from transom.cli.options import Json
from transom.cli.output import print_fields, print_json
from transom.runtime.errors import BackendError

RUNTIME = ("numpy", "tokenizers", "pillow", "safetensors")  # onnxruntime has several distributions
ONNXRUNTIMES = ("onnxruntime", "onnxruntime-gpu")
OTHERS = ("transformers",)  # needed by nothing, useful in a report
BUILD = ("onnx", "onnx-ir", "ml-dtypes", "polygraphy")  # that building an engine takes beside TensorRT
RUN = "cuda-bindings"  # that running one takes
COMPILE = "triton"  # that our attention takes in an engine of full TensorRT
RTX, FULL, CUDA = "tensorrt_rtx", "tensorrt", "cuda"  # modules, and what the report calls them
FLAGS = (  # of instructions that decide how fast INT8 and half precision are, x86 first
    *("avx2", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve"),
)
NVIDIA_SMI = "nvidia-smi"
NVIDIA_SMI_TIMEOUT_S = 60  # it takes up to ten where the driver is loaded for it
QUERIES = (  # the second for drivers that do not tell the compute capability
    {"name": "name", "compute_capability": "compute_cap", "memory": "memory.total", "driver": "driver_version"},
    {"name": "name", "memory": "memory.total", "driver": "driver_version"},
)
ASK_TIMEOUT_S = 120  # a library is loaded within some seconds; a busy machine is no broken library
LOAD_TIMEOUT_S = 300  # of a bundle: TensorRT may read an engine of some gigabytes
VERSION = "from transom.runtime.backends.trt_library import library; told = {{'version': library({!r}).__version__}}"
GPU = (
    "from transom.runtime.backends.cuda import find_gpu; g = find_gpu(); "
    "told = {'gpu': {'name': g.name, 'compute_capability': '{}.{}'.format(*g.capability), "
    "'memory': f'{g.memory >> 20} MiB', "
    "'driver': f'CUDA {g.driver // 1000}.{g.driver % 1000 // 10}'}}"
)
CHOICE = "from transom.runtime.devices import choice_for; told = choice_for({!r}).to_json()"
ASK = """
import json
from transom.runtime.errors import BackendError
try:
    {}
except BackendError as error:
    told = {{"problem": str(error)}}
print("\\ntold", json.dumps(told))
"""
TOLD = re.compile(r"^told (\{.*\})$", re.MULTILINE)


def doctor(
    bundle: Annotated[
        Path | None,
        typer.Argument(
            metavar="[BUNDLE]",
            help="Also load this bundle with --device auto.",
            show_default="a bundle without engines is what auto is told for",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what is installed and what auto chooses.

    Versions, execution providers, the processor and its instructions, GPUs, what `--device auto` chooses and
    why, and what is wrong with each device that would be faster. Which engine runs here depends on the bundle: give
    one to have it loaded. Exit status 1 when the runtime cannot work here; the line `problem` says what to do.
    """
    report = examine(bundle)
    if as_json:
        print_json(report)
    else:
        print_fields(lines(report))
    if report["problems"]:
        raise typer.Exit(FAILED)


def examine(bundle: Path | None = None) -> dict[str, Any]:
    """Everything doctor knows, as plain data. Libraries are asked for their version, not imported.

    Raises BundleError for a ``bundle`` that is damaged.
    """
    if bundle is not None:
        from transom.runtime.bundle import Bundle

        Bundle(bundle)
    versions = {name: version(name) for name in (*RUNTIME, *ONNXRUNTIMES, *EXPORT_EXTRA, *OTHERS, *BUILD, RUN, COMPILE)}
    providers, problems = examine_onnxruntime()
    problems += [f"{name} is not installed. Run `pip install {name}`." for name in RUNTIME if not versions[name]]
    found = ask_libraries()
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
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def examine_onnxruntime() -> tuple[list[str], list[str]]:
    """The execution providers that the library offers, and what is wrong with it."""
    try:
        from transom.runtime.backends.ort_library import onnxruntime

        return list(onnxruntime().get_available_providers()), []
    except (BackendError, ImportError) as error:  # ImportError: numpy
        return [], [str(error)]


def choose(bundle: Path | None, providers: Sequence[str], gpus: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The "device" that ``auto`` is here, the "reason", and "passed_over": what is wrong with faster ones.

    ``load`` makes the same choice by the same function. A bundle is loaded in a process of its own, whose libraries may
    end it. The device is None where none can be used.
    """
    if not providers:
        return {"device": None, "reason": "onnxruntime cannot be used", "passed_over": {}}
    from transom.runtime.devices import choice_for

    try:
        told = choice_for(None).to_json() if bundle is None else ask("auto", CHOICE.format(str(bundle)), LOAD_TIMEOUT_S)
    except BackendError as error:
        told = {"problem": str(error)}
    if "problem" in told:
        return {"device": None, "reason": told["problem"], "passed_over": {}}
    if told["device"] == "cpu":
        told["reason"] += f": {cpu_reason(providers, gpus)}"
    return told


def cpu_reason(providers: Sequence[str], gpus: Sequence[Mapping[str, Any]]) -> str:
    """Why the CPU is left, in view of what the machine has, and what to do."""
    if not gpus:
        return "no NVIDIA GPU was found"
    if "CUDAExecutionProvider" in providers:
        return f"there is one ({gpus[0]['name']}), and neither an engine nor CUDA can be used on it, as below"
    return (
        f"there is a GPU ({gpus[0]['name']}), but this onnxruntime has no CUDA provider; "
        "run `pip uninstall -y onnxruntime` and `pip install onnxruntime-gpu` to use it"
    )


def examine_cpu() -> dict[str, Any]:
    from transom.runtime.cpu import cpu_flags
    from transom.runtime.host import cpu_name, usable_cores

    return {
        "name": cpu_name(),
        "architecture": platform.machine(),
        "cores": usable_cores(),
        "instructions": [flag for flag in FLAGS if flag in cpu_flags()],
        "int8": examine_int8(),
    }


def examine_int8() -> dict[str, Any]:
    """What multiplies 8-bit integers here, and whether their sums are exact: a product with known sums is run.

    ``exact``, ``means`` and ``runs`` are None where onnxruntime cannot be used.
    """
    from transom.runtime.cpu import ADDS_IN_32_BITS, this_cpu

    here = this_cpu()
    told: dict[str, Any] = {"instruction_set": here.name, "meaning": here.meaning}
    try:
        from transom.runtime.backends.integer_sums import integer_sums
        from transom.runtime.backends.ort_library import onnxruntime

        sums = integer_sums()
        if sums.saturates_alone and here.name in ADDS_IN_32_BITS:
            told["meaning"] = "says the system, but this process does not have it, as under emulation"
        runs = f"onnxruntime {onnxruntime().__version__}"
    except (BackendError, ImportError):
        return {**told, "exact": None, "saturates": None, "means": None, "runs": None}
    return {**told, "exact": sums.exact, "saturates": not sums.exact, "means": sums.means, "runs": runs}


def find_gpus() -> list[dict[str, str | None]]:
    """NVIDIA GPUs as the driver's own tool lists them; none where there is no tool or it fails."""
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
    """(8, 9); None where the driver does not tell it."""
    found = re.fullmatch(r"(\d{1,3})\.(\d{1,2})", gpu["compute_capability"] or "")
    return (int(found[1]), int(found[2])) if found else None


def target_for(gpu: Mapping[str, Any]) -> str | None:
    """What ``transom build --target`` takes for a GPU; None where its compute capability is not known."""
    from transom.runtime.backends.trt_library import RTX_CAPABILITIES

    capability = capability_of(gpu)
    if capability is None:
        return None
    return "rtx-sm{}{}".format(*capability) if capability in RTX_CAPABILITIES else "tensorrt"


def ask_libraries() -> dict[str, dict[str, Any]]:
    """Of RTX, FULL and CUDA the ``name``, ``version`` or ``gpu``, and ``problem``, None where there is none.

    Each that is installed is loaded in a process of its own: one that is broken may end its process, or hang.
    """
    from transom.runtime.backends.trt_library import BINDINGS, INSTALL, LIBRARIES, NAMES

    names = {**NAMES, CUDA: RUN}
    there = {name: is_there(name) for name in names}
    there[RTX] |= is_there(BINDINGS) and is_there(LIBRARIES)
    questions = {name: GPU if name == CUDA else VERSION.format(name) for name in names if there[name]}
    with ThreadPoolExecutor(len(names)) as pool:
        answers = {name: pool.submit(ask, names[name], question) for name, question in questions.items()}
    found: dict[str, dict[str, Any]] = {}
    for name, called in names.items():
        absent = {"problem": f"{called} is not installed: {INSTALL.get(name, INSTALL[RTX])}"}
        answer = answers[name].result() if name in answers else absent
        found[name] = {"name": called, "gpu" if name == CUDA else "version": None, "problem": None} | answer
    return found


def is_there(module: str) -> bool:
    """Whether a module of the top level is installed; it is not imported."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def ask(name: str, question: str, timeout_s: float | None = None) -> dict[str, Any]:
    """What a new Python finds out of ``name``: ``told`` as ``question`` sets it, or ``problem``."""
    timeout_s = timeout_s or ASK_TIMEOUT_S
    command = [sys.executable or "python3", "-P", "-c", ASK.format(question)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return {"problem": f"{name} is broken: it did not load within {timeout_s} s. Install it again."}
    except OSError as error:
        return {"problem": f"{name} could not be tried: {error.strerror}"}
    told = TOLD.findall(done.stdout)  # a library may print as well
    if done.returncode == 0 and told:
        return {**json.loads(told[-1])}
    last = (done.stderr.splitlines() or ["it said nothing"])[-1]
    return {"problem": f"{name} is broken: loading it ended with status {done.returncode}, {last:.200}"}


def can_build(found: Mapping[str, Mapping[str, Any]], versions: Mapping[str, str | None]) -> dict[str, Any]:
    """The targets that ``transom build`` can build here, and why there are not more."""
    from transom.runtime.backends.trt_library import INSTALL, RTX_CAPABILITIES

    missing = [name for name in BUILD if not versions[name]]
    if missing:
        return {"targets": [], "reason": f"{', '.join(missing)} not installed: {INSTALL[RTX]}"}
    no_rtx = found[RTX]["problem"]
    targets = [] if no_rtx else ["rtx-sm{}{}".format(*capability) for capability in RTX_CAPABILITIES]
    targets += [] if found[FULL]["problem"] or found[CUDA]["problem"] else ["tensorrt"]
    return {"targets": targets, "reason": no_rtx or "TensorRT-RTX builds without a GPU"}


def can_run(found: Mapping[str, Mapping[str, Any]], gpus: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The targets whose engines run here, and why there are not more."""
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


def lines(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "transom", report["transom"] or "not installed as a package"
    yield "python", f"{report['python']}, {report['system']}"
    for name, found in report["libraries"].items():
        yield name, found or "–"
    yield "export", "ready" if report["export"] else "not here; run `pip install 'transom[export]'`"
    cpu = report["cpu"]
    yield "cpu", f"{cpu['name']}, {cpu['architecture']}, {cpu['cores']} cores usable"
    yield "instructions", " ".join(cpu["instructions"]) or "none of those that matter here"
    int8 = cpu["int8"]
    sums = "sums were not tried" if int8["runs"] is None else f"sums in {int8['runs']} are {int8['means']}"
    yield "int8", f"{int8['instruction_set']}, {int8['meaning']}; {sums}"
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


def gpu_text(gpu: Mapping[str, Any]) -> str:
    """``NVIDIA L4, compute 8.9, 23034 MiB, 570.1, takes rtx-sm89``."""
    capability = capability_of(gpu)
    if capability is None:
        return ", ".join([gpu["name"], "compute capability unknown", gpu["memory"], gpu["driver"]])
    why = ": TensorRT-RTX has no target for SM{}{}".format(*capability) if gpu["target"] == "tensorrt" else ""
    told = f"compute {gpu['compute_capability']}"
    return ", ".join([gpu["name"], told, gpu["memory"], gpu["driver"], f"takes {gpu['target']}{why}"])
