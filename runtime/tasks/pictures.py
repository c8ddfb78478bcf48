"""A loaded bundle that sees images: how they become pixels, and rows of an output in batches that it allows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from transom.runtime.errors import InputError
from transom.runtime.preprocess import ImagePreprocess
from transom.runtime.session import LoadedBundle

if TYPE_CHECKING:
    from transom.runtime.images import ImageSource

Floats = NDArray[np.float32]


class ImageBundle(LoadedBundle):
    """What families with a graph from ``pixel_values`` to one row per image share.

    Images are paths, bytes, PIL images or uint8 arrays (height, width, 3).
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        words = self.manifest.preprocess
        self._preprocess = None if words is None else ImagePreprocess.from_json(words)

    def image_rows(self, images: Sequence[ImageSource], output: str) -> Floats:
        """An output for all images, one row each."""
        if self._preprocess is None:
            raise InputError("this bundle's channels are not red, green, blue; call run() with pixel_values instead.")
        if not images:
            raise InputError("the list of images is empty; give at least one.")
        size = self.max_size("B")
        parts = [
            self.run({"pixel_values": self._preprocess(images[start : start + size])}, [output])[output]
            for start in range(0, len(images), size)
        ]
        return np.concatenate(parts)
