"""Check the sections of bundle.json on parity, quantisation and engines, as far as the runtime depends on them.

The other fields of them are for people.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from transom.runtime.graph_spec import Axis

MODES = ("static", "dynamic", "none")  # how the activations before integer weights become integers
SUMS = EXACT, SATURATED = "exact", "saturated"  # of 8-bit products, as they were added up at the export
UNQUANTIZED = ("Conv", "GRU", "LSTM", "RNN")  # all, or those convolutions that do not gain by it
WEIGHT_BITS = {"int8": (7, 8), "int4": (4,)}
LICENCE_KEYS = ("id", "name", "link", "file")
MOST_PROVENANCE = 500  # characters of a licence's text or a revision


def source_from_json(value: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """Check what is printed of the checkpoint's licence and revision: short texts without control characters."""
    licence = value.get("licence", {})
    if not isinstance(licence, dict) or not all(
        key in LICENCE_KEYS and is_shown(text) for key, text in licence.items()
    ):
        problems.append(
            f"source.licence is {repr(licence)[:60]}, expected {', '.join(LICENCE_KEYS)}: printable texts of at "
            f"most {MOST_PROVENANCE} characters"
        )
    revision = value.get("revision", "")
    if not is_shown(revision):
        problems.append(f"source.revision is {repr(revision)[:60]}, expected a text of printable characters")
    return value


def is_shown(value: Any) -> bool:
    """Return whether a value is a text that can be printed as it is."""
    return isinstance(value, str) and value.isprintable() and len(value) <= MOST_PROVENANCE


def parity_from_json(value: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """Check the fields that ``transom selftest`` compares by: scales and tolerance."""
    scales = value.get("scales", {})
    if not isinstance(scales, dict) or not all(type(scale) in (int, float) for scale in scales.values()):
        problems.append("parity.scales is no object of numbers")
    if type(value.get("tolerance")) not in (int, float):
        problems.append(f"parity.tolerance is {repr(value.get('tolerance'))[:60]}, expected a number")
    return value


def worst_error(parity: Mapping[str, Any]) -> float | None:
    """Return the largest error against PyTorch of an export's parity run; None where no such number is recorded."""
    worst = parity.get("worst")
    error = worst.get("error") if isinstance(worst, dict) else None
    return error if isinstance(error, float) and error >= 0 else None


def quantization_from_json(
    value: dict[str, Any] | None, precision: str | None, graphs: list[str], problems: list[str]
) -> dict[str, Any] | None:
    """Check how the graphs multiply, by which the runtime chooses exact sums."""
    if (value is not None) != (precision in WEIGHT_BITS):
        found = "is missing" if value is None else "is there"
        problems.append(f"quantization {found}, and precision is {repr(precision)[:60]}")
    if value is None:
        return None
    modes = value.get("activations")
    if not isinstance(modes, dict) or modes.keys() != {*graphs} or not all(mode in MODES for mode in modes.values()):
        expected = f"one of {', '.join(MODES)} for each of {', '.join(graphs)}"
        problems.append(f"quantization.activations is {repr(modes)[:60]}, expected {expected}")
    bits = value.get("weight_bits")
    possible = WEIGHT_BITS.get(precision or "", ())
    if possible and (type(bits) is not int or bits not in possible):
        expected = " or ".join(map(str, possible))
        problems.append(f"quantization.weight_bits is {repr(bits)[:60]}, expected {expected} of {precision}")
    sums = value.get("integer_sums", EXACT)
    if sums not in SUMS:
        problems.append(f"quantization.integer_sums is {repr(sums)[:60]}, expected one of {', '.join(SUMS)}")
    return value


def unquantized_operators(operators: Mapping[str, Any], quantization: Mapping[str, Any]) -> dict[str, int]:
    """Count the operators with weights that are no layers of bundle.json's ``quantization``, of its ``operators``."""
    layers = quantization.get("layers")
    listed = (
        [layer.get("operator") for layer in layers if isinstance(layer, Mapping)] if isinstance(layers, list) else []
    )
    found: dict[str, int] = {}
    for counts in operators.values():
        for name in UNQUANTIZED:
            count = counts.get(name) if isinstance(counts, Mapping) else None
            if type(count) is int and count > 0:
                found[name] = found.get(name, 0) + count
    left = {name: count - listed.count(name) for name, count in found.items()}
    return {name: count for name, count in left.items() if count > 0}


def engines_from_json(
    value: dict[str, Any], graphs: list[str], files: Collection[str], axes: Mapping[str, Axis], problems: list[str]
) -> dict[str, Any]:
    """Check which plan belongs to which graph, by target, what loads it, and the bounds that it takes."""
    for target, engine in value.items():
        plans = engine.get("plans") if isinstance(engine, dict) else None
        if (
            not isinstance(plans, dict)
            or plans.keys() != {*graphs}
            or not all(plan in files for plan in plans.values())
        ):
            expected = f"a listed file for each of {', '.join(graphs)}"
            problems.append(f"engines.{target[:60]}.plans is {repr(plans)[:60]}, expected {expected}")
            continue
        for key in ("library", "version", "sm"):
            if not isinstance(engine.get(key, "" if key == "sm" else None), str):
                problems.append(f"engines.{target[:60]}.{key} is {repr(engine.get(key))[:60]}, expected a string")
        bounds = engine.get("axes", {})
        if not isinstance(bounds, dict) or not all(within(axes.get(name), each) for name, each in bounds.items()):
            problems.append(
                f"engines.{target[:60]}.axes is {repr(bounds)[:60]}, expected min, opt and max of axes of the bundle, "
                "in this order and within the bundle's"
            )
    return value


def within(axis: Axis | None, bounds: Any) -> bool:
    """Return whether ``bounds`` are well-formed and within those of ``axis``."""
    if axis is None or not isinstance(bounds, dict) or bounds.keys() != {"min", "opt", "max"}:
        return False
    if any(type(size) is not int for size in bounds.values()):
        return False
    return bool(axis.min <= bounds["min"] <= bounds["opt"] <= bounds["max"] <= axis.max)
