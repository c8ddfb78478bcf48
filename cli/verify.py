"""``transom verify``: compare a bundle with the PyTorch definition it was exported from."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer

from transom.cli.describe import near_ties
from transom.cli.extras import export_extra
from transom.cli.failures import FAILED
from transom.cli.options import BundlePath, CalibratedOn, Device, Json, Source, Threads
from transom.cli.output import comparison_cells, print_json, print_table, printable, say
from transom.cli.progress import progress
from transom.runtime.format import sizes_text

if TYPE_CHECKING:
    from transom.export.parity.results import CaseResult
    from transom.runtime.compare import Comparison


def verify(
    bundle: BundlePath,
    source: Source = None,
    calibration_data: CalibratedOn = None,
    accuracy: Annotated[
        bool,
        typer.Option(help="Measure the accuracy of a quantised bundle; needs its calibration data."),
    ] = True,
    device: Device = "cpu",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Compare a bundle with PyTorch again.

    Compares every output over a grid of shapes, on real inputs. A decoder reads prompts, then chunks and single
    tokens; the table has the worst of the single ones. Needs torch and the checkpoint; on a device without them use
    `transom selftest`. Exit status 1 and the worst element where an output is beyond the tolerance of the bundle's
    precision; that of a quantised bundle is twice the worst error of its export. The variant for other devices is
    compared too, with their arithmetic simulated. A quantised bundle passes its accuracy gate again: exit status 1 too
    where its calibration data is missing, unless --no-accuracy is given.
    """
    with progress(quiet=as_json) as report, redirect_stdout(sys.stderr), export_extra():
        from transom.export import verification
        from transom.runtime.host import processor

        verified = verification.verify(
            bundle,
            source=source,
            calibration_data=calibration_data or (),
            accuracy=accuracy,
            device=device,
            threads=threads,
            progress=report,
        )
    cases = verified.cases
    missing = accuracy and verified.accuracy == verification.NOT_CHECKED
    ties = [asdict(tie) for tie in verified.near_ties]
    if as_json:
        print_json(
            {
                "bundle": bundle,
                "cases": [
                    {
                        "shape": case.shape,
                        "emulated": case.emulated,
                        "native": case.native,
                        "comparisons": [each.to_json() for each in case.comparisons],
                    }
                    for case in cases
                ],
                "greedy_near_ties": ties,
                "gate": verified.gate and verified.gate.to_json(),
                "accuracy": verified.accuracy,
            }
        )
        raise typer.Exit(FAILED * missing)
    rows = [[shape, *comparison_cells(each)] for shape, found in shown(cases) for each in found]
    print_table(("shape", "output", "error", "worst at", "bundle", "PyTorch"), rows, ("error", "bundle", "PyTorch"))
    worst = max((each for case in cases for each in case.comparisons), key=lambda each: each.error)
    for line in near_ties({"greedy_near_ties": ties}):
        print(line)
    if verified.gate is not None:
        print(printable(f"accuracy gate holds: {verified.gate.summary()}; on {processor()}"))
    if verified.accuracy != verification.NOT_CHECKED:
        print(f"agrees with PyTorch; the worst element: {worst}")
        return
    print(f"every output is within its tolerance of PyTorch's; the worst element: {worst}")
    say(
        "accuracy not checked: give --calibration-data what the bundle was calibrated on"
        + (", or --no-accuracy to leave it out" if missing else "")
    )
    raise typer.Exit(FAILED * missing)


def shown(cases: Sequence[CaseResult]) -> Iterator[tuple[str, Sequence[Comparison]]]:
    """Yield the name of each case and its comparisons; single tokens are one line, of the worst of them.

    The shape of a decoder's case is rows, tokens of the prompt, the number of a chunk and its tokens. Chunk 0 is the
    prompt itself, so that steps of two prompts never meet. What fused operators computed, and what is rounded as a
    GPU would round it, comes last.
    """

    def side(case: CaseResult) -> tuple[bool, bool]:
        return case.emulated, case.native

    def kind(case: CaseResult) -> tuple[tuple[bool, bool], bool]:
        return side(case), case.shape.get("chunk", 0) > 0 and case.shape["tokens"] == 1

    for ((emulated, native), single), group in groupby(sorted(cases, key=side), key=kind):
        found = list(group)
        rounded = " rounded" if emulated else " fused" if native else ""
        if not single or len(found) == 1:
            yield from ((f"{sizes_text(case.shape)}{rounded}", case.comparisons) for case in found)
            continue
        worst = max(found, key=lambda case: case.worst.error)
        rows, prompt = worst.shape["B"], worst.shape["prompt"]
        steps = f"chunk={found[0].shape['chunk']}..{found[-1].shape['chunk']}"
        yield f"B={rows},prompt={prompt},{steps},tokens=1{rounded}", worst.comparisons
