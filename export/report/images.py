"""Embed images in the page as data URIs, and turn a model's pixel values back into images."""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from transom.runtime.image_preprocess import ImagePreprocess

SMALL = 64  # pixels of the longer side: up to here an image is stored exactly and shown with sharp pixels


def data_uri(image: Image.Image) -> str:
    """Return the image as a data URI: PNG where it is small, else JPEG."""
    file = io.BytesIO()
    small = is_small(image)
    image.save(file, "PNG" if small else "JPEG", **({} if small else {"quality": 85}))
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"


def is_small(image: Image.Image) -> bool:
    return max(image.size) <= SMALL


def image_from_pixels(pixel_values: NDArray[np.float32], preprocess: ImagePreprocess) -> Image.Image:
    """Return ``pixel_values`` (C, height, width) as an image, with normalisation and rescaling undone."""
    values = pixel_values.astype(np.float64)
    if preprocess.mean is not None and preprocess.std is not None:
        mean, std = (np.array(each)[:, None, None] for each in (preprocess.mean, preprocess.std))
        values = values * std + mean
    if preprocess.rescale:
        values = values / preprocess.rescale
    pixels = np.clip(np.nan_to_num(np.round(values)), 0, 255).astype(np.uint8).transpose(1, 2, 0)
    return Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0]).convert("RGB")


def thumbnail(image: Image.Image, side: int) -> Image.Image:
    """Return a copy of the image with no side longer than ``side`` pixels."""
    small = image.copy()
    small.thumbnail((side, side))
    return small
