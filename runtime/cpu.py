"""Which integer instructions the processor has: an INT8 figure is worth nothing without them.

ONNX Runtime chooses its kernel of U8 x S8 products by them (MLAS, ``platform.cpp``), in the order of INSTRUCTION_SETS.
"""

from __future__ import annotations

import platform
import subprocess
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transom.runtime.bundle import Manifest

CPUINFO = Path("/proc/cpuinfo")
SYSCTL_TIMEOUT_S = 5
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
EXACT = "sums are exact"
SATURATING = "without VNNI, pairs of products saturate at 16 bits: export with --weight-bits 7"


@dataclass(frozen=True)
class InstructionSet:
    """``flags`` are Linux's names of what the processor must have; ``meaning`` is what it means for INT8."""

    name: str
    flags: frozenset[str]
    meaning: str
    saturates: bool = False


INSTRUCTION_SETS = (  # best first, of either architecture
    InstructionSet("amx_int8", frozenset({"amx_tile", "amx_int8"}), f"tiles of INT8 products, {EXACT}"),
    InstructionSet("avx512_vnni", frozenset({"avx512_vnni"}), f"64 INT8 products an instruction, {EXACT}"),
    InstructionSet("avx_vnni", frozenset({"avx_vnni"}), f"32 INT8 products an instruction, {EXACT}"),
    InstructionSet("avx512", frozenset({"avx512bw"}), SATURATING, saturates=True),
    InstructionSet("avx2", frozenset({"avx2"}), SATURATING, saturates=True),
    InstructionSet("sse", frozenset({"sse2"}), SATURATING, saturates=True),
    InstructionSet("neon_i8mm", frozenset({"asimd", "i8mm"}), f"32 INT8 products an instruction, {EXACT}"),
    InstructionSet("neon_dotprod", frozenset({"asimd", "asimddp"}), f"16 INT8 products an instruction, {EXACT}"),
    InstructionSet("neon", frozenset({"asimd"}), f"8 INT8 products an instruction, {EXACT}"),
)
UNKNOWN = InstructionSet("unknown", frozenset(), "this system does not say which instructions it has")


class SaturationWarning(UserWarning):
    """The processor may add up a bundle's INT8 products wrongly."""


def instruction_set_of(flags: frozenset[str]) -> InstructionSet:
    """The best set of which ``flags`` has all; UNKNOWN where it has none."""
    return next((known for known in INSTRUCTION_SETS if known.flags <= flags), UNKNOWN)


def flags_of_cpuinfo(text: str) -> frozenset[str]:
    """What every core listed in a Linux /proc/cpuinfo has: ``flags`` of x86, ``Features`` of Arm."""
    pairs = (line.partition(":") for line in text.splitlines())
    cores = [frozenset(words.split()) for key, _, words in pairs if key.strip() in ("flags", "Features")]
    return frozenset.intersection(*cores) if cores else frozenset()


def flags_of_sysctl(text: str) -> frozenset[str]:
    """The same of the lines ``name: value`` that macOS's sysctl prints for SYSCTL."""
    found = set()
    for name, _, value in (line.partition(":") for line in text.splitlines()):
        found |= set(value.split()) | ({name} if value.strip() == "1" else set())
    return frozenset(MACOS_FLAGS[each] for each in found & MACOS_FLAGS.keys())


@cache
def cpu_flags() -> frozenset[str]:
    """This processor's flags in Linux's words; nothing where the system does not tell."""
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
    """What this processor multiplies INT8 with."""
    return instruction_set_of(cpu_flags())


def instruction_set() -> str:
    """Its name, as figures record it: ``avx512_vnni``."""
    return this_cpu().name


def saturates() -> bool:
    """Whether sums of U8 x S8 products may saturate here, unless weights have 7 bits."""
    return this_cpu().saturates


def warn_of_saturation(manifest: Manifest, device: str) -> None:
    """One SaturationWarning where ``device`` may saturate on this bundle.

    On x86 without VNNI ``vpmaddubsw`` adds two products U8 x S8 in 16 bits: 2 x 255 x 127 does not fit, 2 x 255 x 63
    of 7-bit weights does. Weights in blocks with activations in FP32 ("none") are multiplied another way.
    """
    made = manifest.quantization
    multiplies = made is not None and made["weight_bits"] == 8 and {*made["activations"].values()} - {"none"}
    here = this_cpu()
    if device == "cpu" and multiplies and here.saturates:
        warnings.warn(
            f"{manifest.name} has 8-bit weights, and this processor ({here.name}) may saturate when it adds up their "
            "products: answers may be worse than the export measured. Check with `transom selftest`, or export again "
            "with --weight-bits 7.",
            SaturationWarning,
            stacklevel=3,
        )
