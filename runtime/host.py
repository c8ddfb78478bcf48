"""What this machine is and what this process takes of it: a time without them says nothing."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from transom.runtime.cpu import instruction_set

MIB = 1 << 20


def peak_memory_mib() -> float | None:
    """The most physical memory this process ever held, in MiB; None where the system does not say.

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
    """Logical cores that this process may run on: a container or taskset may leave it fewer than there are."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_info() -> dict[str, str]:
    """The fields of /proc/cpuinfo's first core; empty where there is none."""
    try:
        first = Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_name() -> str:
    """The processor as the system calls it; on ARM boards that do not say, the board."""
    name = cpu_info().get("model name")
    if name:
        return name
    board = Path("/proc/device-tree/model")  # "NVIDIA Jetson Orin Nano Developer Kit", with a trailing NUL
    if board.is_file():
        return board.read_text(errors="replace").strip("\0 \n")
    return platform.processor() or platform.machine() or "unknown"


def processor() -> str:
    """The processor and what it multiplies 8-bit integers with, as every printed figure names it."""
    return f"{cpu_name()}, {instruction_set()}"
