"""Check the images of one call to a model that writes about them, and turn them into pixels batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transom.runtime.errors import InputError
from transom.runtime.image_preprocess import ImagePreprocess
from transom.runtime.tasks.prompts import Prompts

Pixels = NDArray[np.float32]


class ImagePromptReader:
    """Reads images for a model of ``shape`` (channels, height, width); without preprocessing, pixel values alone."""

    def __init__(self, shape: tuple[int, ...], preprocess: ImagePreprocess | None) -> None:
        self.shape, self._preprocess = shape, preprocess

    def preprocess(self) -> ImagePreprocess:
        """Return the preprocessing of images into pixels; InputError where the bundle has none."""
        if self._preprocess is None:
            raise InputError("this bundle's channels are not red, green, blue; give pixel_values instead of images.")
        return self._preprocess

    def read(self, images: Any) -> Prompts:
        """Check what was given: one image or a list of them, or of pixel values, which get ids for an answer.

        An image is opened when its batch comes.
        """
        single = not isinstance(images, list | tuple)
        batch = [images] if single else list(images)
        if not batch:
            raise InputError("the list of images is empty; give at least one.")
        kinds = {is_pixels(image) for image in batch}
        if len(kinds) == 2:
            raise InputError("images holds both images and pixel_values; give one kind in one call.")
        if kinds == {True}:
            for place, pixels in enumerate(batch):
                self.check(pixels, f"image {place}")
        else:
            self.preprocess()
        return Prompts(single, kinds == {False}, batch, [1] * len(batch))

    def rows(self, prompts: Prompts, places: Sequence[int]) -> list[Pixels]:
        """Return the pixels of the images at these places: float32 (C, H, W) each."""
        batch = [prompts.given[place] for place in places]
        if not prompts.text:
            return batch
        names = f"image {{}} of {len(prompts.given)}"
        return list(self.preprocess()(batch, lambda index: names.format(places[index])))

    def check(self, pixels: Pixels, name: str) -> None:
        """Raise InputError unless these are finite pixel values of the model's shape."""
        if pixels.shape != self.shape:
            raise InputError(
                f"{name} has pixel_values {pixels.shape}; expected (channels, height, width) {self.shape}. "
                "Give images, or what preprocess() returns of each."
            )
        if not np.isfinite(pixels).all():
            raise InputError(f"{name} has pixel_values that are NaN or infinite; expected finite numbers.")


def is_pixels(image: Any) -> bool:
    """Return whether ``image`` is an array of pixel values, and not an image: those are of uint8."""
    return isinstance(image, np.ndarray) and image.dtype == np.float32


def stacked(rows: Sequence[Pixels]) -> Pixels:
    """Return the pixels of a batch as one array (R, C, H, W)."""
    return np.ascontiguousarray(np.stack(rows))
