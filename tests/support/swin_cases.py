"""What the tests of Swin and Swin v2 share: tiny sizes that nothing divides, pixels, edited checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from transom.export.checkpoint import LoadedCheckpoint

# 9 x 13 patches, the last of a row halved; windows of 4 padded to 12 x 16, then 5 x 7 tokens, padded to 8 x 8
SWIN: dict[str, Any] = {
    "image_size": [18, 25],
    "patch_size": 2,
    "embed_dim": 48,
    "depths": [2, 2],
    "num_heads": [3, 3],
    "window_size": 4,
    "mlp_ratio": 2.7,
}
SAMPLES = 12  # for calibration; at least 8 are asked for


def write_pixels(folder: Path, size: tuple[int, int] = (18, 25)) -> Path:
    """Write calibration samples whose neighbouring pixels are alike, as those of photographs are."""
    pixels = np.random.default_rng(0).standard_normal((SAMPLES, 3, *size)).cumsum(3) / 2
    path = folder / "pixels.npz"
    np.savez(path, pixel_values=pixels.astype(np.float32))
    return path


def worst_error(loaded: LoadedCheckpoint, theirs: Any, rows: int = 2, **options: Any) -> float:
    """Return the largest error of any output against transformers', over the largest value."""
    torch.manual_seed(rows)
    pixels = torch.randn(rows, *loaded.graphs[0].inputs[0].shape[1:])
    with torch.no_grad():
        found, expected = loaded.module(pixels), theirs(pixel_values=pixels, **options)
    errors = []
    for tensor, ours in zip(loaded.graphs[0].outputs, found, strict=True):
        if tensor.name in expected:
            assert ours.shape == expected[tensor.name].shape
            errors.append(float((ours - expected[tensor.name]).abs().max() / expected[tensor.name].abs().max()))
    assert errors
    return max(errors)
