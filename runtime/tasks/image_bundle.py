"""A loaded bundle that sees images: how they become pixels, and rows of an output in batches that it allows."""

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
from transom.runtime.tasks.batches import Rows, batches, collected, name_of_row

if TYPE_CHECKING:
    from transom.runtime.image_loading import ImageSource

Floats = NDArray[np.float32]


class ImageBundle(LoadedBundle):
    """What families with a graph from ``pixel_values`` to one row per image share.

    Images are paths, bytes, PIL images or uint8 arrays (height, width, 3).
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        words = self.manifest.preprocess
        self._preprocess = None if words is None else ImagePreprocess.from_json(words)

    def image_rows(
        self, images: Sequence[ImageSource], output: str, part: Callable[[Floats], Floats] | None = None
    ) -> Floats:
        """An output for all images, (N, ...) in their order; as ``image_batches``."""
        return collected(self.image_batches(images, output, part), len(images))

    def image_batches(
        self, images: Sequence[ImageSource], output: str, part: Callable[[Floats], Floats] | None = None
    ) -> Iterator[Rows]:
        """Compute an output with one row per image, batch by batch; ``part`` takes from a batch what is read of it.

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
        """What turns images into pixels; InputError where the bundle has nothing that does."""
        if self._preprocess is None:
            raise InputError("this bundle's channels are not red, green, blue; call run() with pixel_values instead.")
        return self._preprocess
