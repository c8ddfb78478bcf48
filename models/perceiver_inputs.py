"""The rows that a Perceiver's latents read: of bytes, and of pixels in three ways.

Shape letters as in perceiver.py; h, w rows and columns of the grid whose M = h * w points are read, K bands.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.models.patches import Size
from transom.models.perceiver_config import (
    BANDS,
    CONV_CHANNELS,
    CONV_RESOLUTION,
    LEARNED_CHANNELS,
    PIXELS_RESOLUTION,
    PerceiverConfig,
    conv_grid,
)

BATCH_NORM_EPS = 1e-5


class Inputs(nn.Module):
    """Base of the preprocessors: an input becomes rows (B, M, C)."""

    def constants(self) -> dict[str, Tensor]:
        """Return the tensors that no input changes, in the order in which ``forward`` takes them behind its input."""
        return {}


class TextInputs(Inputs):
    """Bytes plus learned positions: (B, S) -> (B, S, d_model)."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.d_model)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.d_model)

    def forward(self, input_ids: Tensor) -> Tensor:
        x: Tensor = self.embeddings(input_ids)
        return x + self.position_embeddings.weight[: input_ids.shape[1]]


class PositionEmbeddings(nn.Module):
    """A learned vector for each place: of pixels, or of what a decoder asks for."""

    def __init__(self, places: int, width: int) -> None:
        super().__init__()
        self.position_embeddings = nn.Parameter(torch.zeros(places, width))


class LearnedInputs(Inputs):
    """Pixels by a 1x1 convolution, beside learned positions that a linear layer projects: (B, M, 512)."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        self.convnet_1x1 = nn.Conv2d(3, LEARNED_CHANNELS, kernel_size=1)
        self.position_embeddings = PositionEmbeddings(config.image_size[0] * config.image_size[1], LEARNED_CHANNELS)
        self.positions_projection = nn.Linear(LEARNED_CHANNELS, LEARNED_CHANNELS)

    def constants(self) -> dict[str, Tensor]:
        """Return the projected positions (1, M, 256)."""
        return {"positions": self.positions_projection(self.position_embeddings.position_embeddings)[None]}

    def forward(self, pixel_values: Tensor, positions: Tensor) -> Tensor:
        return beside(flattened(self.convnet_1x1(pixel_values)), positions)


class FourierInputs(Inputs):
    """Red, green and blue as they are, beside Fourier features of their place: (B, M, 3 + 258)."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        self.grid = config.image_size

    def constants(self) -> dict[str, Tensor]:
        return features_of_sides(self.grid, PIXELS_RESOLUTION)

    def forward(self, pixel_values: Tensor, down: Tensor, across: Tensor) -> Tensor:
        return beside(flattened(pixel_values), fourier_features(down, across))


class BatchNorm(nn.Module):
    """The weights of a batch normalisation and what it has counted."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias, self.running_mean, self.running_var = (
            nn.Parameter(torch.zeros(channels)) for _ in range(4)
        )


class ConvNet(nn.Module):
    """A convolution without a bias and the normalisation behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, CONV_CHANNELS, kernel_size=7, stride=2, padding=3, bias=False)
        self.batchnorm = BatchNorm(CONV_CHANNELS)

    def folded(self) -> dict[str, Tensor]:
        """Return weight and bias of the one convolution that both are."""
        norm = self.batchnorm
        scale = norm.weight / torch.sqrt(norm.running_var + BATCH_NORM_EPS)
        weight = self.conv.weight * scale[:, None, None, None]
        return {"conv_weight": weight, "conv_bias": norm.bias - norm.running_mean * scale}


class ConvInputs(Inputs):
    """A convolution that halves the image, ReLU and a pooling that halves it again, beside Fourier features."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        self.convnet = ConvNet()
        self.grid = conv_grid(config.image_size)

    def constants(self) -> dict[str, Tensor]:
        return {**self.convnet.folded(), **features_of_sides(self.grid, CONV_RESOLUTION)}

    def forward(self, pixel_values: Tensor, weight: Tensor, bias: Tensor, down: Tensor, across: Tensor) -> Tensor:
        x = F.relu(F.conv2d(pixel_values, weight, bias, stride=2, padding=3))
        return beside(flattened(F.max_pool2d(x, kernel_size=3, stride=2)), fourier_features(down, across))


INPUTS: dict[str, Callable[[PerceiverConfig], Inputs]] = {
    "text": TextInputs,
    "learned": LearnedInputs,
    "fourier": FourierInputs,
    "conv": ConvInputs,
}


def flattened(x: Tensor) -> Tensor:
    """Make rows of pixels: (B, C, h, w) -> (B, M, C)."""
    return x.flatten(2).transpose(1, 2)


def beside(x: Tensor, positions: Tensor) -> Tensor:
    """Put positions (1, M, P) beside rows (B, M, C): (B, M, C + P)."""
    return torch.cat((x, positions.expand(x.shape[0], -1, -1)), dim=-1)


def features_of_sides(grid: Size, resolution: int) -> dict[str, Tensor]:
    """Return the features of each row ``down`` (h, 1, 1 + 2K) and column ``across`` (1, w, 1 + 2K) of the grid.

    They are the place in -1..1, then sines and cosines of pi times the place times frequencies from 1 to half the
    resolution: Perceiver, section 3.2. Those of a point are these of its row and of its column, so the graph
    need not hold them for every point.
    """
    frequencies = torch.linspace(1.0, resolution / 2, BANDS)
    places = [torch.linspace(-1.0, 1.0, side)[:, None] for side in grid]
    waves = [math.pi * (place * frequencies) for place in places]
    down, across = (
        torch.cat((place, wave.sin(), wave.cos()), dim=1) for place, wave in zip(places, waves, strict=True)
    )
    return {"down": down[:, None], "across": across[None]}


def fourier_features(down: Tensor, across: Tensor) -> Tensor:
    """Combine the features of rows and columns in transformers' order: (1, M, 2 + 4K)."""
    h, w, channels = down.shape[0], across.shape[1], down.shape[2]
    sides = (down.expand(h, w, channels), across.expand(h, w, channels))
    kinds = ((0, 1), (1, 1 + BANDS), (1 + BANDS, 1 + 2 * BANDS))  # places, sines, cosines
    grid = torch.cat([side[..., first:last] for first, last in kinds for side in sides], dim=-1)
    return grid.view(1, h * w, 2 * channels)


def resized(stored: Tensor, old: Size, new: Size) -> Tensor:
    """Resize learned positions (M, C) from the grid ``old`` to ``new``.

    Bicubic without aligned corners, as transformers' ``interpolate_pos_encoding`` does. Returned as they are where
    the grids are equal, or where ``stored`` is not of the grid ``old``: the shape is reported where weights are loaded.
    """
    if old == new or stored.ndim != 2 or len(stored) != old[0] * old[1]:
        return stored
    points = stored.reshape(1, *old, -1).permute(0, 3, 1, 2)  # (1, C, h, w)
    points = F.interpolate(points.float(), size=new, mode="bicubic", align_corners=False)
    return points.flatten(2)[0].T
