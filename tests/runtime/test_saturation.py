"""How sums were added up at a bundle's export, who is warned, and what the self-test says of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from command_line import as_quantized, changed_bundle, document, error_line, transom
from paths import KEPT
from transom.runtime import load, saturation
from transom.runtime.backends.integer_sums import LOST, NATIVE, WIDENED, IntegerSums
from transom.runtime.errors import ParityError
from transom.runtime.host import INSTRUCTION_SETS, UNKNOWN
from transom.runtime.saturation import EXACT_ON, SATURATED_ON, SaturationWarning, recorded_sums, warn_of_saturation
from transom.runtime.selftest import selftest

Here = Callable[[IntegerSums], None]


@pytest.fixture(autouse=True)
def nothing_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saturation, "_warned", set())


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Here:
    """``here(LOST)``: what the known sums would have told on another processor; sessions stay as they are."""

    def set_sums(sums: IntegerSums) -> None:
        for module in ("saturation", "selftest"):
            monkeypatch.setattr(f"transom.runtime.{module}.integer_sums", lambda: sums)

    return set_sums


def manifest(**quantization: Any) -> Any:
    made = {"weight_bits": 8, "activations": {"encoder": "none", "decoder": "dynamic"}, **quantization}
    return SimpleNamespace(name="m", made_for="both", quantization=made if quantization.get("weight_bits", 8) else None)


def warned(device: str = "cpu", **quantization: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_saturation(manifest(**quantization), device)
    assert all(each.category is SaturationWarning for each in caught)
    return [str(each.message) for each in caught]


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        ({"instruction_set": "avx512_vnni"}, "exact"),
        ({"instruction_set": "neon"}, "exact"),
        ({"instruction_set": "sse"}, "exact"),  # products of 16 bits, added in 32
        ({"instruction_set": "avx2"}, "saturated"),
        ({"instruction_set": "avx512"}, "saturated"),
        ({"instruction_set": "avx2", "integer_sums": "exact"}, "exact"),  # by the option
        ({"instruction_set": "avx512_vnni", "integer_sums": "saturated"}, "saturated"),  # under emulation
        ({"instruction_set": "avx2", "weight_bits": 7}, "exact"),
        ({"instruction_set": "avx2", "activations": {"decoder": "none"}}, "exact"),
        ({"instruction_set": "unknown"}, None),
        ({"instruction_set": "avx10_3"}, None),  # of a later version
        ({"instruction_set": 7}, None),
        ({}, None),
    ],
)
def test_what_a_bundle_records_of_its_sums(quantization: dict[str, Any], expected: str | None) -> None:
    assert recorded_sums(manifest(**quantization)) == expected


def test_every_instruction_set_is_known_to_be_exact_or_not() -> None:
    assert {*SATURATED_ON, *EXACT_ON} == {known.name for known in INSTRUCTION_SETS}
    assert UNKNOWN.name not in (*SATURATED_ON, *EXACT_ON)


@pytest.mark.parametrize("sums", [NATIVE, WIDENED])
def test_exact_sums_of_an_exact_export_are_not_warned_of(sums: IntegerSums, here: Here) -> None:
    here(sums)
    for known in (*EXACT_ON, "unknown"):
        assert warned(instruction_set=known) == []
    assert warned(instruction_set="avx2", integer_sums="exact") == []


def test_an_option_without_effect_is_warned_of_once(here: Here) -> None:
    here(LOST)
    (line,) = warned(instruction_set="avx512_vnni")
    assert line.startswith("8-bit products saturate on this processor (")
    assert "session.x64quantprecision has no effect here" in line
    assert line.endswith("export again with --weight-bits 7, whose products always fit.")
    assert "\n" not in line
    assert warned(instruction_set="neon") == []  # said already


def test_what_saturates_now_as_it_did_at_the_export_is_not_warned_of(here: Here) -> None:
    here(LOST)
    assert warned(instruction_set="avx2") == []
    assert warned(weight_bits=7) == warned(weight_bits=4) == []
    assert warned(activations={"model": "none"}) == []
    assert warned(weight_bits=None) == []  # not quantised
    assert warned(device="cuda", instruction_set="neon") == []


def test_a_saturated_export_is_warned_of_where_sums_are_exact(here: Here) -> None:
    here(WIDENED)
    (line,) = warned(instruction_set="avx2")
    assert line.startswith("m was exported where 8-bit products saturate (instruction set avx2): its accuracy gate")
    assert "Export it again" in line
    assert warned(instruction_set="avx2") == []  # said already
    assert len(warned(instruction_set="avx512")) == 1  # of another bundle


def test_a_saturated_bundle_loads_and_its_self_test_refuses(tmp_path: Path) -> None:
    """The reference ViT, exported by version 0.1.0 on AVX2: its golden values are of saturated sums."""
    bundle = KEPT / "vit-int8-saturated"
    with pytest.warns(SaturationWarning, match=r"exported where 8-bit products saturate \(instruction set avx2\)"):
        load(bundle, threads=1).close()
    with pytest.raises(ParityError, match=r"vit-int8-saturated on cpu cannot be tested: vit was exported where 8-bit"):
        selftest(bundle, threads=1)
    result = transom("selftest", bundle, "--threads", "1")
    assert result.exit_code == 1
    assert "Export it again" in error_line(result)


def test_an_exact_bundle_passes_on_another_kind_of_processor_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """The same by version 0.1.0 on AVX512-VNNI: wherever this runs, sums are those of its export."""
    report = selftest(KEPT / "vit-int8-exact", threads=1)
    assert report.worst.error <= 0.02 < report.tolerance
    assert report.sums is not None
    assert (report.sums.here, report.sums.export, report.sums.export_set) == ("exact", "exact", "avx512_vnni")
    said = transom("selftest", KEPT / "vit-int8-exact", "--threads", "1")
    assert (said.exit_code, said.stderr) == (0, "")
    assert f"8-bit products on this processor ({report.sums.instruction_set}): exact" in said.stdout
    assert "; at the export they were exact (avx512_vnni)" in said.stdout
    told = document(transom("selftest", KEPT / "vit-int8-exact", "--threads", "1", "--json"))["integer_sums"]
    assert (told["here"], told["export"], told["export_set"]) == ("exact", "exact", "avx512_vnni")


def test_a_bundle_of_unknown_sums_is_tested_all_the_same(vit_bundle: Path, tmp_path: Path) -> None:
    def change(words: dict[str, Any]) -> None:
        as_quantized(words, bits=8)
        words["quantization"]["instruction_set"] = "unknown"

    bundle = changed_bundle(vit_bundle, tmp_path, change)
    result = transom("selftest", bundle, "--threads", "1", "--kernels", "onnxruntime")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "; bundle.json does not say how they were at the export" in result.stdout


def test_the_warning_comes_once_and_the_command_line_tells_it(
    vit_bundle: Path, tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its advice, 7-bit weights, loads without a word there."""
    eight = changed_bundle(vit_bundle, tmp_path, lambda words: as_quantized(words, bits=8))
    seven = changed_bundle(vit_bundle, tmp_path / "seven", lambda words: as_quantized(words, bits=7))
    here(LOST)
    load(seven, threads=1, kernels="onnxruntime").close()
    with pytest.warns(SaturationWarning) as caught:
        loaded = [load(eight, threads=1, kernels="onnxruntime") for _ in range(2)]
    for each in loaded:
        each.close()
    (warning,) = caught
    assert warning.filename == __file__
    monkeypatch.setattr(saturation, "_warned", set())
    told = transom("selftest", eight, "--threads", "1", "--kernels", "onnxruntime", "--json")
    assert told.exit_code == 0
    assert document(told)["integer_sums"]["here"] == "saturated"
    assert told.stderr == f"transom.runtime.saturation.SaturationWarning: {warning.message}\n"
