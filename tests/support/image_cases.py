"""Photographs and settings that the tests of images share."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import sklearn.datasets
from hypothesis import HealthCheck, settings
from PIL.Image import Image
from transformers.image_utils import load_image

from transom.runtime.image_preprocess import ImagePreprocess

PHOTOS = Path(sklearn.datasets.__file__).parent / "images"  # china.jpg and flower.jpg, 640x427
FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def small_photo() -> Image:
    """151x101 pixels: small and odd on both sides."""
    with PIL.Image.open(PHOTOS / "china.jpg") as image:
        return image.resize((151, 101))


def their_pixels(processor: Any, image: Path | Image) -> np.ndarray:
    """transformers: load_image, then the processor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's about palettes with transparency
        loaded = load_image(image if isinstance(image, Image) else str(image))
    return np.asarray(processor(loaded, return_tensors="np")["pixel_values"])


def settings_of(**changes: Any) -> ImagePreprocess:
    plain = ImagePreprocess(None, "bilinear", None, None, None, None, 3, 4, 4)
    return replace(plain, **changes)
