"""Measure a Perceiver's cost against the length of its input beside a ViT's, FP32, in the bundle runtime on this CPU.

    python benchmarks/perceiver_scaling.py --work DIR                     measure and print the table
    python benchmarks/perceiver_scaling.py --work DIR --write             ... and renew docs/
    python benchmarks/perceiver_scaling.py --results docs/results/FILE.json [--write]      the same from earlier figures

Both read every pixel of the same images, 1k to 16k of them, and have the same width, heads and layers: the ViT has
patches of one pixel, the Perceiver Fourier features. Weights are random. Bundles are exported into DIR the first time,
parity and all; the ViT takes some GB of memory at 16k. Rounds are as those of scaling.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from earlier_figures import figures_with
from scaling import (
    DOCS,
    circumstances,
    point,
    replace_block,
    shown,
    slope,
    threads_of,
    timed,
    write_results,
)
from scaling_plot import FAINT, PAPER, STYLE, panel, reference

from transom.runtime import load
from transom.runtime.bench import example_feeds, sizes_of

PAGE, PICTURE = DOCS / "performance.md", DOCS / "images" / "perceiver_scaling.svg"
MARKERS = "<!-- perceiver scaling: begin -->", "<!-- perceiver scaling: end -->"
IMAGES = {1024: (32, 32), 2048: (64, 32), 4096: (64, 64), 8192: (128, 64), 16384: (128, 128)}  # height, width
WIDTH, HEADS, LAYERS, LATENTS = 64, 2, 2, 128
CHANNELS = 3 + 258  # of a pixel that the Perceiver reads: its colours and the features of its place
ROUNDS = 5


@dataclass(frozen=True)
class Series:
    """One line of the plot; ``kind`` chooses its mark."""

    name: str
    kind: str

    def multiply_adds(self, pixels: int) -> int:
        """Count the products of one image, without softmax and norms."""
        layer = 12 * WIDTH**2  # of a token: four projections, a feed-forward of four times the width
        if self.name == "ViT":
            tokens = pixels + 1
            return LAYERS * (layer * tokens + 2 * WIDTH * tokens**2) + 3 * WIDTH * pixels
        among = LAYERS * (layer * LATENTS + 2 * WIDTH * LATENTS**2)
        reading = pixels * 2 * WIDTH * (CHANNELS + LATENTS) + 9 * WIDTH**2 * LATENTS
        return reading + among + 2 * WIDTH * LATENTS * (WIDTH + 1)


SERIES = (Series("ViT", "image"), Series("Perceiver", "latents"))


def checkpoint_of(name: str, size: tuple[int, int], folder: Path) -> Path:
    """Write a checkpoint with random weights for images of one size."""
    import torch
    import transformers

    torch.manual_seed(0)
    if name == "ViT":
        config = transformers.ViTConfig(
            image_size=list(size), patch_size=1, hidden_size=WIDTH, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, intermediate_size=4 * WIDTH,
        )  # fmt: skip
        model = transformers.ViTForImageClassification(config)
    else:
        config = transformers.PerceiverConfig(
            num_latents=LATENTS, d_latents=WIDTH, num_blocks=1, num_self_attends_per_block=LAYERS,
            num_self_attention_heads=HEADS, num_cross_attention_heads=HEADS, qk_channels=WIDTH, v_channels=WIDTH,
            self_attention_widening_factor=4, cross_attention_widening_factor=4,
        )  # fmt: skip
        model = transformers.PerceiverForImageClassificationFourier(config)
    model.eval().save_pretrained(folder)
    return folder


def bundle_of(name: str, pixels: int, work: Path) -> Path:
    """Return the bundle for a number of pixels, exported unless it exists."""
    from transom.export.pipeline import export

    bundle = work / f"{name}-{pixels}-bundle"
    if not bundle.exists():
        print(f"exporting {bundle.name} ...", flush=True)
        checkpoint = checkpoint_of(name, IMAGES[pixels], work / f"{name}-{pixels}")
        export(str(checkpoint), bundle, max_sizes={"B": 1}, image_size=IMAGES[pixels])
    return bundle


def measure(work: Path, threads: int) -> dict[str, Any]:
    """Measure both at every size: milliseconds of one image, median of the rounds and quartiles."""
    loaded = {
        (one.name, pixels): load(bundle_of(one.name, pixels, work), threads=threads)
        for one in SERIES
        for pixels in IMAGES
    }
    calls = {}
    for key, bundle in loaded.items():
        (file,) = bundle.manifest.graphs
        feeds = example_feeds(file.graph, sizes_of(file.graph, bundle.manifest.axes, {"B": 1}))
        calls[key] = partial(bundle.run, feeds)
    ms = timed(calls, ROUNDS)
    for bundle in loaded.values():
        bundle.close()
    figures = {
        one.name: [point(pixels, pixels, ms[one.name, pixels], one.multiply_adds(pixels)) for pixels in IMAGES]
        for one in SERIES
    }
    return {**circumstances(threads, ROUNDS), "width": WIDTH, "layers": LAYERS, "latents": LATENTS, "ms": figures}


def table(results: Mapping[str, Any]) -> str:
    """Return the text between the markers of docs/performance.md."""
    lines = [
        f"Milliseconds of one image, FP32, on {threads_of(dict(results))} of an {results['cpu']}; onnxruntime "
        f"{results['onnxruntime']}, {results['date']},",
        f"medians of {results['rounds']} rounds. Width {results['width']}, {results['layers']} layers, "
        f"{results['latents']} latents.",
        "",
        f"| pixels | {' | '.join(str(pixels) for pixels in IMAGES)} | slope, all | slope, 4k to 16k |",
        f"|---|{'---|' * (len(IMAGES) + 2)}",
    ]
    for name, points in results["ms"].items():
        cells = " | ".join(shown(each["ms"]) for each in points)
        lines.append(f"| {name} | {cells} | {slope(points):.2f} | {slope(points[-3:]):.2f} |")
    ratios = [theirs["ms"] / ours["ms"] for theirs, ours in zip(*results["ms"].values(), strict=True)]
    lines.append(f"| ViT / Perceiver | {' | '.join(f'{ratio:.1f}' for ratio in ratios)} | | |")
    return "\n".join(lines)


def draw(results: Mapping[str, Any], series: Sequence[Series], path: Path) -> None:
    """Write the SVG: both lines, and what O(M) and O(M²) would be."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(6.4, 4.4), layout="constrained", facecolor=PAPER)
        panel(axes, series, results["ms"])
        first = min(results["ms"].values(), key=lambda points: float(points[0]["ms"]))[0]
        reference(axes, first["size"], first["ms"] * 0.7, across=(min(IMAGES), max(IMAGES)), per=1)
        axes.set_xlabel("pixels of the image, each of which is read")
        axes.set_ylabel("one image, milliseconds")
        axes.set_title(
            f"FP32, threads: {results['threads']}, {results['cpu']}, onnxruntime {results['onnxruntime']}, "
            f"{results['date']}",
            loc="right", fontsize=8.5, color=FAINT,
        )  # fmt: skip
        figure.savefig(path, metadata={"Date": None, "Creator": None}, facecolor=PAPER)
        pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--work", type=Path, help="a folder for checkpoints and bundles")
    source.add_argument("--results", type=figures_with("ms"), help="a file of figures of an earlier run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="renew docs/performance.md, its picture, its figures")
    options = parser.parse_args()
    if options.results:
        results = options.results
    else:
        options.work.mkdir(parents=True, exist_ok=True)
        results = measure(options.work, options.threads)
    if options.write:
        write_results(results, "perceiver-scaling", PICTURE)
        draw(results, SERIES, PICTURE)
        replace_block(PAGE, MARKERS, table(results))
    print(table(results))


if __name__ == "__main__":
    main()
