"""The grid of patches of an image model, and positions that are learned on one grid and used on another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transom.runtime.errors import CheckpointError

Size = tuple[int, int]  # (height, width) in pixels, or (rows, columns) of patches


def grid(image_size: Size, patch_size: Size) -> Size:
    """Return the rows and columns of patches."""
    return image_size[0] // patch_size[0], image_size[1] // patch_size[1]


def resized_positions(stored: Tensor, old: Size, new: Size) -> Tensor:
    """Resize learned positions (1 + P, E), the class token's first, from grid ``old`` to ``new``: ViT, section 3.2.

    Bicubic without aligned corners, the class position untouched, as transformers' ``interpolate_pos_encoding``
    does. Returned as they are where the grids are equal, or where ``stored`` is not of the grid ``old``: load_weights
    reports the shape.
    """
    if len(stored) != old[0] * old[1] + 1:
        return stored
    return torch.cat((stored[:1], resized_map(stored[1:], old, new)))


def resized_map(stored: Tensor, old: Size, new: Size) -> Tensor:
    """Resize learned positions (P, E) from grid ``old`` to ``new``, bicubic without aligned corners.

    Returned as they are where the grids are equal, or where ``stored`` is not of the grid ``old``.
    """
    if old == new or len(stored) != old[0] * old[1]:
        return stored
    patches = stored.reshape(1, *old, -1).permute(0, 3, 1, 2)  # (1, E, rows, columns)
    patches = F.interpolate(patches.float(), size=new, mode="bicubic", align_corners=False)
    return patches.permute(0, 2, 3, 1).flatten(0, 2)


def size_pair(config_json: Mapping[str, Any], name: str, default: int) -> Size:
    """Parse a size that transformers writes as one integer, as [height, width], or as null for the default."""
    value: Any = default if config_json.get(name) is None else config_json[name]
    sides = (value, value) if type(value) is int else value
    valid = isinstance(sides, list | tuple) and len(sides) == 2
    if not valid or not all(type(side) is int and 1 <= side <= 16_384 for side in sides):
        raise CheckpointError(f"config.json: {name} is {value!r}, expected one or two integers in 1..16384.")
    return sides[0], sides[1]


def require_patch(patch_size: Size, sizes: Mapping[str, Size]) -> None:
    """Raise CheckpointError for an image size, by its name, that holds no whole patch."""
    for name, size in sizes.items():
        if size[0] < patch_size[0] or size[1] < patch_size[1]:
            raise CheckpointError(f"{name} {size} is smaller than one patch {patch_size}; ask for a larger one.")
