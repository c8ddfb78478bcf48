"""Images inside the page: data URIs, and what a model sees turned back into pixels."""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from transom.runtime.image_preprocess import ImagePreprocess

FEW = 64  # pixels of a side: what is smaller is kept exactly, and drawn in squares


def data_uri(image: Image.Image) -> str:
    """The image in the page itself: PNG where it is small, else JPEG."""
    file = io.BytesIO()
    small = max(image.size) <= FEW
    image.save(file, "PNG" if small else "JPEG", **({} if small else {"quality": 85}))
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"


def pixels_class(image: Image.Image) -> str:
    """The class that keeps the squares of a small image sharp."""
    return ' class="pixels"' if max(image.size) <= FEW else ""


def seen(pixel_values: NDArray[np.float32], preprocess: ImagePreprocess) -> Image.Image:
    """``pixel_values`` (C, height, width) as an image again: normalising and rescaling undone."""
    values = pixel_values.astype(np.float64)
    if preprocess.mean is not None and preprocess.std is not None:
        mean, std = (np.array(each)[:, None, None] for each in (preprocess.mean, preprocess.std))
        values = values * std + mean
    if preprocess.rescale:
        values = values / preprocess.rescale
    pixels = np.clip(np.nan_to_num(np.round(values)), 0, 255).astype(np.uint8).transpose(1, 2, 0)
    return Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0]).convert("RGB")


def reduced(image: Image.Image, side: int) -> Image.Image:
    """The image with no side longer than ``side`` pixels."""
    small = image.copy()
    small.thumbnail((side, side))
    return small
