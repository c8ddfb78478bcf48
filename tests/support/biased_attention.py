"""Attention with a bias per head, laid out as Swin's in a graph: windows are rows; of a shifted layer, heads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from tiny_graphs import graph_of, normal
from transom.export.passes.half_precision import convert_precision

SHIFTED = -100.0  # what transformers' Swin adds where a shifted window holds two parts of the image


def shift_mask(windows: int, side: int, hidden: float = SHIFTED) -> NDArray[np.float32]:
    """The mask of windows of ``side`` by ``side``, ``windows`` by ``windows`` of them, after a shift by half a window.

    (windows^2, N, N): a pixel sees those of its own part of the image (Liu et al. 2021, figure 4).
    """
    size, shift = windows * side, side // 2
    part = np.repeat([0, 1, 2], [size - side, side - shift, shift])  # of a row; the last two share a window
    image = (3 * part[:, None] + part).reshape(windows, side, windows, side).transpose(0, 2, 1, 3)
    pixels = image.reshape(windows * windows, side * side)
    return np.where(pixels[:, :, None] == pixels[:, None, :], np.float32(0), np.float32(hidden))


def mask_of(heads: int, side: int, windows: int = 0, hidden: float = SHIFTED) -> NDArray[np.float32]:
    """The bias of each head and, of ``windows`` by ``windows``, the shift's mask: (1, windows^2 * heads, N, N)."""
    tokens = side * side
    bias = normal(1, heads, tokens, tokens, seed=7)
    if not windows:
        return bias
    return (bias + shift_mask(windows, side, hidden)[:, None]).reshape(1, windows * windows * heads, tokens, tokens)


def biased_graph(mask: NDArray[np.float32], size: int, precision: str = "fp32") -> ir.Model:
    """One attention under a constant ``mask``, on q, k and v in FP32, (B, heads, N, size), with a batch of any size.

    Each is projected by a sum, so that a builder has something to fuse the attention with.
    """
    _, heads, tokens, _ = mask.shape
    shape = f"float[B, {heads}, {tokens}, {size}]"
    model = graph_of(
        f"model ({shape} q, {shape} k, {shape} v) => ({shape} y) {{\n"
        f"    d = Add (q, q)\n    a = Attention <scale = {size**-0.5}> (d, k, v, m)\n    y = Add (a, a)\n}}",
        {"m": mask},
    )
    (node,) = (node for node in model.graph if node.op_type == "Attention")
    node.name = "attention"
    if precision != "fp32":
        convert_precision(model, precision)
    return model


def save_swin(folder: Path) -> Path:
    """Write a Swin of random weights: stages of two by two windows of 49 pixels and of one, shifted and not."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.SwinConfig(
        image_size=28, patch_size=2, embed_dim=32, depths=[2, 1], num_heads=[2, 4], window_size=7, num_labels=3
    )
    model = transformers.SwinForImageClassification(config)
    for name, weight in model.named_parameters():
        if "relative_position_bias_table" in name:
            torch.nn.init.normal_(weight)  # it begins near zero
    model.save_pretrained(folder)
    return folder
