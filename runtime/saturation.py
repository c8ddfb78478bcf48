"""Compare how 8-bit products are added up here with how they were at a bundle's export.

Exact sums are the same on every processor. Earlier versions exported on x86 without VNNI with sums that saturate: gate,
high-precision layers and golden values of such a bundle are those of another arithmetic than the one it runs in now.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transom.runtime.backends.integer_sums import integer_sums
from transom.runtime.host import instruction_set
from transom.runtime.manifest_graphs import TENSORRT_ALONE
from transom.runtime.manifest_sections import EXACT, SATURATED

if TYPE_CHECKING:
    from transom.runtime.manifest import Manifest

# What the instruction set says of bundles that do not record their sums themselves: those of version 0.1.0.
SATURATED_ON = ("avx2", "avx512")
EXACT_ON = ("amx_int8", "avx512_vnni", "avx_vnni", "sse", "neon_i8mm", "neon_dotprod", "neon")


class SaturationWarning(UserWarning):
    """A bundle's 8-bit products add up otherwise here than they did at its export."""


def multiplies_integers(manifest: Manifest) -> bool:
    """Return whether a CPU multiplies 8-bit activations and weights in any graph of the bundle."""
    made = manifest.quantization
    multiplied = made is not None and bool({*made["activations"].values()} - {"none"})
    return multiplied and manifest.made_for != TENSORRT_ALONE  # whose graphs a CPU computes in float32


def may_saturate(manifest: Manifest) -> bool:
    """Return whether pairs of the bundle's products may pass 16 bits: 2 x 255 x 63 of 7-bit weights does not."""
    return multiplies_integers(manifest) and (manifest.quantization or {})["weight_bits"] == 8


def recorded_sums(manifest: Manifest) -> str | None:
    """Return how 8-bit products were added up at the export, EXACT or SATURATED; None where it is not recorded."""
    made: Mapping[str, Any] = manifest.quantization or {}
    if not may_saturate(manifest):
        return EXACT
    if made.get("integer_sums") in (EXACT, SATURATED):
        return str(made["integer_sums"])
    known = made.get("instruction_set")
    if not isinstance(known, str):
        return None
    return SATURATED if known in SATURATED_ON else EXACT if known in EXACT_ON else None


def sums_here(manifest: Manifest) -> str:
    """Return how the bundle's 8-bit products are added up on this processor, EXACT or SATURATED."""
    return integer_sums().kind if may_saturate(manifest) else EXACT


def saturated_export(manifest: Manifest) -> str | None:
    """Return what is wrong with results of saturated sums, where sums are exact here; None where nothing is."""
    if recorded_sums(manifest) != SATURATED or sums_here(manifest) == SATURATED:
        return None
    built = (manifest.quantization or {}).get("instruction_set")
    return (
        f"{manifest.name} was exported where 8-bit products saturate (instruction set {built!s:.40}): its accuracy "
        "gate, the layers it keeps and its golden values are of saturated sums, and here sums are exact. Export it "
        "again; on this version every processor gives exact sums."
    )


_warned: set[str] = set()  # one warning per cause and process: bundles are loaded by the dozen


def warn_of_saturation(manifest: Manifest, device: str) -> None:
    """Warn once (SaturationWarning) where outputs on ``device`` differ from those that the export measured."""
    if device != "cpu" or not multiplies_integers(manifest):
        return
    problem = saturated_export(manifest)
    if problem is None and sums_here(manifest) == SATURATED and recorded_sums(manifest) != SATURATED:
        problem = (
            f"8-bit products saturate on this processor ({instruction_set()}): {integer_sums().means}. Answers of "
            "bundles with 8-bit weights are worse than their export measured. Install another onnxruntime, or export "
            "again with --weight-bits 7, whose products always fit."
        )
    if problem is not None and problem not in _warned:
        _warned.add(problem)
        warnings.warn(problem, SaturationWarning, stacklevel=4)  # at the call of ``load``
