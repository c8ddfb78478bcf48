"""The top of the page: what this is, whether it is right, how good, how large and how fast."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transom.export.families.base import export_family
from transom.export.report.drawing.markup import words
from transom.export.report.drawing.numbers import (
    at,
    bytes_text,
    count_text,
    error_text,
    milliseconds,
    number,
    short,
    sizes_text,
)
from transom.export.report.latency import one, usual
from transom.export.report.parity import tolerance_of
from transom.export.report.quantization import verdicts_of
from transom.export.report.score import interval, score_text, score_value
from transom.export.report.sizes import running_bytes
from transom.runtime.bench import BenchReport
from transom.runtime.bundle import Bundle
from transom.runtime.families import FAMILIES
from transom.runtime.manifest import Manifest


def headline(bundle: Bundle, parameters: int, timed: BenchReport) -> str:
    """Name, verdict and four figures."""
    manifest = bundle.manifest
    known = manifest.family in FAMILIES
    family = export_family(manifest.family).title if known else words(manifest.family, 60)
    source = words(manifest.source.get("checkpoint"), 120)
    return (
        f'<header><h1>{words(manifest.name, 120)}</h1><p class="soft">{family} for {words(manifest.task, 60)} in '
        f"{manifest.precision.upper()}, exported from {source}</p>"
        f'<p class="verdict">{verdict(manifest)}</p>'
        f'<dl class="tiles">{"".join(tiles(bundle, parameters, timed))}</dl></header>'
    )


def verdict(manifest: Manifest) -> str:
    """Parity in one line; of a quantised bundle its accuracy gate."""
    if manifest.quantization is not None:
        return gate_verdict(manifest.quantization)
    error, tolerance = number(at(manifest.parity, "worst", "error")), tolerance_of(manifest)
    if error is None or tolerance is None:
        return '<b class="limit">Not held against PyTorch:</b> no error was recorded.'
    worst, allowed = (f'<span class="nb">{text}</span>' for text in (error_text(error), short(tolerance)))
    said = f"worst error {worst}; {allowed} is allowed"
    if error > tolerance:
        return f'<b class="limit">Differs from PyTorch:</b> {said}.'
    told = tolerance * 1e-9 <= error <= tolerance / 2  # further off than that nobody wants to know
    room = f", {short(math.floor(tolerance / error))} times as much" if told else ""
    return f"<b>Agrees with PyTorch:</b> {said}{room}."


def gate_verdict(quantization: Mapping[str, Any]) -> str:
    """The gate in one line: of the variant that fails it, else of the CPU's."""
    verdicts = sorted(verdicts_of(quantization), key=lambda verdict: verdict.holds)
    if not verdicts:
        return '<b class="limit">Not held against FP32:</b> no accuracy gate was recorded.'
    told = verdicts[0]
    found, allowed = (f'<span class="nb">{short(each)}</span>' for each in (told.found, told.allowed))
    said = f"{found} of {allowed} allowed, judged by {told.measure}, n = {told.n} ({told.variant})."
    if not told.holds:
        return f'<b class="limit">Less accurate than allowed:</b> {said}'
    return f"<b>As accurate as its gate asks:</b> {said}"


def tiles(bundle: Bundle, parameters: int, timed: BenchReport) -> list[str]:
    """Four figures, each with its name above and what it means below."""
    manifest = bundle.manifest
    worst = at(manifest.parity, "worst")
    timing = usual(timed)
    found = [
        tile(
            "worst error",
            error_text(at(worst, "error")),
            f"{words(at(worst, 'tensor'), 40)} at {sizes_text(at(worst, 'sizes'))}",
        )
    ]
    score = manifest.score
    value = score_value(score, "bundle")
    if value is not None:
        within = interval(score, "bundle")
        ends = f"95 % {score_text(within[0])} to {score_text(within[1])}, " if within else ""
        found.append(
            tile(
                words(at(score, "name"), 60),
                score_text(value),
                f"{ends}n = {count_text(at(score, 'n'))}; PyTorch {score_text(score_value(score, 'pytorch'))}",
            )
        )
    found.append(tile("size", bytes_text(running_bytes(bundle)), f"to run it; {parameters:,} weights"))
    sizes = sizes_text(timing.sizes)
    return [
        *found,
        tile(
            "latency",
            milliseconds(timing.p50_ms),
            f"{one(timing)} at {sizes}, median here",
        ),
    ]


def tile(name: str, figure: str, note: str) -> str:
    return f'<div><dt>{name}</dt><dd class="big">{figure}</dd><dd class="small">{note}</dd></div>'
