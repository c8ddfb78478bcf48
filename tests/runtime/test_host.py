"""Which integer instructions a processor has, by what systems say of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from transom.runtime import host
from transom.runtime.host import (
    INSTRUCTION_SETS,
    UNKNOWN,
    flags_of_cpuinfo,
    flags_of_sysctl,
    instruction_set,
    instruction_set_of,
)

CORE = "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu sse2 ssse3 {}\nvmx flags\t: vnmi avx512_vnni amx_int8\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CORE.format("avx2 avx512f avx512bw avx512_vnni amx_bf16 amx_tile amx_int8"), "amx_int8"),  # Sapphire Rapids
        (CORE.format("avx2 avx512f avx512bw avx512_vnni avx512_bf16"), "avx512_vnni"),  # Zen 4
        (CORE.format("avx2 avx512f avx512bw avx512_vnni amx_int8"), "avx512_vnni"),  # tiles are not to be used
        (CORE.format("avx2 f16c avx_vnni"), "avx_vnni"),  # Alder Lake
        (CORE.format("avx2 avx512f avx512bw avx512vl"), "avx512"),  # Skylake-X
        (CORE.format("avx2 avx512f"), "avx2"),  # Knights Landing: ONNX Runtime wants BW
        (CORE.format("avx2 fma"), "avx2"),
        (CORE.format("avx"), "sse"),
        ("BogoMIPS\t: 50.00\nFeatures\t: fp asimd evtstrm asimddp sve i8mm bf16\nCPU part\t: 0xd4f\n", "neon_i8mm"),
        ("Features\t: fp asimd evtstrm aes asimdhp asimddp\n", "neon_dotprod"),
        ("Features\t: fp asimd evtstrm crc32\n", "neon"),  # Cortex-A53
        ("Features\t: half thumb neon vfpv4\n", "unknown"),  # 32 bits
        ("isa\t: rv64imafdcv\n", "unknown"),
        ("", "unknown"),
        ("flags", "unknown"),
    ],
)
def test_proc_cpuinfo(text: str, expected: str) -> None:
    assert instruction_set_of(flags_of_cpuinfo(text)).name == expected


def test_what_not_every_core_has_is_not_used() -> None:
    text = "\n".join(f"processor : {i}\nFeatures : fp asimd asimddp {more}\n" for i, more in enumerate(("i8mm", "")))
    assert flags_of_cpuinfo(text) == {"fp", "asimd", "asimddp"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hw.optional.neon: 1\nhw.optional.arm.FEAT_DotProd: 1\nhw.optional.arm.FEAT_I8MM: 1\n", "neon_i8mm"),  # M2
        ("hw.optional.neon: 1\nhw.optional.arm.FEAT_DotProd: 1\nhw.optional.arm.FEAT_I8MM: 0\n", "neon_dotprod"),  # M1
        ("machdep.cpu.features: FPU SSE2 AVX1.0\nmachdep.cpu.leaf7_features: AVX2 BMI2\n", "avx2"),
        ("machdep.cpu.features: SSE2\nmachdep.cpu.leaf7_features: AVX2 AVX512BW AVX512VNNI\n", "avx512_vnni"),
        ("sysctl: unknown oid 'hw.optional.neon'\n", "unknown"),
    ],
)
def test_sysctl(text: str, expected: str) -> None:
    assert instruction_set_of(flags_of_sysctl(text)).name == expected


def test_this_machine_has_one() -> None:
    assert instruction_set() in {known.name for known in (*INSTRUCTION_SETS, UNKNOWN)}


@pytest.mark.parametrize(
    ("told", "name"),
    [
        ("AMD EPYC", "AMD EPYC (family 26, model 2)"),  # a virtual machine's: Zen 4 and Zen 5 have the same name there
        ("AMD EPYC 9654 96-Core Processor", "AMD EPYC 9654 96-Core Processor"),
    ],
)
def test_a_name_without_a_number_gets_family_and_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, told: str, name: str
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: {told}\n\n")
    monkeypatch.setattr(host, "CPUINFO", cpuinfo)
    assert host.cpu_name() == name


def test_threads_of_a_core_are_one_core(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """CPUs 0 and 4 are threads of one core, 1 and 5 of another; this process may use 0, 4 and 5."""
    for cpu, siblings in ((0, "0,4"), (4, "0,4"), (5, "1,5")):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{siblings}\n")
    monkeypatch.setattr(host, "TOPOLOGY", tmp_path)
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda process: {0, 4, 5}, raising=False)
    assert host.physical_cores() == 2
    monkeypatch.setattr(host, "TOPOLOGY", tmp_path / "none")
    assert host.physical_cores() == host.usable_cores() == 3
