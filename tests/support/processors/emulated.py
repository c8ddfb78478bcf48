"""Describe the emulated processors, and make a Python environment that runs on each.

QEMU's user mode decides which instructions there are; /proc/cpuinfo is the kernel's and would be this machine's. QEMU
looks for every absolute path in a folder of its own first (``-L``): what stands there answers instead.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CORES = 2  # of an emulated Arm: onnxruntime reads them in /sys/devices/system/cpu

# Linux's names of what each has, in the order of its kernel.
A72 = "fp asimd aes pmull sha1 sha2 crc32 cpuid"
A76 = "fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
NO_SME = (
    "fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma lrcpc dcpop sha3 sm3 sm4 "
    "asimddp sha512 sve asimdfhm ilrcpc flagm sb paca pacg dcpodp sve2 sveaes svepmull svebitperm svesha3 svesm4 "
    "flagm2 frint svei8mm svef32mm svef64mm svebf16 i8mm bf16 rng bti mte"
)
MAX = f"{NO_SME} sme smei16i64 smef64f64 smei8i32 smef16f32 smeb16f32 smef32f32 smefa64"
NEHALEM = (
    "fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 syscall nx lm pni "
    "ssse3 cx16 sse4_1 sse4_2 popcnt lahf_lm"
)
HASWELL = f"{NEHALEM} pclmulqdq fma movbe aes xsave avx f16c rdrand abm fsgsbase bmi1 avx2 bmi2 erms"


@dataclass(frozen=True)
class Processor:
    """An emulated processor: ``qemu`` is what QEMU calls it, ``flags`` and ``model`` what /proc/cpuinfo says.

    ``seen`` are the flags that ``transom doctor`` must report, and ``unseen`` those that it must not.
    """

    name: str
    qemu: str
    architecture: str
    flags: str
    model: tuple[tuple[str, str], ...]
    seen: frozenset[str]
    unseen: frozenset[str]


def arm_model(implementer: str, variant: str, part: str, revision: str) -> tuple[tuple[str, str], ...]:
    return (
        ("CPU implementer", implementer),
        ("CPU architecture", "8"),
        ("CPU variant", variant),
        ("CPU part", part),
        ("CPU revision", revision),
    )


def x86_model(family: str, model: str, name: str) -> tuple[tuple[str, str], ...]:
    return (("vendor_id", "GenuineIntel"), ("cpu family", family), ("model", model), ("model name", name))


PROCESSORS = (
    Processor(  # Raspberry Pi 4: no dot product, no arithmetic in half precision
        "cortex-a72",
        "cortex-a72",
        "aarch64",
        A72,
        arm_model("0x41", "0x0", "0xd08", "3"),
        seen=frozenset({"asimd"}),
        unseen=frozenset({"asimddp", "asimdhp", "i8mm", "bf16", "sve"}),
    ),
    Processor(  # Raspberry Pi 5: dot products, sums in half precision
        "cortex-a76",
        "cortex-a76",
        "aarch64",
        A76,
        arm_model("0x41", "0x4", "0xd0b", "1"),
        seen=frozenset({"asimd", "asimddp", "asimdhp"}),
        unseen=frozenset({"i8mm", "bf16", "sve"}),
    ),
    Processor(  # Arm servers: matrix products of INT8, SVE2, BF16; to onnxruntime a Neoverse V2
        "max-no-sme",
        "max,sme=off",
        "aarch64",
        NO_SME,
        arm_model("0x41", "0x0", "0xd4f", "1"),
        seen=frozenset({"asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve"}),
        unseen=frozenset(),
    ),
    Processor(  # all that QEMU has, SME as well
        "max",
        "max",
        "aarch64",
        MAX,
        arm_model("0x41", "0x0", "0xd4f", "1"),
        seen=frozenset({"asimd", "asimddp", "asimdhp", "i8mm", "bf16", "sve"}),
        unseen=frozenset(),
    ),
    Processor(  # AVX2, but no VNNI: products U8 x S8 saturate; less what QEMU would warn that it cannot emulate
        "Haswell",
        "Haswell,-pcid,-x2apic,-tsc-deadline,-hle,-rtm,-invpcid",
        "x86_64",
        HASWELL,
        x86_model("6", "60", "Intel Core Processor (Haswell)"),
        seen=frozenset({"avx2", "f16c"}),
        unseen=frozenset({"avx512f", "avx512_vnni", "avx_vnni"}),
    ),
    Processor(  # SSE 4.2, no AVX
        "Nehalem",
        "Nehalem",
        "x86_64",
        NEHALEM,
        x86_model("6", "26", "Intel Core i7 9xx (Nehalem Class Core i7)"),
        seen=frozenset(),
        unseen=frozenset({"avx2", "f16c", "avx512f", "avx512_vnni", "avx_vnni"}),
    ),
)


def processors_of(architecture: str) -> tuple[Processor, ...]:
    return tuple(each for each in PROCESSORS if each.architecture == architecture)


def arm_cpuinfo(processor: Processor, cores: int = CORES) -> str:
    """Write /proc/cpuinfo as an Arm kernel does: one block of lines a core."""
    lines = (("BogoMIPS", "108.00"), ("Features", processor.flags), *processor.model)
    block = "".join(f"{key}\t: {value}\n" for key, value in lines)
    return "".join(f"processor\t: {core}\n{block}\n" for core in range(cores))


def x86_cpuinfo(processor: Processor, host: str) -> str:
    """Replace the host's model and flags in its /proc/cpuinfo; cores and sockets stay those of /sys."""
    replaced = {**dict(processor.model), "flags": processor.flags}
    lines = []
    for line in host.splitlines():
        key = line.partition(":")[0].strip()
        lines.append(f"{key}\t: {replaced[key]}" if key in replaced else line)
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Environment:
    """A folder like a virtual environment whose ``bin/python`` runs emulated, and so do the processes it starts."""

    processor: Processor
    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def transom(self) -> Path:
        return self.folder / "bin" / "transom"


