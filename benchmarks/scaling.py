"""Measure each family's cost against sequence length or image size, FP32, in the bundle runtime on this CPU.

    python benchmarks/scaling.py --work DIR                       measure and print the tables
    python benchmarks/scaling.py --work DIR --write               ... and renew docs/performance.md and its files
    python benchmarks/scaling.py --results docs/results/FILE.json [--write]      the same from an earlier run's figures

Layers have the published models' width, but there are few of them, and the vocabulary is small: what is reported is the
time of one layer. Weights are random. Bundles are exported into DIR the first time, parity and all, which takes some
minutes; measuring takes three more. Every round times every size of every family, in an order of its own, so that
what else the machine does falls on all of them alike.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from earlier_figures import figures_with
from scaling_models import LAYERS, save_checkpoint
from scaling_plot import draw

from transom.runtime import load
from transom.runtime.backends.ort_library import onnxruntime
from transom.runtime.bench import example_feeds, sizes_of
from transom.runtime.decoder import CHUNK
from transom.runtime.host import cpu_name

if TYPE_CHECKING:
    from transom.runtime.session import LoadedBundle

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE, PICTURE = DOCS / "performance.md", DOCS / "images" / "scaling.svg"
MARKERS = "<!-- scaling: begin -->", "<!-- scaling: end -->"

TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
CACHED = (64, 128, 256, 512, 1024, 2048, 4096)
SIDES = (64, 128, 224, 384, 512)  # pixels
ROUNDS = 7
TIMED = 5  # calls of a round, after one that is not timed
FAR_ENOUGH = 0.4  # of the crossing by count must be measured before anything is fitted
SLOW_S = 0.2  # a call that takes longer needs no other before it, and one of it is enough for a round


@dataclass(frozen=True)
class Series:
    """One line of the plot: the counted cost of S tokens through ``LAYERS`` layers of width E.

    ``model`` names an entry of MODELS, ``patch`` is a patch's side in pixels where sizes are those of images.
    """

    name: str
    model: str
    width: int  # E
    kind: str  # "encoder", "prefill", "decode" or "image"
    sizes: tuple[int, ...]
    patch: int = 0

    def tokens(self, size: int) -> int:
        """Return S: the tokens of a text or of the cache, an image's patches and its class token."""
        return (size // self.patch) ** 2 + 1 if self.patch else size

    def linear(self) -> int:
        """Return multiply-adds per token and layer outside attention: 4 projections, a feed-forward of four times E."""
        return 12 * self.width**2

    def attention(self, size: int) -> int:
        """Return multiply-adds per layer of queries times keys and weights times values: 2 E per pair of tokens."""
        S = self.tokens(size)
        if self.kind == "decode":
            return 2 * self.width * S
        if self.kind == "prefill":  # a chunk sees itself and what is before it
            ends = [min(first + CHUNK, S) for first in range(0, S, CHUNK)]
            starts = [0, *ends]
            return 2 * self.width * sum((end - start) * end for start, end in zip(starts, ends, strict=False))
        return 2 * self.width * S**2

    def multiply_adds(self, size: int) -> int:
        """Return the multiply-adds of one layer."""
        return self.linear() * (1 if self.kind == "decode" else self.tokens(size)) + self.attention(size)

    def crossing(self) -> int:
        """Return the S at which attention equals the rest, by count: 6 E, and 12 E where a token sees half of them."""
        return 12 * self.width - CHUNK if self.kind == "prefill" else 6 * self.width


SERIES = (
    Series("BERT-base", "bert", 768, "encoder", TOKENS),
    Series("Transformer base, encoder", "transformer", 512, "encoder", TOKENS),
    Series("GPT-2 124M, prompt", "gpt", 768, "prefill", TOKENS),
    Series("GPT-2 124M, one token", "gpt", 768, "decode", CACHED),
    Series("ViT-B/16", "vit", 768, "image", SIDES, patch=16),
    Series("CLIP ViT-B/32, image", "clip", 768, "image", SIDES, patch=32),
)


def bundle_of(series: Series, size: int, work: Path) -> Path:
    """Return the bundle for a size, exported unless it exists; an image's size is fixed in its bundle."""
    from transom.export.pipeline import export

    name = f"{series.model}-{size}" if series.kind == "image" else series.model
    bundle = work / f"{name}-bundle"
    if not bundle.exists():
        print(f"exporting {name} ...", file=sys.stderr, flush=True)
        checkpoint = save_checkpoint(work / name, series.model, longest=max(TOKENS), side=size)
        export(str(checkpoint), bundle, max_sizes={"B": 1})
    return bundle


def call_of(series: Series, size: int, loaded: LoadedBundle) -> Callable[[], object]:
    """Return the timed call at one size; every call does the same work."""
    if series.kind == "prefill":
        prompt = np.random.default_rng(0).integers(0, 1000, size).tolist()
        return lambda: loaded.prefill([prompt])  # type: ignore[attr-defined]
    if series.kind == "decode":  # the last steps before the cache is full, so that it is as long as it says
        steps = (TIMED + 1) * ROUNDS
        prompt = np.random.default_rng(0).integers(0, 1000, size - steps).tolist()
        decoder = loaded.prefill([prompt]).decoder  # type: ignore[attr-defined]
        return lambda: decoder.decode_step(np.zeros(1, np.int64))
    inputs = {"image": "pixel_values"}.get(series.kind, "input_ids")
    graph = next(
        file.graph for file in loaded.manifest.graphs if inputs in {tensor.name for tensor in file.graph.inputs}
    )
    asked = {"B": 1} if series.kind == "image" else {"B": 1, "S": size}
    feeds = example_feeds(graph, sizes_of(graph, loaded.manifest.axes, asked))
    return lambda: loaded.run(feeds)


def seconds_of(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def one_round(call: Callable[[], object]) -> float:
    """Return the seconds of a call: the fastest of a few after a warm-up, or a slow warm-up itself."""
    first = seconds_of(call)
    return first if first > SLOW_S else min(seconds_of(call) for _ in range(TIMED))


def measure(work: Path, threads: int) -> dict[str, Any]:
    """Measure every series at every size: milliseconds of one layer, median of the rounds and quartiles."""
    paths = {bundle_of(series, size, work) for series in SERIES for size in series.sizes}
    loaded = {path: load(path, threads=threads) for path in sorted(paths)}
    calls = {
        (series.name, size): call_of(series, size, loaded[bundle_of(series, size, work)])
        for series in SERIES
        for size in series.sizes
    }
    ms = timed(calls, ROUNDS)
    for bundle in loaded.values():
        bundle.close()
    figures = {
        series.name: [
            point(
                size, series.tokens(size), [one / LAYERS for one in ms[series.name, size]], series.multiply_adds(size)
            )
            for size in series.sizes
        ]
        for series in SERIES
    }
    return {**circumstances(threads, ROUNDS), "layers": LAYERS, "ms_of_one_layer": figures}


def timed(calls: Mapping[tuple[str, int], Callable[[], object]], rounds: int) -> dict[tuple[str, int], list[float]]:
    """Time every call once a round, in an order of its own: milliseconds of each round."""
    found: dict[tuple[str, int], list[float]] = {key: [] for key in calls}
    order = random.Random(0)
    for number in range(rounds):
        print(f"round {number + 1} of {rounds} ...", file=sys.stderr, flush=True)
        for key in order.sample(sorted(calls), len(calls)):
            found[key].append(one_round(calls[key]) * 1e3)
    return found


def point(size: int, tokens: int, ms: Sequence[float], multiply_adds: int) -> dict[str, Any]:
    """Describe one size: the median of the rounds' milliseconds and their quartiles."""
    return {
        "size": size,
        "tokens": tokens,
        "ms": round(statistics.median(ms), 5),
        "quartiles_ms": [round(q, 5) for q in statistics.quantiles(ms)[::2]],
        "multiply_adds": multiply_adds,
    }


def circumstances(threads: int, rounds: int) -> dict[str, Any]:
    """Describe what the figures were measured on."""
    return {
        "cpu": cpu_name(),
        "threads": threads,
        "onnxruntime": onnxruntime().__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        "rounds": rounds,
    }


def slope(points: Sequence[dict[str, Any]]) -> float:
    """Return the slope of log(time) over log(S) by least squares."""
    return float(np.polyfit(np.log([p["tokens"] for p in points]), np.log([p["ms"] for p in points]), 1)[0])


def measured_crossing(series: Series, points: Sequence[dict[str, Any]]) -> float | None:
    """Return the S at which the quadratic part equals the rest, in a fit of time to c + a S + b S².

    Residuals count relative to the time, so that short texts count as much as long ones. For a decode step b = 0 and
    the crossing is that of a S with c. None where the sizes end long before the crossing by count, or nothing grows.
    """
    S = np.array([p["tokens"] for p in points], float)
    if S[-1] < FAR_ENOUGH * series.crossing():
        return None
    ms = np.array([p["ms"] for p in points])
    degree = 1 if series.kind == "decode" else 2
    powers = np.stack([S**power for power in range(degree + 1)], 1) / ms[:, None]
    factors = np.linalg.lstsq(powers, np.ones_like(ms), rcond=None)[0]
    slower, faster = factors[-2:]
    return float(slower / faster) if slower > 0 and faster > 0 else None


def tables(results: dict[str, Any]) -> str:
    """Return the text between the markers of docs/performance.md."""
    lines = [
        f"Milliseconds of one layer, FP32, one row, on {threads_of(results)} of an {results['cpu']}; "
        f"onnxruntime {results['onnxruntime']}, {results['date']}, medians of {results['rounds']} rounds.",
    ]
    for kind, sizes, head in (("text", TOKENS, "S, tokens"), ("image", SIDES, "side, pixels")):
        chosen = [series for series in SERIES if (series.kind == "image") == (kind == "image")]
        lines += ["", f"| {head} | " + " | ".join(str(size) for size in sizes) + " |", "|---|" + "---|" * len(sizes)]
        for series in chosen:
            ms = {point["size"]: shown(point["ms"]) for point in results["ms_of_one_layer"][series.name]}
            lines.append(f"| {series.name} | " + " | ".join(ms.get(size, "") for size in sizes) + " |")
    lines += [
        "",
        "| | slope, all S | slope, the three longest | S² overtakes: by count | measured | GFLOP/s, longest |",
        "|---|---|---|---|---|---|",
    ]
    for series in SERIES:
        points = results["ms_of_one_layer"][series.name]
        found = measured_crossing(series, points)
        rate = 2 * points[-1]["multiply_adds"] / points[-1]["ms"] / 1e6
        lines.append(
            f"| {series.name} | {slope(points):.2f} | {slope(points[-3:]):.2f} | {series.crossing()} | "
            f"{'–' if found is None else round(found)} | {rate:.0f} |"
        )
    return "\n".join(lines)


def threads_of(results: dict[str, Any]) -> str:
    return "one thread" if results["threads"] == 1 else f"{results['threads']} threads"


def shown(ms: float) -> str:
    """Return a number in three significant digits."""
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def write(results: dict[str, Any]) -> None:
    """Update the figures' file, the plot, and the page between its markers."""
    write_results(results, "scaling", PICTURE)
    draw(results, SERIES, PICTURE)
    replace_block(PAGE, MARKERS, tables(results))


def write_results(results: dict[str, Any], name: str, picture: Path) -> None:
    """Write the figures to docs/results, in a file named by the processor, and make the picture's folder."""
    processor = re.sub(r"[^a-z0-9]+", "-", results["cpu"].lower()).strip("-")
    path = DOCS / "results" / f"{name}-{processor}.json"
    for folder in (path.parent, picture.parent):
        folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def replace_block(path: Path, markers: tuple[str, str], block: str) -> None:
    """Put ``block`` between the two markers of a page; SystemExit where it lacks them."""
    begin, end = markers
    head, _, rest = path.read_text(encoding="utf-8").partition(begin)
    _, found, tail = rest.partition(end)
    if not found:
        sys.exit(f"{path} lacks the lines {begin} and {end}; put them where the tables belong.")
    path.write_text(f"{head}{begin}\n{block}\n{end}{tail}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--work", type=Path, help="a folder for checkpoints and bundles, about 2 GB")
    source.add_argument("--results", type=figures_with("ms_of_one_layer"), help="a file of figures of an earlier run")
    parser.add_argument("--threads", type=int, default=1, help="more than one wait for each other, and for the machine")
    parser.add_argument("--write", action="store_true", help="renew docs/performance.md, its picture, its figures")
    options = parser.parse_args()
    if options.results:
        results = options.results
    else:
        options.work.mkdir(parents=True, exist_ok=True)
        results = measure(options.work, options.threads)
    if options.write:
        write(results)
    print(tables(results))


if __name__ == "__main__":
    main()
