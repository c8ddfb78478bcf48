"""``transom selftest``: the golden values again, on the device, without torch."""

from __future__ import annotations

from transom.cli.options import BundlePath, Device, Json, Threads
from transom.cli.show import comparison_cells, print_json, print_table, printable


def selftest(bundle: BundlePath, device: Device = "cpu", threads: Threads = None, as_json: Json = False) -> None:
    """Check a bundle where it runs, without torch.

    Do the golden inputs still give what PyTorch gave? Exit status 1 and the worst element where an
    output is beyond the tolerance that the bundle records. The column "since build" is the difference to
    what the bundle itself gave when it was built. Of a quantised bundle it is that column which is judged:
    its distance from PyTorch was judged by the accuracy gate.
    """
    from transom.runtime import selftest as runtime

    report = runtime.selftest(bundle, device, threads)
    if as_json:
        print_json(
            {
                "bundle": bundle,
                "device": device,
                "side": report.side,
                "tolerance": report.tolerance,
                "worst": report.worst.to_json(),
                "integer_sums": report.sums and vars(report.sums),
                "left_out": report.left_out,
                "cases": [
                    {
                        "name": case.name,
                        "against_pytorch": [each.to_json() for each in case.against_pytorch],
                        "against_build": [each.to_json() for each in case.against_build],
                        "near_ties": case.near_ties,
                    }
                    for case in report.cases
                ],
            }
        )
        return
    rows = []
    for case in report.cases:
        since_build = {each.tensor: f"{each.error:.2e}" for each in case.against_build}
        for each in sorted(case.against_pytorch, key=lambda each: each.tensor):
            rows.append([case.name, *comparison_cells(each), since_build.get(each.tensor, "–")])
    columns = ("case", "output", "error", "worst at", "here", "PyTorch", "since build")
    print_table(columns, rows, right=("error", "here", "PyTorch", "since build"))
    for line in (line for case in report.cases for line in case.near_ties):
        print(f"a near tie: {line}")
    for line in report.left_out:
        print(printable(f"left out, {line}"))
    if report.sums is not None:
        print(printable(str(report.sums)))
    told = f"worst error {report.worst.error:.2e} of {report.tolerance:g} allowed"
    if report.side == runtime.PYTORCH:
        print(f"agrees with PyTorch: {told}")
    else:
        from_pytorch = report.worst_against(runtime.PYTORCH).error
        print(f"agrees with its build: {told}; {from_pytorch:.2e} from PyTorch, which its accuracy gate judged")
