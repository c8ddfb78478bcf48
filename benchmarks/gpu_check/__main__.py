"""Check the attention kernel on this machine's GPU: parity with float64, and speed beside PyTorch's backends.

    PYTHONPATH=benchmarks python -m gpu_check --out docs/results        (make gpu-check)

Needs torch with CUDA, numpy, cuda-bindings and the pack of `make gpu-check-build`, which has the wheel and the PTX; no
Triton, no installation. After --minutes no case is begun; the next run continues. Exit status 0: all that ran is right;
1: our kernel is wrong, or refused, in a case; 2: the check cannot run here. --dry-run needs no GPU, but Triton: the
same kernels in its interpreter, tiny shapes, parity alone.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_check.pack import CheckError, Pack, read_pack, unpack_wheel

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "docs" / "results"
PACK = REPOSITORY / "build" / "gpu-check"
DRY_RESULTS = REPOSITORY / "build" / "gpu-check-dry-run"
NEEDED = {"torch": (2, 5), "numpy": (1, 26), "cuda-bindings": (12, 8)}
DRY_NEEDED = {"torch": (2, 5), "numpy": (1, 26), "triton": (3, 7)}
DRY = "--dry-run"


def main(arguments: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    options = parse(arguments)
    try:
        pack = read_pack(options.pack)
        require(DRY_NEEDED if options.dry_run else NEEDED)
        with tempfile.TemporaryDirectory(prefix="transom-gpu-check-") as site:
            unpack_wheel(pack, Path(site), REPOSITORY)
            if options.dry_run:
                os.environ["TRITON_INTERPRET"] = "1"  # before transom or Triton is imported: both look there then
            use_wheel(Path(site))
            os.environ["TRANSOM_KERNELS"] = str(pack.kernels)
            return run(options, pack, began)
    except CheckError as error:
        print(f"nothing was checked: {error}", file=sys.stderr)
        return 2


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for gpu-check-<GPU>.json and .md; docs/results")
    parser.add_argument("--pack", type=Path, default=PACK, help="folder of `make gpu-check-build`; build/gpu-check")
    parser.add_argument("--minutes", type=float, default=7.5, help="after which no further case is begun")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help='of a name, as "step" or "fp16 head 64"')
    parser.add_argument("--fresh", action="store_true", help="run again what an earlier run has")
    parser.add_argument(DRY, action="store_true", help="without a GPU: Triton's interpreter, tiny shapes, parity alone")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes is {options.minutes}; expected a number above 0")
    options.out = options.out or (DRY_RESULTS if options.dry_run else RESULTS)
    if options.dry_run and options.out.resolve().is_relative_to(RESULTS):
        parser.error(f"--out is {options.out}; expected another folder: a dry run is no result")
    return options


def require(needed: dict[str, tuple[int, int]]) -> None:
    """Raise CheckError for packages that are absent or too old, all of them at once."""
    wrong = [] if sys.version_info >= (3, 11) else [f"Python {sys.version.split()[0]}, not 3.11 or newer"]
    for name, least in needed.items():
        expected = f"{name} {least[0]}.{least[1]} or newer"
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"no {expected}")
            continue
        numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:2] if part.isdigit())
        if numbers < least:
            wrong.append(f"{name} {found}, not {expected}")
    if wrong:
        raise CheckError(f"{sys.executable} has {'; '.join(wrong)}. Install these there, or name another: PYTHON=...")


def use_wheel(site: Path) -> None:
    """Import transom from the unpacked wheel, whatever else is installed. Raises CheckError where it is not."""
    sys.path.insert(0, str(site))
    import transom.export.plugins.compiled as compiled

    if not Path(str(compiled.__file__)).resolve().is_relative_to(site.resolve()):
        raise CheckError(
            f"transom comes from {compiled.__file__}; expected the pack's wheel. Run it by itself: `make gpu-check`."
        )


def run(options: argparse.Namespace, pack: Pack, began: float) -> int:
    """Run the check with the wheel's transom; return the exit status."""
    from gpu_check.cases import cases
    from gpu_check.check import Budget, check, failed
    from gpu_check.sides import Sides

    measured = cases(options.only)
    if not measured:
        raise CheckError(f'no case\'s name has {options.only}; expected parts as "step" or "fp16 head 64".')
    machine, sm, about = dry_machine(pack) if options.dry_run else gpu_machine(pack)
    if options.dry_run:
        tiny = {case.variant: case.tiny() for case in reversed(measured)}  # one case of each kernel
        measured = [tiny[variant] for variant in dict.fromkeys(case.variant for case in measured)]
    name = "-".join(str(about["machine"]).lower().replace("(", "").replace(")", "").split())
    path = options.out / ("gpu-check-dry-run" if options.dry_run else f"gpu-check-{name}")
    about = {**about, "sm": sm, "pack": pack.key}
    budget = Budget(began + 60 * options.minutes)
    report = check(Sides(machine, sm), measured, path, about, budget, fresh=options.fresh or options.dry_run)
    wrong = [each["name"] for each in report["cases"] if failed(each)]
    ran = len(report["cases"])
    print(f"{ran - len(wrong)} of {ran} cases right, {len(report['left'])} left; {path.with_suffix('.md')}")
    if report["left"]:
        print("the time was up: run it again, and it continues with the cases that are left")
    for each in wrong:
        print(f"  not right: {each}")
    return 1 if wrong or not ran else 0


def gpu_machine(pack: Pack) -> tuple[Any, int, dict[str, Any]]:
    """Return this process's GPU, the compute capability of its PTX, and what describes them. Raises CheckError."""
    from transom.runtime.backends.cuda import find_gpu
    from transom.runtime.errors import TransomError

    advice = f"Run it on a machine with a GPU; without one, `make gpu-check GPU_CHECK_ARGS={DRY}`."
    try:
        gpu = find_gpu()
    except TransomError as error:
        raise CheckError(f"{error} {advice}") from None
    sm = pack.sm_for(10 * gpu.capability[0] + gpu.capability[1], str(gpu))
    import torch

    from gpu_check.machines import CudaMachine

    if not torch.cuda.is_available():
        raise CheckError(
            f"torch {torch.__version__} sees no GPU, and CUDA's driver sees {gpu}; expected torch with CUDA."
        )
    versions = {"torch": str(torch.__version__), "driver for CUDA": f"{gpu.driver // 1000}.{gpu.driver % 1000 // 10}"}
    versions |= {name: importlib.metadata.version(name) for name in ("cuda-bindings", "numpy")}
    return CudaMachine(), sm, {"machine": gpu.name, "versions": versions | {"PTX of triton": pack.versions["triton"]}}


def dry_machine(pack: Pack) -> tuple[Any, int, dict[str, Any]]:
    """Return Triton's interpreter in place of a GPU with the pack's last compute capability."""
    from gpu_check.machines import InterpretedMachine

    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton", "numpy")}
    about = {"machine": f"Triton's interpreter, for SM{max(pack.sms)}", "versions": versions}
    return InterpretedMachine(), max(pack.sms), about


if __name__ == "__main__":
    sys.exit(main())
