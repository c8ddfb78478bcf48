"""Measure the time of exact sums of 8-bit products, and the accuracy lost to saturation and 7-bit weights.

    python benchmarks/exact_sums.py --work DIR [NAME ...] [--json FILE]

Each reference model is exported in INT8 with 8-bit weights and, by the same ranges, with 7-bit weights, both without a
gate. On held-out inputs the relative error to FP32 is taken, and in one process the time of a run at B = 1 (a
generation, where the model generates) in alternating blocks. Where U8 x S8 saturates, the 8-bit bundle runs a second
time without the option that makes sums exact: wrong sums, for comparison alone. Trained weights are needed: random ones
hide what saturation and a lost bit cost.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

from int8_cases import CASES, THREADS, Case, HeldOut, bundle_of, open_side
from int8_measures import alternating, machine, relative_error, timed_call

from transom.calib.table import RANGES
from transom.export.reference_models import REFERENCE_MODELS
from transom.runtime.backends import open_backend
from transom.runtime.backends.base import Backend, Read
from transom.runtime.backends.integer_sums import integer_sums
from transom.runtime.manifest_graphs import GraphFile

EXACT, SATURATING, SEVEN = "8 bits, exact", "8 bits, saturating", "7 bits"


@dataclass(frozen=True)
class Figures:
    """One variant of one model; ``time`` is a multiple of the exact variant's."""

    model: str
    way: str
    score: float
    relative_error: float
    time: float
    milliseconds: float


def exported(case: Case, work: Path) -> dict[str, Path]:
    """Return bundles with 8-bit and 7-bit weights, exported unless they exist."""
    from transom.export.pipeline import export  # brings torch
    from transom.export.quantization.options import QuantizeOptions

    eight, seven = work / f"{case.name}-8-bits", work / f"{case.name}-7-bits"
    data = (case.data,)
    if not eight.exists():
        options = QuantizeOptions(data, gate=False)
        export(case.name, eight, precision="int8", max_sizes=case.max_sizes, quantize=options)
    if not seven.exists():
        options = QuantizeOptions(data, weight_bits=7, ranges=eight / RANGES, gate=False)
        export(case.name, seven, precision="int8", max_sizes=case.max_sizes, quantize=options)
    return {EXACT: eight, SEVEN: seven}


def as_by_default(graph: GraphFile, read: Read, device: str, threads: int | None) -> Backend:
    """Open a graph with ONNX Runtime's default, which does not ask for exact sums."""
    return open_backend(replace(graph, integers=None), read, device, threads)


def figures_of(case: Case, work: Path) -> Iterator[Figures]:
    """Return every variant of one model, the exact one first."""
    bundles = exported(case, work)
    with ExitStack() as stack:
        fp32 = stack.enter_context(open_side(case, bundle_of(case, work)))
        held_out = HeldOut(fp32)
        sides = {way: stack.enter_context(open_side(case, bundle)) for way, bundle in bundles.items()}
        if integer_sums().saturates_alone:
            sides[SATURATING] = stack.enter_context(open_side(case, bundles[EXACT], as_by_default))
        seconds: Mapping[str, float] = alternating({way: timed_call(side) for way, side in sides.items()})
        for way, side in sides.items():
            yield Figures(
                case.name,
                way,
                REFERENCE_MODELS[case.name].score(side.loaded).value,
                relative_error(held_out.answers(side), held_out.reference),
                seconds[way] / seconds[EXACT],
                1e3 * seconds[way],
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(CASES), metavar="NAME", help=f"of {', '.join(CASES)}")
    parser.add_argument("--work", type=Path, required=True, help="where bundles go")
    parser.add_argument("--json", type=Path, help="the figures as JSON as well")
    options = parser.parse_args()
    about = {**machine(), "threads": THREADS, "onnxruntime": version("onnxruntime")}
    print(
        json.dumps(about), "\n\n| model | way | score | relative error | ms | time |\n|---|---|---|---|---|---|", sep=""
    )
    rows = []
    for name in options.names:
        for row in figures_of(CASES[name], options.work):
            rows.append(asdict(row))
            figures = f"{row.score:.4f} | {row.relative_error:.4f} | {row.milliseconds:.2f} | {row.time:.2f}"
            print(f"| {row.model} | {row.way} | {figures} |", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps({**about, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
