"""Draw docs/images/attention_as_convolution.svg: the heads of an attention that computes a 3 x 3 convolution.

    python benchmarks/attention_as_convolution.py --out docs/images/attention_as_convolution.svg

Left the taps of a random kernel; in the middle the attention maps, as the softmax gives them, of the nine heads that
``attention_from_convolution`` makes of it, for one pixel; right the largest difference from ``conv2d`` over the
sharpness alpha (Cordonnier et al. 2020, Lemma 2). The same versions give the same bytes.
"""

from __future__ import annotations

import argparse
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from scaling_plot import COLOURS, FAINT, PAPER, STYLE
from torch import nn

from transom.models.convolution_attention import SHARPNESS, QuadraticAttention, attention_from_convolution

SIDE, PIXEL = 7, (0, 4)  # of the image in the maps, and the pixel whose heads are shown: at the border
CHANNELS, BATCH = 3, 4  # of the images that are compared
LEAST, MOST, POINTS = -1, 11, 49  # of log2 alpha


def draw(path: Path) -> None:
    """Write the SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    torch.manual_seed(0)
    kernel = nn.Conv2d(1, 1, 3, padding=1).requires_grad_(False)
    attention = attention_from_convolution(kernel)
    with pyplot.rc_context(STYLE):
        figure = pyplot.figure(figsize=(10.4, 3.9), layout="constrained", facecolor=PAPER)
        left, middle, right = figure.subfigures(1, 3, width_ratios=(2.5, 3.4, 3.6))
        taps(left, kernel.weight[0, 0])
        maps(middle, attention)
        limit(right)
        figure.savefig(path, metadata={"Date": None, "Creator": None}, facecolor=PAPER)
        pyplot.close(figure)


def taps(figure: Any, kernel: torch.Tensor) -> None:
    """Draw the taps with their values."""
    axes = figure.subplots()
    most = float(kernel.abs().max())
    axes.imshow(kernel.numpy(), cmap="PuOr", vmin=-1.4 * most, vmax=1.4 * most)
    for row in range(3):
        for column in range(3):
            axes.text(column, row, f"{float(kernel[row, column]):+.2f}", ha="center", va="center", fontsize=10)
    axes.set_xticks(range(3), (-1, 0, 1))
    axes.set_yticks(range(3), (-1, 0, 1))
    axes.tick_params(length=0)
    axes.set_title("the taps of the kernel, in W_out", fontsize=9.5)


def maps(figure: Any, attention: QuadraticAttention) -> None:
    """Draw the attention of every head at PIXEL, over the image and its border of zeros."""
    with torch.no_grad():
        weights = torch.softmax(attention.position_scores(SIDE, SIDE), -1)[0]  # (9, N, T)
    from matplotlib.patches import Rectangle

    orange, outline = COLOURS["GPT-2 124M, prompt"], {"fill": False, "linewidth": 1.2}
    query = PIXEL[0] * SIDE + PIXEL[1]
    for axes, head in zip(figure.subplots(3, 3).flat, weights[:, query], strict=True):
        axes.imshow(head.view(SIDE + 2, SIDE + 2).numpy(), cmap="Blues", vmin=0, vmax=1)
        axes.add_patch(Rectangle((0.5, 0.5), SIDE, SIDE, edgecolor=FAINT, **outline))  # the rest is padding
        axes.add_patch(Rectangle((PIXEL[1] + 0.5, PIXEL[0] + 0.5), 1, 1, edgecolor=orange, **outline))
        axes.set_axis_off()
    figure.suptitle("attention of its nine heads at the orange pixel", fontsize=9.5)


def limit(figure: Any) -> None:
    """Draw the largest difference between the attention and conv2d, in FP32, as alpha grows."""
    convolution = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1).requires_grad_(False)
    x = torch.randn(BATCH, CHANNELS, SIDE, SIDE)
    exact = deepcopy(convolution).double()(x.double())
    alphas = torch.logspace(LEAST, MOST, POINTS, base=2).tolist()
    with torch.no_grad():
        errors = [float((attention_from_convolution(convolution, a)(x) - exact).abs().max()) for a in alphas]
    axes = figure.subplots()
    axes.loglog(alphas, errors, color=COLOURS["ViT-B/16"], linewidth=1.8, label="attention")
    axes.axhline(float((convolution(x) - exact).abs().max()), color=FAINT, linestyle=(0, (4, 3)), label="conv2d, FP32")
    axes.axvline(SHARPNESS, color=FAINT, linewidth=0.9, linestyle=(0, (1, 2)))
    axes.set_xlabel("sharpness alpha; dotted: the one that is used")
    axes.set_title("largest difference from the convolution in float64", fontsize=9.5)
    axes.grid(color="#e4e8ec", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the SVG to write")
    draw(parser.parse_args().out)


if __name__ == "__main__":
    main()
