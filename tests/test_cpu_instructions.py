"""Which integer instructions a processor has, by what systems say of it; who is warned of saturation."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from command_line import as_quantized, changed_bundle, document, transom
from transom.runtime import cpu, load
from transom.runtime.cpu import (
    INSTRUCTION_SETS,
    UNKNOWN,
    SaturationWarning,
    flags_of_cpuinfo,
    flags_of_sysctl,
    instruction_set_of,
    warn_of_saturation,
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


def test_x86_without_vnni_saturates_and_nothing_else() -> None:
    assert [known.name for known in INSTRUCTION_SETS if known.saturates] == ["avx512", "avx2", "sse"]
    assert all(("--weight-bits 7" in known.meaning) == known.saturates for known in (*INSTRUCTION_SETS, UNKNOWN))


def test_this_machine_has_one() -> None:
    assert cpu.instruction_set() in {known.name for known in (*INSTRUCTION_SETS, UNKNOWN)}
    assert cpu.saturates() == cpu.this_cpu().saturates


def warned(device: str = "cpu", **quantization: Any) -> list[str]:
    made = {"weight_bits": 8, "activations": {"encoder": "none", "decoder": "dynamic"}, **quantization}
    manifest: Any = SimpleNamespace(name="m", quantization=made if quantization.get("weight_bits", 8) else None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_saturation(manifest, device)
    assert all(each.category is SaturationWarning for each in caught)
    return [str(each.message) for each in caught]


def test_who_is_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "cpu_flags", lambda: frozenset({"sse2", "avx2"}))
    (line,) = warned()
    assert line.startswith("m has 8-bit weights, and this processor (avx2) may saturate")
    assert line.endswith("export again with --weight-bits 7.")
    assert "\n" not in line
    assert len(warned(activations={"model": "static"})) == 1
    assert warned(weight_bits=7) == warned(weight_bits=4) == []
    assert warned(activations={"model": "none"}) == []
    assert warned(weight_bits=None) == []  # not quantised
    assert warned(device="cuda") == []
    monkeypatch.setattr(cpu, "cpu_flags", lambda: frozenset({"sse2", "avx2", "avx_vnni"}))
    assert warned() == []


def test_loading_warns_once_and_the_command_line_tells_it(
    vit_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = changed_bundle(vit_bundle, tmp_path, lambda words: as_quantized(words, bits=8))
    monkeypatch.setattr(cpu, "cpu_flags", lambda: frozenset({"sse2", "avx2"}))
    with pytest.warns(SaturationWarning) as caught, load(bundle, threads=1):
        pass
    (warning,) = caught
    assert warning.filename == __file__
    told = transom("selftest", bundle, "--threads", "1", "--json")
    assert told.exit_code == 0
    assert document(told)["side"] == "bundle"
    assert told.stderr == f"transom.runtime.cpu.SaturationWarning: {warning.message}\n"
    monkeypatch.undo()
    if not cpu.saturates():
        assert transom("selftest", bundle, "--threads", "1", "--json").stderr == ""