PYTHON = """#!/bin/sh
exec '{qemu}' -cpu {cpu} -L '{root}' -0 '{own}' '{python}' "$@"
"""
TRANSOM = """#!/bin/sh
exec '{own}' -m transom.cli.main "$@"
"""


def make_environment(
    processor: Processor, folder: Path, *, qemu: Path, root: Path | None, python: Path, packages: Sequence[Path]
) -> Environment:
    """Make an environment anew: ``python``, a file named with its version, on ``processor``, importing ``packages``.

    ``root`` holds the system that Arm binaries see, None where they see the host's. Python takes the name that it was
    started by, here that of the script, for its own, and finds pyvenv.cfg beside it.
    """
    folder = folder.absolute()
    shutil.rmtree(folder, ignore_errors=True)
    environment, own_root = Environment(processor, folder), folder / "root"
    site_packages = folder / "lib" / python.name / "site-packages"
    for made in (own_root / "proc", site_packages, folder / "bin"):
        made.mkdir(parents=True)
    if root is None:
        cpuinfo = x86_cpuinfo(processor, Path("/proc/cpuinfo").read_text(errors="replace"))
    else:
        cpuinfo = arm_cpuinfo(processor)
        write_cores(own_root / "sys/devices/system/cpu")
        for name in ("usr", "lib"):  # anything else is the host's: /tmp, /dev, /bin/sh
            (own_root / name).symlink_to(root.absolute() / name)
    (own_root / "proc" / "cpuinfo").write_text(cpuinfo)
    (site_packages / "packages.pth").write_text("".join(f"{path.absolute()}\n" for path in packages))
    (folder / "pyvenv.cfg").write_text(f"home = {python.parent}\ninclude-system-site-packages = false\n")
    named = {"qemu": qemu.absolute(), "cpu": processor.qemu, "root": own_root, "own": environment.python}
    for path, text in ((environment.python, PYTHON), (environment.transom, TRANSOM)):
        path.write_text(text.format(**named, python=python))
        path.chmod(0o755)
    return environment


def write_cores(folder: Path) -> None:
    """Write what the kernel says of CORES cores of one socket, each with three levels of caches."""
    for name in ("possible", "present", "online"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"0-{CORES - 1}\n")
    for core in range(CORES):
        topology = folder / f"cpu{core}" / "topology"
        topology.mkdir(parents=True)
        (topology / "core_id").write_text(f"{core}\n")
        (topology / "physical_package_id").write_text("0\n")
        (topology / "core_siblings_list").write_text(f"0-{CORES - 1}\n")
        for level in range(4):
            (folder / f"cpu{core}" / "cache" / f"index{level}").mkdir(parents=True)


def clean_variables(home: Path) -> dict[str, str]:
    """Return the environment variables of an emulated process: nothing that names another Python or its packages."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TZ", "TERM") if name in os.environ}
    return {**kept, "HOME": str(home), "OMP_NUM_THREADS": "1", "ORT_DISABLE_TELEMETRY": "1", "PYTHONUTF8": "1"}
