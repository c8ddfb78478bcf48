"""Read millions of damaged bundle.json files; anything but a BundleError is a finding.

    python benchmarks/fuzz_manifests.py BUNDLE... [--runs 1000000] [--seed 1] [--no-coverage]

The bundles' own manifests are the seeds; cases of the parity run are cut short, so that damage hits what is read. Nine
of ten damaged ones get their ``manifest_sha256`` made right again, so that what stands behind the hash is reached: a
bundle is then loaded as ``transom.runtime.load`` does, by the class of its family, with files and graphs that need no
disk. Guided by coverage with atheris (``pip install atheris``) where it is there, blindly where it is not.

Prints how many manifests were tried and accepted, the distinct complaints, the slowest and the peak of memory.
Ends with status 1 at any other exception, and at a manifest that takes longer than --most-seconds.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random
from types import ModuleType

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from diskless_bundles import load_manifest, slim
from json_mutations import mutated
from transom.runtime.host import processor


class Reader:
    """The fuzzed reader and its figures."""

    def __init__(self, runs: int, most_seconds: float) -> None:
        self.runs, self.most_seconds = runs, most_seconds
        self.done, self.accepted, self.slowest, self.begun = 0, Counter[str](), 0.0, time.monotonic()
        self.complaints = Counter[str]()
        self.start_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def __call__(self, data: bytes) -> None:
        begun = time.perf_counter()
        try:
            self.accepted[load_manifest(data).manifest.family] += 1
        except self.expected as error:
            if "\n" in str(error):
                raise AssertionError(f"more than one line: {error}") from error
            self.complaints[shape(str(error))] += 1
        took = time.perf_counter() - begun
        self.slowest = max(self.slowest, took)
        if took > self.most_seconds:
            raise AssertionError(f"a manifest of {len(data)} bytes took {took:.1f} s")
        self.done += 1
        if self.done % 100_000 == 0 or self.done == self.runs:
            self.report()

    def import_runtime(self) -> None:
        """Import the reader, separately, so that atheris can instrument it."""
        import transom.runtime.tasks.bert
        import transom.runtime.tasks.clip
        import transom.runtime.tasks.gpt
        import transom.runtime.tasks.transformer
        import transom.runtime.tasks.vit  # noqa: F401
        from transom.runtime.errors import BundleError

        self.expected = BundleError

    def report(self) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        accepted = ", ".join(f"{family} {count}" for family, count in sorted(self.accepted.items()))
        print(
            f"{self.done} manifests in {time.monotonic() - self.begun:.0f} s: {sum(self.accepted.values())} accepted "
            f"({accepted}), {len(self.complaints)} distinct complaints, slowest {self.slowest * 1e3:.1f} ms, memory "
            f"peak {peak / 1024:.0f} MiB ({(peak - self.start_kib) / 1024:+.0f})",
            flush=True,
        )
        if self.done == self.runs:
            for complaint, count in self.complaints.most_common(12):
                print(f"{count:9d}  {complaint}")
            sys.stdout.flush()


def shape(message: str) -> str:
    """Return a message without the details that differ between manifests; of several, the first."""
    message = message.partition("; ")[0]
    message = re.sub(r"'[^']*'|\"[^\"]*\"|\[.*\]|\{.*\}|[-+.\d]+(e[-+]?\d+)?", "_", message)
    return re.sub(r"\b(axes|files)\.\S+?\.?(like|min|opt|max|size|sha256)?\b( is| has)", r"\1.*.\2\3", message)[:90]


class Mutator:
    """Damage a manifest; one that is no longer JSON is replaced by a seed."""

    def __init__(self, seeds: list[bytes], atheris: ModuleType | None) -> None:
        self.values = [json.loads(seed) for seed in seeds]
        self.atheris = atheris

    def __call__(self, data: bytes, max_size: int, seed: int) -> bytes:
        from transom.runtime.manifest import manifest_sha256

        rng = Random(seed)
        if self.atheris is not None and rng.random() < 0.02:  # bytes instead of structure
            return bytes(self.atheris.Mutate(data, max_size))
        try:
            value = json.loads(data)
        except ValueError:
            value = None
        if not isinstance(value, dict) or rng.random() < 0.2:  # damage upon damage hides what is behind the first
            value = rng.choice(self.values)
        value = mutated(value, rng, self.values)
        if isinstance(value, dict) and rng.random() < 0.9:
            value |= {"format": "transom-bundle", "format_version": 1}
            value["manifest_sha256"] = manifest_sha256(value)
        made = json.dumps(value).encode()
        return made if len(made) <= max_size else json.dumps(rng.choice(self.values)).encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--most-seconds", type=float, default=2.0)
    parser.add_argument("--no-coverage", action="store_true", help="blindly, though atheris may be there")
    options = parser.parse_args()
    print(f"on {processor()}", flush=True)
    reader = Reader(options.runs, options.most_seconds)
    atheris = None
    if not options.no_coverage:
        try:
            import atheris
        except ImportError:
            print("atheris is not there (pip install atheris): going on without coverage", flush=True)
    if atheris is None:
        reader.import_runtime()
    else:
        with atheris.instrument_imports(include=["transom.runtime"]):
            reader.import_runtime()
    from transom.runtime.manifest import manifest_sha256

    seeds = [json.dumps(slim(json.loads((bundle / "bundle.json").read_text()))).encode() for bundle in options.bundles]
    for seed in seeds:
        value = json.loads(seed)
        value["manifest_sha256"] = manifest_sha256(value)
        load_manifest(json.dumps(value).encode())  # a seed that is refused would lead nowhere
    mutator = Mutator(seeds, atheris)
    most = max(map(len, seeds)) * 4
    if atheris is None:
        rng, recent = Random(options.seed), list(seeds)
        while reader.done < options.runs:
            made = mutator(rng.choice(recent), most, rng.getrandbits(32))
            reader(made)
            if rng.random() < 0.1:  # damage upon damage, for a while
                recent = [*seeds, *recent[len(seeds) :][-20:], made]
        return
    with tempfile.TemporaryDirectory() as corpus:
        for index, seed in enumerate(seeds):
            (Path(corpus) / str(index)).write_bytes(seed)
        arguments = [
            f"-runs={options.runs}",
            f"-seed={options.seed}",
            f"-max_len={most}",
            "-rss_limit_mb=2048",
            "-mutate_depth=1",
        ]
        atheris.Setup([sys.argv[0], *arguments, "-verbosity=0", corpus], reader, custom_mutator=mutator)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
