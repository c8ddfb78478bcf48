"""Build the pack of the GPU check, without a GPU: ``python -m gpu_check.build --wheel FILE --out build/gpu-check``.

Compiled is every kernel of every case; a kernel that the pack has is kept.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gpu_check.cases import Case, cases, kernels_of
from gpu_check.pack import KERNELS, MANIFEST, write_manifest
from transom.export.plugins.aot import attention_ptx, combine_ptx
from transom.export.plugins.compiled import ATTENTION, COMBINE, KERNELS_DIR, kernel_file
from transom.export.plugins.kernel_spec import COMBINE_TILES


def build(wheel: Path, out: Path, sms: Sequence[int], measured: Sequence[Case]) -> int:
    """Write the pack into ``out``, which keeps the kernels that it has, and nothing else; return how many there are."""
    out.mkdir(parents=True, exist_ok=True)
    (out / MANIFEST).unlink(missing_ok=True)  # until all is there, there is no pack
    for path in out.iterdir():
        if path.name != KERNELS:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copy(wheel, out / wheel.name)
    os.environ[KERNELS_DIR] = str(out / KERNELS)
    wanted = [(sm, *kernel) for sm in sms for kernel in kernels_of(measured, sm)]
    names, began = set(), time.monotonic()
    for index, (sm, variant, layout, tiles) in enumerate(wanted, 1):
        if tiles is None:
            combine_ptx(sm, variant, layout)
            path = kernel_file(COMBINE, sm, variant, layout, COMBINE_TILES)
        else:
            attention_ptx(sm, variant, layout, tiles)
            path = kernel_file(ATTENTION, sm, variant, layout, tiles)
        names.add(path.name if path else "")
        if index % 20 == 0 or index == len(wanted):
            print(f"{index} of {len(wanted)} kernels, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    for path in (out / KERNELS).iterdir():
        if path.name not in names:
            path.unlink()  # of sources that are no more
    versions = {name: importlib.metadata.version(name) for name in ("triton", "transom")}
    write_manifest(out, tuple(sms), versions)
    return len(names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sms", type=int, nargs="+", default=[80, 90], help="compute capabilities, such as 90")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="of a case's name")
    options = parser.parse_args()
    count = build(options.wheel, options.out, sorted(set(options.sms)), cases(options.only))
    size = sum(path.stat().st_size for path in options.out.rglob("*") if path.is_file())
    print(f"{options.out}: {count} kernels, {size / 2**20:.1f} MiB; carry it, with this repository, to the GPU.")


if __name__ == "__main__":
    main()
