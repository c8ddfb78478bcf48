"""Base class of bundles that read images: preprocess them, and run them in batches that the bundle allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from transom.runtime.errors import InputError
from transom.runtime.finite import check_finite
from transom.runtime.image_preprocess import ImagePreprocess
from transom.runtime.session import LoadedBundle
from transom.runtime.tasks.batches import BatchRows, batches, collected, name_of_row

if TYPE_CHECKING:
    from transom.runtime.image_loading import ImageSource

Floats = NDArray[np.float32]


class ImageBundle(LoadedBundle):
    """A loaded bundle with a graph from ``pixel_values`` to one row per image.

    Images are paths, bytes, PIL images or uint8 arrays (height, width, 3).
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        stored = self.manifest.preprocess
        self._preprocess = None if stored is None else ImagePreprocess.from_json(stored)

    def image_rows(
        self, images: Sequence[ImageSource], output: str, part: Callable[[Floats], Floats] | None = None
    ) -> Floats:
        """Compute an output of all images, (N, ...) in their order, as ``image_batches`` does."""
        return collected(self.image_batches(images, output, part), len(images))

    def image_batches(
        self, images: Sequence[ImageSource], output: str, part: Callable[[Floats], Floats] | None = None
    ) -> Iterator[BatchRows]:
        """Compute an output with one row per image, batch by batch; ``part`` selects the part of a batch that is used.

        An image is opened when its batch comes. Raises InputError for one that cannot be used, and NotFiniteError.
        """
        preprocess = self.preprocess()
        if not images:
            raise InputError("the list of images is empty; give at least one.")
        for places in batches([1] * len(images), self.max_size("B")):
            name = partial(name_of_row, places, f"image {{}} of {len(images)}".format)
            pixels = preprocess([images[place] for place in places], name)
            rows = self.run({"pixel_values": pixels}, [output])[output]
            rows = rows if part is None else part(rows)
            check_finite(rows, output, name)
            yield places, rows

    def preprocess(self) -> ImagePreprocess:
        """Return the preprocessing of images into pixels; InputError where the bundle has none."""
        if self._preprocess is None:
            raise InputError("this bundle's channels are not red, green, blue; call run() with pixel_values instead.")
        return self._preprocess
