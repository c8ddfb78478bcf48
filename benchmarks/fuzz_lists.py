"""Run damaged lists of operators; anything but an error of Transom's is a finding, a process that dies above all.

    python benchmarks/fuzz_lists.py [--runs 1000000] [--seed 1] [--isa plain]

Lists that are accepted are executed on small inputs. With TRANSOM_NATIVE_LIBRARY=FILE, a build with sanitizers, reads
and writes past a buffer end the process too. Prints how many were accepted and the ten most frequent complaints.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from damaged_lists import run_damaged
from transom.runtime.errors import BackendError
from transom.runtime.native.library import library_path, open_library
from transom.runtime.native.records import ISA_NAMES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--isa", choices=ISA_NAMES, default="plain")
    given = parser.parse_args()
    try:
        library = open_library(library_path()).with_isa(ISA_NAMES.index(given.isa))
    except BackendError as error:
        print(f"no list is run: {error}", file=sys.stderr)
        return
    begun, accepted, complaints = time.monotonic(), 0, Counter[str]()
    for run in range(given.runs):
        try:
            error = run_damaged(Random(given.seed * given.runs + run), library)
        except BaseException:
            print(f"seed {given.seed * given.runs + run}", file=sys.stderr)
            raise
        accepted += error is None
        if error is not None:
            complaints[re.sub(r"'[^']*'|\d+", "...", error)[:100]] += 1
    seconds = time.monotonic() - begun
    print(f"{given.runs} lists in {seconds:.0f} s with {given.isa}: {accepted} accepted and executed")
    for complaint, count in complaints.most_common(10):
        print(f"{count:8}  {complaint}")


if __name__ == "__main__":
    main()
