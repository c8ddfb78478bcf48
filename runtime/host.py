"""Describe this machine and process: processor, integer instructions, cores, memory.

A time is worth nothing without them. ONNX Runtime chooses its kernel of 8-bit products by the instructions (MLAS,
``platform.cpp``), in the order of INSTRUCTION_SETS. They say how fast products are; whether sums of them are exact is
measured (``transom.runtime.backends.integer_sums``).
"""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

MIB = 1 << 20
CPUINFO = Path("/proc/cpuinfo")
TOPOLOGY = Path("/sys/devices/system/cpu")
SYSCTL_TIMEOUT_S = 60
SYSCTL = (  # an unknown name is left out of the answer
    *("machdep.cpu.features", "machdep.cpu.leaf7_features"),  # of Intel's: SSE2 AVX2 AVX512VNNI ...
    *("hw.optional.neon", "hw.optional.arm.FEAT_DotProd", "hw.optional.arm.FEAT_I8MM"),  # of Apple's: 1 or 0
)
MACOS_FLAGS = {  # what Linux calls them
    "SSE2": "sse2",
    "AVX2": "avx2",
    "AVX512BW": "avx512bw",
    "AVX512VNNI": "avx512_vnni",
    "hw.optional.neon": "asimd",
    "hw.optional.arm.FEAT_DotProd": "asimddp",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
}


@dataclass(frozen=True)
class InstructionSet:
    """Integer instructions: the ``flags`` they need, by Linux's names, and in ``meaning`` how fast they multiply."""

    name: str
    flags: frozenset[str]
    meaning: str


INSTRUCTION_SETS = (  # best first, of either architecture
    InstructionSet("amx_int8", frozenset({"amx_tile", "amx_int8"}), "tiles of 8-bit products"),
    InstructionSet("avx512_vnni", frozenset({"avx512_vnni"}), "64 8-bit products an instruction"),
    InstructionSet("avx_vnni", frozenset({"avx_vnni"}), "32 8-bit products an instruction"),
    InstructionSet("avx512", frozenset({"avx512bw"}), "64 8-bit products in three instructions"),
    InstructionSet("avx2", frozenset({"avx2"}), "32 8-bit products in three instructions"),
    InstructionSet("sse", frozenset({"sse2"}), "8 products of 16 bits an instruction"),
    InstructionSet("neon_i8mm", frozenset({"asimd", "i8mm"}), "32 8-bit products an instruction"),
    InstructionSet("neon_dotprod", frozenset({"asimd", "asimddp"}), "16 8-bit products an instruction"),
    InstructionSet("neon", frozenset({"asimd"}), "8 8-bit products an instruction"),
)
ADDS_IN_32_BITS = ("amx_int8", "avx512_vnni", "avx_vnni")  # of x86: these alone are exact at U8 x S8
UNKNOWN = InstructionSet("unknown", frozenset(), "this system does not say which instructions it has")


def instruction_set_of(flags: frozenset[str]) -> InstructionSet:
    """Return the best set of which ``flags`` has all; UNKNOWN where it has none."""
    return next((known for known in INSTRUCTION_SETS if known.flags <= flags), UNKNOWN)


def flags_of_cpuinfo(text: str) -> frozenset[str]:
    """Return the flags that all cores of a Linux /proc/cpuinfo have: ``flags`` of x86, ``Features`` of Arm."""
    pairs = (line.partition(":") for line in text.splitlines())
    cores = [frozenset(words.split()) for key, _, words in pairs if key.strip() in ("flags", "Features")]
    return frozenset.intersection(*cores) if cores else frozenset()


def flags_of_sysctl(text: str) -> frozenset[str]:
    """Return the same from the lines ``name: value`` that macOS's sysctl prints for SYSCTL."""
    found = set()
    for name, _, value in (line.partition(":") for line in text.splitlines()):
        found |= set(value.split()) | ({name} if value.strip() == "1" else set())
    return frozenset(MACOS_FLAGS[each] for each in found & MACOS_FLAGS.keys())


@cache
def cpu_flags() -> frozenset[str]:
    """Return this processor's flags by Linux's names; none where the system does not list them."""
    if platform.system() == "Darwin":
        try:
            done = subprocess.run(["sysctl", *SYSCTL], capture_output=True, text=True, timeout=SYSCTL_TIMEOUT_S)
        except (OSError, subprocess.SubprocessError):
            return frozenset()
        return flags_of_sysctl(done.stdout)
    try:
        return flags_of_cpuinfo(CPUINFO.read_text(errors="replace"))
    except OSError:
        return frozenset()


def this_cpu() -> InstructionSet:
    """Return the instructions with which this processor multiplies INT8."""
    return instruction_set_of(cpu_flags())


def instruction_set() -> str:
    """Return their name, as results record it: ``avx512_vnni``."""
    return this_cpu().name


def peak_memory_mib() -> float | None:
    """Return the most physical memory this process ever held, in MiB; None where the system does not say.

    Linux's VmHWM comes first: getrusage there starts from the size of the process that started this one.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))  # in kB
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if platform.system() == "Darwin" else peak / 1024  # bytes there, KiB elsewhere


def usable_cores() -> int:
    """Count the logical cores that this process may use; a container or taskset may leave it fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def physical_cores() -> int:
    """Count the cores that this process may use, the threads of one as one; logical cores where Linux does not say.

    Two threads of a core share its multipliers: products gain nothing from the second.
    """
    try:
        cpus = os.sched_getaffinity(0)
        return len({(TOPOLOGY / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text() for cpu in cpus})
    except (AttributeError, OSError):
        return usable_cores()


def cpu_info() -> dict[str, str]:
    """Return the fields of /proc/cpuinfo's first core; empty where there is none."""
    try:
        first = CPUINFO.read_text(errors="replace").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_name() -> str:
    """Return the processor's name by the system; on ARM boards that do not say, the board's.

    A virtual machine may say "AMD EPYC" alone, of generations that differ by a factor: family and model are added then.
    """
    info = cpu_info()
    name = info.get("model name")
    if name and not any(character.isdigit() for character in name) and {"cpu family", "model"} <= info.keys():
        return f"{name} (family {info['cpu family']}, model {info['model']})"
    if name:
        return name
    board = Path("/proc/device-tree/model")  # "NVIDIA Jetson Orin Nano Developer Kit", with a trailing NUL
    if board.is_file():
        return board.read_text(errors="replace").strip("\0 \n")
    return platform.processor() or platform.machine() or "unknown"


def processor() -> str:
    """Return the processor and its integer instructions, as every printed result names them."""
    return f"{cpu_name()}, {instruction_set()}"
