"""Run 32 threads with 1,000 requests each on one loaded bundle: are answers bit-equal to those of one thread?

    python benchmarks/threads.py BUNDLE... [--threads 32] [--requests 1000] [--distinct 200] [--seed 0]

Every bundle's family is asked for what it does (``mixed_requests.py`` in tests/support), in batches of mixed
sizes and lengths,
and generators greedily, by sampling with a seed, and with beams. ``--distinct`` requests are answered one after another
first; then every thread sends some of them in an order of its own. Sessions have one thread each: it is callers that
compete here. Ends with status 1 if an answer differs.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from mixed_requests import different_answers, requests
from transom.runtime import load
from transom.runtime.host import processor


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--threads", type=int, default=32)
    parser.add_argument("--requests", type=int, default=1000, help="of each thread")
    parser.add_argument("--distinct", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(f"on {processor()}", flush=True)
    wrong = 0
    for bundle in options.bundles:
        with load(bundle, threads=1) as model:
            asked = requests(model, options.distinct, options.seed)
            begun = time.monotonic()
            different = different_answers(model, asked, threads=options.threads, each=options.requests)
            took = time.monotonic() - begun
        wrong += different
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"{bundle.name:12s} {options.threads} threads x {options.requests} requests, {options.distinct} distinct: "
            f"{different} unlike the serial answers, {took:.0f} s, memory peak so far {peak:.0f} MiB",
            flush=True,
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
