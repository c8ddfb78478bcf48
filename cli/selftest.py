"""``transom selftest``: compute the golden values again, on the device, without torch."""

from __future__ import annotations

from transom.cli.options import BundlePath, Device, Json, Kernels, Threads
from transom.cli.output import comparison_cells, print_json, print_table, printable

AGREES = {
    "pytorch": "PyTorch",
    "bundle": "its build",
    "native": "the native kernels of its build",
    "simulated": "its simulated TensorRT graph",
}


def selftest(
    bundle: BundlePath,
    device: Device = "cpu",
    threads: Threads = None,
    kernels: Kernels = "auto",
    as_json: Json = False,
) -> None:
    """Check a bundle on the device where it runs, without torch.

    Runs the golden inputs and compares the outputs with those of PyTorch. Exit status 1 and the worst element where
    an output is beyond the tolerance. The column "since build" is the difference to the bundle's own outputs when it
    was built. A quantised bundle has to repeat those: bit for bit where instructions and libraries are the same, within
    0.1 elsewhere; where the native kernels run, those of theirs. On other devices it is compared with its TensorRT
    graph, simulated at the export. It is compared with PyTorch too, within twice the worst error of its export.
    """
    from transom.runtime import selftest as runtime
    from transom.runtime.golden_reference import BUNDLE, NATIVE
    from transom.runtime.manifest_graphs import SIMULATED

    report = runtime.selftest(bundle, device, threads, kernels)
    simulated = any(case.against(SIMULATED) for case in report.cases)
    if as_json:
        print_json(
            {
                "bundle": bundle,
                "device": device,
                "side": report.side,
                "tolerance": report.tolerance,
                "worst": report.worst.to_json(),
                "references": [
                    {**vars(each), "error": report.worst_against(each.side).error} for each in report.references
                ],
                "integer_sums": report.sums and vars(report.sums),
                "left_out": report.left_out,
                "cases": [
                    {
                        "name": case.name,
                        "against_pytorch": [each.to_json() for each in case.against_pytorch],
                        "against_build": [each.to_json() for each in case.against(BUNDLE)],
                        "against_native": [each.to_json() for each in case.against(NATIVE)],
                        "against_simulated": [each.to_json() for each in case.against(SIMULATED)],
                        "near_ties": case.near_ties,
                    }
                    for case in report.cases
                ],
            }
        )
        return
    native = any(case.against(NATIVE) for case in report.cases)
    others = [("since build", BUNDLE)]
    others += [("from native", NATIVE)] * native + [("from simulation", SIMULATED)] * simulated
    rows = []
    for case in report.cases:
        errors = [{each.tensor: f"{each.error:.2e}" for each in case.against(side)} for _, side in others]
        for each in sorted(case.against_pytorch, key=lambda each: each.tensor):
            rows.append([case.name, *comparison_cells(each), *(found.get(each.tensor, "–") for found in errors)])
    more = [name for name, _ in others]
    columns = ("case", "output", "error", "worst at", "here", "PyTorch", *more)
    print_table(columns, rows, right=("error", "here", "PyTorch", *more))
    for line in (line for case in report.cases for line in case.near_ties):
        print(f"a near tie: {line}")
    for line in report.left_out:
        print(printable(f"left out, {line}"))
    if report.sums is not None:
        print(printable(str(report.sums)))
    for note in report.notes:
        print(printable(f"compared {note}"))
    for reference in report.references:
        error = report.worst_against(reference.side).error
        worst = f"worst error {error:.2e} of {reference.tolerance:.3g} allowed"
        print(f"agrees with {AGREES[reference.side]}{'' if reference.tolerance else ' bit for bit'}: {worst}")
